"""The scale and the codes of a block of least ``r H rᵀ`` found together, r = x − s·q with any levels q.

At one scale the best codes are a closest-vector problem. Nearest codes are a start; coordinate descent improves it:

    g = r H,   q_i ← level nearest to q_i + g_i / (H_ii s),   i = 1 … block_size,   ROUNDS times

No step raises the error, so at every scale the error is at most that of nearest codes. The scales are searched as in
hessian.py, whose windows hold for codes of any kind. So a block's error is at most that of objective ``hessian``.

The result is not proven optimal: closest_vector.py finds the optimum, and docs/layer.md has the measured gap.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.reference.common import ScaleChoice, effective_scale
from quantkit.reference.hessian import HessianSearch

__all__ = ["ROUNDS", "choose_scales", "descend"]

ROUNDS = 3


def choose_scales(blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, factors: HessianFactors) -> ScaleChoice:
    """Scales and levels of float32 ``blocks [rows, num_blocks, block_size]``; Hessian j is of ``blocks[:, j]``."""
    search = HessianSearch(blocks, fmt, global_scale, factors)
    levels = torch.zeros_like(search.blocks)
    hessians = factors.factor @ factors.factor.mT

    def evaluate(first: Tensor, last: Tensor) -> None:
        for block, codes in search.pairs(first, last):
            columns, pairs = torch.unique_consecutive(block // search.rows, return_counts=True)
            scale = effective_scale(codes, fmt, global_scale)
            parts = zip(block.split(pairs.tolist()), scale.split(pairs.tolist()), hessians[columns], strict=True)
            found = torch.cat([descend(search.blocks[part], own, hessian, fmt) for part, own, hessian in parts])
            error = search.errors(search.blocks[block] - scale.double().unsqueeze(-1) * found, block)
            search.offer(block, codes, error)
            best = codes == search.codes[block]
            levels[block[best]] = found[best].float()

    search.run(evaluate)
    by_row = levels.view(*search.shape, -1).transpose(0, 1)
    return ScaleChoice(search.choice.codes.T, search.choice.candidates.T, by_row)


def descend(blocks: Tensor, scale: Tensor, hessian: Tensor, fmt: BlockFormat, rounds: int = ROUNDS) -> Tensor:
    """Float64 levels ``[n, block_size]`` of float32 ``blocks`` at float32 effective ``scale [n]``.

    hessian: float64 ``[block_size, block_size]``, of all the blocks.
    """
    # A coordinate of all blocks lies together: [block_size, n].
    x, wide = blocks.T.contiguous(), scale.double()
    levels = fmt.element.round_signed(x / scale).double()
    g = hessian @ (x - wide * levels)
    reach = 1 / wide
    for _ in range(rounds):
        for i, row in enumerate(hessian):
            wanted = torch.addcmul(levels[i], g[i] / row[i], reach)
            level = fmt.element.round_signed(wanted.float()).double()
            g.addr_(row, wide * (level - levels[i]), alpha=-1)
            levels[i] = level
    return levels.T
