"""Output Gram matrices: rows make up for each other's errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from quantkit import FORMATS, quantize
from quantkit.calibration import gram_matrix
from quantkit.layer import common, gptq, rows
from quantkit.layer.common import LayerOptions, LayerTask
from quantkit.reference.amax import global_scale_of

LAYER = ("gptq", "descent")


def problem(n: int = 24, columns: int = 64, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, Gram of correlated inputs, Gram of correlated gradients), float32."""
    generator = torch.Generator().manual_seed(seed)

    def gram(size: int) -> torch.Tensor:
        mix = torch.eye(size) + 0.8 * torch.randn(size, size, generator=generator) / size**0.5
        spread = torch.exp(0.7 * torch.randn(size, generator=generator))
        return gram_matrix(torch.randn(4 * size, size, generator=generator) @ mix * spread)

    return torch.randn(n, columns, generator=generator) * 0.02, gram(columns), gram(n)


def two_sided(values: torch.Tensor, weight: torch.Tensor, gram: torch.Tensor, outputs: torch.Tensor) -> float:
    """tr(G D H Dᵀ) in float64."""
    d = (weight - values).double()
    return float(((outputs.double() @ d @ gram.double()) * d).sum())


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "nvint4"])
@pytest.mark.parametrize("method", LAYER)
@pytest.mark.parametrize("order", common.ORDERS)
def test_the_two_sided_error_is_lower_than_without(format: str, method: str, order: str) -> None:
    weight, gram, outputs = problem()
    settings: dict[str, Any] = {"method": method, "gram": gram, "order": order}
    alone = quantize(weight, format, **settings)
    together = quantize(weight, format, **settings, output_gram=outputs, rows=4, output_damping=0.01)
    before, after = (two_sided(q.dequantize(), weight, gram, outputs) for q in (alone, together))
    assert after < 0.9 * before


def test_smaller_panels_of_rows_lower_the_error() -> None:
    """One row at a time is the exact recursion. Mean over eight weights: a single one may differ by luck."""
    energies = torch.zeros(3, dtype=torch.float64)
    for seed in range(8):
        weight, gram, outputs = problem(seed=seed)
        for number, panel in enumerate((24, 6, 1)):
            q = quantize(weight, method="gptq", gram=gram, output_gram=outputs, rows=panel, output_damping=0.01)
            energies[number] += two_sided(q.dequantize(), weight, gram, outputs)
    assert energies[0] > energies[1] > energies[2]


@pytest.mark.parametrize("order", common.ORDERS)
@pytest.mark.parametrize("panel", [1, 5])
def test_each_panel_is_solved_for_its_best_target(order: str, panel: int) -> None:
    """Against the definition: with the panels before fixed and those after free, the target is the panel of least
    two-sided error. It is computed here from the inverse of the remaining part of G."""
    weight, gram, outputs = problem(n=12, seed=3)
    seen: list[torch.Tensor] = []

    def solve_layer(task: LayerTask, prepared: gptq.Prepared | None) -> common.LayerResult:
        seen.append(task.weight)
        return gptq.solve(task, prepared)

    fmt = FORMATS["nvfp4"]
    options = LayerOptions(order=order, rows=panel, output_damping=0.02)
    task = LayerTask(
        weight, gram, fmt, 16, global_scale_of(weight, fmt), "nearest", "reference", options, output_gram=outputs
    )
    found = rows.solve(solve_layer, gptq.prepare, task)
    assert found.objective is None
    visited = torch.arange(12) if order == "natural" else outputs.diagonal().argsort(descending=True)
    g = common.damped(outputs, 0.02, visited, torch.float64)
    d = (weight - common.block_values(found.codes, found.scales, task))[visited].double()
    for number, start in enumerate(range(0, 12, panel)):
        rest, here = slice(start, 12), slice(start, start + panel)
        shift = torch.linalg.inv(g[rest, rest]) @ g[rest, :start] @ d[:start]
        best = weight[visited][here].double() + shift[: len(seen[number])]
        torch.testing.assert_close(seen[number].double(), best, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", LAYER)
def test_outputs_without_correlation_change_nothing(method: str) -> None:
    """Rows are then independent, whatever their order and panels; zeros count as no correlation."""
    weight, gram, _ = problem(seed=5)
    alone = quantize(weight, method=method, gram=gram)
    for diagonal in (torch.rand(24, generator=torch.Generator().manual_seed(0)) + 0.1, torch.zeros(24)):
        q = quantize(weight, method=method, gram=gram, output_gram=diagonal.diag(), rows=5)
        assert torch.equal(q.codes, alone.codes) and torch.equal(q.scales, alone.scales)
        assert q.objective is None


def test_codes_do_not_depend_on_the_scale_of_the_output_gram_matrix() -> None:
    weight, gram, outputs = problem(seed=6)
    one, other = (quantize(weight, method="gptq", gram=gram, output_gram=outputs * c, rows=8) for c in (1, 2.0**-40))
    assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def test_counts_of_candidates_are_in_the_order_of_rows() -> None:
    """Rows without correlation are solved from the last to the first; a row of zeros has one candidate per block."""
    weight, gram, _ = problem(seed=7)
    weight[3] = 0
    ascending = torch.arange(1, 25, dtype=torch.float32).diag()
    q = quantize(weight, method="gptq", gram=gram, output_gram=ascending, rows=5, count_candidates=True)
    alone = quantize(weight, method="gptq", gram=gram, count_candidates=True)
    assert q.candidates is not None and alone.candidates is not None
    assert torch.equal(q.candidates, alone.candidates)
    assert (q.candidates.view(24, -1)[3] == 1).all() and (q.candidates > 1).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "joint"}, "method 'joint' takes no output_gram; gptq and descent do"),
        ({"output_gram": torch.eye(23)}, r"output_gram has shape \[23, 23\] and the weight \[24, 64\]"),
        ({"output_gram": torch.full((24, 24), torch.nan)}, "output_gram"),
        ({"output_gram": -torch.eye(24)}, "^output_gram is not positive semi-definite.*raise output_damping"),
        ({"rows": 0}, "rows must be a whole number from 1 on, got 0"),
        ({"output_damping": 0}, "output_damping must be above 0 and at most 1, got 0; 0.3 is usual"),
    ],
)
def test_what_cannot_be_used_is_named(given: dict[str, Any], message: str) -> None:
    weight, gram, outputs = problem()
    with pytest.raises(ValueError, match=message):
        quantize(weight, **({"method": "gptq", "gram": gram, "output_gram": outputs} | given))


def test_codes_to_begin_with_and_experts_are_refused() -> None:
    weight, gram, outputs = problem()
    begin = quantize(weight)
    with pytest.raises(ValueError, match="output_gram cannot be used with init"):
        quantize(weight, method="descent", gram=gram, output_gram=outputs, init=begin)
    with pytest.raises(ValueError, match=r"a weight \[N, K\] needs \[N, N\]"):
        quantize(weight.unsqueeze(0), method="gptq", gram=gram, output_gram=outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", LAYER)
def test_kernels_solve_the_panels_of_rows(method: str) -> None:
    weight, gram, outputs = (t.cuda() for t in problem(n=200, columns=512, seed=8))
    q, again = (quantize(weight, method=method, gram=gram, output_gram=outputs, backend="triton") for _ in range(2))
    assert torch.equal(q.codes, again.codes) and torch.equal(q.scales, again.scales)
    alone = quantize(weight, method=method, gram=gram, backend="triton")
    reference = quantize(weight, method=method, gram=gram, output_gram=outputs, backend="reference")
    energies = [two_sided(r.dequantize(), weight, gram, outputs) for r in (alone, q, reference)]
    assert energies[1] < energies[0]
    assert abs(energies[1] - energies[2]) < 0.02 * energies[2]
