"""What the three methods share: the effective scale, the residual of round-to-nearest, and the record of a search.

S = scale · global_scale   (float32),   y = |x| / S   (float32, IEEE),   r = |x| − S·Q(y)   (float64, exact)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import BlockFormat

__all__ = ["ScaleChoice", "Search", "effective_scale", "residual"]


@dataclass(frozen=True)
class ScaleChoice:
    """codes: int32 scale codes of the blocks; candidates: int32 how many scales were evaluated for each. One shape."""

    codes: Tensor
    candidates: Tensor


def effective_scale(codes: Tensor, fmt: BlockFormat, global_scale: Tensor) -> Tensor:
    """Float32 ``scale · global_scale`` of int32 scale ``codes``, same shape."""
    return fmt.scale.decode(codes) * global_scale


def residual(magnitudes: Tensor, exact_magnitudes: Tensor, scale: Tensor, fmt: BlockFormat) -> Tensor:
    """Float64 ``|x| − S·Q(|x|/S)``, ``[..., block_size]``; the magnitudes in both precisions."""
    scale = scale.unsqueeze(-1)
    levels = fmt.element.round(magnitudes / scale)
    return torch.addcmul(exact_magnitudes, levels.double(), scale.double(), value=-1)


class Search:
    """The best scale seen so far for each block; ties go to the smaller code."""

    def __init__(self, first: Tensor) -> None:
        self.codes = first.clone()
        self.error = torch.full(first.shape, torch.inf, dtype=torch.float64, device=first.device)
        self.candidates = torch.zeros_like(first)

    def offer(self, codes: Tensor, error: Tensor, wanted: Tensor) -> None:
        """Takes ``codes`` where ``wanted`` and their float64 ``error`` is less, or equal at a smaller code."""
        better = (error < self.error) | ((error == self.error) & (codes < self.codes))
        better &= wanted
        self.codes = torch.where(better, codes, self.codes)
        self.error = torch.where(better, error, self.error)
        self.candidates += wanted

    @property
    def choice(self) -> ScaleChoice:
        return ScaleChoice(self.codes, self.candidates)
