"""Kernel launches: grid and tile sizes, outputs, flags. Nothing here synchronizes with the device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
import triton
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import DEAD_CHANNEL, MAX_RELATIVE_NEGATIVE, RELATIVE_DAMPING
from quantkit.formats import BlockFormat
from quantkit.kernels.amax import amax_kernel
from quantkit.kernels.block_hessians import block_hessians_kernel
from quantkit.kernels.dequantize import dequantize_kernel
from quantkit.kernels.device import format_constants, search_constants
from quantkit.kernels.factorize import EXTRA_ROWS, FIRST_SHIFT, factorize_kernel
from quantkit.kernels.hessian import hessian_kernel
from quantkit.kernels.naive import naive_kernel
from quantkit.kernels.sse import sse_kernel

__all__ = ["Quantized", "amax_parts", "block_hessians", "dequantize", "factorize", "quantize", "unpack_factors"]

INTERPRETED = triton.knobs.runtime.interpret
PTX_CAPABILITY = (8, 9)  # the first NVIDIA GPUs with all instructions of ptx.py
# Fastest on an H200 or H100 (docs/log.md). The interpreter's cost is per operation, so it gets large tiles.
NAIVE_ELEMENTS = dict.fromkeys((16, 32), 8192) if INTERPRETED else {16: 2048, 32: 1024}  # per program, one warp
NAIVE_REGISTERS = {16: None, 32: 56}
SSE_ELEMENTS = 8192 if INTERPRETED else 1024  # per program, one warp
SSE_REGISTERS = {16: 80, 32: 96}
AMAX_PROGRAMS = 1 if INTERPRETED else 256
AMAX_ELEMENTS = 8192 if INTERPRETED else 16384  # per step of a program
AMAX_WARPS = 16
HESSIAN_REGISTERS = {16: 80, 32: 128}
HESSIAN_ROWS = 512 if INTERPRETED else 32  # per tile
# Tiles per program, by whether scales are powers of two: a short search amortizes a program's start over more tiles.
HESSIAN_TILES = {True: 1, False: 1} if INTERPRETED else {True: 4, False: 1}
ALIGNED = 16  # bytes; for addresses that are multiples of it, Triton compiles wider loads
DEQUANTIZE_CHUNKS = 4096 if INTERPRETED else 256  # chunks of eight elements per program
BLOCK_HESSIANS_WIDTH = 64  # columns per program
BLOCK_HESSIANS_TOKENS = 2048  # tokens per program

P = ParamSpec("P")
T = TypeVar("T")


def _ceil_div(a: int, b: int) -> int:
    """⌈a / b⌉. triton.cdiv is a jit function, and its call takes 3 µs."""
    return -(-a // b)


class Kernel:
    """A kernel with its grid and compile-time constants; ``kernel(stream, *arguments)`` launches it.

    At every call, Triton's own launch looks up the binary that fits the arguments, constants and hooks. A Kernel skips
    the lookup and launches the binary of its first call. So every later call must pass the same integers, and tensors
    of the same Kind. docs/log.md has the time that this saves.

    The cached functions below make the Kernels. Their arguments, the cache keys, include all integers and Kinds that a
    binary depends on. Three sorts of tensors need no Kind in the key: those allocated in this module, which are always
    aligned and of one dtype; those that the kernel does not read; and a single float32.
    """

    def __init__(self, kernel: Any, grid: tuple[int, int], **constants: Any) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.last = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.run: Any = None
        self.function: tuple[Any, ...] = ()

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        if stream is not None and self.run is not None:
            # The call that compiled[grid] makes; test_launch.py checks the order of its arguments.
            self.run(*self.grid, 1, stream, *self.function, *arguments, *self.last)
        elif (compiled := self.kernel[self.grid](*arguments, **self.constants)) is not None:
            self.run, self.function = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)


Kind = tuple[torch.dtype, bool]


def _kind(tensor: Tensor) -> Kind:
    """(dtype, whether the address is a multiple of ALIGNED): the tensor properties that Triton specializes on. The
    functions below take it as a cache key only."""
    return tensor.dtype, tensor.data_ptr() % ALIGNED == 0


def _stream(device: torch.device) -> int | None:
    """The device's current stream. None where Triton's own launch must be used: under the interpreter, or with launch
    hooks, which profilers set."""
    if INTERPRETED:
        return None
    enter, exit = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(exit, "calls", exit):
        return None
    return int(triton.runtime.driver.active.get_current_stream(device.index))


def _on_its_device(call: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """``call``, run with its first argument's device as the current device, on which Triton launches kernels."""

    @functools.wraps(call)
    def on_its_device(tensor: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        if INTERPRETED or tensor.device.index == torch.accelerator.current_device_index():
            return call(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device):
            return call(tensor, *args, **kwargs)

    return on_its_device


@functools.cache
def target_of(device: torch.device) -> str:
    """The kernels' TARGET on a device: "interpreter", "cuda" (with PTX), or "plain" (without PTX: NVIDIA GPUs before
    PTX_CAPABILITY, and other vendors')."""
    if INTERPRETED:
        return "interpreter"
    nvidia = torch.version.cuda is not None and device.type == "cuda"
    return "cuda" if nvidia and torch.cuda.get_device_capability(device) >= PTX_CAPABILITY else "plain"


def _at_most(registers: int | None, device: torch.device) -> dict[str, int]:
    """Launch options that limit registers per thread, on "cuda"; none without a limit."""
    return {"maxnreg": registers} if registers and target_of(device) == "cuda" else {}


@functools.cache
def _pdl(device: torch.device) -> dict[str, Any]:
    """Launch options of programmatic dependent launch: the kernel may start while the previous one on the stream still
    runs. Off where the device does not support it."""
    if target_of(device) == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


# ---- the kernels with grids, constants and tiles ---------------------------------------------------------------------


def _after_amax(parts: int, device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel after amax_kernel, whose ``parts`` partial amax values it reads; 0: no amax_kernel."""
    return {"AMAX_PARTS": parts, **(_pdl(device) if parts else {"PDL": False})}


@functools.cache
def _naive(
    fmt: BlockFormat, block_size: int, rule: str, parts: int, num_blocks: int, kind: Kind, device: torch.device
) -> Kernel:
    per_program = NAIVE_ELEMENTS[block_size] // block_size
    return Kernel(
        naive_kernel,
        (_ceil_div(num_blocks, per_program), 1),
        FMT=format_constants(fmt, block_size),
        RULE=rule,
        TARGET=target_of(device),
        BLOCK_N=per_program,
        num_warps=1,
        **_after_amax(parts, device),
        **_at_most(NAIVE_REGISTERS[block_size], device),
    )


@functools.cache
def _sse(
    fmt: BlockFormat, block_size: int, count: bool, parts: int, num_blocks: int, kind: Kind, device: torch.device
) -> Kernel:
    per_program = SSE_ELEMENTS // block_size
    return Kernel(
        sse_kernel,
        (_ceil_div(num_blocks, per_program), 1),
        FMT=search_constants(fmt, block_size),
        COUNT=count,
        TARGET=target_of(device),
        BLOCK_N=per_program,
        num_warps=1,
        **_after_amax(parts, device),
        **_at_most(SSE_REGISTERS[block_size], device),
    )


@functools.cache
def _hessian(
    fmt: BlockFormat,
    block_size: int,
    count: bool,
    parts: int,
    after: bool,
    rows: int,
    column_blocks: int,
    kind: Kind,
    device: torch.device,
) -> Kernel:
    """after: another kernel of the same call precedes it, with programmatic dependent launch."""
    tiles = HESSIAN_TILES[fmt.scale.mantissa_bits == 0]
    return Kernel(
        hessian_kernel,
        (column_blocks * _ceil_div(rows, HESSIAN_ROWS * tiles), 1),
        FMT=search_constants(fmt, block_size),
        COUNT=count,
        TARGET=target_of(device),
        SLACK=bounds.SLACK,
        BLOCK_M=HESSIAN_ROWS,
        TILES=tiles,
        AMAX_PARTS=parts,
        num_warps=1,
        **(_pdl(device) if after else {"PDL": False}),
        **_at_most(HESSIAN_REGISTERS[block_size], device),
    )


@functools.cache
def _factorize(block_size: int, num_blocks: int, kind: Kind, device: torch.device) -> Kernel:
    # The first kernel of a call, this one or amax_kernel, has no launch_pdl, so it starts after all earlier work on the
    # stream has ended. Later kernels rely on that: before their pdl_wait they read only inputs of the call, which are
    # then complete.
    return Kernel(
        factorize_kernel,
        (num_blocks, 1),
        QBLOCK=block_size,
        DAMPING=RELATIVE_DAMPING,
        DEAD=DEAD_CHANNEL,
        SHIFT=FIRST_SHIFT,
        MAX_NEGATIVE=MAX_RELATIVE_NEGATIVE,
        TARGET=target_of(device),
        PDL=_pdl(device)["PDL"],
        num_warps=1,
    )


@functools.cache
def _amax(after: bool, size: int, kind: Kind, device: torch.device) -> Kernel:
    """after: another kernel of the same call precedes it, with programmatic dependent launch."""
    pdl = _pdl(device)
    return Kernel(
        amax_kernel,
        (AMAX_PROGRAMS, 1),
        BLOCK_N=AMAX_ELEMENTS,
        TARGET=target_of(device),
        PDL_WAIT=after and pdl["PDL"],
        num_warps=AMAX_WARPS,
        **(pdl if after else {"PDL": pdl["PDL"]}),
    )


@functools.cache
def _dequantize(
    fmt: BlockFormat,
    block_size: int,
    num_chunks: int,
    codes: Kind,
    scales: Kind,
    types: tuple[torch.dtype, torch.dtype],
    device: torch.device,
) -> Kernel:
    return Kernel(
        dequantize_kernel,
        (_ceil_div(num_chunks, DEQUANTIZE_CHUNKS), 1),
        FMT=format_constants(fmt, block_size),
        BLOCK_N=DEQUANTIZE_CHUNKS,
    )


def _splits(tokens: int) -> int:
    """Number of parts into which block_hessians_kernel splits the tokens."""
    return max(1, _ceil_div(tokens, BLOCK_HESSIANS_TOKENS))


@functools.cache
def _block_hessians(block_size: int, tokens: int, in_features: int, kind: Kind, device: torch.device) -> Kernel:
    return Kernel(
        block_hessians_kernel,
        (_ceil_div(in_features, BLOCK_HESSIANS_WIDTH), _splits(tokens)),
        QBLOCK=block_size,
        WIDTH=BLOCK_HESSIANS_WIDTH,
        BLOCK_T=128 if kind[0].itemsize == 2 else 32,
        UPCAST=INTERPRETED,
        num_warps=4,
    )


# ---- calls -----------------------------------------------------------------------------------------------------------


@functools.cache
def _unread_flags(device: torch.device) -> Tensor:
    """Flags that kernels set and nobody reads; cached, which saves an allocation per call."""
    return torch.zeros(2, dtype=torch.int32, device=device)


@functools.cache
def _scalar_template(device: torch.device) -> Tensor:
    """A scalar for torch.empty_like, which takes half the time of torch.empty."""
    return torch.zeros((), dtype=torch.float32, device=device)


class Quantized(NamedTuple):
    """The result of quantize: packed codes, scale bytes, decode multiplier, candidates where counted, and flags.

    flags: int32 ``[2]``. Element 0 is 1 if the matrix holds NaN or Inf, element 1 if a Hessian does or is clearly
    indefinite. Codes and scales are then undefined. Without check_finite the flags are undefined.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    candidates: Tensor | None
    flags: Tensor


@_on_its_device
def quantize(
    matrix: Tensor,
    /,
    fmt: BlockFormat,
    block_size: int,
    objective: str,
    global_scale: Tensor | None,
    rule: str,
    factors: Tensor | None,
    hessians: Tensor | None,
    count_candidates: bool,
    check_finite: bool,
) -> Quantized:
    """Quantizes a bf16, fp16 or fp32 ``[rows, K]`` matrix that is not empty.

    global_scale: decode multiplier; None computes it from the matrix's amax, or is 1 for a single-level format.
    factors (from :func:`factorize`, or a slice of its blocks) or hessians ``[K/block_size, block_size, block_size]``:
        on the matrix's device, one of them for an objective that needs them.
    """
    matrix = matrix.contiguous()
    rows, columns = matrix.shape
    column_blocks = columns // block_size
    device = matrix.device
    from_amax = fmt.two_level and global_scale is None
    kind, stream = _kind(matrix), _stream(device)
    flags = torch.zeros(2, dtype=torch.int32, device=device) if check_finite else _unread_flags(device)
    amax = None
    # Each kernel of this call but the first has programmatic dependent launch.
    if hessians is not None:
        hessians = _contiguous_float(hessians)
        factors = _empty_factors(hessians)
        _factorize(block_size, column_blocks, _kind(hessians), device)(stream, hessians, factors, flags)
    if from_amax:
        amax = torch.empty(AMAX_PROGRAMS, dtype=torch.int32, device=device)
        size = rows * columns
        _amax(hessians is not None, size, kind, device)(stream, matrix, amax, size)

    # Outputs are allocated after the first launches, so that the GPU does not wait for the allocation.
    parts = AMAX_PROGRAMS if from_amax else 0
    num_blocks = rows * column_blocks
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
    scales = torch.empty(rows, column_blocks, dtype=torch.uint8, device=device)
    candidates = torch.empty_like(scales) if count_candidates else None
    if global_scale is None:
        global_scale = torch.empty_like(_scalar_template(device))  # written by the kernels
    if objective == "hessian":
        after = hessians is not None or from_amax
        kernel = _hessian(fmt, block_size, count_candidates, parts, after, rows, column_blocks, kind, device)
        kernel(stream, matrix, factors, global_scale, amax, codes, scales, candidates, flags, rows, column_blocks)
    elif objective == "naive":
        kernel = _naive(fmt, block_size, rule, parts, num_blocks, kind, device)
        kernel(stream, matrix, global_scale, amax, codes, scales, flags, num_blocks)
        if candidates is not None:
            candidates.fill_(1)
    elif objective == "sse":
        kernel = _sse(fmt, block_size, count_candidates, parts, num_blocks, kind, device)
        kernel(stream, matrix, global_scale, amax, codes, scales, candidates, flags, num_blocks)
    else:
        raise NotImplementedError(f"objective {objective!r} has no kernel: list it with has_kernel=False")
    return Quantized(codes, scales, global_scale, candidates, flags)


def _contiguous_float(hessians: Tensor) -> Tensor:
    """``hessians`` as factorize_kernel reads them: contiguous, float32 or float64."""
    if hessians.dtype not in (torch.float32, torch.float64):
        hessians = hessians.float()
    return hessians.contiguous()


def _empty_factors(hessians: Tensor) -> Tensor:
    """Uninitialized float32 ``[num_blocks, block_size + EXTRA_ROWS, block_size]``, in the layout of factors_of."""
    num_blocks, block_size, _ = hessians.shape
    rows = block_size + EXTRA_ROWS.value
    return torch.empty(num_blocks, rows, block_size, dtype=torch.float32, device=hessians.device)


@_on_its_device
def factorize(hessians: Tensor, /, flags: Tensor | None = None) -> Tensor:
    """Packed factors of ``hessians [num_blocks, block_size, block_size]`` for :func:`quantize`: float32
    ``[num_blocks, block_size + EXTRA_ROWS, block_size]``, see :func:`unpack_factors`.

    flags: int32 ``[2]``; element 1 is set to 1 for NaN, Inf or a clearly indefinite Hessian.
    """
    hessians = _contiguous_float(hessians)
    num_blocks, block_size, _ = hessians.shape
    factors = _empty_factors(hessians)
    device = hessians.device
    flags = _unread_flags(device) if flags is None else flags
    _factorize(block_size, num_blocks, _kind(hessians), device)(_stream(device), hessians, factors, flags)
    return factors


def unpack_factors(factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of packed factors: upper triangular Aᵀ ``[num_blocks, block_size, block_size]``; the norms of A's rows
    ``[num_blocks, block_size]``; and √(H⁻¹)_ii ``[num_blocks, block_size]`` in fp16, rounded up."""
    block_size = factors.shape[-1]
    inverse_roots = factors[:, block_size + 1].view(torch.float16)[:, :block_size]
    return factors[:, :block_size], factors[:, block_size], inverse_roots


@_on_its_device
def amax_parts(matrix: Tensor, /) -> Tensor:
    """int32 ``[AMAX_PROGRAMS]``: partial amax values, as float32 bits, of contiguous bf16, fp16 or fp32 ``matrix``. The
    kernels of :func:`quantize` compute the global scale from them."""
    size, device = matrix.numel(), matrix.device
    parts = torch.empty(AMAX_PROGRAMS, dtype=torch.int32, device=device)
    _amax(False, size, _kind(matrix), device)(_stream(device), matrix, parts, size)
    return parts


@_on_its_device
def dequantize(
    codes: Tensor, /, scales: Tensor, global_scale: Tensor, fmt: BlockFormat, block_size: int, dtype: torch.dtype
) -> Tensor:
    """The weight ``[..., K]`` in ``dtype`` (bf16, fp16 or fp32) of packed codes ``[..., K/2]`` and scale bytes."""
    codes, scales = codes.contiguous(), scales.contiguous()
    weight = torch.empty(*codes.shape[:-1], 2 * codes.shape[-1], dtype=dtype, device=codes.device)
    num_chunks = weight.numel() // 8
    if num_chunks:
        types = (global_scale.dtype, dtype)
        kernel = _dequantize(fmt, block_size, num_chunks, _kind(codes), _kind(scales), types, codes.device)
        kernel(_stream(codes.device), codes, scales, global_scale, weight, num_chunks)
    return weight


@_on_its_device
def block_hessians(activations: Tensor, /, block_size: int) -> Tensor:
    """Float32 ``[K/block_size, block_size, block_size]`` of bf16, fp16 or fp32 activations ``[tokens, K]``."""
    activations = activations.contiguous()
    tokens, in_features = activations.shape
    device = activations.device
    splits = _splits(tokens)
    shape = (splits, in_features // block_size, block_size, block_size)
    parts = torch.empty(shape, dtype=torch.float32, device=device)
    if parts.numel():
        kernel = _block_hessians(block_size, tokens, in_features, _kind(activations), device)
        kernel(_stream(device), activations, parts, tokens, in_features, BLOCK_HESSIANS_TOKENS)
    return parts[0] if splits == 1 else parts.sum(0)
