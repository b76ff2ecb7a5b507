"""QuantizedTensor: sizes, dequantization, device, and the file."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from quantkit import FORMATS, QuantizedTensor, QuantizedWeight, quantize
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


def test_a_missing_folder_is_named(tmp_path: Path, q: QuantizedTensor) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing: no such folder to save w\.safetensors in; make it first$"):
        q.save(tmp_path / "missing" / "w.safetensors")


# ---- round trips -----------------------------------------------------------------------------------------------------


def torch_saved(q: QuantizedTensor) -> QuantizedTensor:
    buffer = io.BytesIO()
    torch.save({"layers": [q]}, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=True, map_location="cpu")["layers"][0]
    assert isinstance(back, QuantizedTensor)
    return back


@pytest.mark.parametrize("format", [*FORMATS, "own"])
@pytest.mark.parametrize(
    "trip",
    [torch_saved, copy.deepcopy, copy.copy, lambda q: pickle.loads(pickle.dumps(q))],
    ids=["save", "deep", "copy", "pickle"],
)
def test_round_trips(trip: Callable[[QuantizedTensor], QuantizedTensor], format: str) -> None:
    fmt = replace(MXFP4, name="own") if format == "own" else FORMATS[format]
    weight = torch.randn(2, 4, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    scale = "amax_per_expert" if fmt.two_level else None
    q = quantize(weight, fmt, 16, "sse", count_candidates=True, global_scale=scale)
    q.dequantize()  # derives what is kept
    back = trip(q)
    same(back, q)
    assert back.format == fmt and (format == "own" or back.format is fmt)
    assert torch.equal(back.candidates, q.candidates)  # type: ignore[arg-type]


def same(got: QuantizedTensor, want: QuantizedTensor) -> None:
    for name in ("codes", "scales", "global_scale"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    for name in ("format", "block_size", "method", "nearest_codes"):
        assert getattr(got, name) == getattr(want, name), name
    assert torch.equal(got.dequantize(), want.dequantize())


class Layer(torch.nn.Module):
    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.weight = QuantizedWeight(q)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight(x.dtype).flatten(0, -2).T


def test_a_module_s_state_dict_has_it(tmp_path: Path, q: QuantizedTensor) -> None:
    """Tensors alone, so a safetensors file holds them, too."""
    from safetensors.torch import load_file, save_file

    state = Layer(replace(q, nearest_codes=False)).state_dict()
    save_file(state, tmp_path / "layer.safetensors")
    torch.save(state, tmp_path / "layer.pt")
    for loaded in (load_file(tmp_path / "layer.safetensors"), torch.load(tmp_path / "layer.pt", weights_only=True)):
        layer = Layer(quantize(torch.zeros(3, 5, 64, dtype=torch.float32, device="cpu"), method="naive"))
        layer.load_state_dict(loaded)
        same(layer.weight.tensor, replace(q, nearest_codes=False))
    other = Layer(quantize(torch.zeros(3, 5, 64, dtype=torch.float32, device="cpu"), "fp4_ue5m3"))
    with pytest.raises(ValueError, match=r"the state holds nvfp4 of block size 16, the module fp4_ue5m3 of 16; make"):
        other.load_state_dict(state)


def test_a_module_s_dtype_and_device_leave_it_whole(q: QuantizedTensor) -> None:
    layer = Layer(q)
    for changed in (layer.half(), layer.to(torch.bfloat16), layer.double(), copy.deepcopy(layer)):
        same(changed.weight.tensor, q)
    moved = layer.to("meta").weight.tensor
    assert moved.codes.is_meta and moved.global_scale.is_meta


def test_dequantize_in_fake_tensor_mode(q: QuantizedTensor) -> None:
    """Nothing of the mode is left behind, and nothing that is real gets in."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    for tensor in (
        q,
        quantize(torch.ones(2, 3, 32), global_scale="amax_per_expert"),
        quantize(torch.ones(2, 32), "mxfp4"),
    ):
        want = tensor.dequantize()
        with FakeTensorMode() as mode:
            fake = replace(
                tensor,
                codes=mode.from_tensor(tensor.codes),
                scales=mode.from_tensor(tensor.scales),
                global_scale=mode.from_tensor(tensor.global_scale),
            )
            found = fake.dequantize(torch.bfloat16)
            assert isinstance(found, FakeTensor) and found.shape == tensor.shape and found.dtype == torch.bfloat16
        assert torch.equal(tensor.dequantize(), want)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_function_dequantizes(q: QuantizedTensor, backend: str) -> None:
    """As an argument, from around the function, and in a module; in one graph."""
    torch.compiler.reset()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32, device="cpu")
    layer, want = Layer(q), x @ q.dequantize().flatten(0, -2).T
    compiled = partial(torch.compile, fullgraph=True, backend=backend)
    given = compiled(lambda q, x: x @ q.dequantize().flatten(0, -2).T)
    assert torch.equal(given(q, x), want)
    assert torch.equal(compiled(lambda x: x @ q.dequantize().flatten(0, -2).T)(x), want)
    assert torch.equal(compiled(layer)(x), want)
    single = quantize(torch.ones(2, 64), "mxfp4")
    assert torch.equal(given(single, x), x @ single.dequantize().T)
