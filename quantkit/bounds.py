"""Proven search windows: the range of scale codes outside which no block's optimum needs to be sought.

With ``E(s) = Σ (|x_i| − s·Q(|x_i|/s))²`` over a block of n weights with largest magnitude a (docs/theory.md has the
proofs):

    upper   s ≥ a/3.5 and s/2 representable                 ⇒  E(s/2) ≤ E(s)
    lower   s ≤ 24/(28 + (n−1)/4) · a/6 and 2s representable ⇒  E(2s) ≤ E(s)

so the optimum of the squared error lies between, at most 10 codes (n = 16) or 12 (n = 32) of E4M3's normal range and
two powers of two for UE8M0. Where a scale has no half in the grid (E4M3's subnormals) codes up to the first that is ≥
4a are kept, at which every element rounds to zero.

These two are proven for E2M1 elements and any scale grid. For other elements all codes are the window.

For ``r H rᵀ`` they are wrong. For any elements (6 being the largest level and 1/2 the smallest but zero), with an
incumbent's error E* and t_i = √(E*·(H⁻¹)_ii), since r H rᵀ ≥ r_i²/(H⁻¹)_ii:

    clipping   s ≥ max_i (|x_i| − t_i) / 6
    dead zone  s ≤ 2·(|x_i| + t_i)  for every i with |x_i| > t_i
    magnitude  s ≥ (√(x H xᵀ) − √E*) / (6·Σ_i √H_ii)

All bounds are in the unit of the effective scale ``scale · global_scale``. Float32 rounding of that product and of the
bounds is covered by SLACK: a window may hold one code too many, never one too few that is better by more than rounding.
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
    """(lower, upper): the optimum's scale is above lower·amax and below upper·amax, where half and double scales exist.

    Both follow from the grid's top: levels up to the third-highest (3 for E2M1) have a half that is a level, the
    midpoint above it (3.5) is where the next one begins; doubling the scale loses at most (s/2)² an element and gains,
    for the largest, the clipping error that remains. Raises ValueError for an element grid that the proof does not
    cover.
    """
    if not has_windows(element):
        raise ValueError(f"the search windows are proven for e2m1 elements, not for {element.name}; see docs/theory.md")
    return 24 / (28 + (block_size - 1) / 4) / 6, 1 / 3.5


def zeroing_factor(element: ElementGrid) -> float:
    """Scale over amax from which on every element rounds to zero: amax is then half the smallest level, a tie."""
    return 2 / element.value(1)


def zeroing_code(amax: Tensor, element: ElementGrid, scale: ScaleGrid, global_scale: Tensor) -> Tensor:
    """int32 smallest code at which every element rounds to zero; float32 ``amax`` of any shape."""
    factor = zeroing_factor(element) * (1 + SLACK)
    return scale.ceil_code(amax / global_scale * factor).clamp(min=scale.min_code)


def sse_window(
    amax: Tensor, element: ElementGrid, scale: ScaleGrid, global_scale: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """(first, last) int32 codes, of ``amax``'s shape, between which a scale of least squared error lies.

    amax: float32 largest magnitude of each block, in the weight's unit; global_scale: float32 scalar. All codes where
    no window is proven for the elements.
    """
    if not has_windows(element):
        first = torch.full_like(amax, scale.min_code, dtype=torch.int32)
        return first, torch.full_like(first, scale.max_code)
    lower, upper = sse_window_factors(element, block_size)
    ratio = amax / global_scale
    # Codes above this one cannot be doubled, so the lower bound says nothing of them.
    last_doubling = int(scale.floor_code(torch.tensor(scale.max_value / 2)))
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
    """(first, last) int32 codes ``[...]`` outside which ``r H rᵀ`` exceeds the incumbent's.

    magnitudes: float64 |x| ``[..., block_size]``; error: float64 incumbent errors ``[...]``; inverse_diagonal (H⁻¹)_ii:
    broadcastable to magnitudes. The window need not hold the incumbent itself when the two differ by rounding alone.
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
    """int32 smallest code ``[...]`` that can bring ``r H rᵀ`` from the error of all zeros down to the incumbent's.

    It matters where correlated activations leave clipping without a bound. zero_error: float64 x H xᵀ ``[...]``; error:
    float64 incumbent errors ``[...]``; sum_of_norms: float64 Σ √H_ii, broadcastable to them.
    """
    needed = (zero_error.sqrt() - error.sqrt()).clamp(min=0)
    least = needed / (element.max_value * sum_of_norms * global_scale.to(needed.dtype))
    return scale.ceil_code((least * (1 - SLACK)).float()).clamp(min=scale.min_code)
