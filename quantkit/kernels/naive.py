"""Naive scales; the twin of reference/naive.py, where the formula is."""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import (
    block_amax,
    encode_magnitude,
    load_blocks,
    load_global_scale,
    normalizer,
    packed_codes,
    pairs,
    pdl_wait,
    reciprocal_of,
    round_to_grid,
    rounded_quotient,
    scale_ceil_code,
)

__all__ = ["MULTIPLIED_MANTISSA", "naive_codes", "naive_kernel"]

# rounded_quotient is proven to lie on the right side of every tie of scale grids with at most this many mantissa bits
# (docs/theory.md). With more, such as UE4M4's four, the kernel divides.
MULTIPLIED_MANTISSA = tl.constexpr(3)


@triton.jit
def largest_product(global_scale, FMT: tl.constexpr, TARGET: tl.constexpr):
    """(divisor, normalize, reciprocal, rest) [1]: divisor = element_max · global_scale · normalize lies in [1, 2)."""
    product = tl.full([1], FMT.element_max, tl.float32) * global_scale
    normalize = normalizer(product)
    reciprocal, rest = reciprocal_of(product * normalize, FMT, TARGET)
    return product * normalize, normalize, reciprocal, rest


@triton.jit
def naive_codes(amax, largest, FMT: tl.constexpr, RULE: tl.constexpr, TARGET: tl.constexpr):
    """int32 scale codes of float32 amax; largest: see largest_product."""
    if FMT.scale_mantissa > 0:
        divisor, normalize, reciprocal, rest = largest
        # The divisor is below 2, so a dividend above twice the largest scale has a quotient above every scale.
        dividend = tl.minimum(amax * normalize, FMT.largest_quotient)
        if FMT.scale_mantissa > MULTIPLIED_MANTISSA:
            wanted = tl.div_rn(dividend, tl.broadcast_to(divisor, dividend.shape))
        else:
            wanted = rounded_quotient(dividend, divisor, reciprocal, rest, FMT, TARGET)
        wanted = round_to_grid(tl.minimum(wanted, FMT.scale_max), FMT.scale_mantissa, FMT.scale_min_exponent)
        return encode_magnitude(tl.maximum(wanted, FMT.scale_min), FMT.scale_mantissa, FMT.scale_bias)
    elif RULE == "rceil":
        return tl.maximum(
            scale_ceil_code(tl.div_rn(amax, tl.zeros_like(amax) + FMT.element_max), FMT), FMT.scale_min_code
        )
    else:
        bits = amax.to(tl.int32, bitcast=True)
        if RULE == "ceil":
            bits += (1 << 23) - 1
        elif RULE == "even":
            bits += 1 << (22 - FMT.element_mantissa)
        else:
            tl.static_assert(RULE == "floor")
        codes = (bits >> 23) - FMT.element_max_exponent
        return tl.minimum(tl.maximum(codes, FMT.scale_min_code), FMT.scale_max_code)


@triton.jit
def naive_kernel(
    weight_ptr,  # [num_blocks, block_size] bf16, fp16 or fp32
    global_scale_ptr,  # [1] fp32; an output for single-level formats and with AMAX_PARTS
    amax_ptr,  # [AMAX_PARTS] int32; None without them
    codes_ptr,  # [num_blocks, block_size / 2] uint8
    scales_ptr,  # [num_blocks] uint8
    flag_ptr,  # [1] int32, set to 1 where the weight holds NaN or Inf
    num_blocks,
    FMT: tl.constexpr,
    RULE: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK_N: tl.constexpr,  # blocks per program
    AMAX_PARTS: tl.constexpr,  # partial amax values for the global scale; 0: the global scale is given
    PDL: tl.constexpr,  # programmatic dependent launch: starts before the amax kernel has ended
):
    QBLOCK: tl.constexpr = FMT.block_size
    # Last blocks first: the amax kernel read them last, so they are in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    block = program.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = block < num_blocks
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    VECTOR: tl.constexpr = 128 // BITS  # elements per load instruction
    pdl_wait(PDL)
    global_scale = load_global_scale(global_scale_ptr, amax_ptr, FMT, AMAX_PARTS)
    largest = largest_product(global_scale, FMT, TARGET)  # before the loads, which saves registers
    blocks = load_blocks(weight_ptr + block * QBLOCK, inside, QBLOCK, VECTOR, "evict_first")

    amax = block_amax(blocks, flag_ptr, TARGET)
    normalize = normalizer(amax)
    code = naive_codes(amax, largest, FMT, RULE, TARGET)

    even, odd = pairs(blocks.to(tl.float32))
    even, odd = even * normalize[:, None], odd * normalize[:, None]
    packed = packed_codes(even, odd, code, global_scale * normalize, BITS, FMT, TARGET)
    half = block[:, None] * (QBLOCK // 2) + tl.arange(0, QBLOCK // 2)[None, :]
    tl.store(codes_ptr + half, packed, mask=inside[:, None])
    tl.store(scales_ptr + block, code.to(tl.uint8), mask=inside)
