"""The layout of gpt-oss: MXFP4 experts, everything else unquantized.

    P_blocks  uint8 [E, N, K/32, 16], even column in the low nibble, sign in bit 3
    P_scales  uint8 [E, N, K/32], 2^(byte - 127)

P is ``model.layers.0.mlp.experts.gate_up_proj`` (its rows alternate between gate and up) or ``….down_proj``. The float
parameter is [E, K, N], the transpose of the quantized weight [E, N, K]. Source: transformers' integration "mxfp4".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import MXFP4, BlockFormat
from quantkit.layouts.common import Layout, assembled, part
from quantkit.tensor import QuantizedTensor

__all__ = ["GPT_OSS"]

BLOCKS, SCALES = "_blocks", "_scales"


def _pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    if len(quantized.shape) != 3:
        raise ValueError(
            f"gpt_oss stores experts [E, N, K] alone, and {name} is {list(quantized.shape)}; leave it unquantized, or "
            "use compressed_tensors"
        )
    return {
        name + BLOCKS: quantized.codes.unflatten(-1, (-1, 16)).contiguous(),
        name + SCALES: quantized.scales.contiguous(),
    }


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    blocks = part(name, BLOCKS, tensors, (torch.uint8,))
    scales = part(name, SCALES, tensors, (torch.uint8,))
    one = torch.ones((), dtype=torch.float32, device=blocks.device)
    return assembled(name, blocks.flatten(-2), scales, one, MXFP4, 32)


def _entries(fmt: BlockFormat, left_out: Sequence[str]) -> dict[str, dict[str, Any]]:
    entry = {"quant_method": "mxfp4", "modules_to_not_convert": list(left_out)}
    return {"config.json": {"quantization_config": entry}}


GPT_OSS = Layout(
    name="gpt_oss",
    holds=(("mxfp4", 32),),
    instead="For nvfp4 use compressed_tensors; gpt-oss itself is served with mxfp4 experts.",
    quant_method="mxfp4",
    parts=(BLOCKS, SCALES),
    shared_scales=False,
    pack=_pack,
    unpack=_unpack,
    entries=_entries,
)
