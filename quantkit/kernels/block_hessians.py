"""Block Hessians ``H_j = X_jᵀ X_j`` of activations in one pass; the twin of calibration.hessians_from_activations.

A tensor core's tile is wider than a block, so a program computes the Gram matrix of WIDTH columns and keeps the blocks
on its diagonal. Tokens are split among programs: tensor cores truncate float32 sums, and short sums lose less. The
partial results are added in a fixed order, so the result is deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_hessians_kernel"]


@triton.jit
def block_hessians_kernel(
    activations_ptr,  # [tokens, in_features] bf16, fp16 or fp32
    parts_ptr,  # [splits, num_blocks, block_size, block_size] fp32
    tokens,
    in_features,
    tokens_per_split,
    QBLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # columns per program
    BLOCK_T: tl.constexpr,  # tokens per step
    UPCAST: tl.constexpr,  # multiply in float32, because the interpreter has no bf16 product
):
    NUM: tl.constexpr = WIDTH // QBLOCK
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    split = tl.program_id(1)
    start = split * tokens_per_split
    stop = tl.minimum(start + tokens_per_split, tokens)
    product = tl.zeros([WIDTH, WIDTH], tl.float32)
    for first in range(start, stop, BLOCK_T):
        token = first + tl.arange(0, BLOCK_T)
        x = tl.load(
            activations_ptr + token[:, None].to(tl.int64) * in_features + column[None, :],
            mask=(token < stop)[:, None] & (column < in_features)[None, :],
            other=0.0,
        )
        if UPCAST:
            x = x.to(tl.float32)
        product = tl.dot(tl.trans(x), x, product, input_precision="ieee")

    # [NUM, QBLOCK, NUM, QBLOCK] → the blocks with equal first and third index
    tiles = tl.reshape(product, [NUM, QBLOCK, NUM, QBLOCK])
    index = tl.arange(0, NUM)
    diagonal = index[:, None, None, None] == index[None, None, :, None]
    blocks = tl.sum(tl.where(diagonal, tiles, 0.0), axis=2)
    lane = tl.arange(0, QBLOCK)
    block = tl.program_id(0) * NUM + index
    num_blocks = in_features // QBLOCK
    offsets = (split * num_blocks + block[:, None, None]).to(tl.int64) * QBLOCK * QBLOCK
    offsets += lane[None, :, None] * QBLOCK + lane[None, None, :]
    tl.store(parts_ptr + offsets, blocks, mask=(block < num_blocks)[:, None, None])
