"""Naive scales: the block's largest magnitude is mapped near the top of the element grid.

    fractional scales (E4M3)   amax / (6 · global_scale) rounded to nearest even, at least the smallest positive scale
    powers of two (UE8M0)      floor   2^(⌊log₂ amax⌋ − 2)           (OCP MX v1.0, section 6.3)
                               ceil    2^(⌈log₂ amax⌉ − 2)
                               even    2^(⌊log₂ e⌋ − 2), e = amax rounded to the element's mantissa, half up
                               rceil   2^⌈log₂(amax / 6)⌉

6 is E2M1's largest value and 2 its exponent. Exponents are read from the float32's bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.formats import FLOAT32_EXPONENT_MASK, FLOAT32_MANTISSA, BlockFormat
from quantkit.reference.common import ScaleChoice

__all__ = ["choose_scales", "naive_codes"]


def choose_scales(blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str) -> ScaleChoice:
    """Naive scale of float32 ``blocks [..., block_size]``; ``rule`` is one of the format's ``scale_rules``."""
    codes = naive_codes(blocks.abs().amax(-1), fmt, global_scale, rule)
    return ScaleChoice(codes, torch.ones_like(codes))


def naive_codes(amax: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str) -> Tensor:
    """int32 scale codes for float32 ``amax`` of any shape."""
    grid, element = fmt.scale, fmt.element
    if not grid.is_power_of_two:
        return grid.encode(grid.round(amax / (element.max_value * global_scale)).clamp(min=grid.min_value))
    if rule == "rceil":
        return grid.ceil_code(amax / element.max_value)
    bits = amax.view(torch.int32)
    if rule == "ceil":
        bits = bits + ((1 << FLOAT32_MANTISSA) - 1)
    elif rule == "even":
        bits = bits + (1 << (FLOAT32_MANTISSA - element.mantissa_bits - 1))
    else:
        assert rule == "floor", rule
    codes = ((bits & FLOAT32_EXPONENT_MASK) >> FLOAT32_MANTISSA) - element.max_exponent
    return codes.clamp(grid.min_code, grid.max_code)
