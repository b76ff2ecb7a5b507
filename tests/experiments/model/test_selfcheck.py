"""Each defect is planted in an export, and the check finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.model import selfcheck
from experiments.model.export import export
from experiments.model.selfcheck import Verdict, check_export
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit.layouts import get_layout
from tests.experiments.model.exported import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FIRST = "model-00001-of-00003.safetensors"
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741  joined with no other
NV = ("compressed_tensors", "modelopt")
PACKED = {"compressed_tensors": ".weight_packed", "modelopt": ".weight"}
GLOBAL = {"compressed_tensors": ".weight_global_scale", "modelopt": ".weight_scale_2"}


class Made:
    def __init__(self, root: Path) -> None:
        self.sources = {fmt: quantized(root, "llama", fmt) for fmt in ("nvfp4", "mxfp4")}
        self.folders: dict[tuple[str, str], Path] = {}
        for fmt, layout in [*(("nvfp4", name) for name in (*NV, "gguf")), ("mxfp4", "compressed_tensors")]:
            self.folders[fmt, layout] = root / f"{fmt}-{layout}"
            export(self.sources[fmt], self.folders[fmt, layout], layout)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("checked"))


def planted(
    made: Made, tmp_path: Path, layout: str, change: Callable[[dict[str, Tensor]], object], fmt: str = "nvfp4"
) -> Verdict:
    """What the check says of an export whose first shard was changed."""
    folder = tmp_path / "planted"
    shutil.copytree(made.folders[fmt, layout], folder)
    tensors = load_file(folder / FIRST)
    change(tensors)
    save_file(tensors, folder / FIRST)
    return check(made.sources[fmt], folder, layout)


def check(source: QuantizedCheckpoint, folder: Path, layout: str) -> Verdict:
    return check_export(folder, get_layout(layout), source)


def found(verdict: Verdict, message: str) -> bool:
    return not verdict.ok and any(message in problem for problem in verdict.problems)


def test_a_good_export_has_no_problem(made: Made) -> None:
    for (fmt, layout), folder in made.folders.items():
        verdict = check(made.sources[fmt], folder, layout)
        assert verdict.ok and verdict.problems == verdict.warnings == [] and verdict.equal == verdict.weights == 14
        assert Verdict(**json.loads(json.dumps(verdict.to_dict()))) == verdict


@pytest.mark.parametrize("layout", NV)
def test_one_flipped_code(made: Made, tmp_path: Path, layout: str) -> None:
    def flip(tensors: dict[str, Tensor]) -> None:
        tensors[Q + PACKED[layout]][3, 5] ^= 0x01

    verdict = planted(made, tmp_path, layout, flip)
    assert found(verdict, f"{Q}: 1 of 4096 decoded weights differ") and verdict.equal == 13


@pytest.mark.parametrize("layout", NV)
@pytest.mark.parametrize(
    "byte, message", [(0x7F, "1 of 256 scales are NaN"), (0xFF, "NaN"), (0xB8, "negative"), (0x00, "zero")]
)
def test_a_scale_that_no_decoder_can_use(made: Made, tmp_path: Path, layout: str, byte: int, message: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight_scale"].view(torch.uint8)[2, 1] = byte

    assert found(planted(made, tmp_path, layout, spoil), message)


def test_a_scale_of_mxfp4_that_is_nan(made: Made, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight_scale"][2, 1] = 255

    assert found(planted(made, tmp_path, "compressed_tensors", spoil, "mxfp4"), f"{Q}: 1 of 128 scales are NaN")


@pytest.mark.parametrize("layout", NV)
def test_subnormal_scales_are_warned_of_and_a_changed_one_is_found(made: Made, tmp_path: Path, layout: str) -> None:
    def shrink(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q}.weight_scale"].view(torch.uint8)[2, 1] = 3

    verdict = planted(made, tmp_path, layout, shrink)
    assert "1 of " in verdict.warnings[0] and "block scales are subnormal" in verdict.warnings[0]
    assert found(verdict, f"{Q}: ")


def test_a_model_with_subnormal_scales_is_right_with_a_warning(tmp_path: Path) -> None:
    source = quantized(tmp_path, "llama", "nvfp4", global_scale=64.0)
    verdict = export(source, tmp_path / "out", "modelopt")
    assert verdict.ok and "block scales are subnormal" in verdict.warnings[0]


@pytest.mark.parametrize("layout, said", [("compressed_tensors", "multiplier"), ("modelopt", "divisor")])
def test_an_inverted_global_scale(made: Made, tmp_path: Path, layout: str, said: str) -> None:
    def invert(tensors: dict[str, Tensor]) -> None:
        tensors[O + GLOBAL[layout]] = 1 / tensors[O + GLOBAL[layout]]

    assert found(planted(made, tmp_path, layout, invert), f"{O}{GLOBAL[layout]} is inverted: it holds the {said}")


@pytest.mark.parametrize("layout", NV)
@pytest.mark.parametrize("value", [0.0, float("nan"), 1e-40])
def test_a_global_scale_that_no_decoder_can_use(made: Made, tmp_path: Path, layout: str, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[O + GLOBAL[layout]].fill_(value)

    verdict = planted(made, tmp_path, layout, spoil)
    told = float(torch.tensor(value, dtype=torch.float32, device="cpu"))
    assert found(verdict, f"{O}{GLOBAL[layout]} is {told:g} instead of ") and verdict.equal == 13


@pytest.mark.parametrize("layout", NV)
def test_unequal_global_scales_of_layers_that_engines_join(made: Made, tmp_path: Path, layout: str) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[K + GLOBAL[layout]] *= 2

    verdict = planted(made, tmp_path, layout, change)
    assert found(verdict, "engines join these layers and read one global scale, but they have: ")
    assert found(verdict, f"{K}{GLOBAL[layout]} is ")


@pytest.mark.parametrize("layout", NV)
def test_a_layer_missing_from_the_list_to_ignore(made: Made, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", layout], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    message = "lm_head are not quantized and not in the list of layers to ignore"
    assert found(check(made.sources["nvfp4"], folder, layout), message)


def test_two_lists_to_ignore_that_differ(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", "modelopt"], folder)
    config = json.loads((folder / "hf_quant_config.json").read_text())
    config["quantization"]["exclude_modules"] = []
    (folder / "hf_quant_config.json").write_text(json.dumps(config))
    verdict = check(made.sources["nvfp4"], folder, "modelopt")
    assert found(verdict, "list other layers to ignore") and found(verdict, "lm_head are not quantized and not in")


def test_patterns_count_as_names() -> None:
    assert selfcheck._matches("model.layers.3.mlp.gate", "re:.*mlp.gate$")
    assert selfcheck._matches("model.layers.3.mlp.gate", "*.mlp.gate")
    assert selfcheck._matches("lm_head", "lm_head") and not selfcheck._matches("lm_head", "head")


@pytest.mark.parametrize("layout", NV)
def test_missing_surplus_and_changed_tensors(made: Made, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", layout], folder)
    tensors = load_file(folder / FIRST)
    norm = "model.layers.0.input_layernorm.weight"
    tensors[norm][0] += 1
    del tensors[Q + PACKED[layout]]
    tensors["model.layers.0.odd"] = torch.zeros(2, dtype=torch.float32, device="cpu")
    save_file(tensors, folder / FIRST)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: shard for name, shard in index["weight_map"].items() if shard != FIRST}
    index["weight_map"] |= dict.fromkeys(tensors, FIRST)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    verdict = check(made.sources["nvfp4"], folder, layout)
    assert found(verdict, f"{Q}{PACKED[layout]} is missing")
    assert found(verdict, "model.layers.0.odd belong to no weight")
    assert found(verdict, f"{norm}, which is not quantized, has changed")


@pytest.mark.parametrize("layout", NV)
def test_a_truncated_shard(made: Made, tmp_path: Path, layout: str) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", layout], folder)
    data = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(data[: len(data) // 2])
    assert found(check(made.sources["nvfp4"], folder, layout), "cannot be read")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_missing_file(made: Made, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", "modelopt"], folder)
    (folder / name).unlink()
    assert found(check(made.sources["nvfp4"], folder, "modelopt"), "the folder cannot be read")


def test_weights_that_transformers_loads_otherwise(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = selfcheck.load_in_transformers

    def changed(folder: Path, layout: str) -> object:
        model = real(folder, layout)
        model.get_submodule(O).weight_packed[0, 0] ^= 1
        return model

    monkeypatch.setattr(selfcheck, "load_in_transformers", changed)
    verdict = check(made.sources["nvfp4"], made.folders["nvfp4", "compressed_tensors"], "compressed_tensors")
    assert found(verdict, f"loads other weights of {O}") and verdict.equal == 14


def test_without_compressed_tensors_an_own_reader_checks(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors.compressors", None)
    verdict = check(made.sources["nvfp4"], made.folders["nvfp4", "compressed_tensors"], "compressed_tensors")
    assert verdict.equal == verdict.weights == 14 and "an own reader of the documented layout" in verdict.routes
    assert "compressed-tensors is not installed" in verdict.warnings[0]


def test_modelopts_own_unpacker_reads_where_it_is_installed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of the same interface stands for it here: it keeps what it is given, and decodes by quantkit."""
    from quantkit.formats import NVFP4
    from quantkit.tensor import QuantizedTensor

    class Unpacker:
        wrong = False

        def __init__(self, shape: torch.Size, dtype: torch.dtype, codes: Tensor) -> None:
            assert dtype == torch.float32 and shape == (codes.shape[0], 2 * codes.shape[1])
            self.codes = codes

        def dequantize(
            self, dtype: torch.dtype, scale: Tensor, double_scale: Tensor, block_sizes: dict[int, int]
        ) -> Tensor:
            q = QuantizedTensor(self.codes, scale.view(torch.uint8), double_scale, NVFP4, block_sizes[-1])
            return q.dequantize(dtype) * (2 if self.wrong else 1)

    modules = __import__("sys").modules
    monkeypatch.setitem(modules, "modelopt", SimpleNamespace(__version__="9.9", __path__=[]))
    for name in ("modelopt.torch", "modelopt.torch.quantization", "modelopt.torch.quantization.qtensor"):
        monkeypatch.setitem(modules, name, SimpleNamespace(NVFP4QTensor=Unpacker, __path__=[]))
    folder = made.folders["nvfp4", "modelopt"]
    verdict = check(made.sources["nvfp4"], folder, "modelopt")
    assert verdict.ok and verdict.routes == ["ModelOpt 9.9"] and verdict.equal == 14
    monkeypatch.setattr(Unpacker, "wrong", True)
    assert check(made.sources["nvfp4"], folder, "modelopt").equal == 0


def test_a_large_folder_is_not_loaded_whole(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "WHOLE_BYTES", 1000)
    verdict = check(made.sources["nvfp4"], made.folders["nvfp4", "compressed_tensors"], "compressed_tensors")
    assert verdict.ok and "too large to be loaded by transformers" in verdict.warnings[0]
    assert [route.split()[0] for route in verdict.routes] == ["compressed-tensors"]


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_changed_byte_of_a_gguf_file(made: Made, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", "gguf"], folder)
    reader = GGUFReader(folder / "model.gguf", "r+")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    tensors["blk.0.attn_q.weight"].data[1, 20] ^= 1
    tensors["blk.0.ffn_up.scale"].data[0] = 1 / tensors["blk.0.ffn_up.scale"].data[0]
    tensors["blk.1.ffn_norm.weight"].data[0] += 1
    tensors["blk.1.attn_q.weight"].data[2, 1] = 0x7F
    tensors["blk.1.attn_k.weight"].data[2, 1] |= 0x80
    tensors["blk.1.attn_v.scale"].data[0] = 0
    reader.data.flush()
    del reader, tensors
    verdict = check(made.sources["nvfp4"], folder, "gguf")
    assert found(verdict, "blk.0.attn_q.weight: decoded weights differ")
    assert found(verdict, "blk.0.ffn_up.scale is inverted")
    assert found(verdict, "blk.1.ffn_norm.weight, which is not quantized, has changed")
    assert found(verdict, "blk.1.attn_q.weight: 1 of 256 scales are NaN")
    assert found(verdict, "blk.1.attn_k.weight: 1 of 128 scales are negative")
    assert found(verdict, "blk.1.attn_v.scale is 0 instead of 0.0006")
    assert verdict.equal == 9


def test_a_truncated_gguf_file(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "planted"
    shutil.copytree(made.folders["nvfp4", "gguf"], folder)
    data = (folder / "model.gguf").read_bytes()
    (folder / "model.gguf").write_bytes(data[: len(data) // 2])
    assert found(check(made.sources["nvfp4"], folder, "gguf"), "model.gguf cannot be read")
