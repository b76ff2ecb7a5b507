"""The residuals that MXFP4's Hessian kernel finds two an instruction, in half precision: every element and scale.

The instructions are those of ``kernels/hessian.py``, each rounded once, as the GPU rounds them.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantkit import E2M1

# Where norm_of_twos answers: the smallest tie above half precision's subnormals, the largest level far below its end.
SCALES = [2.0**k for k in range(-40, 40) if 2.0**k / 4 > 2.0**-14 and 2.0**k * E2M1.max_value < 2.0**9]


def half(x: np.ndarray) -> np.ndarray:
    """Rounded to half precision; NumPy rounds a float64 once."""
    return x.astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("scale", SCALES)
def test_every_residual_is_exact(scale: float) -> None:
    x = np.arange(np.float16(2).view(np.uint16), dtype=np.uint16).view(np.float16).astype(np.float64)  # 0 ≤ x < 2
    least, most, times = scale * (1 + 2.0**-8), scale * E2M1.max_value, 2.0**9
    assert (half(np.array([least, most, times])) == [least, most, times]).all()
    y = np.maximum(x, least)
    level = half(y * times - half(y * times - x))
    residual = half(x - np.minimum(level, most))
    want = x - scale * E2M1.round(torch.tensor(x / scale, dtype=torch.float32)).double().numpy()
    assert (residual == want).all()


def test_the_scales_are_those_of_all_blocks_but_odd_ones() -> None:
    """Of elements normalized to below 2: beyond, all are zero, or the largest is clipped 300 times over."""
    assert min(SCALES) == 2.0**-11 and max(SCALES) == 2.0**6
