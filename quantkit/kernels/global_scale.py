"""The decode multiplier of a two-level format, ``amax(W) / (6 · 448)``, in one pass over W and one launch.

Programs take their share of W in strides, offer its largest magnitude to a common maximum, and the one that comes last
turns the maximum into the multiplier. Magnitudes are compared as integers, which orders floats, and puts NaN last.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["global_scale_kernel"]


@triton.jit
def global_scale_kernel(
    weight_ptr,  # [size] bf16, fp16 or fp32
    largest_ptr,  # [1] int32, zero at the start: bits of the float32 maximum
    arrived_ptr,  # [1] int32, zero at the start: programs that are done
    multiplier_ptr,  # [1] fp32
    size,
    LARGEST_PRODUCT: tl.constexpr,  # largest element value times largest scale
    SMALLEST_NORMAL: tl.constexpr,
    BLOCK_N: tl.constexpr,  # elements a step
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    stride = tl.num_programs(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    largest = tl.zeros([BLOCK_N], tl.int32)
    for offset in range(start, size, stride):
        position = offset + lane
        weight = tl.load(weight_ptr + position, mask=position < size, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, weight.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(largest_ptr, tl.max(largest, axis=0))
    if tl.atomic_add(arrived_ptr, 1) == tl.num_programs(0) - 1:
        amax = tl.atomic_max(largest_ptr, 0).to(tl.float32, bitcast=True)
        multiplier = tl.maximum(tl.div_rn(amax, amax * 0.0 + LARGEST_PRODUCT), SMALLEST_NORMAL)
        tl.store(multiplier_ptr, tl.where(amax > 0, multiplier, 1.0))
