"""The kernels' parts on their own, and the kernels that no method's test reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from quantkit import E2M1, E4M3, FORMATS, quantize, verify
from quantkit.calibration import hessians_from_activations
from quantkit.formats import ElementGrid, ScaleGrid
from quantkit.kernels import launch
from quantkit.kernels.device import columns, format_constants, load_blocks, round_to_grid
from quantkit.kernels.hessian import (
    columns_to_fp16x2,
    fp16_norm,
    fp16_norm_x2,
    fp32_error,
    hessian_bounds,
    hessian_bounds_x2,
    load_fp16_factor,
)
from quantkit.reference.amax import global_scale_of
from tests.inputs import BLOCK_METHODS, SEARCHED_BY_KERNELS, all_families, correlated_tokens

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter rounds to bfloat16 otherwise than to nearest.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]


@triton.jit
def _round_kernel(y_ptr, rounded_ptr, MANTISSA: tl.constexpr, MIN_EXPONENT: tl.constexpr, BLOCK: tl.constexpr):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rounded_ptr + lane, round_to_grid(tl.load(y_ptr + lane), MANTISSA, MIN_EXPONENT))


@pytest.mark.parametrize("grid", [E2M1, E4M3], ids=lambda grid: grid.name)
def test_rounding_is_exact_around_every_value_and_tie(grid: ElementGrid | ScaleGrid) -> None:
    """±40 ulps around every grid value and tie, and random values of every binade."""
    values = grid.decode(torch.arange(grid.max_code + 1))
    centres = torch.cat([values, (values[1:] + values[:-1]) / 2]).float()
    near = (centres[1:].view(torch.int32)[:, None] + torch.arange(-40, 41)).flatten().view(torch.float32)
    random = torch.rand(20000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 2.5, 20000)
    y = torch.cat([near, random, centres]).clamp(0, grid.max_value)
    y = torch.nn.functional.pad(y, (0, -len(y) % 1024)).to(DEVICE)
    rounded = torch.empty_like(y)
    _round_kernel[(len(y) // 1024,)](
        y, rounded, MANTISSA=grid.mantissa_bits, MIN_EXPONENT=grid.min_exponent, BLOCK=1024
    )
    assert torch.equal(rounded.cpu(), nearest(y.cpu(), values.float()))


def nearest(y: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The nearest of ``values``, ties to the one of even index, in float64."""
    distance = (y.double()[:, None] - values.double()).abs()
    best = distance.amin(1, keepdim=True)
    odd = torch.arange(len(values)) % 2
    return values[torch.where(distance == best, odd, 2).argmin(1)]


@triton.jit
def _product_kernel(
    r_ptr, factor_ptr, row_norm_ptr, norm_ptr, margin_ptr, error_ptr, QBLOCK: tl.constexpr, TARGET: tl.constexpr
):
    lane = tl.arange(0, 32)
    fp16_factor = load_fp16_factor(factor_ptr, row_norm_ptr, 32, QBLOCK, False, TARGET)
    r = columns(load_blocks(r_ptr + lane * QBLOCK, lane >= 0, QBLOCK, 4, ""), QBLOCK)
    norm, margin = fp16_norm(r, fp16_factor, TARGET)
    tl.store(norm_ptr + lane, norm)
    tl.store(margin_ptr + lane, margin)
    same = columns(load_blocks(r_ptr + (lane >> 2) * QBLOCK, lane >= 0, QBLOCK, 4, ""), QBLOCK)
    tl.store(error_ptr + lane, fp32_error(same, factor_ptr, TARGET))


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7])
@pytest.mark.parametrize("block_size", [16, 32])
def test_the_half_precision_product_is_within_its_margin_and_the_full_one_exact(block_size: int, spread: float) -> None:
    """Also for elements that are subnormal in fp16, or zero."""
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(32, block_size, generator=generator) * spread ** torch.rand(32, block_size, generator=generator)
    factor = torch.randn(block_size, block_size, generator=generator).tril()
    factor *= spread ** torch.rand(block_size, block_size, generator=generator)
    norm, margin, error = torch.empty(3, 32, device=DEVICE)
    _product_kernel[(1,)](
        r.to(DEVICE),
        factor.T.contiguous().to(DEVICE),
        factor.norm(dim=1).to(DEVICE),
        norm,
        margin,
        error,
        QBLOCK=block_size,
        TARGET=launch.target_of(torch.device(DEVICE)),
        num_warps=1,
    )
    want = (r.double() @ factor.double()).square().sum(1)
    assert ((norm.cpu().double() - want.sqrt()).abs() <= margin.cpu()).all()
    assert (margin.cpu() <= 2.0**-9 * (r.abs() @ factor.norm(dim=1)) + 1e-5).all()
    torch.testing.assert_close(error.cpu().double(), want[torch.arange(32) // 4], rtol=2e-6, atol=0)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", SEARCHED_BY_KERNELS)
def test_tiles_of_a_warp_choose_the_least_error(format: str, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as on a GPU, four per program, with a partial last one. Blocks of zeros and of ties exclude no scale."""
    rng = np.random.default_rng(3)
    weight = torch.tensor(all_families(block_size, rng)).reshape(-1, 32).float()[:100].to(DEVICE)
    weight[1::2] = torch.randn(weight[1::2].shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight[7] = 0
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 32)
    hessian = hessians_from_activations(x, block_size).to(DEVICE)
    monkeypatch.setattr(launch, "HESSIAN_ROWS", 32)
    monkeypatch.setattr(launch, "HESSIAN_TILES", dict.fromkeys((True, False), 4))
    monkeypatch.setattr(launch, "_hessian", launch._hessian.__wrapped__)
    whole, got = (
        quantize(
            weight,
            format,
            block_size,
            "hessian",
            hessian=hessian,
            backend=backend,
            global_scale="none",
            count_candidates=True,
        )
        for backend in ("reference", "triton")
    )
    assert got.candidates is not None and whole.candidates is not None
    # When the kernel computes the window, it knows the least error in half precision; for MXFP4, from one scale.
    assert ((got.candidates.float() - whole.candidates.float()).abs() <= 2).float().mean() > 0.98
    assert (got.candidates.float().mean() / whole.candidates.float().mean() - 1).abs() < 0.02
    differs = got.scales != whole.scales
    error, least = (
        torch.einsum("rbi,bij,rbj->rb", r, hessian.double(), r)
        for r in ((weight.double() - q.dequantize().double()).unflatten(1, (-1, block_size)) for q in (got, whole))
    )
    assert (error <= least * (1 + 1e-6)).logical_or(~differs).all() and differs.float().mean() < 0.05


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_zero_hessian_leaves_every_scale_open(block_size: int) -> None:
    """Of scales that tie, the smallest is chosen, as in the reference."""
    weight = torch.randn(40, 2 * block_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    hessian = torch.zeros(2, block_size, block_size, device=DEVICE)
    q = quantize(weight, "nvfp4", block_size, "hessian", hessian=hessian, backend="triton")
    assert verify(q, weight, hessian).ok


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(300, 128), (37, 96), (2, 3, 32), (0, 32)])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("format", FORMATS)
def test_dequantize(format: str, block_size: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02
    q = quantize(weight, format, block_size, "naive")
    on = q.to(DEVICE)
    got = launch.dequantize(on.codes, on.scales, on.global_scale, q.format, block_size, dtype)
    assert got.dtype == dtype and got.shape == weight.shape
    integer = torch.int32 if dtype == torch.float32 else torch.int16  # bits, for −0
    assert torch.equal(got.cpu().view(integer), q.dequantize(dtype).view(integer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 128), (1, 16), (513, 33), (700, 8192)])
def test_amax_parts(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The amax of all elements, with the largest at any place, and NaN above all."""
    weight = (torch.randn(shape, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype).to(DEVICE)
    for step, index in enumerate((0, 1, weight.numel() // 2, weight.numel() - 1)):
        weight.view(-1)[index] = -3 - step
        assert launch.amax_parts(weight).max().view(torch.float32) == weight.abs().max()
    weight.view(-1)[weight.numel() // 3] = torch.nan
    assert launch.amax_parts(weight).max().view(torch.float32).isnan()


@pytest.mark.parametrize("method", BLOCK_METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_global_scale_from_amax(dtype: torch.dtype, method: str) -> None:
    """Every kernel computes the same float32 quotient."""
    # More than one step of the amax kernel, in one column of blocks.
    weight = (torch.randn(600, 16, generator=torch.Generator().manual_seed(2)) * 0.02).to(dtype)
    given = {"hessian": torch.eye(16)[None].to(DEVICE)} if method == "hessian" else {}
    for matrix in (weight, weight * 0, -weight.abs(), weight * 1e-30):
        q = quantize(matrix.to(DEVICE), "nvfp4", 16, method, backend="triton", **given)  # type: ignore[arg-type]
        assert q.global_scale.cpu() == global_scale_of(matrix, FORMATS["nvfp4"])


def test_global_scale_of_adversarial_weights() -> None:
    for block in torch.tensor(all_families(16, np.random.default_rng(4))).split(48):
        q = quantize(block.to(DEVICE), "nvfp4", 16, "naive", backend="triton")
        assert q.global_scale.cpu() == global_scale_of(block.float(), FORMATS["nvfp4"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "columns"), [(300, 128), (5000, 96), (1, 32), (0, 64)])
@pytest.mark.parametrize("block_size", [16, 32])
def test_block_hessians(block_size: int, tokens: int, columns: int, dtype: torch.dtype) -> None:
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).to(dtype)
    got = launch.block_hessians(x.to(DEVICE), block_size).cpu()
    want = hessians_from_activations(x.double(), block_size)
    assert got.dtype == torch.float32
    scale = want.diagonal(dim1=1, dim2=2).amax() if tokens else 1.0
    assert (got - want).abs().amax() <= 1e-5 * scale


@pytest.mark.parametrize("largest", [1.0, 2.0**126])
@pytest.mark.parametrize("block_size", [16, 32])
def test_correlated_activations_do_not_leave_every_smaller_power_of_two(block_size: int, largest: float) -> None:
    """As in test_bounds.py. For the largest float32 weights no scale gives all zeros, so all smaller scales remain."""
    generator = torch.Generator().manual_seed(0)
    tokens = correlated_tokens(block_size, generator)
    weight = (torch.randn(64 if CUDA else 24, block_size, generator=generator) / 4).clamp(-0.999, 0.999) * largest
    hessian = hessians_from_activations(tokens, block_size).to(DEVICE)
    q = quantize(
        weight.to(DEVICE), "mxfp4", block_size, "hessian", hessian=hessian, backend="triton", count_candidates=True
    )
    assert q.candidates is not None and verify(q, weight.to(DEVICE), hessian).ok
    counts = q.candidates.double()
    assert (counts.median() < 20) == (largest == 1) and counts.min() >= 3


@triton.jit
def _fp16x2_kernel(
    x_ptr,
    factor_ptr,
    row_norm_ptr,
    inverse_root_ptr,
    code_ptr,
    radius_ptr,
    norm_ptr,
    margin_ptr,
    bounds_ptr,
    FMT: tl.constexpr,
    TARGET: tl.constexpr,
):
    QBLOCK: tl.constexpr = FMT.block_size
    lane = tl.arange(0, 32)
    fp16_factor = load_fp16_factor(factor_ptr, row_norm_ptr, 32, QBLOCK, True, TARGET)
    x = columns(load_blocks(x_ptr + lane * QBLOCK, lane >= 0, QBLOCK, 4, ""), QBLOCK)
    x_fp16x2 = columns_to_fp16x2(x)
    norm, margin = fp16_norm_x2(x_fp16x2, tl.load(code_ptr + lane), 1.0, fp16_factor, FMT)
    tl.store(norm_ptr + lane, norm)
    tl.store(margin_ptr + lane, margin)
    radius = tl.load(radius_ptr + lane)
    clipping, dead_zone = hessian_bounds_x2(x_fp16x2, radius, inverse_root_ptr)
    tl.store(bounds_ptr + lane, clipping)
    tl.store(bounds_ptr + 32 + lane, dead_zone)
    clipping, dead_zone = hessian_bounds(x, radius, inverse_root_ptr)
    tl.store(bounds_ptr + 64 + lane, clipping)
    tl.store(bounds_ptr + 96 + lane, dead_zone)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-7])
@pytest.mark.parametrize("block_size", [16, 32])
def test_fp16x2_is_within_the_margin_and_the_bounds(block_size: int, spread: float) -> None:
    """For bfloat16 elements from 2 down to far below fp16's range, and radii from far below to far above them."""
    fmt = FORMATS["mxfp4"]
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(32, block_size, generator=generator) * 2 - 1
    x = (2 * x * spread ** torch.rand(32, block_size, generator=generator)).bfloat16().float()
    x[:, 0] = (1 + x[:, 0].abs() / 2).bfloat16()
    x[3, 1:] = 0
    factor = torch.randn(block_size, block_size, generator=generator).tril()
    factor *= spread ** torch.rand(block_size, block_size, generator=generator)
    codes = torch.randint(127 - 11, 127 + 6, (32,), generator=generator, dtype=torch.int32)
    roots = torch.logspace(-2, 6, block_size).half()  # the last are infinite
    radius = torch.logspace(-9, 2, 32)
    norm, margin = torch.empty(2, 32, device="cuda")
    found = torch.empty(4, 32, device="cuda")
    given = (x, factor.T.contiguous(), factor.norm(dim=1), roots, codes, radius)
    _fp16x2_kernel[(1,)](
        *(tensor.cuda() for tensor in given),
        norm,
        margin,
        found,
        FMT=format_constants(fmt, block_size),
        TARGET=launch.target_of(torch.device(DEVICE)),
        num_warps=1,
    )
    scale = fmt.scale.decode(codes)[:, None]
    residual = x.double() - scale * fmt.element.round(x / scale).double()
    want = (residual @ factor.double()).square().sum(1).sqrt()
    assert ((norm.cpu() - want).abs() <= margin.cpu())[margin.cpu().isfinite()].all()
    assert margin.isfinite().sum() >= 16
    reach = radius.double()[:, None] * roots.double()
    clipping = (x.abs() - reach).amax(1).clamp(min=0)
    dead_zone = torch.where(x.abs() > reach, x.abs() + reach, torch.inf).amin(1)
    fp16x2, float32 = found.cpu().double().view(2, 2, 32)
    for lower, upper in (fp16x2, float32):
        assert (lower <= clipping * (1 + 1e-6)).all() and (upper >= dead_zone * (1 - 1e-6)).all()
    assert (fp16x2[0] >= clipping * (1 - 2**-7) - 2**-9).all()
    near = dead_zone < 4
    assert near.sum() > 8 and (fp16x2[1][near] <= dead_zone[near] * (1 + 2**-7) + 2**-9).double().mean() > 0.9
