"""Proven search windows: ranges of scale codes that hold a block's optimum. docs/theory.md has the proofs.

Squared error. Let ``E(s) = Σ (|x_i| − s·Q(|x_i|/s))²`` over a block of n weights with largest magnitude a:

    upper   s ≥ a/3.5 and s/2 representable                 ⇒  E(s/2) ≤ E(s)
    lower   s ≤ 24/(28 + (n−1)/4) · a/6 and 2s representable ⇒  E(2s) ≤ E(s)

So an optimum lies between these bounds. They leave at most 10 codes (n = 16) or 12 (n = 32) of E4M3's normal range, and
two of UE8M0's powers of two. Some small E4M3 scales have no half in the grid. There the window goes on, but at most
to the first scale ≥ 4a, at which every element rounds to zero.

Both bounds are proven for E2M1 elements and any scale grid. For other elements the window is all codes.

Hessian. Those bounds do not hold for ``r H rᵀ``. Let E* be the error of an incumbent and t_i = √(E*·(H⁻¹)_ii). Since
r H rᵀ ≥ r_i²/(H⁻¹)_ii, a scale with some |r_i| > t_i is worse. A scale that is no worse satisfies

    clipping   s ≥ max_i (|x_i| − t_i) / 6
    dead zone  s ≤ 2·(|x_i| + t_i)  for every i with |x_i| > t_i
    magnitude  s ≥ (√(x H xᵀ) − √E*) / (6·Σ_i √H_ii)

For other elements, 6 becomes the largest level, and 2 the reciprocal of the smallest positive one.

All bounds are in the unit of the effective scale ``scale · global_scale``. SLACK covers the float32 rounding of that
product and of the bounds. A window may hold a code too many. It never lacks a code that is better beyond rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import ElementGrid, ScaleGrid

__all__ = [
    "SLACK",
    "first_useful_code",
    "has_windows",
    "hessian_window",
    "sse_window",
    "sse_window_factors",
    "zeroing_code",
    "zeroing_factor",
]

SLACK = 2.0**-18


def has_windows(element: ElementGrid) -> bool:
    """Whether the squared error's window is proven for these elements."""
    return (element.exponent_bits, element.mantissa_bits, element.bias) == (2, 1, 1)


def sse_window_factors(element: ElementGrid, block_size: int) -> tuple[float, float]:
    """(lower, upper): an optimum lies above lower·amax and below upper·amax, where the scale has a half and a double.

    upper: if amax ≤ 3.5·s, every element rounds to a level of at most 3, and twice that level is a level at s/2. lower:
    at 2s each element loses at most (s/2)², but the largest one is clipped less. Raises ValueError for an element grid
    that the proof does not cover.
    """
    if not has_windows(element):
        raise ValueError(f"the search windows are proven for e2m1 elements, not for {element.name}; see docs/theory.md")
    return 24 / (28 + (block_size - 1) / 4) / 6, 1 / 3.5


def zeroing_factor(element: ElementGrid) -> float:
    """Smallest scale/amax at which every element rounds to zero: amax is then half the smallest level, a tie."""
    return 2 / element.value(1)


def zeroing_code(amax: Tensor, element: ElementGrid, scale: ScaleGrid, global_scale: Tensor) -> Tensor:
    """int32 smallest code at which every element rounds to zero; float32 ``amax`` of any shape."""
    factor = zeroing_factor(element) * (1 + SLACK)
    return scale.ceil_code(amax / global_scale * factor).clamp(min=scale.min_code)


def sse_window(
    amax: Tensor, element: ElementGrid, scale: ScaleGrid, global_scale: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """(first, last) int32 codes, of ``amax``'s shape: a scale of least squared error lies in this range.

    amax: float32 largest magnitude of each block, in the weight's unit; global_scale: float32 scalar. Where no window
    is proven for the elements, the range is all codes.
    """
    if not has_windows(element):
        first = torch.full_like(amax, scale.min_code, dtype=torch.int32)
        return first, torch.full_like(first, scale.max_code)
    lower, upper = sse_window_factors(element, block_size)
    ratio = amax / global_scale
    # Scales above this code have no double, so the lower bound does not apply to them.
    last_doubling = int(scale.floor_code(torch.tensor(scale.max_value / 2, dtype=torch.float32, device="cpu")))
    first = (scale.floor_code(ratio * (lower * (1 - SLACK))) + 1).clamp(scale.min_code, last_doubling + 1)
    last = scale.floor_code(ratio * (upper * (1 + SLACK)))
    without_half = zeroing_code(amax, element, scale, global_scale).clamp(max=scale.last_code_without_half)
    return first, torch.maximum(torch.maximum(last, without_half), first)


def hessian_window(
    magnitudes: Tensor,
    error: Tensor,
    inverse_diagonal: Tensor,
    element: ElementGrid,
    scale: ScaleGrid,
    global_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """(first, last) int32 codes ``[...]``; outside them ``r H rᵀ`` exceeds the incumbent's error.

    magnitudes: float64 |x| ``[..., block_size]``; error: float64 incumbent errors ``[...]``; inverse_diagonal: float64
    (H⁻¹)_ii, broadcastable to magnitudes. By rounding, the window may miss the incumbent itself.
    """
    reach = (error.unsqueeze(-1) * inverse_diagonal).sqrt() * (1 + SLACK)
    ratio = global_scale.to(magnitudes.dtype)
    clipping = (magnitudes - reach).amax(-1).clamp(min=0) / (element.max_value * ratio)
    smallest_level = element.value(1)
    beyond = torch.where(magnitudes > reach, (magnitudes + reach) / smallest_level, torch.inf)
    dead_zone = beyond.amin(-1) / ratio
    first = scale.ceil_code((clipping * (1 - SLACK)).float()).clamp(min=scale.min_code)
    last = scale.floor_code((dead_zone * (1 + SLACK)).float()).clamp(min=scale.min_code)
    return first, torch.minimum(last, zeroing_code(magnitudes.amax(-1).float(), element, scale, global_scale))


def first_useful_code(
    zero_error: Tensor,
    error: Tensor,
    sum_of_norms: Tensor,
    element: ElementGrid,
    scale: ScaleGrid,
    global_scale: Tensor,
) -> Tensor:
    """int32 smallest code ``[...]`` whose ``r H rᵀ`` can be as small as the incumbent's: the magnitude bound.

    It helps where correlated activations make the clipping bound useless. zero_error: float64 x H xᵀ ``[...]``; error:
    float64 incumbent errors ``[...]``; sum_of_norms: float64 Σ √H_ii, broadcastable to them.
    """
    needed = (zero_error.sqrt() - error.sqrt()).clamp(min=0)
    least = needed / (element.max_value * sum_of_norms * global_scale.to(needed.dtype))
    return scale.ceil_code((least * (1 - SLACK)).float()).clamp(min=scale.min_code)
