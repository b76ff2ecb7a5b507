"""The layout of NVIDIA's ModelOpt for NVFP4 weights (``W4A16_NVFP4``).

    P.weight          uint8 [N, K/2], even column in the low nibble, sign in bit 3
    P.weight_scale    float8_e4m3fn [N, K/16]
    P.weight_scale_2  float32, 0-d, the multiplier: quantkit's global scale

    w = value(code) · (value(scale) · weight_scale_2)

Both product and order are quantkit's, so decoded weights are the same to the bit. The scale of quantized activations
(``P.input_scale`` of W4A4 checkpoints) is not read.

Source: checkpoints of ModelOpt, and what vLLM, SGLang and TensorRT-LLM require of hf_quant_config.json. vLLM refuses
a producer of another name, so the entry names the layout's; its version names quantkit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import NVFP4, BlockFormat
from quantkit.layouts.common import Layout, assembled, expert_matrices, part
from quantkit.tensor import QuantizedTensor

__all__ = ["MODELOPT"]

WEIGHT, SCALE, GLOBAL = ".weight", ".weight_scale", ".weight_scale_2"
ALGORITHM = "W4A16_NVFP4"
PRODUCER = {"name": "modelopt", "version": "quantkit"}


def _pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    tensors = {}
    for matrix, q in expert_matrices(name, quantized):
        tensors[matrix + WEIGHT] = q.codes.contiguous()
        tensors[matrix + SCALE] = q.scales.contiguous().view(torch.float8_e4m3fn)
        tensors[matrix + GLOBAL] = q.global_scale.reshape(()).clone()
    return tensors


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    codes = part(name, WEIGHT, tensors, (torch.uint8,))
    scales = part(name, SCALE, tensors, (torch.float8_e4m3fn,))
    global_scale = part(name, GLOBAL, tensors, (torch.float32,))
    return assembled(name, codes, scales.view(torch.uint8), global_scale.reshape(()), NVFP4, 16)


def _entries(fmt: BlockFormat, left_out: Sequence[str]) -> dict[str, dict[str, Any]]:
    weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    entry = {
        "quant_method": "modelopt",
        "quant_algo": ALGORITHM,
        "config_groups": {"group_0": {"weights": weights, "targets": ["Linear"]}},
        "ignore": list(left_out),
        "producer": PRODUCER,
    }
    quantization = {
        "quant_algo": ALGORITHM,
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": list(left_out),
    }
    return {
        "config.json": {"quantization_config": entry},
        "hf_quant_config.json": {"producer": PRODUCER, "quantization": quantization},
    }


MODELOPT = Layout(
    name="modelopt",
    holds=(("nvfp4", 16),),
    instead="For mxfp4 use compressed_tensors or gguf (block size 32); quantkit's own folder (export=null) has all.",
    quant_method="modelopt",
    parts=(GLOBAL, WEIGHT, SCALE),
    shared_scales=True,
    pack=_pack,
    unpack=_unpack,
    entries=_entries,
)
