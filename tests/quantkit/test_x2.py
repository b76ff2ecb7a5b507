"""The fp16x2 arithmetic of MXFP4's kernels, for every element and scale.

NumPy executes the instructions of ``kernels/ptx.py`` in their order, and rounds each once, as the GPU does.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit import E2M1

# Scales that fp16_norm_x2 evaluates: the smallest tie is well above fp16's subnormals, and the largest level far below
# its largest number.
SCALES = [2.0**k for k in range(-40, 40) if 2.0**k / 4 > 2.0**-13 and 2.0**k * E2M1.max_value < 2.0**9]


def half(x: np.ndarray) -> np.ndarray:
    """Rounded to half precision; NumPy rounds a float64 once."""
    return x.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("scale", SCALES)
def test_every_residual_is_exact(scale: float) -> None:
    """Elements below 2; and below 4 for bfloat16 elements that no float32 power of two brings below 2."""
    x = np.arange(np.float16(2).view(np.uint16), dtype=np.uint16).view(np.float16).astype(np.float64)
    x = np.concatenate([x, 2 + np.arange(128) / 64])
    least, most, times = scale * (1 + 2.0**-8), scale * E2M1.max_value, 2.0**9
    assert (half(np.array([least, most, times])) == [least, most, times]).all()
    y = np.maximum(x, least)
    level = half(y * times - half(y * times - x))
    residual = half(x - np.minimum(level, most))
    want = x - scale * E2M1.round(torch.tensor(x / scale, dtype=torch.float32)).double().numpy()
    assert (residual == want).all()


def test_the_scales_are_those_of_all_blocks_but_odd_ones() -> None:
    """Scales for elements normalized to below 2. Beyond, all levels are zero, or the largest is clipped 300-fold."""
    assert min(SCALES) == 2.0**-10 and max(SCALES) == 2.0**6


def test_every_code_is_that_of_the_quotient() -> None:
    """Every fp16 number times every power of two, also where the quotient exceeds fp16; a zero keeps its sign."""
    numbers = np.arange(2**16, dtype=np.uint16).view(np.float16)
    x = numbers[np.isfinite(numbers)].astype(np.float64)
    unit = 2.0**-6
    for exponent in range(-30, 31, 3):
        with np.errstate(over="ignore"):
            y = half(np.float32(x * 2.0**exponent * unit).astype(np.float64))
        y = np.copysign(np.minimum(np.abs(y), E2M1.max_value * unit), y)
        magnitude = np.maximum(np.abs(y), unit * (1 + 2.0**-8))
        level = half(np.copysign(magnitude, y) * 2.0**9 - half(np.copysign(magnitude, y) * 2.0**9 - y))
        level = np.copysign(level, y) / unit
        want = E2M1.decode_signed(E2M1.encode_signed(torch.tensor(x * 2.0**exponent, dtype=torch.float32))).numpy()
        assert (level == want).all() and (np.signbit(level) == np.signbit(want)).all()


@pytest.mark.parametrize("root", [1e-3, 0.5, 1.0, 3.0, 1e3, 1e5])
def test_bounds_are_rounded_outwards(root: float) -> None:
    """Every element of either sign, with a radius and √(H⁻¹)_ii of every size, within fp16's range or not."""
    magnitudes = np.arange(np.float16(2).view(np.uint16), dtype=np.uint16).view(np.float16).astype(np.float64)
    for radius in np.geomspace(1e-9, 1e6, 151):
        for below in (0.0, 0.99 * 2.0**-24):  # what rounding toward zero may have taken off small ones
            exact = np.where(magnitudes < 2.0**-14, magnitudes + below, magnitudes)
            reach = radius * root
            with np.errstate(over="ignore"):
                up_radius, up_root = (half(np.array(v * (1 + 2.0**-10) + 2.0**-24)) for v in (radius, root))
                less, more = half(magnitudes - up_radius * up_root), half(magnitudes + up_radius * up_root)
            clipping = np.maximum(np.maximum(less, 0) * (1 - 2.0**-10) - 2.0**-24, 0)
            assert (clipping <= np.maximum(exact - reach, 0)).all()
            used = less > 0
            assert (exact[used] > reach).all()
            assert (more[used] * (1 + 2.0**-10) + 2.0**-23 >= exact[used] + reach).all()
