"""Shared by the three objectives: the effective scale, the residual of round-to-nearest, and the search among pairs.

S = scale · global_scale   (float32),   y = x / S   (float32, IEEE),   r = x − S·Q(y)   (float64, exact)

Windows differ in length between blocks, some by a factor of ten. So the search evaluates a list of (block, scale code)
pairs: exactly the codes in each block's window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.formats import BlockFormat

__all__ = ["ScaleChoice", "Search", "effective_scale", "residual"]

# Weights evaluated at once. On a CPU the arrays must fit a core's cache.
CPU_ELEMENTS = 1 << 17
GPU_ELEMENTS = 1 << 22
# Errors closer than this are equal: a matrix product may round one row differently at another place in the matrix.
TIE = 2.0**-48
NO_CODE = 1 << 30  # above every code


@dataclass(frozen=True)
class ScaleChoice:
    """codes: int32 scale codes of the blocks; candidates: int32 how many scales were evaluated for each. One shape.

    levels: float32 element values ``[*shape, block_size]``, where they are not the nearest ones at the scale.
    """

    codes: Tensor
    candidates: Tensor
    levels: Tensor | None = None


def effective_scale(codes: Tensor, fmt: BlockFormat, global_scale: Tensor) -> Tensor:
    """Float32 ``scale · global_scale`` of int32 scale ``codes``, same shape."""
    return fmt.scale.decode(codes) * global_scale


def residual(blocks: Tensor, scale: Tensor, fmt: BlockFormat) -> Tensor:
    """Float64 ``x − S·Q(x/S)`` of float32 ``blocks [..., block_size]`` at float32 effective ``scale [...]``."""
    scale = scale.unsqueeze(-1)
    levels = fmt.element.round(blocks / scale)
    return levels.double().mul_(-scale.double()).add_(blocks)  # the product is exact: 24 bits by 2


class Search:
    """The best scale so far of each block of float32 ``blocks [..., block_size]``; ties go to the smaller code.

    Attributes and methods use flat block indices.
    """

    def __init__(self, blocks: Tensor) -> None:
        self.shape = blocks.shape[:-1]
        self.blocks = blocks.flatten(0, -2)
        number, device = len(self.blocks), blocks.device
        self.codes = torch.zeros(number, dtype=torch.int64, device=device)
        self.error = torch.full((number,), torch.inf, dtype=torch.float64, device=device)
        self.candidates = torch.zeros(number, dtype=torch.int32, device=device)

    def pairs(self, first: Tensor, last: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(block index, code), two int64 tensors, for the codes ``first … last`` of every block; in pieces, in the
        blocks' order. first, last: int32 ``[...]``; a block with ``first > last`` has no pair.
        """
        first, last = first.flatten(), last.flatten()
        count = (last - first + 1).clamp(min=0)
        self.candidates += count
        end = count.cumsum(0)
        block = _count_to(len(count), count.device).repeat_interleave(count)
        codes = (first + count - end).index_select(0, block) + _count_to(len(block), count.device)
        elements = CPU_ELEMENTS if count.device.type == "cpu" else GPU_ELEMENTS
        piece = elements // self.blocks.shape[-1]
        for start in range(0, len(block), piece):
            yield block[start : start + piece], codes[start : start + piece]

    def offer(self, block: Tensor, codes: Tensor, error: Tensor) -> None:
        """Keeps, for each block, the code of least float64 ``error`` among ``codes`` and the best so far."""
        least = self.error.scatter_reduce(0, block, error, "amin")
        kept = torch.where(self.error <= least * (1 + TIE), self.codes, NO_CODE)
        ties = error <= least.index_select(0, block) * (1 + TIE)
        self.codes = kept.scatter_reduce(0, block, torch.where(ties, codes, NO_CODE), "amin")
        self.error = least

    @property
    def choice(self) -> ScaleChoice:
        return ScaleChoice(self.codes.int().view(self.shape), self.candidates.view(self.shape))


def _count_to(number: int, device: torch.device) -> Tensor:
    return torch.arange(number, dtype=torch.int64, device=device)
