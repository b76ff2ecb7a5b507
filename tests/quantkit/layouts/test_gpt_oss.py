"""The layout of gpt-oss, against hand-written bytes and transformers' own dequantizer."""

from __future__ import annotations

import pytest
import torch

from quantkit import MXFP4, quantize
from quantkit.layouts.gpt_oss import GPT_OSS
from quantkit.tensor import QuantizedTensor
from tests.quantkit.layouts.stored import byte, every_code, random_weight, scalar


def test_by_hand() -> None:
    codes = byte(0x21, *[0] * 14, 0x43, *[0x65] * 16)[None, None]
    q = QuantizedTensor(codes, byte(127, 130)[None, None], scalar(1.0), MXFP4, 32)
    tensors = GPT_OSS.to_tensors("m.experts.down_proj", q)
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "m.experts.down_proj_blocks": [1, 1, 2, 16],
        "m.experts.down_proj_scales": [1, 1, 2],
    }
    assert tensors["m.experts.down_proj_blocks"][0, 0, 0].tolist() == [0x21, *[0] * 14, 0x43]
    assert tensors["m.experts.down_proj_blocks"][0, 0, 1].tolist() == [0x65] * 16
    assert tensors["m.experts.down_proj_scales"].flatten().tolist() == [127, 130]


def test_transformers_decodes_every_code_at_every_scale_to_our_numbers() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    q = every_code(MXFP4, 32)
    one = QuantizedTensor(q.codes[None], q.scales[None], q.global_scale, MXFP4, 32)
    tensors = GPT_OSS.to_tensors("p", one)
    found = convert_moe_packed_tensors(tensors["p_blocks"], tensors["p_scales"], dtype=torch.bfloat16)
    finite = 253  # 6 · 2^126 is beyond bfloat16: quantkit gives the largest number
    assert torch.equal(found.transpose(1, 2)[0, :finite], q.dequantize(torch.bfloat16)[:finite])


def test_a_dense_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"experts \[E, N, K\] alone, and p is \[4, 32\]; leave it unquantized"):
        GPT_OSS.to_tensors("p", quantize(random_weight(4, 32), "mxfp4", 32))


def test_the_configuration_is_transformers_own() -> None:
    from transformers import Mxfp4Config

    entry = GPT_OSS.config(MXFP4, 32, ["lm_head", "model.layers.0.mlp.router"])["config.json"]["quantization_config"]
    assert Mxfp4Config.from_dict(entry).modules_to_not_convert == ["lm_head", "model.layers.0.mlp.router"]
