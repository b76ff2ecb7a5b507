"""The global scale with headroom, and the one searched jointly with the block scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit import FORMATS, QuantizedTensor, global_scale, quantize
from tests.inputs import WITHOUT_KERNEL

GIVEN = {"naive": None, "sse": None, "hessian": "gram", "joint": "gram", "gptq": "gram", "descent": "gram"}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def gram(columns: int) -> Tensor:
    tokens = normal(4 * columns, columns, seed=1) @ (normal(columns, columns, seed=2) / columns + torch.eye(columns))
    return tokens.T @ tokens


def error_of(q: QuantizedTensor, weight: Tensor, matrix: Tensor | None) -> float:
    """Squared error; with a Gram matrix, Σ r H rᵀ with its diagonal blocks; both in float64."""
    error, size = q.dequantize().cpu().double() - weight.double(), q.block_size
    if matrix is None:
        return float(error.square().sum())
    own = [matrix[i : i + size, i : i + size].double() for i in range(0, weight.shape[1], size)]
    return sum(float(((r @ h) * r).sum()) for r, h in zip(error.split(size, 1), own, strict=True))


@pytest.fixture
def points(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The number of global scales tried: 16, and 3 where Triton interprets the kernels."""
    if backend == "triton" and device == "cpu":
        monkeypatch.setattr(global_scale, "POINTS", 3)
    return global_scale.POINTS


def octave(amax_scale: Tensor, points: int) -> list[float]:
    return [float((amax_scale.double() * 2 ** (i / points)).float()) for i in range(points)]


def test_sixteen_points_cover_an_octave() -> None:
    scales = [float(scale) for scale in global_scale.points(torch.full((2, 32), 5376.0), FORMATS["nvfp4"])]
    assert scales == octave(torch.tensor(2.0), 16)


def same(got: QuantizedTensor, want: QuantizedTensor) -> None:
    for name in ("codes", "scales", "global_scale"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize(
    ("method", "block_size", "format"),
    [
        ("naive", 16, "nvfp4"),
        ("sse", 16, "nvfp4"),
        ("sse", 32, "nvint4"),
        ("hessian", 16, "nvfp4"),
        ("joint", 32, "nvfp4"),
    ],
)
def test_the_best_is_kept(method: str, block_size: int, format: str, backend: str, device: str, points: int) -> None:
    weight = normal(4, 64, seed=6) * 0.02
    matrix = gram(64) if GIVEN[method] else None
    given = {} if matrix is None else {"gram": matrix.to(device)}

    def at(scale: str | float) -> QuantizedTensor:
        return quantize(
            weight.to(device), format, block_size, method, backend=backend, global_scale=scale, count_candidates=True,
            **given,
        )  # fmt: skip

    amax = at("amax")
    assert float(amax.global_scale) == octave(amax.global_scale, points)[0]
    each = [at(scale) for scale in octave(amax.global_scale, points)]
    errors = [error_of(q, weight, matrix) for q in each]
    found = at("search")
    best = min(range(points), key=errors.__getitem__)
    runner_up = min(error for number, error in enumerate(errors) if number != best)
    assert runner_up > errors[best] * (1 + 1e-9), "the inputs leave no doubt about the best"
    same(found, each[best])
    assert found.candidates is not None and torch.equal(found.candidates, each[best].candidates)
    assert best > 0, "amax itself would pass without a search"


@pytest.mark.usefixtures("points")
@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_layer_methods_take_the_scale_of_joint(method: str, backend: str, device: str) -> None:
    weight, matrix = normal(3, 64).to(device) * 0.02, gram(64).to(device)
    joint = quantize(weight, method="joint", gram=matrix, backend=backend, global_scale="search")
    found = quantize(weight, method=method, gram=matrix, backend=backend, global_scale="search")
    same(found, quantize(weight, method=method, gram=matrix, backend=backend, global_scale=joint.global_scale))
    assert found.global_scale == joint.global_scale


@pytest.mark.parametrize(("weight", "smallest"), [(torch.zeros(2, 32), 1.0), (torch.full((2, 32), 6.0), 6 / 2688)])
def test_the_smallest_of_equal_errors(weight: Tensor, smallest: float, backend: str, device: str) -> None:
    """A constant weight is exact at its amax, where every element is 6 and the scale 448."""
    q = quantize(weight.to(device), backend=backend, global_scale="search")
    assert float(q.global_scale) == float(torch.tensor(smallest, dtype=torch.float32))


@pytest.mark.parametrize(("format", "divisor"), [("nvfp4", 6 * 256), ("nvint4", 7 * 256)])
def test_headroom_is_exact(format: str, divisor: int, backend: str, device: str) -> None:
    method = "naive" if (format, "sse") in WITHOUT_KERNEL else "sse"
    weight = (normal(4, 64) * 0.02).to(device)
    q = quantize(weight, format, 16, method, backend=backend, global_scale="headroom")
    want = weight.abs().max().cpu() / torch.tensor(divisor, dtype=torch.float32)
    assert float(q.global_scale) == float(want)
    same(q, quantize(weight, format, 16, method, backend=backend, global_scale=want.to(device)))


def test_headroom_of_experts_is_that_of_all() -> None:
    weight, matrix = normal(2, 3, 32), torch.stack([gram(32), 2 * gram(32)])
    q = quantize(weight, method="hessian", gram=matrix, global_scale="headroom")
    assert float(q.global_scale) == float(weight.abs().max() / torch.tensor(1536, dtype=torch.float32))


def test_experts_that_share_everything_are_one_weight() -> None:
    weight = normal(2, 3, 32)
    q, flat = (quantize(w, global_scale="search") for w in (weight, weight.flatten(0, 1)))
    assert torch.equal(q.scales.flatten(0, 1), flat.scales) and torch.equal(q.global_scale, flat.global_scale)


@pytest.mark.parametrize("value", ["headroom", "search"])
@pytest.mark.parametrize("format", [name for name in FORMATS if not FORMATS[name].two_level])
def test_a_single_level_format_has_none(format: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{format} has no global scale; got global_scale='{value}', use 'none'"):
        quantize(normal(2, 32), format, global_scale=value)


def test_experts_with_their_own_statistics_are_not_searched() -> None:
    with pytest.raises(ValueError, match=r"global_scale='search' is for one weight.* one by one, or use 'amax'"):
        quantize(normal(2, 3, 32), method="hessian", gram=torch.stack([gram(32)] * 2), global_scale="search")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float, backend: str, device: str) -> None:
    weight = normal(2, 32)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="weight holds 1"):
        quantize(weight.to(device), backend=backend, global_scale="search")


def test_a_wrong_hessian_is_refused(backend: str, device: str) -> None:
    wrong = -torch.eye(16).expand(2, 16, 16)
    with pytest.raises(ValueError, match="block 0 is not positive semi-definite"):
        quantize(
            normal(2, 32).to(device), method="hessian", hessian=wrong.to(device), backend=backend, global_scale="search"
        )


def test_a_weight_without_rows() -> None:
    assert quantize(torch.empty(0, 32), global_scale="search").codes.shape == (0, 16)
