"""The first pass of a two-level format whose global scale comes from amax: largest magnitudes of parts of W.

    global scale = amax(W) / (6 · 448)

Each program takes its share of W in strides and writes one largest magnitude. The kernel after finds the largest of
these (``global_scale_of``), so nothing has to be zeroed before, and no program waits for another.
Magnitudes are compared as integers, which orders floats, and puts NaN last.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import larger_by_twos, larger_twos, let_next_start, wait_for_previous

__all__ = ["amax_kernel"]


@triton.jit
def larger_in_groups(largest, weight, GROUP: tl.constexpr, BY_TWOS: tl.constexpr):
    """largest, after a look at weight, GROUP elements to each of its places: two 16-bit magnitudes, or float32 bits."""
    groups = tl.reshape(weight, [weight.shape[0] // GROUP, GROUP])
    if BY_TWOS:
        return larger_by_twos(largest, larger_twos(groups))
    else:
        magnitude = groups.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.maximum(largest, tl.max(magnitude, axis=1))


@triton.jit
def amax_kernel(
    weight_ptr,  # [size] bf16, fp16 or fp32
    parts_ptr,  # [programs] int32, bits of the float32 largest magnitudes
    size,
    BLOCK_N: tl.constexpr,  # elements a step
    TARGET: tl.constexpr,
    OVERLAP: tl.constexpr,  # with the kernel after
    AFTER: tl.constexpr,  # started while the kernel before still runs; ends after it, on which the one after relies
):
    let_next_start(OVERLAP)
    # With evict_first, lines in the cache that wait to be written stay there: the next kernel has more time for them.
    GROUP: tl.constexpr = 8  # elements that a thread folds at once, so that it need not keep them apart
    BY_TWOS: tl.constexpr = TARGET == "cuda" and weight_ptr.dtype.element_ty.primitive_bitwidth == 16
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    if BY_TWOS:
        largest = tl.zeros([BLOCK_N // GROUP, 2], weight_ptr.dtype.element_ty)
    else:
        largest = tl.zeros([BLOCK_N // GROUP], tl.int32)
    for offset in range(start, size, stride):
        position = offset + lane
        weight = tl.load(weight_ptr + position, mask=position < size, other=0.0, eviction_policy="evict_first")
        largest = larger_in_groups(largest, weight, GROUP, BY_TWOS)
    if BY_TWOS:
        magnitudes = largest.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.reshape(magnitudes, [BLOCK_N // GROUP * 2])
    wait_for_previous(AFTER)
    tl.store(parts_ptr + tl.program_id(0), tl.max(largest, axis=0))
