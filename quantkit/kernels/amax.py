"""The first pass of a two-level format whose global scale comes from amax: largest magnitudes of parts of W.

    global scale = amax(W) / (6 · 448)

Each program takes its share of W in strides and writes one largest magnitude. The kernel after finds the largest of
these (``global_scale_of``), so nothing has to be zeroed before, and no program waits for another.
Magnitudes are compared as integers, which orders floats, and puts NaN last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import let_next_start, wait_for_previous

__all__ = ["amax_kernel"]


@triton.jit
def amax_kernel(
    weight_ptr,  # [size] bf16, fp16 or fp32
    parts_ptr,  # [programs] int32, bits of the float32 largest magnitudes
    size,
    BLOCK_N: tl.constexpr,  # elements a step
    OVERLAP: tl.constexpr,  # with the kernel after
    AFTER: tl.constexpr,  # started while the kernel before still runs; ends after it, on which the one after relies
):
    let_next_start(OVERLAP)
    # With evict_first, lines in the cache that wait to be written stay there: the next kernel has more time for them.
    GROUP: tl.constexpr = 8  # elements that a thread folds at once, so that it need not keep them apart
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N // GROUP], tl.int32)
    for offset in range(start, size, stride):
        position = offset + lane
        weight = tl.load(weight_ptr + position, mask=position < size, other=0.0, eviction_policy="evict_first")
        magnitude = weight.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.maximum(largest, tl.max(tl.reshape(magnitude, [BLOCK_N // GROUP, GROUP]), axis=1))
    wait_for_previous(AFTER)
    tl.store(parts_ptr + tl.program_id(0), tl.max(largest, axis=0))
