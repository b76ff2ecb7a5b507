"""The layout of GGUF, llama.cpp's file: type 39 (MXFP4) and type 40 (NVFP4).

    P.weight  MXFP4: uint8 [..., K/32, 17]; the E8M0 byte, then 16 bytes: low nibbles values 0–15, high nibbles 16–31
              NVFP4: uint8 [..., K/64, 36]; 4 UE4M3 bytes, then for each 8 bytes: low nibbles values 0–7, high 8–15
    P.scale   float32 [1], or [E] for experts: the global scale (NVFP4 alone)

    w = (value(code) · value(scale)) · P.scale

llama.cpp multiplies the layer's output by P.scale, so its results are quantkit's up to float32 rounding; codes, scales
and the global scale are the same to the bit. P is the name in the file, such as ``blk.0.attn_q``: whoever writes the
file gives the names, and orders the rows of llama's q and k. Source: the gguf package 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import MXFP4, NVFP4, BlockFormat
from quantkit.layouts.common import Layout, assembled, part
from quantkit.tensor import QuantizedTensor, pack_codes, unpack_codes

__all__ = ["GGUF", "TYPES"]

WEIGHT, SCALE = ".weight", ".scale"
TYPES = {"mxfp4": 39, "nvfp4": 40}  # numbers of GGMLQuantizationType
MX_BYTES, NV_BYTES = 17, 36


def _halves(codes: Tensor) -> Tensor:
    """uint8 codes ``[..., n]`` → ``[..., n/2]``: the first half in the low nibbles, the second in the high."""
    first, second = codes.chunk(2, dim=-1)
    return first | (second << 4)


def _whole(halves: Tensor) -> Tensor:
    """The inverse of :func:`_halves`."""
    return torch.cat((halves & 0xF, halves >> 4), dim=-1)


def _pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    codes, columns = unpack_codes(quantized.codes), quantized.shape[-1]
    if not quantized.format.two_level:
        halves = _halves(codes.unflatten(-1, (-1, 32)))
        return {name + WEIGHT: torch.cat((quantized.scales.unsqueeze(-1), halves), dim=-1)}
    if columns % 64:
        raise ValueError(
            f"{name}: gguf stores nvfp4 by 64 columns, and K = {columns}; use compressed_tensors or modelopt"
        )
    halves = _halves(codes.unflatten(-1, (-1, 4, 16))).flatten(-2)
    blocks = torch.cat((quantized.scales.unflatten(-1, (-1, 4)), halves), dim=-1)
    experts = quantized.shape[0] if len(quantized.shape) == 3 else 1
    return {name + WEIGHT: blocks, name + SCALE: quantized.global_scale.flatten().expand(experts).contiguous()}


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    blocks = part(name, WEIGHT, tensors, (torch.uint8,))
    if blocks.shape[-1] == MX_BYTES:
        one = torch.ones((), dtype=torch.float32, device=blocks.device)
        codes = pack_codes(_whole(blocks[..., 1:]).flatten(-2))
        return assembled(name, codes, blocks[..., 0].contiguous(), one, MXFP4, 32)
    if blocks.shape[-1] != NV_BYTES:
        raise ValueError(f"{name + WEIGHT} has blocks of {blocks.shape[-1]} bytes, not {MX_BYTES} or {NV_BYTES}")
    stored = part(name, SCALE, tensors, (torch.float32,))
    codes = pack_codes(_whole(blocks[..., 4:].unflatten(-1, (4, 8))).flatten(-3))
    shared = bool((stored == stored[0]).all())
    scale = stored[0] if shared else stored.reshape(-1, 1, 1)
    return assembled(name, codes, blocks[..., :4].flatten(-2).contiguous(), scale, NVFP4, 16)


def _entries(fmt: BlockFormat, left_out: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {}  # a GGUF file says the type of each tensor


GGUF = Layout(
    name="gguf",
    holds=(("nvfp4", 16), ("mxfp4", 32)),
    instead="llama.cpp knows no other FP4 block; choose one of these, or keep quantkit's own folder (export=null).",
    quant_method="",
    parts=(WEIGHT, SCALE),
    shared_scales=False,
    pack=_pack,
    unpack=_unpack,
    entries=_entries,
)
