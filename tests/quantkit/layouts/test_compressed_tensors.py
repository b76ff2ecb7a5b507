"""The layout of compressed-tensors, against hand-written bytes and the package's own decompression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import MXFP4, NVFP4, quantize
from quantkit.formats import E4M3, BlockFormat
from quantkit.layouts import exact_global_scale
from quantkit.layouts.compressed_tensors import COMPRESSED_TENSORS, divisor
from quantkit.tensor import QuantizedTensor
from tests.quantkit.layouts.stored import byte, every_code, random_weight, scalar

SCALES = E4M3.decode(torch.arange(1, 127, dtype=torch.int32, device="cpu"))
KINDS = [(NVFP4, 16), (MXFP4, 32)]


def decompressed(tensors: dict[str, torch.Tensor], fmt: BlockFormat, block_size: int) -> torch.Tensor:
    """bfloat16 ``[N, K]``, by compressed-tensors."""
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    entry = COMPRESSED_TENSORS.config(fmt, block_size, ["lm_head"])["config.json"]["quantization_config"]
    config = QuantizationConfig.model_validate(entry)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    local = {name.removeprefix("p."): tensor for name, tensor in tensors.items()}
    result: torch.Tensor = compressor.decompress(local, config.config_groups["group_0"])["weight"]
    return result


def test_nvfp4_by_hand() -> None:
    codes = byte(0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE)[None]
    q = QuantizedTensor(codes, byte(0x38)[None], scalar(0.25), NVFP4, 16)
    tensors = COMPRESSED_TENSORS.to_tensors("p", q)
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "p.weight_packed": torch.uint8,
        "p.weight_scale": torch.float8_e4m3fn,
        "p.weight_global_scale": torch.float32,
    }
    assert tensors["p.weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert tensors["p.weight_scale"].float().tolist() == [[1.0]]
    assert tensors["p.weight_global_scale"].tolist() == [4.0]  # the divisor
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    wanted = [v / 4 for v in values] + [-v / 4 for v in values]
    assert q.dequantize()[0].tolist() == wanted
    assert decompressed(tensors, NVFP4, 16)[0].tolist() == wanted


def test_mxfp4_by_hand() -> None:
    q = QuantizedTensor(byte(0x42, *[0x70] * 15)[None], byte(129)[None], scalar(1.0), MXFP4, 32)
    tensors = COMPRESSED_TENSORS.to_tensors("p", q)
    assert sorted(tensors) == ["p.weight_packed", "p.weight_scale"]
    assert tensors["p.weight_scale"].dtype == torch.uint8 and tensors["p.weight_scale"].tolist() == [[129]]
    wanted = [4.0, 8.0] + [0.0, 24.0] * 15  # codes 2, 4, 0, 7 at 2^(129 - 127)
    assert q.dequantize()[0].tolist() == wanted
    assert decompressed(tensors, MXFP4, 32)[0].tolist() == wanted


@pytest.mark.parametrize("global_scale", [1.0, 0.0123, 3.1e-5, 7.7e-20])
def test_the_package_decodes_every_nvfp4_code_at_every_scale_to_our_numbers(global_scale: float) -> None:
    q = every_code(NVFP4, 16, float(exact_global_scale(scalar(global_scale))))
    assert torch.equal(decompressed(COMPRESSED_TENSORS.to_tensors("p", q), NVFP4, 16), q.dequantize(torch.bfloat16))


def test_the_package_decodes_every_mxfp4_code_at_every_scale_to_our_numbers() -> None:
    q = every_code(MXFP4, 32)
    found = decompressed(COMPRESSED_TENSORS.to_tensors("p", q), MXFP4, 32)
    finite = 253  # 6 · 2^126 is beyond bfloat16: quantkit gives the largest number, the package infinity
    assert torch.equal(found[:finite], q.dequantize(torch.bfloat16)[:finite])


@settings(max_examples=60, deadline=None)
@given(st.floats(2.0**-110, 2.0**60, width=32))
def test_an_exact_global_scale_is_inverted_exactly(value: float) -> None:
    given_, found = scalar(value), exact_global_scale(scalar(value))
    assert 1 <= float(found) / value < 1 + 4.1e-4
    stored = divisor(found)
    assert torch.equal(SCALES / stored, SCALES * found)
    assert torch.equal(1 / stored[0], found)  # so the round trip returns it
    assert torch.equal(exact_global_scale(found), found)
    if float(found) != value:  # the given one has no exact divisor
        near = 1 / given_
        for candidate in (near, near.nextafter(scalar(0.0)), near.nextafter(scalar(float("inf")))):
            assert not torch.equal(SCALES / candidate, SCALES * given_)


def test_powers_of_two_are_exact_as_they_are() -> None:
    for exponent in (-100, -9, 0, 30):
        assert float(exact_global_scale(scalar(2.0**exponent))) == 2.0**exponent
        assert divisor(scalar(2.0**exponent)).tolist() == [2.0**-exponent]


def test_the_stretch_without_exact_neighbours_is_crossed() -> None:
    value = scalar(1 + 2.0**-23 * 3_473_009)  # near √2; the longest between two powers of two, found by trying all
    found = exact_global_scale(value)
    assert int(found.view(torch.int32) - value.view(torch.int32)) == 3327
    assert torch.equal(SCALES / divisor(found), SCALES * found)


def _inexact(loaded_alike: bool) -> torch.Tensor:
    """A global scale without exact divisor that loaders decode to the same numbers, or to others."""
    bits = torch.arange(0x3F800000, 0x40000000, 997 if loaded_alike else 1, dtype=torch.int32, device="cpu")
    from quantkit.layouts import compressed_tensors as module

    for chunk in bits.split(1 << 12):
        scales = chunk.view(torch.float32)
        divisors = module._divisors(scales)
        for index in (~module._exact(scales, divisors).any(-1)).nonzero().flatten().tolist():
            if bool(module._same_when_loaded(scales[index], divisors[index]).any()) == loaded_alike:
                return scales[index]
    raise AssertionError("none found")


def test_other_global_scales_are_stored_if_loaders_decode_the_same_numbers() -> None:
    scale = _inexact(loaded_alike=True)
    q = every_code(NVFP4, 16, float(scale))
    tensors = COMPRESSED_TENSORS.to_tensors("p", q)
    assert not torch.equal(SCALES / tensors["p.weight_global_scale"], SCALES * scale)
    assert torch.equal(decompressed(tensors, NVFP4, 16), q.dequantize(torch.bfloat16))


def test_other_global_scales_are_refused_if_loaders_decode_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkit.layouts import compressed_tensors as module

    scale = _inexact(loaded_alike=True)
    never = torch.zeros(3, dtype=torch.bool, device="cpu")
    monkeypatch.setattr(module, "_same_when_loaded", lambda *_: never)
    with pytest.raises(ValueError, match=r"no divisor stands for the global scale .*exact_global_scale"):
        COMPRESSED_TENSORS.to_tensors("p", every_code(NVFP4, 16, float(scale)))


@pytest.mark.parametrize("value", [1e-45, 3e38])
def test_no_global_scale_at_the_ends_of_float32_is_exact(value: float) -> None:
    with pytest.raises(ValueError, match="no divisor inverts a global scale near"):
        exact_global_scale(scalar(value))


@pytest.mark.parametrize("value", [1e-45, 3e38])
def test_no_divisor_stands_for_the_ends_of_float32(value: float) -> None:
    with pytest.raises(ValueError, match="no divisor stands for the global scale"):
        divisor(scalar(value))


def test_each_expert_has_its_own_divisor() -> None:
    scales = torch.tensor([0.5, 0.25], dtype=torch.float32, device="cpu").view(2, 1, 1)
    q = quantize(random_weight(2, 4, 32), global_scale=scales)
    tensors = COMPRESSED_TENSORS.to_tensors("m.experts.down_proj", q)
    stored = {name: t.tolist() for name, t in tensors.items() if name.endswith("global_scale")}
    assert stored == {
        "m.experts.0.down_proj.weight_global_scale": [2.0],
        "m.experts.1.down_proj.weight_global_scale": [4.0],
    }


@pytest.mark.parametrize("fmt, block_size", KINDS, ids=["nvfp4", "mxfp4"])
def test_the_package_reads_the_configuration(fmt: BlockFormat, block_size: int) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import QuantizationConfig

    entry: dict[str, Any] = COMPRESSED_TENSORS.config(fmt, block_size, ["lm_head", "a.router"])["config.json"]
    config = QuantizationConfig.model_validate(entry["quantization_config"])
    group = config.config_groups["group_0"]
    assert config.ignore == ["lm_head", "a.router"]
    assert (group.weights.group_size, group.input_activations) == (block_size, None)
    assert infer_module_format(torch.nn.Linear, group).value == config.format == f"{fmt.name}-pack-quantized"
