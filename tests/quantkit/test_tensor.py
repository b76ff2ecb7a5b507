"""QuantizedTensor: sizes, dequantization, device, and the file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantkit import QuantizedTensor, quantize
from quantkit.formats import MXFP4


@pytest.fixture
def q() -> QuantizedTensor:
    return quantize(torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)), "nvfp4", 16, "sse")


def test_sizes(q: QuantizedTensor) -> None:
    assert q.shape == (3, 5, 64)
    assert q.bits_per_weight == 4.5
    assert q.nbytes == 3 * 5 * 64 // 2 + 3 * 5 * 64 // 16 + 4
    assert quantize(torch.zeros(2, 64), "mxfp4", 32).nbytes == 64 + 4


def test_dequantize_in_other_dtypes(q: QuantizedTensor) -> None:
    full = q.dequantize()
    assert full.dtype == torch.float32
    assert torch.equal(q.dequantize(torch.bfloat16), full.bfloat16())
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int8"):
        q.dequantize(torch.int8)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_safetensors_round_trip(tmp_path: Path, format: str) -> None:
    q = quantize(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), format, 32, "sse")
    q.save(tmp_path / "w.safetensors")
    back = QuantizedTensor.load(tmp_path / "w.safetensors")
    assert back.format is q.format and back.block_size == 32
    for name in ("codes", "scales", "global_scale"):
        assert torch.equal(getattr(back, name), getattr(q, name))
    assert torch.equal(back.dequantize(), q.dequantize())
    assert back.method == "sse"
    assert QuantizedTensor.load(tmp_path / "w.safetensors", format=format).format is q.format


@pytest.mark.parametrize("nearest", [True, False])
def test_the_file_says_whether_codes_are_nearest(tmp_path: Path, q: QuantizedTensor, nearest: bool) -> None:
    path = tmp_path / "w.safetensors"
    replace(q, nearest_codes=nearest).save(path)
    assert QuantizedTensor.load(path).nearest_codes is nearest


def test_a_file_from_before_that_was_saved_has_nearest_codes(tmp_path: Path, q: QuantizedTensor) -> None:
    from safetensors.torch import save_file

    tensors = {"codes": q.codes, "scales": q.scales, "global_scale": q.global_scale}
    header = {"version": "1", "format": "nvfp4", "block_size": "16", "method": "sse"}
    save_file(tensors, tmp_path / "old.safetensors", {"quantkit": json.dumps(header)})
    back = QuantizedTensor.load(tmp_path / "old.safetensors")
    assert back.nearest_codes and back.method == "sse" and torch.equal(back.codes, q.codes)


def test_a_format_of_one_s_own_is_passed_to_load(tmp_path: Path) -> None:
    own = replace(MXFP4, name="own")
    path = tmp_path / "w.safetensors"
    quantize(torch.ones(2, 32), own).save(path)
    assert QuantizedTensor.load(path, format=own).format is own
    with pytest.raises(ValueError, match=r"format 'own', which quantkit does not know; pass its BlockFormat"):
        QuantizedTensor.load(path)
    with pytest.raises(ValueError, match="holds format 'own', not 'mxfp4'"):
        QuantizedTensor.load(path, format=MXFP4)


def test_shown_in_a_line_and_compared_as_an_object(q: QuantizedTensor) -> None:
    line = "QuantizedTensor(nvfp4, block_size=16, method=sse, shape=[3, 5, 64], 4.5 bits a weight, cpu)"
    assert repr(q) == line
    assert q == q and q != q.to("cpu") and len({q, q}) == 1


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"codes": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a quantkit file"):
        QuantizedTensor.load(tmp_path / "other.safetensors")


def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, q: QuantizedTensor) -> None:
    path = tmp_path / "w.safetensors"
    q.save(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"junk" * 10,
        whole[:-10],
        whole.replace(b"global_scale", b"global_xcale"),
        whole.replace(rb"\"block_size\": \"16\"", rb"\"block_size\": \"32\""),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"w\.safetensors is damaged, or not a quantkit file"):
            QuantizedTensor.load(path)
    with pytest.raises(FileNotFoundError, match="other: no such file"):
        QuantizedTensor.load(tmp_path / "other")
    with pytest.raises(RuntimeError, match="nope"):  # torch's own, about devices
        QuantizedTensor.load(path, device="nope")


def test_to_moves_every_part() -> None:
    q = quantize(torch.randn(2, 32), count_candidates=True).to("meta")
    assert {t.device.type for t in (q.codes, q.scales, q.global_scale, q.candidates)} == {"meta"}
