"""A quantized decoder as one GGUF file: metadata, tokenizer, and the codes in types 39 (MXFP4) and 40 (NVFP4).

The gguf package writes the file and, for the check, decodes it; sources/gguf_names.py names the tensors. llama.cpp's
Llama wants the rows of q and k in another order (neighbours instead of two halves), and experts in three tensors; a row
moves with its codes and scales. Unquantized matrices keep their dtype, vectors and routers become float32.
gguf_vocabulary.py writes the tokenizer. If llama.cpp has no name for its pre-tokenizer, the file names none, and the
check warns of it: llama.cpp then takes its default one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.files import SourceError, one_line
from experiments.model.gguf_vocabulary import differences, read_vocabulary, write_vocabulary
from experiments.sources.gguf_names import ROUTER, SIZES, architecture_of, gguf_name
from experiments.sources.gguf_rope import (
    FREQUENCIES,
    add_scaling,
    frequency_factors,
    head_dim,
    rope_parameters,
    rope_theta,
    rope_type,
)
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit import QuantizedTensor
from quantkit.formats import BlockFormat
from quantkit.layouts import get_layout
from quantkit.layouts.gguf import TYPES

FILE_NAME = "model.gguf"
COLUMNS = 64  # of a block of type 40
FILE_TYPES = {"mxfp4": 38, "nvfp4": 39}


def write(source: QuantizedCheckpoint, folder: Path) -> None:
    """Write FOLDER/model.gguf. Raises SourceError for another kind of model."""
    from gguf import GGUFWriter

    config = _config(source)
    writer = GGUFWriter(folder / FILE_NAME, architecture_of(config["model_type"]).name)
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
    list(_pieces(source, config))
    read_vocabulary(source.folder)
    check_format(config, source.quantized(source.names[0]).format)
    for name in source.names:
        quantized = source.quantized(name)
        get_layout("gguf").check(quantized.format, quantized.block_size)
        if quantized.format.two_level:
            check_columns([(name, quantized.shape[-1])])


def check_format(config: dict[str, Any], fmt: BlockFormat) -> None:
    """Raises SourceError for a model whose global scales llama.cpp does not read. config: as for `check_config`."""
    if fmt.two_level and not architecture_of(str(config.get("model_type"))).scaled:
        raise SourceError(
            f"export=gguf: llama.cpp misreads global scales of {config['model_type']} models, so {fmt.name} would be "
            "wrong there; use mxfp4 with block_size=32, or export compressed_tensors"
        )


def check_columns(matrices: Iterable[tuple[str, int]]) -> None:
    """matrices: (name, in_features) of those in nvfp4. Raises ValueError where no row is a whole number of blocks."""
    for name, columns in matrices:
        if columns % COLUMNS:
            raise ValueError(
                f"{name}: gguf stores nvfp4 by {COLUMNS} columns, and K = {columns}; use compressed_tensors or modelopt"
            )


def check_config(config: dict[str, Any]) -> None:
    """Raises SourceError for another kind of model. config: of transformers, as a dict."""
    architecture = architecture_of(str(config.get("model_type")))
    other = next(
        (name for name, meant in architecture.refused.items() if config.get(name, meant) not in (meant, None)), None
    )
    if other is not None:
        raise SourceError(
            f"export=gguf cannot tell llama.cpp of {other}={config[other]}; export compressed_tensors instead"
        )
    if config["model_type"] == "gpt_oss" and config["layer_types"] != _alternating(config["num_hidden_layers"]):
        raise SourceError(
            "export=gguf: llama.cpp knows gpt-oss with sliding windows in every second layer alone; use export=gpt_oss"
        )
    if (kind := rope_type(config)) not in ("default", *architecture.ropes):
        raise SourceError(
            f"export=gguf writes no model with scaled rotary embeddings of the type {kind}; export compressed_tensors, "
            "and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    if (config.get("attention_bias") and architecture.name != "gpt-oss") or config.get("mlp_bias"):
        raise SourceError(
            f"export=gguf writes {config['model_type']} models without biases; export compressed_tensors instead"
        )


def _config(source: QuantizedCheckpoint) -> dict[str, Any]:
    from transformers import AutoConfig

    # With the defaults of transformers, which config.json leaves out.
    known = AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    config: dict[str, Any] = known.to_dict()
    check_config(config)
    return config


# --- metadata ---------------------------------------------------------------------------------------------------------


def _metadata(writer: Any, source: QuantizedCheckpoint, config: dict[str, Any]) -> None:
    fmt = source.quantized(source.names[0]).format.name
    writer.add_type("model")
    writer.add_name(str(source.about.get("model", "model")))
    for key, field in SIZES.items():
        value = _size(config, field)
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{writer.arch}.{key}", value)
    add_scaling(writer, config)
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FILE_TYPES[fmt])
    writer.add_quantization_version(2)
    if (vocabulary := read_vocabulary(source.folder)) is not None:
        write_vocabulary(writer, source.folder, vocabulary, config["vocab_size"])


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]


def _size(config: dict[str, Any], field: str) -> Any:
    if field == "head_dim":
        return head_dim(config)
    if field == "num_key_value_heads":
        return config.get(field) or config["num_attention_heads"]
    if field == "sliding_window" and config["model_type"] != "gpt_oss":
        return None
    if field == "moe_intermediate_size" and config["model_type"] == "gpt_oss":
        return config["intermediate_size"]
    if field == "num_experts":
        return config.get(field) or config.get("num_local_experts")  # transformers 5 writes the second
    if field == "rope_theta":
        return rope_theta(config)
    return config.get(field)


# --- tensors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A tensor of the file. name: without its last part, end. stored: the quantized weight or kept tensor that it comes
    from. rows: of its last but one dimension, or of a vector; None: all, in their order."""

    name: str
    end: str
    stored: str
    rows: Tensor | None = None

    def of(self, value: Any) -> Any:
        """A tensor or a QuantizedTensor → the part of it that the file's tensor holds."""
        if self.rows is None:
            return value
        if isinstance(value, QuantizedTensor):
            return replace(value, codes=value.codes[..., self.rows, :], scales=value.scales[..., self.rows, :])
        return value[..., self.rows] if self.end == "bias" else value[self.rows]


def _pieces(source: QuantizedCheckpoint, config: dict[str, Any]) -> Iterator[Piece]:
    """Raises SourceError for a weight that the file has no place for."""
    quantized = set(source.names)
    for stored in (*source.names, *source.kept):
        module, end = (stored, "weight") if stored in quantized else stored.rpartition(".")[::2]
        if end == "sinks":
            module, end = stored, "weight"
        parent, _, last = module.rpartition(".")
        if end.endswith("_bias") and module.endswith(".experts"):
            size = source.tensor(stored).shape[-1]
            yield from _experts(module, end.removesuffix("_bias"), "bias", stored, size, config)
        elif parent.endswith(".experts") and stored in quantized:
            yield from _experts(parent, last, end, stored, source.quantized(stored).codes.shape[-2], config)
        elif ".experts." in module:
            raise SourceError(f"{stored}: export=gguf writes quantized experts alone; quantize them all")
        else:
            yield Piece(_named(module, config), end, stored, _row_order(source, stored, last, config))


def _experts(parent: str, name: str, end: str, stored: str, rows: int, config: dict[str, Any]) -> Iterator[Piece]:
    """Gate and up of a fused parameter are two tensors in the file."""
    if name != "gate_up_proj":
        yield Piece(_named(f"{parent}.{name}", config), end, stored)
        return
    numbers = _numbers(rows)
    alternate = architecture_of(config["model_type"]).alternates
    halves = (numbers[0::2], numbers[1::2]) if alternate else numbers.chunk(2)
    for part, half in zip(("gate_proj", "up_proj"), halves, strict=True):
        yield Piece(_named(f"{parent}.{part}", config), end, stored, half)


def _named(module: str, config: dict[str, Any]) -> str:
    name = gguf_name(architecture_of(config["model_type"]), module)
    if name is None:
        raise SourceError(f"{module}: no name for it in a GGUF file of {config['model_type']}; export another layout")
    return name


def _row_order(source: QuantizedCheckpoint, stored: str, projection: str, config: dict[str, Any]) -> Tensor | None:
    """llama.cpp's order of the rows of Llama's q and k; None for other weights."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    if not architecture_of(config["model_type"]).pairs or projection not in heads:
        return None
    size = source.quantized(stored).codes.shape[0] if stored in source.names else source.tensor(stored).shape[0]
    return _numbers(size).view(_size(config, heads[projection]), 2, -1).transpose(1, 2).flatten()


def _numbers(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.int64, device="cpu")


def _arrays(source: QuantizedCheckpoint, config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray[Any, Any], Any]]:
    """(name in GGUF, its bytes or values, type or None), one at a time."""
    from gguf import GGMLQuantizationType

    if (factors := _frequency_factors(config)) is not None:
        yield FREQUENCIES, factors.numpy(), None
    for piece in _pieces(source, config):
        name = f"{piece.name}.{piece.end}"
        if piece.stored in source.names:
            quantized = piece.of(source.quantized(piece.stored))
            tensors = get_layout("gguf").to_tensors(piece.name, quantized)
            yield name, tensors[name].flatten(-2).numpy(), GGMLQuantizationType(TYPES[quantized.format.name])
            if f"{piece.name}.scale" in tensors:
                yield f"{piece.name}.scale", tensors[f"{piece.name}.scale"].numpy(), None
            continue
        tensor = piece.of(source.tensor(piece.stored))
        if tensor.ndim == 1 or piece.end == "bias" or piece.name.endswith(ROUTER):
            tensor = tensor.float()
        if tensor.dtype == torch.bfloat16:
            yield name, tensor.contiguous().view(torch.uint8).numpy(), GGMLQuantizationType.BF16
        else:
            yield name, tensor.contiguous().numpy(), None


def _frequency_factors(config: dict[str, Any]) -> Tensor | None:
    """float32 [head_dim/2] of FREQUENCIES; None for a model without."""
    if rope_type(config) != "llama3":
        return None
    return frequency_factors(rope_parameters(config), rope_theta(config), head_dim(config))


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
        right: dict[str, bool] = {}
        for piece in _pieces(self.source, self.config):
            name = f"{piece.name}.{piece.end}"
            wanted.add(name)
            if name not in self.tensors:
                self.problems.append(f"{name} is missing")
                right[piece.stored] = False
            elif piece.stored in self.source.names:
                quantized = piece.of(self.source.quantized(piece.stored))
                wanted |= {f"{piece.name}.scale"} if quantized.format.two_level else set()
                right[piece.stored] = self._quantized(piece, quantized) and right.get(piece.stored, True)
            else:
                self._kept(piece, name)
        if (factors := _frequency_factors(self.config)) is not None:
            wanted.add(FREQUENCIES)
            self._frequencies(factors)
        self.equal = sum(right.get(name, False) for name in self.source.names)
        if surplus := sorted(self.tensors.keys() - wanted):
            self.problems.append(f"{surplus[0]} belongs to no weight of the model")
        if "tokenizer.ggml.tokens" not in self.reader.fields:
            self.warnings.append(f"{FILE_NAME} has no tokenizer, because the model's folder has none")
        elif "tokenizer.ggml.pre" not in self.reader.fields:
            self.warnings.append(
                f"{FILE_NAME} names no pre-tokenizer, because llama.cpp has no name for the model's; llama.cpp then "
                "takes its default one, and may split text otherwise"
            )
        if (vocabulary := read_vocabulary(self.source.folder)) is not None:
            self.warnings += differences(vocabulary)

    def _quantized(self, piece: Piece, wanted: QuantizedTensor) -> bool:
        from gguf.quants import dequantize

        name = f"{piece.name}.{piece.end}"
        tensor = self.tensors[name]
        if int(tensor.tensor_type) != TYPES[wanted.format.name]:
            self.problems.append(f"{name} is of type {tensor.tensor_type.name}, not {wanted.format.name}")
            return False
        if not self._block_scales(name, torch.from_numpy(np.array(tensor.data)), wanted):
            return False
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        # llama.cpp multiplies by the global scale afterwards.
        one = torch.ones((), dtype=torch.float32, device="cpu")
        same = torch.equal(values, replace(wanted, global_scale=one).dequantize())
        if not same:
            self.problems.append(f"{name}: decoded weights differ from the quantized model's")
        return (not wanted.format.two_level or self._scale(f"{piece.name}.scale", wanted.global_scale)) and same

    def _block_scales(self, name: str, stored: Tensor, wanted: QuantizedTensor) -> bool:
        """Whether the block scales are numbers. E8M0 has NaN alone, UE4M3 also a sign that it must not have."""
        size, count = (36, 4) if wanted.format.two_level else (17, 1)
        scales = stored.unflatten(-1, (-1, size))[..., :count]
        nan = (scales & 0x7F) == 0x7F if wanted.format.two_level else scales == 0xFF
        counts = {"NaN": int(nan.sum()), "negative": 0}
        if wanted.format.two_level:
            counts["negative"] = int(((scales >= 0x80) & ~nan).sum())
        found = [f"{name}: {count} of {scales.numel()} scales are {what}" for what, count in counts.items() if count]
        self.problems += found
        return not found

    def _scale(self, name: str, meant: Tensor) -> bool:
        if name not in self.tensors:
            self.problems.append(f"{name} is missing")
            return False
        found = torch.from_numpy(np.array(self.tensors[name].data, dtype=np.float32))
        wanted = meant.flatten().expand(len(found))
        if torch.equal(found, wanted):
            return True
        worst = int((found - wanted).abs().argmax())
        value, right = float(found[worst]), float(wanted[worst])
        inverted = abs(value * right - 1) < 1e-5
        self.problems.append(f"{name} is inverted" if inverted else f"{name} is {value:g} instead of {right:g}")
        return False

    def _frequencies(self, meant: Tensor) -> None:
        stored = self.tensors.get(FREQUENCIES)
        if stored is None:
            self.problems.append(f"{FREQUENCIES} is missing")
        elif not torch.equal(torch.from_numpy(np.array(stored.data)), meant):
            self.problems.append(f"{FREQUENCIES} has not the factors of config.json")

    def _kept(self, piece: Piece, name: str) -> None:
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        values = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        meant: Tensor = piece.of(self.source.tensor(piece.stored))
        if not torch.equal(values, meant.float()):
            self.problems.append(f"{name}, which is not quantized, has changed")
