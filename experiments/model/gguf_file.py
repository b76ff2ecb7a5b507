"""A quantized Llama or Qwen3 as one GGUF file: metadata, tokenizer, and the codes in types 39 (MXFP4) and 40 (NVFP4).

The gguf package writes the file, names the tensors and, for the check, decodes them. llama.cpp's Llama wants the rows
of q and k in another order (neighbours instead of two halves); a row moves with its codes and scales. Unquantized
matrices keep their dtype, vectors become float32. A tokenizer that llama.cpp knows under no name is left out, which the
check warns of: such a file has tensors and the model's sizes only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.files import SourceError, one_line
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit import QuantizedTensor
from quantkit.layouts import get_layout
from quantkit.layouts.gguf import TYPES

FILE_NAME = "model.gguf"
COLUMNS = 64  # of a block of type 40
ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3"}  # model_type → name in GGUF
FILE_TYPES = {"mxfp4": 38, "nvfp4": 39}
# The expression that splits text before BPE → its name in llama.cpp.
_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {_SPLIT % r"\p{N}{1,3}": "llama-bpe", _SPLIT % r"\p{N}": "qwen2"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # token types


def write(source: QuantizedCheckpoint, folder: Path) -> None:
    """Write FOLDER/model.gguf. Raises SourceError for another kind of model."""
    from gguf import GGUFWriter

    config = _config(source)
    writer = GGUFWriter(folder / FILE_NAME, ARCHITECTURES[config["model_type"]])
    _metadata(writer, source, config)
    for name, array, kind in _arrays(source, config):
        shape = array.shape
        writer.add_tensor_info(name, shape, array.dtype, array.nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, array, _ in _arrays(source, config):
        writer.write_tensor_data(array)
    writer.close()


def refuse(source: QuantizedCheckpoint) -> None:
    """Raises ValueError for a model whose GGUF file this module cannot write."""
    config = _config(source)
    list(_names(source, config))
    for name in source.names:
        quantized = source.quantized(name)
        get_layout("gguf").check(quantized.format, quantized.block_size)
        if quantized.format.two_level:
            check_columns([(name, quantized.shape[-1])])


def check_columns(matrices: Iterable[tuple[str, int]]) -> None:
    """matrices: (name, in_features) of those in nvfp4. Raises ValueError where no row is a whole number of blocks."""
    for name, columns in matrices:
        if columns % COLUMNS:
            raise ValueError(
                f"{name}: gguf stores nvfp4 by {COLUMNS} columns, and K = {columns}; use compressed_tensors or modelopt"
            )


def check_config(config: dict[str, Any]) -> None:
    """Raises SourceError for another kind of model. config: as in config.json."""
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise SourceError(
            f"export=gguf writes {' and '.join(ARCHITECTURES)} models, and this is {kind}; export compressed_tensors, "
            "and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    rope = _rope(config)
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise SourceError(
            "export=gguf writes no model with scaled rotary embeddings; export compressed_tensors, and convert it with "
            "llama.cpp's convert_hf_to_gguf.py"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise SourceError("export=gguf writes models without biases; export compressed_tensors")


def _config(source: QuantizedCheckpoint) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    check_config(config)
    return config


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(writer: Any, source: QuantizedCheckpoint, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    fmt = source.quantized(source.names[0]).format.name
    writer.add_type("model")
    writer.add_name(str(source.about.get("model", "model")))
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(float(_rope(config).get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[fmt])
    writer.add_quantization_version(2)
    _tokenizer(writer, source.folder, config["vocab_size"])


def _tokenizer(writer: Any, folder: Path, size: int) -> None:
    from gguf import SpecialVocab

    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    described = json.loads(path.read_text(encoding="utf-8"))
    model, name = described["model"], split_name(described)
    if model.get("type") != "BPE" or model.get("byte_fallback") or name is None:
        return
    tokens, types = [f"[PAD{number}]" for number in range(size)], [5] * size  # 5: unused
    for token, number in model["vocab"].items():
        tokens[number], types[number] = token, NORMAL
    for added in described.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added.get("special") else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def split_name(described: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way in which a tokenizer.json splits text; None if it is none of SPLITS."""
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    patterns = [str(step.get("pattern", {}).get("Regex", "")) for step in steps if step.get("type") == "Split"]
    if len(patterns) != 1:
        return None
    return SPLITS.get(patterns[0])


# --- tensors ----------------------------------------------------------------------------------------------------------


def _arrays(source: QuantizedCheckpoint, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any], Any]]:
    """(name in GGUF, its bytes or values, type or None), one at a time."""
    from gguf import GGMLQuantizationType

    for name, stored in _names(source, config):
        if stored in source.names:
            quantized = reordered(source.quantized(stored), stored, config)
            tensors = get_layout("gguf").to_tensors(name, quantized)
            blocks = tensors[f"{name}.weight"].flatten(-2).numpy()
            yield f"{name}.weight", blocks, GGMLQuantizationType(TYPES[quantized.format.name])
            if f"{name}.scale" in tensors:
                yield f"{name}.scale", tensors[f"{name}.scale"].numpy(), None
            continue
        tensor = reordered(source.tensor(stored), stored.removesuffix(".weight"), config)
        if tensor.ndim == 1:
            tensor = tensor.float()
        if tensor.dtype == torch.bfloat16:
            yield f"{name}.weight", tensor.view(torch.uint8).numpy(), GGMLQuantizationType.BF16
        else:
            yield f"{name}.weight", tensor.numpy(), None


def _names(source: QuantizedCheckpoint, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name in GGUF without its last part, name of the quantized weight or of the kept tensor)."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    arch = MODEL_ARCH[config["model_type"].upper()]
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    for stored in (*source.names, *source.kept):
        name = names.get_name(stored.removesuffix(".weight"))
        if name is None:
            raise SourceError(
                f"{stored}: gguf has no name for it in a {config['model_type']} model; export another layout"
            )
        yield name, stored


def reordered(value: Any, name: str, config: dict[str, Any]) -> Any:
    """A matrix, or a QuantizedTensor, with the rows of llama's q and k in llama.cpp's order."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config.get("num_key_value_heads")}
    projection = name.rpartition(".")[2]
    if config["model_type"] != "llama" or projection not in heads:
        return value
    number = heads[projection] or config["num_attention_heads"]
    rows = torch.arange(value.shape[0], dtype=torch.int64, device="cpu").view(number, 2, -1).transpose(1, 2).flatten()
    if isinstance(value, QuantizedTensor):
        return replace(value, codes=value.codes[rows], scales=value.scales[rows])
    return value[rows]


# --- the check --------------------------------------------------------------------------------------------------------


def check(source: QuantizedCheckpoint, folder: Path) -> tuple[list[str], int, int, list[str], list[str]]:
    """(routes, number of weights, equal ones, problems, warnings) of a written file; see selfcheck.Verdict."""
    from importlib.metadata import version

    routes = [f"gguf {version('gguf')}"]
    try:
        found = _File(source, folder)
        found.compare()
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        return routes, len(source.names), 0, [f"{FILE_NAME} cannot be read: {one_line(error)}"], []
    return routes, len(source.names), found.equal, found.problems, found.warnings


class _File:
    def __init__(self, source: QuantizedCheckpoint, folder: Path) -> None:
        from gguf import GGUFReader

        self.source, self.config = source, _config(source)
        self.reader = GGUFReader(folder / FILE_NAME)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        self.equal = 0
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def compare(self) -> None:
        wanted: set[str] = set()
        for name, stored in _names(self.source, self.config):
            wanted.add(f"{name}.weight")
            if f"{name}.weight" not in self.tensors:
                self.problems.append(f"{name}.weight is missing")
            elif stored in self.source.names:
                wanted |= self._quantized(name, self.source.quantized(stored), stored)
            else:
                self._kept(name, stored)
        if surplus := sorted(self.tensors.keys() - wanted):
            self.problems.append(f"{surplus[0]} belongs to no weight of the model")
        if "tokenizer.ggml.tokens" not in self.reader.fields:
            self.warnings.append("model.gguf has no tokenizer, because llama.cpp knows this one under no name")

    def _quantized(self, name: str, quantized: QuantizedTensor, stored: str) -> set[str]:
        from gguf.quants import dequantize

        wanted = reordered(quantized, stored, self.config)
        tensor = self.tensors[f"{name}.weight"]
        if int(tensor.tensor_type) != TYPES[wanted.format.name]:
            self.problems.append(f"{name}.weight is of type {tensor.tensor_type.name}, not {wanted.format.name}")
            return set()
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        # llama.cpp multiplies by the global scale afterwards.
        one = torch.ones((), dtype=torch.float32, device="cpu")
        same = torch.equal(values, replace(wanted, global_scale=one).dequantize())
        if not same:
            self.problems.append(f"{name}.weight: decoded weights differ from the quantized model's")
        names: set[str] = set()
        if wanted.format.two_level:
            names.add(f"{name}.scale")
            same = self._scale(f"{name}.scale", float(wanted.global_scale)) and same
        self.equal += same
        return names

    def _scale(self, name: str, meant: float) -> bool:
        if name not in self.tensors:
            self.problems.append(f"{name} is missing")
            return False
        value = float(self.tensors[name].data[0])
        if value != meant:
            kind = "is inverted" if abs(value * meant - 1) < 1e-5 else f"is {value:g} instead of {meant:g}"
            self.problems.append(f"{name} {kind}")
        return value == meant

    def _kept(self, name: str, stored: str) -> None:
        from gguf.quants import dequantize

        tensor = self.tensors[f"{name}.weight"]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        meant: Tensor = reordered(self.source.tensor(stored), stored.removesuffix(".weight"), self.config)
        if not torch.equal(values, meant.float()):
            self.problems.append(f"{name}.weight, which is not quantized, has changed")
