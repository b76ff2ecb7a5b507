"""The representable scale of least output error of its own block, ``r H rᵀ`` with r = x − s·Q(x/s) and H = X_jᵀX_j.

With H = A Aᵀ the error is ‖r A‖², which stays accurate where r lies in H's weak directions. Three steps:

1. incumbent: the best scale of the squared error's window (bounds.py). The optimum may lie outside it.
2. window: the codes that the incumbent's error does not rule out.
3. rest: the codes of this window above the squared error's window, then those below it in descending order.

The codes below are evaluated a few at a time. In between, the magnitude bound excludes some, by the best error so far.

The element codes are round-to-nearest at the chosen scale. There is no error feedback as in GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quantkit import bounds
from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.reference.common import ScaleChoice, Search, effective_scale, residual

__all__ = ["HessianSearch", "choose_scales"]

CODES_AT_A_TIME = 4  # evaluated below the squared error's window before the magnitude bound is applied again


def choose_scales(blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, factors: HessianFactors) -> ScaleChoice:
    """Hessian-optimal scale of ``blocks [rows, num_blocks, block_size]``; Hessian j is of ``blocks[:, j]``."""
    search = HessianSearch(blocks, fmt, global_scale, factors)

    def evaluate(first: Tensor, last: Tensor) -> None:
        for block, codes in search.pairs(first, last):
            r = residual(search.blocks.index_select(0, block), effective_scale(codes, fmt, global_scale), fmt)
            search.offer(block, codes, search.errors(r, block))

    search.run(evaluate)
    return ScaleChoice(search.choice.codes.T, search.choice.candidates.T)


class HessianSearch(Search):
    """The three steps, for ``blocks [rows, num_blocks, block_size]`` and any way to evaluate a range of codes.

    The windows hold for codes of any kind, nearest or not: they bound ``r H rᵀ`` from below over all codes at a scale.
    """

    def __init__(self, blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, factors: HessianFactors) -> None:
        # [num_blocks, rows, block_size]: the blocks of one Hessian lie together
        super().__init__(blocks.transpose(0, 1))
        self.fmt, self.global_scale, self.factors = fmt, global_scale, factors
        self.rows = blocks.shape[0]

    def errors(self, residuals: Tensor, block: Tensor) -> Tensor:
        """Float64 ‖r A‖² of float64 ``residuals [pairs, block_size]`` of the blocks ``block [pairs]``, ascending."""
        columns, pairs = torch.unique_consecutive(block // self.rows, return_counts=True)
        parts = zip(residuals.split(pairs.tolist()), self.factors.factor[columns], strict=True)
        return torch.cat([part @ factor for part, factor in parts]).square_().sum(-1)

    def run(self, evaluate: Callable[[Tensor, Tensor], None]) -> None:
        """Calls ``evaluate(first, last)`` for every range of codes that may hold the optimum."""
        fmt, global_scale, factors = self.fmt, self.global_scale, self.factors
        magnitudes = self.blocks.abs().view(*self.shape, -1)
        search_first, search_last = bounds.sse_window(
            magnitudes.amax(-1), fmt.element, fmt.scale, global_scale, magnitudes.shape[-1]
        )
        evaluate(search_first, search_last)
        first, last = bounds.hessian_window(
            magnitudes.double(),
            self.error.view(self.shape),
            factors.inverse_diagonal.unsqueeze(1),
            fmt.element,
            fmt.scale,
            global_scale,
        )
        evaluate(torch.maximum(first, search_last + 1), last)
        first, last = first.flatten(), torch.minimum(last, search_first - 1).flatten()
        sums_of_norms = factors.factor.norm(dim=-1).sum(-1)
        while bool((first <= last).any()):
            evaluate(torch.maximum(first, last - (CODES_AT_A_TIME - 1)), last)
            last = last - CODES_AT_A_TIME
            block = (first <= last).nonzero().squeeze(1)
            if len(block):
                zero_error, error = self.errors(self.blocks[block].double(), block), self.error[block]
                matters = bounds.first_useful_code(
                    zero_error, error, sums_of_norms[block // self.rows], fmt.element, fmt.scale, global_scale
                )
                first = first.index_copy(0, block, torch.maximum(first[block], matters))
