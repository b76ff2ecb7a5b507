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
from quantkit.kernels.device import format_constants
from quantkit.kernels.factorize import EXTRA_ROWS, FIRST_SHIFT, factorize_kernel
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["Quantized", "amax_parts", "block_hessians", "dequantize", "factorize", "quantize"]

INTERPRETED = triton.knobs.runtime.interpret
PTX_CAPABILITY = (8, 9)  # NVIDIA GPUs that know all instructions which the kernels spell out
# Sizes that were fastest on an H200 or H100 (docs/log.md); the interpreter pays by the operation, not the element.
NAIVE_ELEMENTS = dict.fromkeys((16, 32), 8192) if INTERPRETED else {16: 2048, 32: 1024}  # a program, one warp
NAIVE_REGISTERS = {16: None, 32: 56}
SSE_ELEMENTS = 8192 if INTERPRETED else 1024  # likewise
SSE_REGISTERS = {16: 80, 32: 96}
AMAX_PROGRAMS = 1 if INTERPRETED else 256
AMAX_ELEMENTS = 8192 if INTERPRETED else 16384  # a step of a program
AMAX_WARPS = 16
HESSIAN_REGISTERS = {16: 80, 32: 128}
HESSIAN_ROWS = 512 if INTERPRETED else 32  # a tile
# Tiles a program, where scales are powers of two and where not: a short search pays more for a program's beginning.
HESSIAN_TILES = {True: 1, False: 1} if INTERPRETED else {True: 4, False: 1}
ALIGNED = 16  # bytes: for an address that divides, Triton compiles wider loads
DEQUANTIZE_CHUNKS = 4096 if INTERPRETED else 256  # of eight elements, a program
BLOCK_HESSIANS_WIDTH = 64  # columns, and tokens, a program
BLOCK_HESSIANS_TOKENS = 2048


def _ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, a jit function, whose call takes 3 µs."""
    return -(-a // b)


class Kernel:
    """A kernel with its compile-time constants on one device: ``kernel(grid, *arguments)``.

    Triton looks at all arguments, constants and hooks at each call for what it compiled for their like. Here that is
    found by numbers and by type and alignment of the tensors that come from elsewhere, an entry a shape; docs/log.md
    has what that saves.

    fresh: names of the pointers to tensors that are made in this module, always of one type and aligned, or of which
    the kernel reads nothing, or one number.
    """

    def __init__(self, kernel: Any, device: torch.device, fresh: tuple[str, ...] = (), **constants: Any) -> None:
        self.kernel, self.device, self.constants = kernel, device, constants
        self.last = tuple(constants[name] for name in kernel.arg_names if name in constants)
        arguments = [name for name in kernel.arg_names if name not in constants]
        pointers = [name for name in arguments if name.endswith("_ptr")]
        assert set(fresh) <= set(pointers), fresh
        self.numbers = [arguments.index(name) for name in arguments if name not in pointers]
        self.tensors = [arguments.index(name) for name in pointers if name not in fresh]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, int], *arguments: Any) -> None:
        if INTERPRETED:
            self.kernel[grid](*arguments, **self.constants)
        elif self.device.index != torch.accelerator.current_device_index():
            with torch.cuda.device(self.device):
                self(grid, *arguments)
        else:
            alike = [arguments[index] for index in self.numbers]
            for index in self.tensors:
                tensor = arguments[index]
                alike += tensor.dtype, tensor.data_ptr() % ALIGNED == 0
            key = tuple(alike)
            compiled = self.compiled.get(key)
            if compiled is None or _is_hooked():
                self.compiled[key] = self.kernel[grid](*arguments, **self.constants)
            else:  # as compiled[grid] does; test_launch.py holds Triton to the order of the arguments
                stream = triton.runtime.driver.active.get_current_stream(self.device.index)
                start = (*grid, 1, stream, compiled.function, compiled.packed_metadata)
                compiled.run(*start, None, None, None, *arguments, *self.last)


def _is_hooked() -> bool:
    """Whether a profiler wants to hear of launches."""
    enter, exit = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(exit, "calls", exit))


@functools.cache
def target_of(device: torch.device) -> str:
    """The kernels' TARGET on a device: "interpreter", "cuda", or "plain" for GPUs where they spell out no instructions:
    NVIDIA's before PTX_CAPABILITY, and other makers'."""
    if INTERPRETED:
        return "interpreter"
    nvidia = torch.version.cuda is not None and device.type == "cuda"
    return "cuda" if nvidia and torch.cuda.get_device_capability(device) >= PTX_CAPABILITY else "plain"


def _at_most(registers: int | None, device: torch.device) -> dict[str, int]:
    """Options of a kernel that is to use so many registers at most, where that was measured."""
    return {"maxnreg": registers} if registers and target_of(device) == "cuda" else {}


@functools.cache
def _overlap(device: torch.device) -> dict[str, Any]:
    """Options of a kernel that starts while the one before it, on the same stream, still runs; none where the device
    cannot."""
    if target_of(device) == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"OVERLAP": True, "launch_pdl": True}
    return {"OVERLAP": False}


# ---- the kernels on a device, with constants and tiles ---------------------------------------------------------------


def _after_amax(parts: int, device: torch.device) -> dict[str, Any]:
    """Options of a kernel that takes the global scale from so many largest magnitudes, or is given it for none."""
    return {"AMAX_PARTS": parts, **(_overlap(device) if parts else {"OVERLAP": False})}


@functools.cache
def _naive(fmt: BlockFormat, block_size: int, rule: str, parts: int, device: torch.device) -> Kernel:
    return Kernel(
        naive_kernel,
        device,
        ("amax_ptr", "codes_ptr", "scales_ptr", "flag_ptr"),
        FMT=format_constants(fmt, block_size),
        RULE=rule,
        TARGET=target_of(device),
        BLOCK_N=NAIVE_ELEMENTS[block_size] // block_size,
        num_warps=1,
        **_after_amax(parts, device),
        **_at_most(NAIVE_REGISTERS[block_size], device),
    )


@functools.cache
def _sse(fmt: BlockFormat, block_size: int, count: bool, parts: int, device: torch.device) -> Kernel:
    return Kernel(
        sse_kernel,
        device,
        ("amax_ptr", "codes_ptr", "scales_ptr", "candidates_ptr", "flag_ptr"),
        FMT=format_constants(fmt, block_size),
        COUNT=count,
        TARGET=target_of(device),
        BLOCK_N=SSE_ELEMENTS // block_size,
        num_warps=1,
        **_after_amax(parts, device),
        **_at_most(SSE_REGISTERS[block_size], device),
    )


@functools.cache
def _hessian(fmt: BlockFormat, block_size: int, count: bool, parts: int, device: torch.device) -> Kernel:
    return Kernel(
        hessian_kernel,
        device,
        ("factors_ptr", "amax_ptr", "codes_ptr", "scales_ptr", "candidates_ptr", "flag_ptr"),
        FMT=format_constants(fmt, block_size),
        COUNT=count,
        TARGET=target_of(device),
        SLACK=bounds.SLACK,
        BLOCK_M=HESSIAN_ROWS,
        TILES=HESSIAN_TILES[fmt.scale.mantissa_bits == 0],
        AMAX_PARTS=parts,
        num_warps=1,
        **_overlap(device),
        **_at_most(HESSIAN_REGISTERS[block_size], device),
    )


@functools.cache
def _factorize(block_size: int, device: torch.device) -> Kernel:
    # Without launch_pdl it starts after all that came before, as amax does where it is first. The kernels behind rely
    # on that: what they write, or read of others than the one before them, before they wait is then free, or there.
    return Kernel(
        factorize_kernel,
        device,
        ("factors_ptr", "flags_ptr"),
        QBLOCK=block_size,
        DAMPING=RELATIVE_DAMPING,
        DEAD=DEAD_CHANNEL,
        SHIFT=FIRST_SHIFT,
        MAX_NEGATIVE=MAX_RELATIVE_NEGATIVE,
        TARGET=target_of(device),
        OVERLAP=_overlap(device)["OVERLAP"],
        num_warps=1,
    )


@functools.cache
def _amax(after: bool, device: torch.device) -> Kernel:
    overlap = _overlap(device)
    return Kernel(
        amax_kernel,
        device,
        ("parts_ptr",),
        BLOCK_N=AMAX_ELEMENTS,
        TARGET=target_of(device),
        AFTER=after and overlap["OVERLAP"],
        num_warps=AMAX_WARPS,
        **(overlap if after else {"OVERLAP": overlap["OVERLAP"]}),
    )


@functools.cache
def _dequantize(fmt: BlockFormat, block_size: int, device: torch.device) -> Kernel:
    return Kernel(dequantize_kernel, device, FMT=format_constants(fmt, block_size), BLOCK_N=DEQUANTIZE_CHUNKS)


@functools.cache
def _block_hessians(block_size: int, step_tokens: int, device: torch.device) -> Kernel:
    return Kernel(
        block_hessians_kernel,
        device,
        ("parts_ptr",),
        QBLOCK=block_size,
        WIDTH=BLOCK_HESSIANS_WIDTH,
        BLOCK_T=step_tokens,
        UPCAST=INTERPRETED,
        num_warps=4,
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


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
    if hessians is not None:
        hessians = _as_factorized(hessians)
        factors = _empty_factors(hessians)
        _factorize(block_size, device)((column_blocks, 1), hessians, factors, flags)
    # After the first of its kernels, another may start before the one before it has ended.
    from_amax = fmt.two_level and global_scale is None
    amax = amax_parts(matrix, after=hessians is not None) if from_amax else flags  # any pointer, again
    parts = AMAX_PROGRAMS if from_amax else 0
    if global_scale is None:
        global_scale = torch.empty((), dtype=torch.float32, device=device)  # written by the kernels

    if method == "hessian":
        kernel = _hessian(fmt, block_size, count_candidates, parts, device)
        kernel(
            (column_blocks * _ceil_div(rows, kernel.constants["BLOCK_M"] * kernel.constants["TILES"]), 1),
            matrix,
            factors,
            global_scale,
            amax,
            codes,
            scales,
            counted,
            flags,
            rows,
            column_blocks,
        )
    elif method == "naive":
        kernel = _naive(fmt, block_size, rule, parts, device)
        grid = (_ceil_div(num_blocks, kernel.constants["BLOCK_N"]), 1)
        kernel(grid, matrix, global_scale, amax, codes, scales, flags, num_blocks)
        if candidates is not None:
            candidates.fill_(1)
    elif method == "sse":
        kernel = _sse(fmt, block_size, count_candidates, parts, device)
        grid = (_ceil_div(num_blocks, kernel.constants["BLOCK_N"]), 1)
        kernel(grid, matrix, global_scale, amax, codes, scales, counted, flags, num_blocks)
    else:
        raise NotImplementedError(f"method {method!r} has no kernel: list it with has_kernel=False")
    return Quantized(codes, scales, global_scale, candidates, flags)


def _as_factorized(hessians: Tensor) -> Tensor:
    """As the kernel takes them: float32 or float64, contiguous."""
    if hessians.dtype != torch.float64:
        hessians = hessians.float()
    return hessians.contiguous()


def _empty_factors(hessians: Tensor) -> Tensor:
    """Float32 ``[num_blocks, block_size + EXTRA_ROWS, block_size]``, as factors_of finds its way in it."""
    num_blocks, block_size, _ = hessians.shape
    rows = block_size + EXTRA_ROWS.value
    return torch.empty(num_blocks, rows, block_size, dtype=torch.float32, device=hessians.device)


def factorize(hessians: Tensor, flags: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 upper triangular Aᵀ ``[num_blocks, block_size, block_size]``, the norms of A's rows and, in half
    precision and rounded up, √(H⁻¹)_ii, both ``[num_blocks, block_size]``, of ``hessians``: what quantize has made for
    its kernel, for a look at it.

    Sets ``flags[1]``, int32, to 1 for NaN, Inf or a clearly indefinite Hessian.
    """
    hessians = _as_factorized(hessians)
    num_blocks, block_size, _ = hessians.shape
    factors = _empty_factors(hessians)
    _factorize(block_size, hessians.device)((num_blocks, 1), hessians, factors, flags)
    inverse_roots = factors[:, block_size + 1].view(torch.float16)[:, :block_size]
    return factors[:, :block_size], factors[:, block_size], inverse_roots


def amax_parts(matrix: Tensor, after: bool = False) -> Tensor:
    """int32 ``[AMAX_PROGRAMS]``: float32 bits of the largest magnitudes of as many parts of ``matrix``, bf16, fp16 or
    fp32 and contiguous. after: may start while the kernel before still runs, and ends after it."""
    parts = torch.empty(AMAX_PROGRAMS, dtype=torch.int32, device=matrix.device)
    _amax(after, matrix.device)((AMAX_PROGRAMS, 1), matrix, parts, matrix.numel())
    return parts


def dequantize(
    codes: Tensor, scales: Tensor, global_scale: Tensor, fmt: BlockFormat, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[..., K]`` in ``dtype`` (bf16, fp16 or fp32) of packed codes ``[..., K/2]`` and scale bytes."""
    codes, scales = codes.contiguous(), scales.contiguous()
    weight = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype, device=codes.device)
    num_chunks = weight.numel() // 8
    if num_chunks:
        kernel = _dequantize(fmt, block_size, codes.device)
        kernel((_ceil_div(num_chunks, kernel.constants["BLOCK_N"]), 1), codes, scales, global_scale, weight, num_chunks)
    return weight


def block_hessians(activations: Tensor, block_size: int) -> Tensor:
    """Float32 ``[K/block_size, block_size, block_size]`` of bf16, fp16 or fp32 activations ``[tokens, K]``."""
    activations = activations.contiguous()
    tokens, in_features = activations.shape
    num_blocks = in_features // block_size
    splits = max(1, _ceil_div(tokens, BLOCK_HESSIANS_TOKENS))
    shape = (splits, num_blocks, block_size, block_size)
    parts = torch.empty(shape, dtype=torch.float32, device=activations.device)
    if parts.numel():
        kernel = _block_hessians(block_size, 128 if activations.element_size() == 2 else 32, activations.device)
        grid = (_ceil_div(in_features, kernel.constants["WIDTH"]), splits)
        kernel(grid, activations, parts, tokens, in_features, BLOCK_HESSIANS_TOKENS)
    return parts[0] if splits == 1 else parts.sum(0)
