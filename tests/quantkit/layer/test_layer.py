"""gptq and descent: the recursion against its definition, optimality on tiny layers, monotony, reproducibility."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch

from quantkit import E2M1, E4M3, FORMATS, BlockFormat, QuantizedTensor, quantize
from quantkit.calibration import gram_matrix
from quantkit.closest_vector import least_error, lower_factor
from quantkit.layer import common, descent, gptq
from quantkit.layer.common import LayerOptions, LayerTask, Pass
from quantkit.reference.amax import global_scale_of

FOURS = BlockFormat("fours", E2M1, E4M3, block_sizes=(4,), scale_rules=("nearest",), two_level=False)
LAYER = ("gptq", "descent")


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, correlated activations), float32."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    mix = torch.eye(columns) + 0.6 * torch.randn(columns, columns, generator=generator) / columns**0.5
    spread = torch.exp(0.7 * torch.randn(columns, generator=generator))
    return weight, torch.randn(tokens, columns, generator=generator) @ mix * spread


def error(q: QuantizedTensor, weight: torch.Tensor, gram: torch.Tensor) -> float:
    d = (weight - q.dequantize()).double()
    return float(((d @ gram.double()) * d).sum())


def task(weight: torch.Tensor, gram: torch.Tensor, backend: str = "reference", **options: object) -> LayerTask:
    fmt = FORMATS["nvfp4"]
    scale = global_scale_of(weight, fmt)
    return LayerTask(weight, gram, fmt, 16, scale, "nearest", backend, LayerOptions(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", [16, 32])
def test_each_step_lowers_the_output_error(format: str, block_size: int) -> None:
    """hessian ≥ joint, block by block; gptq below both; descent below gptq. For every named format."""
    weight, x = layer(24, 96)
    gram = gram_matrix(x)
    found = [
        error(quantize(weight, format, block_size, m, gram=gram), weight, gram) for m in ("hessian", "joint", *LAYER)
    ]
    assert found[0] >= found[1] > found[2] > found[3], found


def test_joint_is_nowhere_above_hessian() -> None:
    weight, x = layer(40, 64, seed=3)
    gram = gram_matrix(x)
    by_block = []
    for method in ("hessian", "joint"):
        d = (weight - quantize(weight, method=method, gram=gram).dequantize()).double().unflatten(1, (4, 16))
        h = common.diagonal_blocks(gram.double(), 16)
        by_block.append(torch.einsum("rni,nij,rnj->rn", d, h, d))
    assert (by_block[1] <= by_block[0] * (1 + 1e-6)).all()
    assert (by_block[1] < by_block[0] * 0.99).any()


@pytest.mark.parametrize("order", common.ORDERS)
def test_gptq_solves_each_block_under_the_schur_complement(order: str) -> None:
    """The recursion against its definition: target and metric from the inverse of the Hessian's remaining part."""
    weight, x = layer(6, 64, seed=1)
    gram = gram_matrix(x)
    state = gptq.run(task(weight, gram, order=order))
    columns = torch.arange(64) if state.columns is None else state.columns
    hessian = common.damped(gram, 0.01).double()[columns][:, columns]
    w, d = weight[:, columns].double(), state.error.double()
    for start in range(0, 64, 16):
        before, rest, here = slice(0, start), slice(start, 64), slice(start, start + 16)
        # With blocks before fixed and those after free, the least error of the rest, as a function of this block.
        inverse = torch.linalg.inv(hessian[rest, rest])
        metric = torch.linalg.inv(inverse[:16, :16])
        shift = d[:, before] @ hessian[before, rest] @ inverse
        target = w[:, here] + shift[:, :16]
        q = quantize(
            target.float(),
            "nvfp4",
            method="joint",
            hessian=metric.unsqueeze(0),
            global_scale=state.task.global_scale,
        )
        torch.testing.assert_close(w[:, here] - d[:, here], q.dequantize().double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", LAYER)
@pytest.mark.parametrize(
    "options", [{"scale": s} for s in ("naive", "sse", "hessian", "joint")] + [{"order": "natural"}]
)
def test_every_option_beats_its_own_scales_without_feedback(method: str, options: dict[str, str]) -> None:
    weight, x = layer(16, 96, seed=2)
    gram = gram_matrix(x)
    scale = options.get("scale", "joint")
    alone = quantize(weight, method=scale, **({"gram": gram} if scale in ("hessian", "joint") else {}))
    assert error(quantize(weight, method=method, gram=gram, **options), weight, gram) < error(alone, weight, gram)


def test_the_objective_of_descent_never_rises_and_is_recorded() -> None:
    weight, x = layer(16, 96, seed=4)
    gram = gram_matrix(x)
    q = quantize(weight, method="descent", gram=gram, sweeps=5)
    history = q.objective
    assert history is not None and len(history) == 6
    assert all(after <= before for before, after in itertools.pairwise(history))
    assert history[-1] == pytest.approx(error(q, weight, common.damped(gram, 0.01)), rel=1e-5)


def test_descent_raises_should_the_objective_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(4, 32)
    rising = iter([1.0, 2.0])
    monkeypatch.setattr(descent, "objective_of", lambda *_: next(rising))
    with pytest.raises(RuntimeError, match="objective rose from 1 to 2"):
        descent.solve(task(weight, gram_matrix(x)))


@pytest.mark.parametrize("method", LAYER)
def test_two_runs_give_the_same_bytes(method: str) -> None:
    weight, x = layer(32, 288, seed=5)  # more columns than a panel has
    options = {"sweeps": 1} if method == "descent" else {}
    first, second = (quantize(weight, method=method, activations=x, **options) for _ in range(2))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)


def test_panels_change_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(16, 96, seed=6)
    gram = gram_matrix(x)
    whole = quantize(weight, method="gptq", gram=gram)
    monkeypatch.setattr(common, "PANEL_COLUMNS", 32)
    parts = quantize(weight, method="gptq", gram=gram)
    same = (whole.codes == parts.codes).float().mean()
    assert same > 0.99
    assert error(parts, weight, gram) == pytest.approx(error(whole, weight, gram), rel=2e-3)


@pytest.mark.parametrize("tokens", [1, 20, 60])
@pytest.mark.parametrize("method", LAYER)
def test_too_few_tokens_warn_with_numbers_and_never_do_worse_than_hessian(tokens: int, method: str) -> None:
    weight, x = layer(16, 96, seed=7, tokens=tokens)
    gram = gram_matrix(x)
    with pytest.warns(UserWarning, match=r"determines \d+ of 96 channels.*more than 96 tokens"):
        q = quantize(weight, method=method, gram=gram)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian = quantize(weight, method="hessian", gram=gram)
    assert error(q, weight, gram) <= error(hessian, weight, gram) * (1 + 1e-6)


def test_many_tokens_and_dead_channels_warn_of_nothing() -> None:
    weight, x = layer(8, 96, seed=8, tokens=2000)
    x[:, 5] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q = quantize(weight, method="gptq", activations=x)
    assert q.dequantize().isfinite().all()


def test_where_hessian_is_better_its_result_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = layer(8, 64, seed=9, tokens=20)
    gram = gram_matrix(x)
    state = Pass(task(weight, gram))  # nothing solved yet: all codes are zero, far worse than hessian
    state.error = weight[:, state.columns].clone()
    with pytest.warns(UserWarning, match="determines 20 of 64"):
        found = gptq.finish(state, None, 20)
    expected = quantize(weight, method="hessian", gram=gram)
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("size", [1, 2, 33, 600])
def test_reversing_in_place_and_taking_columns_copy_what_they_say(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float32)
    columns = torch.randperm(size, generator=generator)
    assert torch.equal(gptq._reverse_(matrix.clone()), matrix.flip(0, 1))
    assert torch.equal(common.submatrix(matrix, columns, torch.float64), matrix[columns][:, columns].double())


def test_an_all_zero_gram_and_an_all_zero_weight_are_sane() -> None:
    weight, x = layer(4, 32)
    assert quantize(weight, method="gptq", gram=torch.zeros(32, 32)).dequantize().isfinite().all()
    assert not quantize(torch.zeros(4, 32), method="descent", activations=x).dequantize().any()


def test_an_ill_conditioned_gram_gives_a_sane_result() -> None:
    weight, x = layer(8, 64, seed=10, tokens=1000)
    x = x * torch.logspace(-4, 4, 64)
    gram = gram_matrix(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gptq_error, hessian_error = (
            error(quantize(weight, method=m, gram=gram), weight, gram) for m in ("gptq", "hessian")
        )
    assert gptq_error <= hessian_error


def test_an_indefinite_gram_is_refused() -> None:
    gram = torch.eye(32)
    gram[0, 0] = -5
    with pytest.raises(ValueError, match="not positive semi-definite"):
        quantize(torch.randn(4, 32), method="gptq", gram=gram)


def test_float32_suffices_for_the_factor() -> None:
    """The factor that a GPU takes, in float32, and that of float64 give errors within 1e-3 of each other."""
    _, x = layer(32, 160, seed=11, tokens=3000)
    gram = gram_matrix(x)
    exact = gptq.factor(gram.double(), 0.01)
    single, failed = gptq._lower(gram, 0.01, None, torch.float32)
    assert not failed
    torch.testing.assert_close(single.flip(0, 1).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize(
    ("options", "error_type", "message"),
    [
        ({"method": "sse", "damping": 0.1}, ValueError, "'sse' takes no damping; gptq and descent do"),
        ({"method": "gptq", "sweeps": 2}, ValueError, "'gptq' takes no sweeps; descent do"),
        ({"method": "gptq", "dampening": 0.1}, TypeError, "unexpected keyword argument 'dampening'"),
        ({"method": "gptq", "damping": 0}, ValueError, "damping must be above 0"),
        ({"method": "gptq", "damping": "0.1"}, ValueError, "damping must be above 0"),
        ({"method": "gptq", "scale": "best"}, ValueError, "unknown scale 'best'"),
        ({"method": "gptq", "order": "random"}, ValueError, "unknown order 'random'"),
        ({"method": "descent", "sweeps": 0}, ValueError, "sweeps must be a whole number from 1 on"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict, error_type: type, message: str) -> None:
    weight, x = layer(4, 32)
    with pytest.raises(error_type, match=message):
        quantize(weight, **options, **({} if options["method"] == "sse" else {"activations": x}))


def least_of_a_row(row: torch.Tensor, hessian: torch.Tensor, incumbent: float) -> float:
    """The true optimum of one row of two blocks of 4: all codes at all pairs of E4M3 scales."""
    scales = torch.tensor([E4M3.value(code) for code in range(1, 127)], dtype=torch.float64)
    pairs = torch.cartesian_prod(scales, scales)
    levels = torch.tensor(E2M1.magnitudes, dtype=torch.float64)
    levels = torch.cat((-levels[1:], levels))
    return least_error(row.double(), lower_factor(hessian), pairs.repeat_interleave(4, 1), levels, incumbent)


@pytest.mark.parametrize("seed", range(12, 18))
def test_tiny_layers_come_near_the_true_optimum(seed: int) -> None:
    """Two blocks of 4: every code at every pair of scales. The shares are those of the table in docs/layer.md."""
    weight, x = layer(6, 8, seed=seed, tokens=100)
    weight = weight * 50
    gram = gram_matrix(x)
    hessian = common.damped(gram, 0.01).double()
    found = {}
    for method in ("sse", "hessian", "joint", *LAYER):
        given = {} if method == "sse" else {"gram": gram}
        d = (weight - quantize(weight, FOURS, 4, method, **given).dequantize()).double()
        found[method] = ((d @ hessian) * d).sum(1)
    optimum = torch.tensor(
        [
            least_of_a_row(row, hessian, float(best) * (1 + 1e-9))
            for row, best in zip(weight, found["descent"], strict=True)
        ],
        dtype=torch.float64,
    )
    share = {method: float(value.sum() / optimum.sum()) for method, value in found.items()}
    assert (found["descent"] >= optimum * (1 - 1e-6)).all()
    assert 1 - 1e-6 <= share["descent"] <= share["gptq"] <= share["hessian"] <= share["sse"], share  # float64 rounding
    assert share["descent"] < 1.15, share
    optimal = int((found["descent"] <= optimum * (1 + 1e-6)).sum())
    line = f"| {seed - 11} | {' | '.join(f'{value:.3f}' for value in share.values())} | {optimal} of 6 |"
    assert line in (Path(__file__).parents[3] / "docs" / "layer.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("method", ["joint", *LAYER])
def test_the_kernel_agrees_with_the_reference(method: str, device: str, backend: str) -> None:
    """Two backends whose arithmetic differs may end in different local optima: the errors are compared, not bytes."""
    if backend == "reference":
        pytest.skip("the reference itself")
    weight, x = layer(3, 32, seed=13)
    gram = gram_matrix(x)
    options = {"sweeps": 1} if method == "descent" else {}
    want = quantize(weight, method=method, gram=gram, backend="reference", **options)
    got = quantize(weight.to(device), method=method, gram=gram.to(device), backend="triton", **options).to("cpu")
    assert error(got, weight, gram) == pytest.approx(error(want, weight, gram), rel=1e-3)
    assert (got.scales == want.scales).float().mean() >= 0.9


# --- descent from given codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("order", common.ORDERS)
@pytest.mark.parametrize("first", ["naive", "gptq"])
def test_descent_begins_with_given_codes(format: str, order: str, first: str) -> None:
    weight, x = layer(16, 96, seed=5)
    gram = gram_matrix(x)
    init = quantize(weight, format, method=first, **({} if first == "naive" else {"gram": gram}))
    before = init.codes.clone(), init.scales.clone()
    q = quantize(weight, format, method="descent", gram=gram, init=init, order=order, sweeps=3)
    history = q.objective
    assert history is not None and len(history) == 4
    assert history[0] == pytest.approx(error(init, weight, common.damped(gram, 0.01)), rel=1e-5)
    assert history[-1] < history[0] and torch.equal(q.global_scale, init.global_scale)
    assert history[-1] == pytest.approx(error(q, weight, common.damped(gram, 0.01)), rel=1e-5)
    assert torch.equal(init.codes, before[0]) and torch.equal(init.scales, before[1])


def test_descent_from_gptqs_result_is_descent() -> None:
    weight, x = layer(16, 96, seed=6)
    gram = gram_matrix(x)
    want = quantize(weight, method="descent", gram=gram)
    got = quantize(weight, method="descent", gram=gram, init=quantize(weight, method="gptq", gram=gram))
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)


def test_the_given_codes_keep_their_global_scale() -> None:
    weight, x = layer(16, 96, seed=7)
    gram = gram_matrix(x)
    init = quantize(weight, method="naive", global_scale=3e-5)
    q = quantize(weight, method="descent", gram=gram, init=init)
    assert float(q.global_scale) == float(init.global_scale)
    assert error(q, weight, gram) < error(init, weight, gram)


@pytest.mark.parametrize("scale", ["amax", "amax_per_expert"])
@pytest.mark.parametrize("own", [False, True])
def test_experts_begin_with_their_own_codes(scale: str, own: bool) -> None:
    weight, x = layer(16, 96, seed=8)
    gram = gram_matrix(x)
    experts = weight.view(2, 8, 96) * torch.tensor([1.0, 3.0], dtype=torch.float32, device="cpu").view(2, 1, 1)
    grams = torch.stack([gram, gram]) if own else gram
    init = quantize(experts, method="naive", global_scale=scale)
    q = quantize(experts, method="descent", gram=grams, init=init)
    assert torch.equal(q.global_scale, init.global_scale)
    for expert in range(2):
        alone = quantize(experts[expert], method="descent", gram=gram, init=init[expert])
        assert torch.equal(q[expert].codes, alone.codes) and torch.equal(q[expert].scales, alone.scales)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "gptq"}, "method 'gptq' takes no init; descent does"),
        ({"method": "sse", "gram": None}, "method 'sse' takes no init"),
        ({"format": "mxfp4"}, "init is nvfp4 with block size 16, not mxfp4 with 16"),
        ({"block_size": 32}, "init is nvfp4 with block size 16, not nvfp4 with 32"),
        ({"global_scale": "amax"}, "init has a global scale of its own, so global_scale='amax' cannot be used"),
        ({"global_scale": 0.5}, "init has a global scale of its own"),
    ],
)
def test_codes_of_something_else_are_refused(changes: dict[str, object], message: str) -> None:
    weight, x = layer(16, 96)
    given = {"method": "descent", "gram": gram_matrix(x), "init": quantize(weight, method="naive")}
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(weight, **{name: value for name, value in (given | changes).items() if value is not None})
    with pytest.raises(ValueError, match=re.escape("init is [16, 96] on cpu, the weight [8, 96] on cpu")):
        quantize(weight[:8], **given)
    with pytest.raises(TypeError, match="init must be a QuantizedTensor, got Tensor"):
        quantize(weight, **given | {"init": weight})


@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_tiny_activations_whose_gram_matrix_is_float64(method: str) -> None:
    """Their squares are below float32's range, and the Gram matrix singular."""
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(4, 32, generator=generator)
    x = 1e-30 * torch.randn(1, 32, generator=generator)
    result = quantize(weight, "nvfp4", 16, method, activations=x)
    assert bool(result.dequantize().isfinite().all())


def test_an_objective_beyond_float32_is_a_clear_error() -> None:
    weight = torch.full((1, 32), 3e38)
    weight[0, ::3] = 1.0
    x = 1000 * torch.randn(1, 32, generator=torch.Generator("cpu").manual_seed(0))
    with pytest.raises(ValueError, match="beyond float32; scale weight or activations down"):
        quantize(weight, "nvfp4", 16, "descent", activations=x)
