"""Kernel against reference: equal scale bytes except where two scales tie within the contract, then equal codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from quantkit import FORMATS, METHODS, QuantizedTensor, quantize
from tests.inputs import BLOCK_METHODS, WITHOUT_KERNEL, all_families

CUDA = torch.cuda.is_available()


def objective(q: QuantizedTensor, weight: torch.Tensor, hessian: torch.Tensor | None) -> torch.Tensor:
    """Float64 error of every block, ``[rows, num_blocks]``."""
    r = weight.double() - q.values().double() * q.scale_values().double().repeat_interleave(q.block_size, -1)
    r = r.unflatten(-1, (-1, q.block_size))
    return r.square().sum(-1) if hessian is None else torch.einsum("rbi,bij,rbj->rb", r, hessian.double(), r)


def compare(weight: torch.Tensor, format: str, block_size: int, method: str, **options: object) -> None:
    """The results of both backends on ``weight``, on a GPU if there is one."""
    weight = weight.cuda() if CUDA else weight
    options = {k: v.cuda() if CUDA and isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = quantize(weight, format, block_size, method, backend="reference", **options)  # type: ignore[arg-type]
    got = quantize(weight, format, block_size, method, backend="triton", count_candidates=True, **options)  # type: ignore[arg-type]
    assert torch.equal(got.global_scale, want.global_scale)
    differs = got.scales != want.scales
    same = ~differs.repeat_interleave(block_size // 2, -1)
    assert torch.equal(got.codes[same], want.codes[same])
    if not METHODS[method].is_optimal:
        assert not differs.any()
        return
    hessian = options.get("hessian")
    assert hessian is None or isinstance(hessian, torch.Tensor)
    a, b = objective(got, weight.float(), hessian), objective(want, weight.float(), hessian)
    if hessian is None:
        torch.testing.assert_close(a[differs], b[differs], rtol=1e-6, atol=0)
    else:
        norm = objective(got, weight.float(), None)
        slack = 1e-6 * b + 1e-7 * torch.linalg.eigvalsh(hessian.double())[:, -1] * norm
        assert (((a - b).abs() <= slack) | ~differs).all()


def hessians(columns: int, block_size: int) -> torch.Tensor:
    x = torch.randn(256, columns, generator=torch.Generator().manual_seed(7)) * torch.logspace(-1, 1, columns)
    return torch.einsum("tbi,tbj->bij", *(x.unflatten(1, (-1, block_size)),) * 2)


def given(method: str, columns: int, block_size: int) -> dict[str, torch.Tensor]:
    return {"hessian": hessians(columns, block_size)} if METHODS[method].needs_hessian else {}


each = pytest.mark.parametrize(
    ("format", "block_size", "method"),
    [
        (f, b, m)
        for f in FORMATS
        for b in FORMATS[f].block_sizes
        for m in BLOCK_METHODS
        if METHODS[m].has_kernel and (f, m) not in WITHOUT_KERNEL
    ],
)


@each
@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree(format: str, block_size: int, method: str, rows: int, dtype: torch.dtype) -> None:
    columns = 3 * block_size
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)
    compare(weight, format, block_size, method, **given(method, columns, block_size))


@each
def test_backends_agree_on_adversarial_weights(format: str, block_size: int, method: str) -> None:
    weight = torch.tensor(all_families(block_size, np.random.default_rng(9))).reshape(-1, 2 * block_size)
    if METHODS[method].needs_hessian and not CUDA:
        weight = weight[::2]  # interpreted, the Hessian kernel pays by the block
    options = given(method, weight.shape[1], block_size)
    compare(weight, format, block_size, method, global_scale="none", **options)


@pytest.mark.parametrize("method", ["sse", "hessian"])
@pytest.mark.parametrize("block_size", [16, 32])
def test_blocks_that_even_the_largest_scale_clips(block_size: int, method: str) -> None:
    """In a tile with blocks of longer windows, whose last steps clip nothing."""
    weight = torch.randn(64, 2 * block_size, generator=torch.Generator().manual_seed(4)) * 3
    weight[::7] *= 400
    options = given(method, weight.shape[1], block_size)
    compare(weight, "nvfp4", block_size, method, global_scale="none", **options)


@pytest.mark.parametrize("rule", FORMATS["mxfp4"].scale_rules)
def test_backends_agree_on_mx_rules(rule: str) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-38, 37, 64)[:, None]
    compare(weight, "mxfp4", 32, "naive", scale_rule=rule)


@pytest.mark.parametrize("block_size", [16, 32])
def test_hessians_in_half_precision_with_amax(block_size: int) -> None:
    """They are converted before kernels that overlap on a GPU. There, this test would show an unfinished conversion."""
    device, columns = ("cuda", 9728) if CUDA else ("cpu", 64)
    weight = torch.randn(40, columns, generator=torch.Generator().manual_seed(2)).to(device)
    hessian = (hessians(columns, block_size) / 2**14).half().to(device)
    half, exact = (
        quantize(weight, "nvfp4", block_size, "hessian", hessian=h, backend="triton")
        for h in (hessian, hessian.float())
    )
    assert torch.equal(half.codes, exact.codes) and torch.equal(half.scales, exact.scales)


@pytest.mark.gpu
@each
@pytest.mark.parametrize("rows", [2560, 2561, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_agree_at_full_size(format: str, block_size: int, method: str, rows: int, dtype: torch.dtype) -> None:
    """Qwen3-4B's down_proj, 2560 × 9728, and odd row counts."""
    weight = (torch.randn(rows, 9728, generator=torch.Generator().manual_seed(rows)) * 0.02).to(dtype)
    compare(weight, format, block_size, method, **given(method, 9728, block_size))


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels with TARGET "plain", for GPUs without the PTX instructions."""
    from quantkit.kernels import launch

    monkeypatch.setattr(launch, "target_of", lambda device: "plain")
    for name in ("_pdl", "_naive", "_sse", "_hessian", "_factorize", "_amax"):
        monkeypatch.setattr(launch, name, getattr(launch, name).__wrapped__)
    assert launch._amax(False, 64, (torch.float32, True), torch.device("cuda")).constants["TARGET"] == "plain"


@pytest.mark.gpu
@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("plain")
def test_backends_agree_without_spelt_out_instructions(
    format: str, block_size: int, method: str, dtype: torch.dtype
) -> None:
    weight = torch.tensor(all_families(block_size, np.random.default_rng(9))).reshape(-1, 2 * block_size).to(dtype)
    options = given(method, weight.shape[1], block_size)
    compare(weight[weight.isfinite().all(1)], format, block_size, method, global_scale="none", **options)
    weight = (torch.randn(300, 9728, generator=torch.Generator().manual_seed(6)) * 0.02).to(dtype)
    options = given(method, 9728, block_size)
    compare(weight, format, block_size, method, **options)


@pytest.mark.gpu
@each
def test_a_kernel_started_again_gives_the_same(format: str, block_size: int, method: str) -> None:
    """Launched by Triton, by Kernel, and by Triton again, as with a profiler."""
    from triton import knobs

    weight = torch.randn(96, 9728, generator=torch.Generator().manual_seed(5)).bfloat16().cuda()
    options = {name: value.cuda() for name, value in given(method, 9728, block_size).items()}
    first, second = (quantize(weight, format, block_size, method, **options) for _ in range(2))  # type: ignore[arg-type]
    heard: list[str] = []

    def listen(launch: Any) -> None:
        heard.append(launch.get()["name"])

    knobs.runtime.launch_enter_hook.add(listen)
    try:
        third = quantize(weight, format, block_size, method, **options)  # type: ignore[arg-type]
    finally:
        knobs.runtime.launch_enter_hook.remove(listen)
    assert f"{method}_kernel" in heard
    for again in (second, third):
        assert torch.equal(again.codes, first.codes) and torch.equal(again.scales, first.scales)
        assert torch.equal(again.global_scale, first.global_scale)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", ["naive", "hessian"])
def test_the_kernels_run_on_the_weight_s_device(method: str) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    options = given(method, 64, 16)
    results = [
        quantize(weight.to(device), "nvfp4", 16, method, **{k: v.to(device) for k, v in options.items()})  # type: ignore[arg-type]
        for device in ("cuda:0", "cuda:1")
    ]
    assert results[1].codes.device == torch.device("cuda:1")
    assert torch.equal(results[0].codes.cpu(), results[1].codes.cpu())
    assert torch.equal(results[0].dequantize().cpu(), results[1].dequantize().cpu())
