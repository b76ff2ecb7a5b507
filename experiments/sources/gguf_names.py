"""What a decoder's weights and sizes are called in GGUF and in transformers. One table for writing and for reading.

An architecture's experts are in three tensors [E, N, K] in GGUF. In a checkpoint they are apart, but for gpt-oss, whose
rows of gate and up alternate in one parameter. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from experiments.files import SourceError

AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
MODULES = {  # of a decoder layer
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
GPT_OSS = {
    **{name: own for name, own in MODULES.items() if name.startswith("self_attn.") and name.endswith("_proj")},
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.sinks": "attn_sinks",
    "mlp.router": "ffn_gate_inp",
}
ROUTER = "ffn_gate_inp"
SIZES = {  # after the architecture's name → field of config.json
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "attention.sliding_window": "sliding_window",
}


@dataclass(frozen=True)
class Architecture:
    """name: in GGUF. model_types: in transformers; a file is read as the first. pairs: q and k have rotary pairs in
    neighbouring rows, not in two halves. scaled: whether llama.cpp multiplies by every `.scale` of nvfp4 (b11549 leaves
    out those of Qwen2's MLP, and gpt-oss gives NaN). modules: of a layer. alternates: rows of gate and up of the
    experts do. ropes: ways in which rotary embeddings may be scaled, by transformers' names. refused: fields of
    config.json that GGUF cannot tell → the value that it means."""

    name: str
    model_types: tuple[str, ...]
    pairs: bool = False
    scaled: bool = True
    modules: Mapping[str, str] = field(default_factory=lambda: MODULES)
    alternates: bool = False
    ropes: tuple[str, ...] = ("linear",)
    refused: Mapping[str, Any] = field(default_factory=dict)


NO_WINDOW = MappingProxyType({"use_sliding_window": False})
ALL_SPARSE = MappingProxyType(dict(NO_WINDOW) | {"mlp_only_layers": [], "decoder_sparse_step": 1})
ARCHITECTURES = (
    Architecture(
        "llama",
        ("llama", "mistral"),
        pairs=True,
        ropes=("linear", "llama3"),
        refused=MappingProxyType({"sliding_window": None}),
    ),
    Architecture("qwen2", ("qwen2",), scaled=False, refused=NO_WINDOW),
    Architecture("qwen3", ("qwen3",), refused=NO_WINDOW),
    Architecture("qwen3moe", ("qwen3_moe",), refused=MappingProxyType(dict(ALL_SPARSE) | {"norm_topk_prob": True})),
    Architecture("gpt-oss", ("gpt_oss",), scaled=False, modules=GPT_OSS, alternates=True, ropes=("yarn",)),
)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
EXPERT = re.compile(r"mlp\.experts\.(?:\d+\.)?(\w+)")


def architecture_of(model_type: str) -> Architecture:
    """By transformers' name. Raises SourceError."""
    for known in ARCHITECTURES:
        if model_type in known.model_types:
            return known
    names = ", ".join(name for known in ARCHITECTURES for name in known.model_types)
    raise SourceError(
        f"export=gguf writes {names} models, and this is {model_type}; use export=compressed_tensors, and convert the "
        "folder with llama.cpp's convert_hf_to_gguf.py"
    )


def architecture_named(name: str, file: str) -> Architecture:
    """By GGUF's name. Raises SourceError."""
    for known in ARCHITECTURES:
        if known.name == name:
            return known
    names = ", ".join(known.name for known in ARCHITECTURES)
    raise SourceError(f"{file} holds a {name} model; only {names} are read from GGUF files.")


def gguf_name(architecture: Architecture, module: str) -> str | None:
    """Of a module, such as model.layers.0.self_attn.q_proj, or of an expert's, such as ….mlp.experts.3.up_proj."""
    if module in AROUND:
        return AROUND[module]
    layer = LAYER.fullmatch(module)
    if layer is None:
        return None
    expert = EXPERT.fullmatch(layer[2])
    name = architecture.modules.get(layer[2]) if expert is None else EXPERTS.get(expert[1])
    return None if name is None else f"blk.{layer[1]}.{name}"


def module_name(architecture: Architecture, name: str, expert: int | None = None) -> str | None:
    """The inverse of `gguf_name`; expert: which one of a tensor of experts."""
    around = {own: module for module, own in AROUND.items()}
    if name in around:
        return around[name]
    block = BLOCK.fullmatch(name)
    if block is None:
        return None
    if is_experts(name):
        part = next(module for module, own in EXPERTS.items() if own == block[2])
        return f"model.layers.{block[1]}.mlp.experts.{expert}.{part}"
    found = next((module for module, own in architecture.modules.items() if own == block[2]), None)
    return None if found is None else f"model.layers.{block[1]}.{found}"


def fused_name(module: str) -> str:
    """The parameter that holds an expert's matrix with those of all others: gate and up are one."""
    parent, _, part = module.rpartition(".")
    parent = parent.rpartition(".")[0]  # without the expert's number
    return f"{parent}.{'gate_up_proj' if part in ('gate_proj', 'up_proj') else part}"


def is_experts(name: str) -> bool:
    return name.rpartition(".")[2] in EXPERTS.values()
