"""The layout of GGUF, against hand-written bytes and the gguf package's own dequantizer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from quantkit import MXFP4, NVFP4, quantize
from quantkit.layouts.gguf import GGUF, TYPES
from quantkit.tensor import QuantizedTensor, pack_codes
from tests.quantkit.layouts.stored import byte, every_code, random_weight, same, scalar


def decoded(blocks: torch.Tensor, kind: str) -> torch.Tensor:
    """Float32 ``[N, K]``, by the gguf package."""
    values = dequantize(blocks.flatten(-2).numpy(), GGMLQuantizationType(TYPES[kind]))
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def test_the_types_are_the_packages() -> None:
    assert TYPES["mxfp4"] == GGMLQuantizationType.MXFP4
    assert TYPES["nvfp4"] == GGMLQuantizationType.NVFP4


def test_mxfp4_by_hand() -> None:
    codes = byte(*range(1, 16), 0, *[8] * 16)[None]  # values 0–15, then 16–31
    q = QuantizedTensor(pack_codes(codes), byte(128)[None], scalar(1.0), MXFP4, 32)
    block = GGUF.to_tensors("p", q)["p.weight"]
    assert block.shape == (1, 1, 17)
    assert block.flatten().tolist() == [128, *(0x80 | code for code in (*range(1, 16), 0))]


def test_nvfp4_by_hand() -> None:
    codes = byte(*[1] * 8, *[2] * 8, *[3] * 8, *[4] * 8, *[5] * 8, *[6] * 8, *[7] * 8, *[8] * 8)[None]
    q = QuantizedTensor(pack_codes(codes), byte(1, 2, 3, 4)[None], scalar(0.5), NVFP4, 16)
    tensors = GGUF.to_tensors("p", q)
    assert tensors["p.weight"].shape == (1, 1, 36)
    halves = [*[0x21] * 8, *[0x43] * 8, *[0x65] * 8, *[0x87] * 8]
    assert tensors["p.weight"].flatten().tolist() == [1, 2, 3, 4, *halves]
    assert tensors["p.scale"].tolist() == [0.5]


@pytest.mark.parametrize("fmt, block_size", [(NVFP4, 16), (MXFP4, 32)], ids=["nvfp4", "mxfp4"])
def test_the_package_decodes_every_code_at_every_scale_to_our_numbers(fmt: object, block_size: int) -> None:
    q = every_code(fmt, block_size)
    wanted, found = q.dequantize(), decoded(GGUF.to_tensors("p", q)["p.weight"][:253], fmt.name)
    assert torch.equal(found, wanted[:253])  # 6 · 2^126, of the next scale of mxfp4, is beyond float32


def test_the_package_decodes_a_weight_to_our_numbers_before_the_global_scale() -> None:
    q = quantize(random_weight(8, 128))
    tensors = GGUF.to_tensors("p", q)
    blocks = q.values().unflatten(-1, (-1, 16)) * NVFP4.scale.decode(q.scales)[..., None]
    assert torch.equal(decoded(tensors["p.weight"], "nvfp4"), blocks.flatten(-2))
    assert torch.equal(tensors["p.scale"][0], q.global_scale)


def test_experts_keep_their_own_global_scales() -> None:
    scales = torch.tensor([0.5, 0.25], dtype=torch.float32, device="cpu").view(2, 1, 1)
    q = quantize(random_weight(2, 4, 64), global_scale=scales)
    tensors = GGUF.to_tensors("p", q)
    assert tensors["p.scale"].tolist() == [0.5, 0.25]
    assert same(GGUF.from_tensors("p", tensors), q)


def test_nvfp4_needs_whole_blocks_of_64() -> None:
    with pytest.raises(ValueError, match=r"p: gguf stores nvfp4 by 64 columns, and K = 32; use compressed_tensors"):
        GGUF.to_tensors("p", quantize(random_weight(4, 32)))


def test_other_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p\.weight has blocks of 18 bytes, not 17 or 36"):
        GGUF.from_tensors("p", {"p.weight": torch.zeros(1, 1, 18, dtype=torch.uint8, device="cpu")})
