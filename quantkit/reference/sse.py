"""The representable scale of least squared error, one block at a time.

    E(s) = Σ (|x_i| − s·Q(|x_i|/s))²,  minimised over the codes of bounds.sse_window

No code outside that window has a smaller error. Residuals are exact, and their squares are summed in float64. Ties go
to the smaller scale.
"""

from __future__ import annotations

from torch import Tensor

from quantkit import bounds
from quantkit.formats import BlockFormat
from quantkit.reference.common import ScaleChoice, Search, effective_scale, residual

__all__ = ["choose_scales"]


def choose_scales(blocks: Tensor, fmt: BlockFormat, global_scale: Tensor) -> ScaleChoice:
    """SSE-optimal scale of float32 ``blocks [..., block_size]``."""
    amax = blocks.abs().amax(-1)
    window = bounds.sse_window(amax, fmt.element, fmt.scale, global_scale, blocks.shape[-1])
    search = Search(blocks)
    for block, codes in search.pairs(*window):
        r = residual(search.blocks.index_select(0, block), effective_scale(codes, fmt, global_scale), fmt)
        search.offer(block, codes, r.square_().sum(-1))
    return search.choice
