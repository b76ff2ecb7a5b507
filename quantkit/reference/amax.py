"""The global scale of a two-level format from the largest magnitude of the weight.

    global_scale = amax(weight) / (largest element · largest scale)      float32, for NVFP4 amax / (6·448)

With headroom, the largest power of two in the scale grid takes the place of the largest scale: amax / (6·256). The
block of the largest weight can then take a scale above that of its amax.

Clamped to float32's smallest normal number, below which it would lose precision; 1 for a weight of zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit.formats import FLOAT32_SMALLEST_NORMAL, BlockFormat

__all__ = ["global_scale_of"]


def global_scale_of(matrix: Tensor, fmt: BlockFormat, headroom: bool = False) -> Tensor:
    """Float32 scalar on the device of ``matrix`` (any shape and float dtype); 1 for a single-level format."""
    if not fmt.two_level or matrix.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=matrix.device)
    amax = torch.linalg.vector_norm(matrix, torch.inf).float()
    largest = 2.0 ** (math.frexp(fmt.scale.max_value)[1] - 1) if headroom else fmt.scale.max_value
    # The divisor is a tensor: by a Python number, CUDA multiplies with its reciprocal and may be off by an ulp.
    multiplier = amax / torch.full_like(amax, fmt.element.max_value * largest)
    return torch.where(amax > 0, multiplier.clamp(min=FLOAT32_SMALLEST_NORMAL), 1.0)
