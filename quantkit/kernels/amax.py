"""Partial amax values of W: the first pass of a two-level format whose global scale comes from amax.

    global scale = amax(W) / (6 · 448)

Each program reads its share of W in strides and writes one partial amax. The next kernel takes the maximum of these
(``global_scale_of``). So no memory has to be zeroed first, and no program waits for another. The bits of magnitudes are
compared as integers, which orders them like floats, with NaN above all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import max_magnitude_x2, pdl_launch_dependents, pdl_wait, row_amax_x2

__all__ = ["amax_kernel"]


@triton.jit
def update_group_amax(largest, weight, GROUP: tl.constexpr, X2: tl.constexpr):
    """Running amax of groups of GROUP weights: [groups, 2] of the weight's type if X2, else [groups] float32 bits."""
    groups = tl.reshape(weight, [weight.shape[0] // GROUP, GROUP])
    if X2:
        return max_magnitude_x2(largest, row_amax_x2(groups))
    else:
        magnitude = groups.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.maximum(largest, tl.max(magnitude, axis=1))


@triton.jit
def amax_kernel(
    weight_ptr,  # [size] bf16, fp16 or fp32
    parts_ptr,  # [programs] int32, bits of the float32 largest magnitudes
    size,
    BLOCK_N: tl.constexpr,  # elements per step
    TARGET: tl.constexpr,
    PDL: tl.constexpr,  # programmatic dependent launch: the next kernel may start before this one has ended
    PDL_WAIT: tl.constexpr,  # this kernel itself may start before the previous one has ended
):
    pdl_launch_dependents(PDL)
    # evict_first keeps dirty cache lines of earlier kernels in the cache, so they are written back later.
    GROUP: tl.constexpr = 8  # elements that a thread reduces to one register before the next step
    X2: tl.constexpr = TARGET == "cuda" and weight_ptr.dtype.element_ty.primitive_bitwidth == 16
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    if X2:
        largest = tl.zeros([BLOCK_N // GROUP, 2], weight_ptr.dtype.element_ty)
    else:
        largest = tl.zeros([BLOCK_N // GROUP], tl.int32)
    for offset in range(start, size, stride):
        position = offset + lane
        weight = tl.load(weight_ptr + position, mask=position < size, other=0.0, eviction_policy="evict_first")
        largest = update_group_amax(largest, weight, GROUP, X2)
    if X2:
        magnitudes = largest.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        largest = tl.reshape(magnitudes, [BLOCK_N // GROUP * 2])
    pdl_wait(PDL_WAIT)  # the next kernel waits for this one alone, so this one must end after the previous one
    tl.store(parts_ptr + tl.program_id(0), tl.max(largest, axis=0))
