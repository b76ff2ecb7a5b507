"""Dequantization, ``value · (scale · global_scale)`` in float32, saturated; the twin of QuantizedTensor.dequantize.

A thread reads four bytes of codes and writes its eight values in one or two stores of 16 bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quantkit.kernels.device import scale_value

__all__ = ["dequantize_kernel"]


@triton.jit
def element_values(nibbles, FMT: tl.constexpr):
    """Float32 signed values of int32 element codes.

    The code's exponent and mantissa become float32's, and a power of two corrects the bias. It is split in two factors
    where it exceeds float32.
    """
    magnitude = (nibbles & ((1 << FMT.element_sign_shift) - 1)) << (23 - FMT.element_mantissa)
    sign = (nibbles & (1 << FMT.element_sign_shift)) << (31 - FMT.element_sign_shift)
    values = (magnitude | sign).to(tl.float32, bitcast=True)
    if FMT.element_bias < 0:
        return values * 2.0**127 * 2.0 ** (-FMT.element_bias)
    else:
        return values * 2.0 ** (127 - FMT.element_bias)


BFLOAT16_MAX = tl.constexpr((2 - 2.0**-7) * 2.0**127)
FLOAT32_MAX = tl.constexpr((2 - 2.0**-23) * 2.0**127)


@triton.jit
def saturated(x, dtype: tl.constexpr):
    """Float32 x as ``dtype``; what exceeds its range is its largest finite number."""
    largest: tl.constexpr = 65504.0 if dtype == tl.float16 else BFLOAT16_MAX if dtype == tl.bfloat16 else FLOAT32_MAX
    return tl.minimum(tl.maximum(x, -largest), largest).to(dtype)


@triton.jit
def dequantize_kernel(
    codes_ptr,  # [num_blocks, block_size / 2] uint8
    scales_ptr,  # [num_blocks] uint8
    global_scale_ptr,  # [1] fp32
    weight_ptr,  # [num_blocks, block_size] bf16, fp16 or fp32
    num_chunks,  # chunks of eight elements
    FMT: tl.constexpr,
    BLOCK_N: tl.constexpr,  # chunks per program
):
    CHUNK: tl.constexpr = 8
    chunk = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = chunk < num_chunks
    half = chunk[:, None] * (CHUNK // 2) + tl.arange(0, CHUNK // 2)[None, :]
    packed = tl.load(codes_ptr + half, mask=inside[:, None], other=0).to(tl.int32)
    code = tl.load(scales_ptr + chunk // (FMT.block_size // CHUNK), mask=inside, other=0).to(tl.int32)
    scale = scale_value(code, FMT) * tl.load(global_scale_ptr)

    nibbles = tl.reshape(tl.join(packed & 0xF, packed >> 4), [BLOCK_N, CHUNK])
    weight = element_values(nibbles, FMT) * scale[:, None]
    offsets = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(weight_ptr + offsets, saturated(weight, weight_ptr.dtype.element_ty), mask=inside[:, None])
