"""quantize(): its results, the conformance cases by name, and every error."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from quantkit import (
    FORMATS,
    BackendUnavailableError,
    QuantizedTensor,
    compute_metrics,
    nvfp4_optimal,
    quantize,
    resolve_backend,
    verify,
)
from quantkit.calibration import GramAccumulator, block_hessians, gram_matrix, hessians_from_activations
from tests.inputs import BLOCK_METHODS
from tests.oracle import nearest_code, values_of

CODES = ["uint8", "int8", "float8_e4m3fn", "float8_e5m2"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight(rows: int = 6, columns: int = 64, std: float = 0.02) -> Tensor:
    return torch.randn(rows, columns, generator=generator()) * std


def run(
    w: Tensor, format: str, block_size: int, method: str, backend: str, device: str, **options: object
) -> QuantizedTensor:
    if method == "hessian" and not {"gram", "hessian", "activations"} & options.keys():
        options["activations"] = torch.randn(96, w.shape[-1], generator=generator(1)).to(device)
    return quantize(w.to(device), format, block_size, method, backend=backend, **options)  # type: ignore[arg-type]


every = pytest.mark.parametrize(
    ("format", "block_size", "method"),
    [(f, b, m) for f in FORMATS for b in FORMATS[f].block_sizes for m in BLOCK_METHODS],
)


@every
def test_shapes_dtypes_and_codes(format: str, block_size: int, method: str, backend: str, device: str) -> None:
    columns = 2 * block_size
    w = weight(columns=columns).reshape(2, 3, columns)
    q = run(w, format, block_size, method, backend, device, count_candidates=True)
    assert q.codes.shape == (2, 3, block_size) and q.codes.dtype == torch.uint8
    assert q.scales.shape == (2, 3, 2) and q.scales.dtype == torch.uint8
    assert q.global_scale.shape == () and q.global_scale.dtype == torch.float32
    assert q.shape == w.shape and q.bits_per_weight == 4 + 8 / block_size
    assert q.candidates is not None and q.candidates.shape == q.scales.shape and int(q.candidates.min()) >= 1
    # Codes: nearest, ties to even, of w / S in float32, with the sign of the weight.
    s = q.scale_values().cpu().repeat_interleave(block_size, -1)
    magnitudes = values_of(FORMATS[format].element)
    code = nearest_code((w.abs() / s).double().numpy(), magnitudes)
    expected = np.where(np.signbit(w.numpy()), -magnitudes[code], magnitudes[code])
    assert np.array_equal(q.values().cpu().numpy(), expected)
    assert torch.equal(q.dequantize().cpu(), torch.tensor(expected).float() * s)


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_low_precision_weights_equal_their_float32_copy(
    format: str, block_size: int, method: str, dtype: torch.dtype, backend: str, device: str
) -> None:
    w = weight(columns=2 * block_size).to(dtype)
    got = run(w, format, block_size, method, backend, device)
    want = run(w.float(), format, block_size, method, backend, device)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert torch.equal(got.global_scale, want.global_scale)


def test_case_bf16_global_scale_is_computed_in_float32(backend: str, device: str) -> None:
    w = weight(rows=4).bfloat16()
    q = run(w, "nvfp4", 16, "naive", backend, device)
    assert float(q.global_scale) == float(w.float().abs().max() / (6 * 448))


@every
def test_case_zero_block_and_zero_tensor(format: str, block_size: int, method: str, backend: str, device: str) -> None:
    w = weight(columns=2 * block_size)
    w[1] = 0
    w[2, :block_size] = -0.0
    q = run(w, format, block_size, method, backend, device)
    smallest = FORMATS[format].scale.min_code
    assert q.scales[1].eq(smallest).all() and q.codes[1].eq(0).all()
    assert int(q.scales[2, 0]) == smallest and q.codes[2, : block_size // 2].eq(0x88).all()
    zero = run(torch.zeros(3, 2 * block_size), format, block_size, method, backend, device)
    assert zero.scales.eq(smallest).all() and zero.codes.eq(0).all() and zero.dequantize().eq(0).all()


@every
def test_case_minus_zero_and_what_rounds_to_it(
    format: str, block_size: int, method: str, backend: str, device: str
) -> None:
    w = torch.ones(1, block_size)
    w[0, 1], w[0, 2], w[0, 3] = -0.0, -1e-9, 1e-9
    codes = run(w, format, block_size, method, backend, device).codes[0, :2].tolist()
    assert codes[0] >> 4 == 8 and codes[1] == 0x08


def test_case_subnormal_round_down_saturates(backend: str, device: str) -> None:
    """amax/6 = 1.4·2⁻⁹ rounds down to 2⁻⁹, y ≈ 8.4 saturates to 6 and never reaches code 8."""
    w = torch.full((1, 16), 1.4 * 6 * 2.0**-9)
    q = run(w, "nvfp4", 16, "naive", backend, device, global_scale="none")
    assert int(q.scales) == 1 and q.codes.eq(0x77).all()


def test_the_default_is_the_least_squared_error(backend: str, device: str) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    q, sse = quantize(w, backend=backend), quantize(w, "nvfp4", 16, "sse", backend=backend)
    assert q.method == "sse" and torch.equal(q.codes, sse.codes) and torch.equal(q.scales, sse.scales)


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_case_scale_never_rounds_to_zero(method: str, backend: str, device: str) -> None:
    """amax/6 below 2⁻¹⁰: the scale is the smallest positive one and the block is searched."""
    w = torch.full((1, 16), 0.005)
    q = run(w, "nvfp4", 16, method, backend, device, global_scale="none")
    assert int(q.scales) >= 1
    if method == "naive":
        assert int(q.scales) == 1
    else:
        assert (q.dequantize().cpu() - w).abs().max() < 0.0002  # 5·2⁻⁹·0.5 = .00488


def test_case_amax_beyond_448_times_6(backend: str, device: str) -> None:
    w = torch.zeros(2, 16)
    w[0, 0], w[1, 0] = 448 * 6, 448 * 60
    q = run(w, "nvfp4", 16, "naive", backend, device, global_scale="none")
    assert q.scales.flatten().tolist() == [126, 126] and q.dequantize()[:, 0].tolist() == [2688, 2688]


@pytest.mark.parametrize(
    ("rule", "amax", "exponent"),
    [
        ("floor", 7.9, 0), ("floor", 4.0, 0), ("floor", 3.99, -1),
        ("ceil", 4.0, 0), ("ceil", 4.01, 1), ("ceil", 8.0, 1),
        ("even", 6.9, 0), ("even", 7.0, 1), ("even", 4.0, 0),
        ("rceil", 6.0, 0), ("rceil", 6.01, 1), ("rceil", 3.0, -1), ("rceil", 12.0, 1),
        ("floor", 2.0**-140, -127), ("floor", 3e38, 125), ("rceil", 3e38, 126), ("ceil", 3e38, 126),
    ],
)  # fmt: skip
def test_mx_scale_rules(rule: str, amax: float, exponent: int, backend: str, device: str) -> None:
    w = torch.zeros(1, 32)
    w[0, 5] = -amax
    q = run(w, "mxfp4", 32, "naive", backend, device, scale_rule=rule)
    assert int(q.scales) - 127 == exponent


def test_case_mxfp4_optimum_is_one_step_below_ocp(backend: str, device: str) -> None:
    w = torch.full((1, 32), 0.25)
    w[0, 0] = 4
    naive = run(w, "mxfp4", 32, "naive", backend, device)
    best = run(w, "mxfp4", 32, "sse", backend, device)
    assert int(best.scales) == int(naive.scales) - 1


def test_ties_go_to_the_smaller_scale(backend: str, device: str) -> None:
    """One nonzero weight of 1 is exact at 2⁰, 2⁻¹ and 2⁻² alike."""
    w = torch.zeros(1, 16)
    w[0, 3] = 1
    for method in ("sse", "hessian"):
        assert (
            int(
                run(
                    w,
                    "mxfp4",
                    16,
                    method,
                    backend,
                    device,
                    **({"hessian": torch.eye(16, device=device)[None]} if method == "hessian" else {}),
                ).scales
            )
            == 127 - 2
        )


@every
def test_case_one_block_and_non_contiguous_input(
    format: str, block_size: int, method: str, backend: str, device: str
) -> None:
    one = run(weight(3, block_size), format, block_size, method, backend, device)
    assert one.scales.shape == (3, 1)
    w = weight(2 * block_size, 3 * block_size)
    for view in (w.T, w[::2, block_size:], w.reshape(4, -1, 3 * block_size).transpose(0, 1)):
        got = run(view, format, block_size, method, backend, device)
        want = run(view.contiguous(), format, block_size, method, backend, device)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)


@every
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 32)])
def test_case_empty_tensor(
    format: str, block_size: int, method: str, shape: tuple[int, ...], backend: str, device: str
) -> None:
    q = run(torch.zeros(shape), format, block_size, method, backend, device)
    assert q.shape == shape and q.dequantize().shape == shape


@every
def test_case_nan_and_inf_are_counted_and_located(
    format: str, block_size: int, method: str, backend: str, device: str
) -> None:
    w = weight(columns=2 * block_size)
    w[2, 7], w[4, 1] = torch.nan, -torch.inf
    with pytest.raises(ValueError, match=r"weight holds 2 NaN or Inf values, the first at index \(2, 7\)"):
        run(w, format, block_size, method, backend, device)


@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_float64_beyond_float32_is_no_inf_to_work_with(method: str, backend: str, device: str) -> None:
    w = 1e40 * weight().double()
    given = {"hessian": torch.eye(16).repeat(4, 1, 1).to(device)} if method == "hessian" else {}
    with pytest.raises(ValueError, match=r"weight holds \d\.\d+e\+38, beyond float32, .* scale it down"):
        run(w, "nvfp4", 16, method, backend, device, **given)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("method", BLOCK_METHODS)
def test_without_the_check_a_bad_value_harms_no_other_block(
    format: str, method: str, backend: str, device: str
) -> None:
    """NaN, Inf and -Inf, each in a block of its own."""
    w = weight(columns=32)
    given = {"hessian": torch.eye(16).repeat(2, 1, 1).to(device)} if method == "hessian" else {}
    want = run(w, format, 16, method, backend, device, global_scale="none", **given)
    w[1, 7], w[2, 0], w[4, 30] = torch.nan, torch.inf, -torch.inf
    got = run(w, format, 16, method, backend, device, global_scale="none", check_finite=False, **given)
    others = torch.ones(want.scales.shape, dtype=torch.bool)
    others[1, 0] = others[2, 0] = others[4, 1] = False
    assert torch.equal(got.scales.cpu()[others], want.scales.cpu()[others])
    codes, expected = (q.codes.cpu().unflatten(-1, (-1, 8))[others] for q in (got, want))
    assert torch.equal(codes, expected)


@pytest.mark.parametrize("given", ["global_scale", "activations", "gram", "hessian"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_nothing_keeps_a_graph(format: str, given: str, backend: str, device: str) -> None:
    """For parameters, such as layer.weight, and for outputs of layers."""
    w = torch.nn.Parameter(weight())
    x = torch.randn(200, 64, generator=generator(2))
    values = {
        "activations": x,
        "gram": x.T @ x,
        "hessian": block_hessians(x.T @ x, 16),
        "global_scale": torch.tensor(1e-4),
    }
    if given == "global_scale" and format == "mxfp4":
        pytest.skip("it has none")
    option = {given: values[given].to(device).requires_grad_()}
    method = "sse" if given == "global_scale" else "hessian"
    q = run(w, format, 16, method, backend, device, **option)
    assert not any(t.requires_grad for t in (q.codes, q.scales, q.global_scale, q.dequantize()))
    hessian = values["hessian"].clone().requires_grad_() if method == "hessian" else None
    scaled = replace(q.to("cpu"), global_scale=q.global_scale.cpu().requires_grad_())
    assert verify(scaled, w, hessian).wrong_codes == 0
    assert not block_hessians((x.T @ x).requires_grad_(), 16).requires_grad


@every
def test_quantizing_twice_changes_nothing(format: str, block_size: int, method: str, backend: str, device: str) -> None:
    once = run(weight(columns=2 * block_size), format, block_size, method, backend, device).dequantize()
    if method == "naive":
        return  # the naive scale of a block whose largest code is not 6 is another one
    twice = run(
        once, format, block_size, method, backend, device, **({"global_scale": "none"} if format == "nvfp4" else {})
    )
    again = run(
        twice.dequantize(),
        format,
        block_size,
        method,
        backend,
        device,
        **({"global_scale": "none"} if format == "nvfp4" else {}),
    )
    torch.testing.assert_close(again.dequantize(), twice.dequantize(), rtol=0, atol=0)


def test_activations_gram_and_hessian_are_three_ways_to_say_one_thing(backend: str, device: str) -> None:
    w, x = weight(), torch.randn(200, 64, generator=generator(2))
    g = x.T @ x
    h = torch.stack([g[i : i + 16, i : i + 16] for i in range(0, 64, 16)])
    results = [
        run(w, "nvfp4", 16, "hessian", backend, device, **{name: value.to(device)})
        for name, value in (("activations", x), ("gram", g), ("hessian", h))
    ]
    assert all(torch.equal(r.scales, results[0].scales) for r in results)


def test_methods_are_ordered_as_their_objectives_say(backend: str, device: str) -> None:
    from quantkit.metrics import output_error, weight_error

    w, x = weight(64), torch.randn(300, 64, generator=generator(3)) * torch.logspace(-1, 1, 64)
    done = {
        m: run(w, "nvfp4", 16, m, backend, device, **({"activations": x.to(device)} if m == "hessian" else {}))
        .dequantize()
        .cpu()
        for m in BLOCK_METHODS
    }
    errors = {m: weight_error(w, q) for m, q in done.items()}
    assert errors["sse"] < errors["naive"] and errors["sse"] < errors["hessian"]
    assert output_error(x, w, done["hessian"]) < output_error(x, w, done["naive"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fp4"}, "unknown format 'fp4'; known formats: nvfp4, mxfp4"),
        ({"method": "best"}, "unknown method 'best'; known methods: naive, sse, hessian"),
        ({"backend": "cuda"}, "unknown backend 'cuda'; known backends: auto, reference, triton"),
        ({"block_size": 64}, "nvfp4 has no block size 64; it offers 16, 32"),
        ({"block_size": 16.0}, r"nvfp4 has no block size 16\.0; it offers 16, 32"),
        ({"method": "hessian", "activations": torch.ones(0, 64)}, r"activations \[0, 64\] have no token"),
        ({"scale_rule": "floor"}, "nvfp4 has no scale rule 'floor'; it offers nearest"),
        ({"format": "mxfp4", "global_scale": "amax"}, "mxfp4 has no global scale"),
        ({"global_scale": "max"}, "unknown global_scale 'max'"),
        ({"global_scale": 0.0}, "positive number"),
        ({"global_scale": float("nan")}, "positive number"),
        ({"activations": torch.ones(4, 64)}, "method 'sse' does not use activations"),
        ({"method": "hessian"}, "exactly one of activations, gram and hessian; got none"),
        ({"method": "hessian", "gram": torch.eye(64), "activations": torch.ones(4, 64)}, "got activations and gram"),
        ({"method": "hessian", "activations": torch.ones(4, 32)}, "activations have 32 features, the layer has 64"),
        ({"method": "hessian", "activations": torch.full((4, 64), torch.nan)}, "activations holds 256 NaN"),
        ({"method": "hessian", "activations": torch.ones(4, 64).int()}, "integers and 8-bit floats are codes"),
        ({"method": "hessian", "activations": torch.full((4, 64), 1e30)}, "squares exceed float32; scale them down"),
        ({"method": "hessian", "gram": torch.full((64, 64), torch.nan)}, "gram, in its diagonal blocks, holds 1024"),
        ({"method": "hessian", "hessian": torch.ones(4, 16, 16).bool()}, "hessian must be dense float.* got bool"),
        ({"method": "hessian", "gram": torch.eye(64).to(torch.float8_e4m3fn)}, "got float8_e4m3fn; integers and"),
        ({"method": "hessian", "activations": torch.eye(64).to_sparse()}, r"sparse_coo; convert with .*to_dense"),
        ({"format": ["nvfp4"]}, r"unknown format \['nvfp4'\]; known"),
        ({"method": ["sse"]}, r"unknown method \['sse'\]; known"),
        ({"global_scale": [1.0]}, r"unknown global_scale \[1\.0\]; use"),
        ({"global_scale": torch.tensor(-0.1)}, r"positive number .*, got tensor\(-0\.1000\)"),
        ({"global_scale": torch.tensor(torch.nan)}, "positive number"),
        ({"method": "hessian", "gram": torch.eye(32)}, r"gram has shape \[32, 32\]"),
        ({"method": "hessian", "hessian": torch.eye(16)[None]}, r"hessian has shape \[1, 16, 16\].*\[4, 16, 16\]"),
        ({"method": "hessian", "hessian": -torch.eye(16).expand(4, 16, 16)}, "block 0 is not positive semi-definite"),
    ],
)  # fmt: skip
def test_errors_name_the_value_and_the_remedy(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight(), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (-torch.eye(16), "block 0 is not positive semi-definite"),
        (torch.full((16, 16), torch.nan), r"hessian holds 1024 NaN or Inf values, the first at index \(0, 0, 0\)"),
    ],
)
def test_hessians_that_are_none(hessian: Tensor, message: str, backend: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(weight(), "nvfp4", 16, "hessian", backend, device, hessian=hessian.expand(4, 16, 16).to(device))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(2, 65), "K = 65, is not divisible by block size 16"),
        (torch.ones(2, 64).int(), "weight must be dense float16, .* or float64, got int32; integers and 8-bit"),
        (torch.ones(2, 64).to(torch.float8_e4m3fn), "got float8_e4m3fn; .* dequantize them with the tool that made"),
        (torch.ones(2, 64, dtype=torch.complex64), r"got complex64; pass weight\.real"),
        (torch.empty(2, 64, device="meta"), "got float32 on meta; a tensor on the meta device has no values"),
        (torch.eye(64).to_sparse(), r"got float32, torch\.sparse_coo; .*to_dense"),
        (torch.tensor(1.0), "at least one dimension"),
    ],
)
def test_weights_that_cannot_be_quantized(bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(bad)


@pytest.mark.parametrize("dtype", CODES)
def test_codes_are_not_taken_for_values(dtype: str) -> None:
    """Anywhere; and the advice is not to convert them."""
    codes = torch.ones(32, 32, dtype=torch.uint8, device="cpu").view(getattr(torch, dtype))
    values = torch.ones(32, 32, dtype=torch.float32, device="cpu")
    q = quantize(values)
    for name, call in {
        "weight": [
            lambda: quantize(codes),
            lambda: nvfp4_optimal(codes),
            lambda: verify(q, codes),
            lambda: compute_metrics(codes, values),
        ],
        "quantized": [lambda: compute_metrics(values, codes)],
        "activations": [
            lambda: quantize(values, method="hessian", activations=codes),
            lambda: GramAccumulator(32).update(codes),
            lambda: gram_matrix(codes),
            lambda: hessians_from_activations(codes, 16),
            lambda: compute_metrics(values, values, codes),
        ],
        "gram": [lambda: quantize(values, method="hessian", gram=codes)],
    }.items():
        for taken in call:
            with pytest.raises(ValueError, match=f"{name} must be dense .* codes, which are no values") as error:
                taken()
            assert ".float()" not in str(error.value)


def test_activations_are_taken_as_a_hook_gives_them(backend: str, device: str) -> None:
    """``[batch, tokens, K]``, by all that take activations."""
    w = weight(rows=4)[:, :16].contiguous()
    tokens = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")
    flat = tokens.view(6, 16)
    got = run(w, "nvfp4", 16, "hessian", backend, device, activations=tokens.to(device))
    want = run(w, "nvfp4", 16, "hessian", backend, device, activations=flat.to(device))
    assert torch.equal(got.scales, want.scales) and torch.equal(got.codes, want.codes)
    one, other = GramAccumulator(16), GramAccumulator(16)
    one.update(tokens)
    other.update(flat)
    assert one.tokens == 6 and torch.equal(one.gram, other.gram)
    assert torch.equal(gram_matrix(tokens), gram_matrix(flat))
    assert torch.equal(hessians_from_activations(tokens, 16), hessians_from_activations(flat, 16))
    assert compute_metrics(w, w / 2, tokens) == compute_metrics(w, w / 2, flat)
    with pytest.raises(ValueError, match=r"activations must be \[tokens, in_features\], or .*, got float32 \[16\]"):
        quantize(w, method="hessian", activations=tokens[0, 0])


def test_an_accumulator_that_saw_nothing_says_so() -> None:
    accumulator = GramAccumulator(64)
    accumulator.update(torch.ones(0, 64, dtype=torch.float32, device="cpu"))
    for used in (lambda: accumulator.gram, lambda: accumulator.hessians(16)):
        with pytest.raises(ValueError, match=r"the accumulator has seen no token: call update\(activations\)"):
            used()


def test_a_weight_is_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"got Linear; pass layer\.weight"):
        quantize(torch.nn.Linear(32, 32))  # type: ignore[arg-type]


def test_triton_on_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET=1"):
        quantize(weight(), backend="triton")
    assert resolve_backend("auto", "cpu") == "reference"


def test_import_is_light() -> None:
    """No Triton, Hydra, transformers, datasets, W&B or pandas, and little beyond torch itself."""
    code = (
        "import torch, sys, time; start = time.perf_counter(); import quantkit; "
        "heavy = {'triton', 'hydra', 'transformers', 'datasets', 'wandb', 'pandas', 'safetensors'} & set(sys.modules); "
        "torch_itself = {'triton'} & heavy; print(sorted(heavy - torch_itself)); print(time.perf_counter() - start)"
    )
    heavy, seconds = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert heavy == "[]" and float(seconds) < 1


def test_the_number_of_threads_changes_nothing() -> None:
    weight = torch.randn(40, 16384, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            results.append(quantize(weight, "nvfp4", 16, "sse", backend="reference", count_candidates=True))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    one, three = results
    assert torch.equal(one.scales, three.scales) and torch.equal(one.codes, three.codes)
    assert one.candidates is not None and three.candidates is not None
    assert torch.equal(one.candidates, three.candidates)


@pytest.mark.parametrize("rows", [1, 3, 700])
def test_a_hessian_scale_does_not_depend_on_the_rows_beside_it(rows: int) -> None:
    """One block in many rows: a matrix product may round the last rows differently, which must not change ties."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(1, 64, generator=generator)
    hessian = torch.eye(16).repeat(4, 1, 1) * torch.rand(4, 1, 1, generator=generator)
    alone = quantize(block, "mxfp4", 16, "hessian", hessian=hessian, backend="reference")
    many = quantize(block.repeat(rows, 1), "mxfp4", 16, "hessian", hessian=hessian, backend="reference")
    assert torch.equal(many.scales, alone.scales.expand(rows, -1))


def test_global_scale_as_a_tensor_is_taken_as_it_is(backend: str, device: str) -> None:
    w = weight(rows=8).to(device)
    shared = torch.tensor(0.0005, device=device)
    got = quantize(w, "nvfp4", 16, "sse", backend=backend, global_scale=shared)
    want = quantize(w, "nvfp4", 16, "sse", backend=backend, global_scale=0.0005)
    assert torch.equal(got.global_scale, shared)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)


@pytest.mark.parametrize(
    ("format", "scale", "message"),
    [
        ("mxfp4", torch.tensor(1.0), "has no global scale"),
        ("nvfp4", torch.tensor([1.0, 2.0]), "one float32"),
        ("nvfp4", torch.tensor(1.0, dtype=torch.float64), "float64"),
    ],
)
def test_global_scale_tensor_that_does_not_fit(format: str, scale: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(weight(rows=2), format, 16, global_scale=scale)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("activations", np.ones((4, 64)), r"activations must be a torch.Tensor, got ndarray; .*from_numpy\(array\)"),
        ("activations", GramAccumulator(64), "activations .* got GramAccumulator; pass gram=accumulator.gram in its"),
        ("activations", [torch.ones(4, 64)], "got list"),
        ("gram", GramAccumulator(64), "gram .* got GramAccumulator; pass gram=accumulator.gram"),
    ],
)
def test_what_is_no_tensor(name: str, value: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        quantize(weight(), method="hessian", **{name: value})  # type: ignore[arg-type]
