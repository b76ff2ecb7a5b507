"""The two forms of the output error agree with each other and with the formula."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit import quantize
from quantkit.metrics import compute_metrics, output_error, output_error_from_gram, weight_error


def sample() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(24, 32, generator=g)
    return w, w + 0.05 * torch.randn(24, 32, generator=g), torch.randn(100, 32, generator=g)


def test_definitions() -> None:
    w, q, x = (t.double() for t in sample())
    want_weight = float((q - w).norm() / w.norm())
    want_output = float((x @ q.T - x @ w.T).norm() / (x @ w.T).norm())
    assert weight_error(w, q) == pytest.approx(want_weight, rel=1e-12)
    assert output_error(x, w, q) == pytest.approx(want_output, rel=1e-12)
    assert output_error(x.split(17), w, q) == pytest.approx(want_output, rel=1e-12)
    assert output_error_from_gram(w, q, x.T @ x) == pytest.approx(want_output, rel=1e-10)
    w, q, x = sample()
    assert output_error_from_gram(w, q, x.T @ x) == pytest.approx(want_output, rel=1e-4)
    assert compute_metrics(w, q) == {"weight_error": pytest.approx(want_weight, rel=1e-6)}
    assert compute_metrics(w, q, x)["output_error"] == pytest.approx(want_output, rel=1e-4)


def test_zero_and_bf16_weights() -> None:
    w = torch.zeros(2, 16)
    assert weight_error(w, w) == 0
    assert math.isnan(weight_error(w, w + 1))
    b = torch.randn(4, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert weight_error(b, b.float() * 1.01) == pytest.approx(0.01, rel=1e-5)


def test_leading_dimensions_are_rows() -> None:
    w, q, x = sample()
    w3, q3 = w.view(2, 12, 32), q.view(2, 12, 32)
    assert compute_metrics(w3, q3, x) == compute_metrics(w, q, x)
    assert output_error_from_gram(w3, q3, x.T @ x) == output_error_from_gram(w, q, x.T @ x)
    assert weight_error(torch.zeros(3, 0), torch.zeros(3, 0)) == 0


def test_metrics_of_what_has_a_graph_make_none() -> None:
    w, q, x = sample()
    want, gram = compute_metrics(w, q, x), x.T @ x
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail("kept for a graph"), lambda t: t):
        assert compute_metrics(w.requires_grad_(), q.requires_grad_(), x.requires_grad_()) == want
        assert output_error_from_gram(w, q, gram.requires_grad_()) > 0


def test_no_token_is_no_perfect_score() -> None:
    w, q, x = sample()
    batches = (batch for batch in x.split(17))
    assert output_error(batches, w, q) > 0
    for none in (batches, [], x[:0]):
        with pytest.raises(ValueError, match="activations hold no token"):
            output_error(none, w, q)


def test_errors() -> None:
    w, q, x = sample()
    with pytest.raises(TypeError, match=r"quantized must be a torch\.Tensor, got QuantizedTensor; pass its \.dequant"):
        compute_metrics(w, quantize(w))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in shape"):
        weight_error(w, q[1:])
    with pytest.raises(ValueError, match="do not fit a weight with 32 columns"):
        output_error(x[:, 1:], w, q)
    with pytest.raises(ValueError, match="gram of shape"):
        output_error_from_gram(w, q, torch.eye(16))


def test_nan_is_no_perfect_score() -> None:
    weight = torch.ones(2, 16)
    quantized = weight.clone()
    quantized[1, 3] = math.nan
    gram = torch.eye(16)
    assert math.isnan(weight_error(weight, quantized))
    assert math.isnan(output_error(torch.ones(3, 16), weight, quantized))
    assert math.isnan(output_error_from_gram(weight, quantized, gram))
