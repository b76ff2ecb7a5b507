"""Starts the kernels: grid and tile sizes, outputs, flags. Nothing here waits for the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import DEAD_CHANNEL, MAX_RELATIVE_NEGATIVE, RELATIVE_DAMPING
from quantkit.formats import BlockFormat
from quantkit.kernels.amax import amax_kernel
from quantkit.kernels.block_hessians import block_hessians_kernel
from quantkit.kernels.dequantize import dequantize_kernel
from quantkit.kernels.device import FormatConstants, format_constants
from quantkit.kernels.factorize import FIRST_SHIFT, factorize_kernel
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["Quantized", "amax_parts", "block_hessians", "dequantize", "factorize", "quantize"]

INTERPRETED = triton.knobs.runtime.interpret
TARGET = "interpreter" if INTERPRETED else "cuda" if torch.version.cuda else "hip"
# Sizes that were fastest on an H200 or H100 (docs/log.md); the interpreter pays by the operation, not the element.
NAIVE_ELEMENTS = dict.fromkeys((16, 32), 8192) if INTERPRETED else {16: 2048, 32: 1024}  # a program, one warp
NAIVE_REGISTERS = {16: {}, 32: {"maxnreg": 56}} if TARGET == "cuda" else {16: {}, 32: {}}
SSE_ELEMENTS = 8192 if INTERPRETED else 1024  # likewise
SSE_REGISTERS = {16: {"maxnreg": 80}, 32: {"maxnreg": 96}} if TARGET == "cuda" else {16: {}, 32: {}}
AMAX_PROGRAMS = 1 if INTERPRETED else 128
AMAX_ELEMENTS = 8192 if INTERPRETED else 16384  # a step of a program
AMAX_WARPS = 32
HESSIAN_REGISTERS = {16: 80, 32: 128}
DEQUANTIZE_CHUNKS = 4096 if INTERPRETED else 256  # of eight elements, a program
HESSIAN_WIDTH = 64  # columns, and tokens, a program
HESSIAN_TOKENS = 2048


def _ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, a jit function, whose call takes 3 µs."""
    return -(-a // b)


@functools.cache
def _constants(fmt: BlockFormat, block_size: int) -> FormatConstants:
    return format_constants(fmt, block_size)


@functools.cache
def _overlap(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that starts while the one before it, on the same stream, still runs; none where the device
    cannot."""
    if TARGET == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


_COMPILED: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | int, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the first argument's device.

    Triton looks at all arguments and constants at each call for what it compiled for their like. Here this is found by
    the little of them that it depends on, which saves half of a launch's time on the host.
    """
    device = arguments[0].device  # type: ignore[union-attr]
    if INTERPRETED:
        kernel[grid](*arguments, **constants)
    elif device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _launch(kernel, grid, *arguments, **constants)
    else:
        alike = [
            (a.dtype, a.data_ptr() % 16 == 0) if isinstance(a, Tensor) else (a == 1, a % 16 == 0, a >= 1 << 31)
            for a in arguments
        ]
        key = (kernel.fn, device.index, *alike, *constants.values())
        found = _COMPILED.get(key)
        if found is None:
            compiled = kernel[grid](*arguments, **constants)
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            _COMPILED[key] = compiled, rest
        else:
            compiled, rest = found
            compiled[(*grid, 1, 1)](*arguments, *rest)


@functools.cache
def _unread_flags(device: torch.device) -> Tensor:
    """Where kernels may set flags that nobody reads: always the same, which saves an allocation a call."""
    return torch.zeros(2, dtype=torch.int32, device=device)


class Quantized(NamedTuple):
    """What quantize returns: packed codes, scale bytes, decode multiplier, candidates where counted, and flags.

    flags: int32 ``[2]``, 1 where the matrix, or the Hessians, hold what cannot be worked with (NaN, Inf, a clearly
    indefinite Hessian); codes and scales are then undefined. Without check_finite the flags are, too.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    candidates: Tensor | None
    flags: Tensor


def quantize(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    method: str,
    global_scale: Tensor | None,
    rule: str,
    hessians: Tensor | None,
    count_candidates: bool,
    check_finite: bool,
) -> Quantized:
    """Quantizes a bf16, fp16 or fp32 ``[rows, K]`` matrix that is not empty.

    global_scale: decode multiplier; None: that of the matrix's amax, or 1 for a single-level format.
    hessians: ``[K/block_size, block_size, block_size]`` on the matrix's device, for the method that needs them.
    """
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    column_blocks = columns // block_size
    num_blocks = rows * column_blocks
    device = matrix.device
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, column_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count_candidates else None
    flags = torch.zeros(2, dtype=torch.int32, device=device) if check_finite else _unread_flags(device)
    counted = scales if candidates is None else candidates  # any pointer will do where nothing is counted
    constants = _constants(fmt, block_size)
    overlap = _overlap(device)
    options: dict[str, Any] = {"FMT": constants, "TARGET": TARGET}
    # From here on each kernel may start before the one before it has ended.
    amax = amax_parts(matrix) if fmt.two_level and global_scale is None else None
    if global_scale is None:
        global_scale = torch.empty((), dtype=torch.float32, device=device)  # written by the kernels

    if method == "hessian":
        assert hessians is not None
        largest_product = 0 if amax is None else constants.element_max * constants.scale_max
        factor, row_norm, inverse_root = factorize(hessians, flags[1:], amax, global_scale, largest_product)
        options |= overlap | _hessian_options(constants)
        _launch(
            hessian_kernel,
            (column_blocks * _ceil_div(rows, options["BLOCK_M"] * options["TILES"]),),
            matrix,
            factor,
            row_norm,
            inverse_root,
            global_scale,
            codes,
            scales,
            counted,
            flags,
            rows,
            column_blocks,
            COUNT=count_candidates,
            SLACK=bounds.SLACK,
            **options,
        )
        return Quantized(codes, scales, global_scale, candidates, flags)

    if amax is None:
        options |= {"AMAX_PARTS": 0, "OVERLAP": False}
        amax = flags  # unused
    else:
        options |= {"AMAX_PARTS": AMAX_PROGRAMS} | overlap
    if method == "naive":
        tile = NAIVE_ELEMENTS[block_size] // block_size
        _launch(
            naive_kernel,
            (_ceil_div(num_blocks, tile),),
            matrix,
            global_scale,
            amax,
            codes,
            scales,
            flags,
            num_blocks,
            RULE=rule,
            BLOCK_N=tile,
            num_warps=1,
            **options,
            **NAIVE_REGISTERS[block_size],
        )
        if candidates is not None:
            candidates.fill_(1)
    else:
        tile = SSE_ELEMENTS // block_size
        _launch(
            sse_kernel,
            (_ceil_div(num_blocks, tile),),
            matrix,
            global_scale,
            amax,
            codes,
            scales,
            counted,
            flags,
            num_blocks,
            COUNT=count_candidates,
            BLOCK_N=tile,
            num_warps=1,
            **options,
            **SSE_REGISTERS[block_size],
        )
    return Quantized(codes, scales, global_scale, candidates, flags)


def factorize(
    hessians: Tensor,
    flag: Tensor,
    amax: Tensor | None = None,
    global_scale: Tensor | None = None,
    largest_product: float = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 upper triangular Aᵀ ``[num_blocks, block_size, block_size]``, the norms of A's rows and √(H⁻¹)_ii, both
    ``[num_blocks, block_size]``, of ``hessians``.

    Sets ``flag``, int32 ``[1]``, to 1 for NaN, Inf or a clearly indefinite Hessian. amax: what amax_parts returned just
    before; its largest over largest_product is then written to global_scale.
    """
    if hessians.dtype != torch.float64:
        hessians = hessians.float()
    hessians = hessians.contiguous()
    num_blocks, block_size, _ = hessians.shape
    factor = torch.empty_like(hessians, dtype=torch.float32)
    row_norm, inverse_root = torch.empty(2, num_blocks, block_size, device=hessians.device)
    overlap = _overlap(hessians.device)
    _launch(
        factorize_kernel,
        (num_blocks,),
        hessians,
        factor,
        row_norm,
        inverse_root,
        flag,
        flag if amax is None else amax,
        row_norm if global_scale is None else global_scale,
        QBLOCK=block_size,
        DAMPING=RELATIVE_DAMPING,
        DEAD=DEAD_CHANNEL,
        SHIFT=FIRST_SHIFT,
        MAX_NEGATIVE=MAX_RELATIVE_NEGATIVE,
        TARGET=TARGET,
        AMAX_PARTS=0 if amax is None else AMAX_PROGRAMS,
        LARGEST_PRODUCT=largest_product,
        num_warps=1,
        **({"OVERLAP": overlap["OVERLAP"]} if amax is None else overlap),  # what came before may be anything
    )
    return factor, row_norm, inverse_root


def amax_parts(matrix: Tensor) -> Tensor:
    """int32 ``[AMAX_PROGRAMS]``: float32 bits of the largest magnitudes of as many parts of ``matrix``, bf16, fp16 or
    fp32 and contiguous."""
    parts = torch.empty(AMAX_PROGRAMS, dtype=torch.int32, device=matrix.device)
    _launch(
        amax_kernel,
        (AMAX_PROGRAMS,),
        matrix,
        parts,
        matrix.numel(),
        BLOCK_N=AMAX_ELEMENTS,
        OVERLAP=_overlap(matrix.device)["OVERLAP"],
        num_warps=AMAX_WARPS,
    )
    return parts


def dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor, fmt: BlockFormat, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[..., K]`` in ``dtype`` (bf16, fp16 or fp32) of packed codes ``[..., K/2]`` and scale bytes."""
    codes, scales = codes.contiguous(), scales.contiguous()
    weight = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype, device=codes.device)
    num_chunks = weight.numel() // 8
    if num_chunks:
        _launch(
            dequantize_kernel,
            (_ceil_div(num_chunks, DEQUANTIZE_CHUNKS),),
            codes,
            scales,
            global_scale,
            weight,
            num_chunks,
            FMT=_constants(fmt, block_size),
            BLOCK_N=DEQUANTIZE_CHUNKS,
        )
    return weight


def block_hessians(activations: Tensor, block_size: int) -> Tensor:
    """Float32 ``[K/block_size, block_size, block_size]`` of bf16, fp16 or fp32 activations ``[tokens, K]``."""
    activations = activations.contiguous()
    tokens, in_features = activations.shape
    num_blocks = in_features // block_size
    splits = max(1, _ceil_div(tokens, HESSIAN_TOKENS))
    shape = (splits, num_blocks, block_size, block_size)
    parts = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if parts.numel():
        _launch(
            block_hessians_kernel,
            (_ceil_div(in_features, HESSIAN_WIDTH), splits),
            activations,
            parts,
            tokens,
            in_features,
            HESSIAN_TOKENS,
            QBLOCK=block_size,
            WIDTH=HESSIAN_WIDTH,
            BLOCK_T=128 if activations.element_size() == 2 else 32,
            UPCAST=INTERPRETED,
            num_warps=4,
        )
    return parts[0] if splits == 1 else parts.sum(0)


def _hessian_options(constants: FormatConstants) -> dict[str, Any]:
    """The Hessian kernel's tiles, and what the compiler is told."""
    if INTERPRETED:
        return {"BLOCK_M": 512, "TILES": 1, "num_warps": 1}
    registers = {"maxnreg": HESSIAN_REGISTERS[constants.block_size]} if TARGET == "cuda" else {}
    return {"BLOCK_M": 32, "TILES": 2, "num_warps": 1} | registers
