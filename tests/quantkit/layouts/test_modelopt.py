"""The layout of ModelOpt, against hand-written bytes."""

from __future__ import annotations

import torch

from quantkit import NVFP4, quantize
from quantkit.layouts.modelopt import MODELOPT
from quantkit.tensor import QuantizedTensor
from tests.quantkit.layouts.stored import byte, every_code, random_weight, scalar


def test_by_hand() -> None:
    codes = byte(0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE)[None]
    q = QuantizedTensor(codes, byte(0x3C)[None], scalar(0.3), NVFP4, 16)
    tensors = MODELOPT.to_tensors("p", q)
    assert {name: (t.dtype, list(t.shape)) for name, t in tensors.items()} == {
        "p.weight": (torch.uint8, [1, 8]),
        "p.weight_scale": (torch.float8_e4m3fn, [1, 1]),
        "p.weight_scale_2": (torch.float32, []),
    }
    assert tensors["p.weight"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert tensors["p.weight_scale"].float().tolist() == [[1.5]]
    assert tensors["p.weight_scale_2"] == scalar(0.3)  # the multiplier, unchanged


def test_the_documented_formula_gives_our_numbers() -> None:
    q = every_code(NVFP4, 16, 0.0123)
    tensors = MODELOPT.to_tensors("p", q)
    table = scalar(0.0).new_tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    packed = tensors["p.weight"].int()
    values = torch.stack((table[packed % 16], table[packed // 16]), dim=-1).flatten(1)
    scales = tensors["p.weight_scale"].float() * tensors["p.weight_scale_2"]
    assert torch.equal(values * scales.repeat_interleave(16, dim=1), q.dequantize())


def test_the_scale_of_activations_is_not_read() -> None:
    q = quantize(random_weight(4, 32))
    tensors = {**MODELOPT.to_tensors("p", q), "p.input_scale": scalar(7.0)}
    assert MODELOPT.names(tensors) == ["p"]
    assert torch.equal(MODELOPT.from_tensors("p", tensors).dequantize(), q.dequantize())


def test_the_entries_that_engines_require() -> None:
    files = MODELOPT.config(NVFP4, 16, ["lm_head", "model.layers.0.mlp.gate"])
    assert set(files) == {"config.json", "hf_quant_config.json"}
    quantization = files["hf_quant_config.json"]["quantization"]
    assert quantization == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head", "model.layers.0.mlp.gate"],
    }
    assert files["hf_quant_config.json"]["producer"]["name"] == "modelopt"  # vLLM refuses another
    entry = files["config.json"]["quantization_config"]
    assert (entry["quant_method"], entry["quant_algo"]) == ("modelopt", "W4A16_NVFP4")
    assert entry["ignore"] == ["lm_head", "model.layers.0.mlp.gate"]
    assert entry["config_groups"]["group_0"]["weights"]["group_size"] == 16
    assert "kv_cache_scheme" not in entry
