"""The representable scale of least squared error, one block at a time.

    E(s) = Σ (|x_i| − s·Q(|x_i|/s))²,  minimised over the codes that bounds.py leaves

No code outside that window has a smaller error. Errors are summed in float64 from exact residuals. Ties go to the
smaller scale.
"""

from __future__ import annotations

from torch import Tensor

from quantkit import bounds
from quantkit.formats import BlockFormat
from quantkit.reference.common import ScaleChoice, Search, effective_scale, residual

__all__ = ["choose_scales"]


def choose_scales(blocks: Tensor, fmt: BlockFormat, global_scale: Tensor) -> ScaleChoice:
    """SSE-optimal scale of float32 ``blocks [..., block_size]``."""
    magnitudes = blocks.abs()
    exact_magnitudes = magnitudes.double()
    first, last = bounds.sse_window(magnitudes.amax(-1), fmt.element, fmt.scale, global_scale, blocks.shape[-1])
    search = Search(first)
    for step in range(int((last - first).max()) + 1 if first.numel() else 0):
        codes = (first + step).clamp(max=fmt.scale.max_code)
        scale = effective_scale(codes, fmt, global_scale)
        error = residual(magnitudes, exact_magnitudes, scale, fmt).square_().sum(-1)
        search.offer(codes, error, first + step <= last)
    return search.choice
