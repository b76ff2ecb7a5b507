"""The benchmark's own cases on one weight: every method, a copy, and an empty launch for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quantkit import FORMATS, METHODS, quantize, resolve_backend
from quantkit.formats import BlockFormat

TOKENS = 65536  # of the activations from which block_hessians is timed
HESSIAN_TOKENS = 2048  # of the activations from which the given block Hessians are made
WEIGHT_STD = 0.02
LARGEST = 5.3  # standard deviations: the largest magnitude of 2560 × 9728 Gaussian weights
WARM_ROWS = 32  # of the weight, for warm-up calls


@dataclass(kw_only=True)
class Case:
    """A call to time, and its times so far in microseconds.

    bytes: number of bytes to read and write, each once. warm_up: the same call on a few rows of the weight; None: the
    call itself. in_graph: time it as a CUDA graph if that is possible. graph: this graph. limit: maximum number of
    times. judge: the output error in percent of what the call returns; None: not measured. note: why there are no
    times.
    """

    kind: str  # kernel, copy, launch or peer
    tool: str
    operation: str
    call: Callable[[], object]
    bytes: int
    format: str = ""
    block_size: int | None = None
    backend: str = ""
    global_scale: str = ""
    warm_up: Callable[[], object] | None = None
    gpu_us: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)
    in_graph: bool = True
    graph: Any = None
    limit: int = 1 << 30
    judge: Callable[[Any], float] | None = None
    output_error: float | None = None
    note: str = ""


def sample_weight(rows: int, columns: int) -> Tensor:
    """Float32 ``[rows, columns]``, Gaussian, with a largest magnitude of LARGEST standard deviations at every size.

    So all shapes have the same global scale. The global scale determines where block scales lie in their grid and how
    many larger scales there are. This changes the time of SSE by 4 %, and that of Hessian by a quarter within a binade.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    weight.clamp_(-LARGEST, LARGEST)
    weight[0, 0] = LARGEST
    return WEIGHT_STD * weight


def sample_tokens(weight: Tensor) -> Tensor:
    """Float32 activations ``[HESSIAN_TOKENS, columns]``; neighbouring channels correlate, as in a layer's inputs."""
    columns, device = weight.shape[1], weight.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(HESSIAN_TOKENS, columns, generator=generator, dtype=torch.float32, device=device)
    tokens *= torch.logspace(-0.5, 0.5, columns, dtype=torch.float32, device=device)
    return tokens + 0.5 * tokens.roll(1, 1)


def sample_hessian(tokens: Tensor, block_size: int) -> Tensor:
    """Block Hessians ``[num_blocks, block_size, block_size]`` of ``tokens``."""
    blocks = tokens.unflatten(1, (-1, block_size))
    return torch.einsum("tbi,tbj->bij", blocks, blocks).contiguous()


def cases(
    weight: Tensor, backends: Sequence[str], block_sizes: Sequence[int], formats: Sequence[str] = tuple(FORMATS)
) -> Iterator[Case]:
    """All cases of quantkit on one weight ``[rows, columns]``, the copy and the launch."""
    on_gpu = "triton" in backends and weight.is_cuda
    yield copy_case(weight)
    yield _launch_case(weight.device)
    tokens = sample_tokens(weight)
    for name, layout in ((name, FORMATS[name]) for name in formats):
        for block_size in (size for size in block_sizes if size in layout.block_sizes):
            hessian = sample_hessian(tokens, block_size)
            for method in (name for name, entry in METHODS.items() if entry.needs != "gram"):
                yield from _method_cases(weight, layout, block_size, method, backends, hessian)
            if on_gpu:
                yield _dequantize_case(weight, name, block_size)
    if on_gpu:
        yield _amax_case(weight)


def copy_case(weight: Tensor) -> Case:
    target = torch.empty_like(weight)
    return Case(kind="copy", tool="torch", operation="copy", call=lambda: target.copy_(weight), bytes=2 * weight.nbytes)


def _launch_case(device: torch.device) -> Case:
    one = torch.zeros(1, dtype=torch.float32, device=device)
    return Case(kind="launch", tool="torch", operation="launch", call=lambda: one.add_(1), bytes=0)


def _method_cases(
    weight: Tensor, layout: BlockFormat, block_size: int, method: str, backends: Sequence[str], hessian: Tensor
) -> Iterator[Case]:
    """The cases of one method on each backend: with a given global scale and, for a two-level format, from amax."""
    given: dict[str, Any] = {"hessian": hessian} if METHODS[method].needs_hessian else {}
    moved = weight.nbytes + weight.numel() // 2 + weight.numel() // block_size
    moved += hessian.nbytes if given else 0
    for backend in backends:
        if backend == "triton" and resolve_backend("auto", "cuda", method, block_size, layout) != backend:
            continue  # no kernel
        for label, scale in _global_scales(weight, layout).items():
            arguments = given | ({} if scale is None else {"global_scale": scale})
            yield Case(
                kind="kernel",
                tool="quantkit",
                operation=method,
                call=_quantizer(weight, layout.name, block_size, method, backend, arguments),
                bytes=moved,
                format=layout.name,
                block_size=block_size,
                backend=backend,
                global_scale=label,
                warm_up=_quantizer(weight[:WARM_ROWS], layout.name, block_size, method, backend, arguments),
            )


def _global_scales(weight: Tensor, layout: BlockFormat) -> dict[str, Any]:
    """Label → quantize()'s argument global_scale; None leaves it out."""
    if not layout.two_level:
        return {"none": None}
    return {"given": amax_scale(weight, layout), "amax": "amax"}


def amax_scale(weight: Tensor, layout: BlockFormat) -> Tensor:
    """The global scale that puts the scale of the largest weight at the end of the format's scale grid."""
    return weight.abs().amax().float() / (layout.element.max_value * layout.scale.max_value)


def _quantizer(
    weight: Tensor, format: str, block_size: int, method: str, backend: str, arguments: dict[str, Any]
) -> Callable[[], object]:
    return lambda: quantize(weight, format, block_size, method, backend=backend, check_finite=False, **arguments)


def _dequantize_case(weight: Tensor, format: str, block_size: int) -> Case:
    q, few = (quantize(rows, format, block_size, "naive") for rows in (weight, weight[:WARM_ROWS]))
    return Case(
        kind="kernel",
        tool="quantkit",
        operation="dequantize",
        call=lambda: q.dequantize(weight.dtype),
        bytes=weight.nbytes + q.codes.nbytes + q.scales.nbytes,
        format=format,
        block_size=block_size,
        backend="triton",
        global_scale="given",
        warm_up=lambda: few.dequantize(weight.dtype),
    )


def _amax_case(weight: Tensor) -> Case:
    from quantkit.kernels import launch

    return Case(
        kind="kernel",
        tool="quantkit",
        operation="amax",
        call=lambda: launch.amax_parts(weight),
        bytes=weight.nbytes,
        format="nvfp4",
        backend="triton",
        global_scale="amax",
        warm_up=lambda: launch.amax_parts(weight[:WARM_ROWS]),
    )


def block_hessian_cases(columns: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The kernel that accumulates block Hessians, on TOKENS tokens of activations."""
    activations = torch.randn(TOKENS, columns, device=device, dtype=dtype)
    for block_size in (16, 32):
        yield _block_hessian_case(activations, block_size)


def _block_hessian_case(activations: Tensor, block_size: int) -> Case:
    from quantkit.kernels import launch

    return Case(
        kind="kernel",
        tool="quantkit",
        operation="block_hessians",
        call=lambda: launch.block_hessians(activations, block_size),
        bytes=activations.nbytes + 4 * activations.shape[1] * block_size,
        block_size=block_size,
        backend="triton",
        warm_up=lambda: launch.block_hessians(activations[:WARM_ROWS], block_size),
    )
