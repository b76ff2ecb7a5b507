"""One function per format and method, for explicit blocks; they return values, not codes, and single-level scales.

``W`` has the block dimension ``dim`` (of size 16 or 32); every function returns ``(scales, quants)`` or, with
``return_dequant=True``, ``(scales, quants, dequantized)``:

    scales  float32, the shape of W without ``dim``: values of the format's scale grid
    quants  float32, the shape of W: signed element values before scaling

Names and shapes are those of qwantize, so that code written for qwantize runs. ``*_optimal`` minimises the squared
error. ``*_optimal_hessian`` minimises ``r H rᵀ`` with H from ``X [tokens, K]``. The K columns of X are the elements of
a row's blocks, in order. The ``_triton`` functions run the fused kernels, the others the reference.
"""

from __future__ import annotations

from torch import Tensor

from quantkit.quantize import quantize
from quantkit.tensor import saturated

__all__ = [
    f"{fmt}_{name}"
    for fmt in ("nvfp4", "mxfp4")
    for name in (
        "naive",
        "naive_triton",
        "optimal",
        "optimal_triton",
        "optimal_hessian",
        "optimal_hessian_triton",
        "dequantize",
    )
]


def _blockwise(
    format: str, method: str, backend: str, W: Tensor, dim: int, return_dequant: bool, X: Tensor | None = None
) -> tuple[Tensor, ...]:
    if not -W.ndim <= dim < W.ndim:
        raise ValueError(f"dim {dim} is out of range for a tensor with {W.ndim} dimensions")
    blocks = W.movedim(dim, -1)
    block_size = blocks.shape[-1]
    if method == "hessian":
        if X is None:
            raise ValueError(f"{format}_optimal_hessian needs the layer's inputs: X=[tokens, in_features]")
        if blocks.ndim < 2 or X.ndim != 2 or blocks.shape[-2] * block_size != X.shape[1]:
            raise ValueError(
                f"X of shape {list(X.shape)} does not fit blocks of shape {list(blocks.shape)}: "
                "expected [tokens, num_blocks * block_size]"
            )
        matrix = blocks.flatten(-2)
    else:
        matrix = blocks
    q = quantize(matrix, format, block_size, method, activations=X, backend=backend, global_scale="none")
    scales = q.scale_values().reshape(blocks.shape[:-1])
    quants = q.values().reshape(blocks.shape).movedim(-1, dim)
    if return_dequant:
        return scales, quants, _dequantize(scales, quants, dim)
    return scales, quants


def _dequantize(scales: Tensor, quants: Tensor, dim: int) -> Tensor:
    values = quants * scales.unsqueeze(dim)
    return saturated(values, values.dtype)


def nvfp4_naive(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """NVFP4 with E4M3 scales nearest to amax/6."""
    return _blockwise("nvfp4", "naive", "reference", W, dim, return_dequant)


def nvfp4_optimal(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """NVFP4 with the E4M3 scales of least squared error."""
    return _blockwise("nvfp4", "sse", "reference", W, dim, return_dequant)


def nvfp4_optimal_hessian(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None
) -> tuple[Tensor, ...]:
    """NVFP4 with the E4M3 scales of least ``r H rᵀ``, H from the activations X ``[tokens, K]``."""
    return _blockwise("nvfp4", "hessian", "reference", W, dim, return_dequant, X)


def nvfp4_naive_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """:func:`nvfp4_naive` by the fused kernel."""
    return _blockwise("nvfp4", "naive", "triton", W, dim, return_dequant)


def nvfp4_optimal_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """:func:`nvfp4_optimal` by the fused kernel."""
    return _blockwise("nvfp4", "sse", "triton", W, dim, return_dequant)


def nvfp4_optimal_hessian_triton(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None
) -> tuple[Tensor, ...]:
    """:func:`nvfp4_optimal_hessian` by the fused kernel."""
    return _blockwise("nvfp4", "hessian", "triton", W, dim, return_dequant, X)


def nvfp4_dequantize(scales: Tensor, quants: Tensor, dim: int = -1) -> Tensor:
    """``quants · scales``, the scales broadcast over ``dim``, at most the dtype's largest finite number."""
    return _dequantize(scales, quants, dim)


def mxfp4_naive(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """MXFP4 with the OCP scales 2^(⌊log₂ amax⌋ − 2)."""
    return _blockwise("mxfp4", "naive", "reference", W, dim, return_dequant)


def mxfp4_optimal(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """MXFP4 with the powers of two of least squared error."""
    return _blockwise("mxfp4", "sse", "reference", W, dim, return_dequant)


def mxfp4_optimal_hessian(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None
) -> tuple[Tensor, ...]:
    """MXFP4 with the powers of two of least ``r H rᵀ``, H from the activations X ``[tokens, K]``."""
    return _blockwise("mxfp4", "hessian", "reference", W, dim, return_dequant, X)


def mxfp4_naive_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """:func:`mxfp4_naive` by the fused kernel."""
    return _blockwise("mxfp4", "naive", "triton", W, dim, return_dequant)


def mxfp4_optimal_triton(W: Tensor, dim: int = -1, return_dequant: bool = False) -> tuple[Tensor, ...]:
    """:func:`mxfp4_optimal` by the fused kernel."""
    return _blockwise("mxfp4", "sse", "triton", W, dim, return_dequant)


def mxfp4_optimal_hessian_triton(
    W: Tensor, dim: int = -1, return_dequant: bool = False, X: Tensor | None = None
) -> tuple[Tensor, ...]:
    """:func:`mxfp4_optimal_hessian` by the fused kernel."""
    return _blockwise("mxfp4", "hessian", "triton", W, dim, return_dequant, X)


def mxfp4_dequantize(scales: Tensor, quants: Tensor, dim: int = -1) -> Tensor:
    """``quants · scales``, the scales broadcast over ``dim``, at most the dtype's largest finite number."""
    return _dequantize(scales, quants, dim)
