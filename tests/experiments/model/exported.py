"""Tiny models of four families in quantkit's own folder, as an export needs them: fused layers share a global scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from experiments.model.checkpoint import CheckpointWriter, kept_tensors, open_quantized
from experiments.sources.checkpoints import Checkpoint
from experiments.sources.decoder import build_whole
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit.layouts import exact_global_scale
from tests.experiments.model.folders import IDENTITY, open_source, quantize_layer
from tests.experiments.tiny_models import train_sentencepiece, train_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
ROPES: dict[str, dict[str, Any]] = {  # scaled rotary embeddings, by kind of model
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama_linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "qwen3_linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
}
SHARED_SCALE = float(exact_global_scale(torch.tensor(6e-4, dtype=torch.float32, device="cpu")))


def build(kind: str, vocab_size: int = SIZES["vocab_size"]) -> Any:
    """A model of transformers with random weights, bfloat16."""
    from transformers import (
        AutoModelForCausalLM,
        GptOssConfig,
        LlamaConfig,
        MistralConfig,
        MixtralConfig,
        Qwen2Config,
        Qwen3Config,
        Qwen3MoeConfig,
    )

    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": vocab_size}
    config = {
        "llama": lambda: LlamaConfig(**sizes),
        "llama3": lambda: LlamaConfig(**sizes | {"rope_parameters": ROPES["llama3"]}),
        "llama_linear": lambda: LlamaConfig(**sizes | {"rope_parameters": ROPES["llama_linear"]}),
        "qwen3": lambda: Qwen3Config(**sizes),
        "qwen3_linear": lambda: Qwen3Config(**sizes | {"rope_parameters": ROPES["qwen3_linear"]}),
        "qwen2": lambda: Qwen2Config(**{key: value for key, value in sizes.items() if key != "head_dim"}),
        "mistral": lambda: MistralConfig(**sizes | {"sliding_window": None}),
        "qwen3_moe": lambda: Qwen3MoeConfig(**sizes | EXPERTS),
        "mixtral": lambda: MixtralConfig(**sizes | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        "gpt_oss": lambda: GptOssConfig(
            **sizes | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": None, "sliding_window": 64}
        ),
    }[kind]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def quantized(
    root: Path, kind: str, format: str, only: str = "", style: str | None = None, **options: Any
) -> QuantizedCheckpoint:
    """The finished folder of a tiny model. only: a part of the names of the weights that are quantized. style: of a
    tokenizer of SentencePiece."""
    source = root / f"{kind}-source"
    if not source.exists():
        build(kind, SIZES["vocab_size"] if style is None else 384).save_pretrained(source)
        train_tokenizer(source) if style is None else train_sentencepiece(source, style)
    return quantize_source(open_source(source), root / f"{kind}-{format}", kind, format, only, **options)


def quantize_source(
    checkpoint: Checkpoint, folder: Path, kind: str, format: str, only: str = "", **options: Any
) -> QuantizedCheckpoint:
    """The finished folder of that checkpoint. The other arguments are those of `quantized`."""
    decoder = build_whole(checkpoint, "bfloat16")
    settings = {"format": format, "size": {"nvfp4": 16, "mxfp4": 32}[format], "method": "sse"}
    settings |= {"global_scale": SHARED_SCALE} if format == "nvfp4" else {}
    layers = [quantize_layer(decoder, index, **settings | options) for index in range(len(decoder.stack))]
    chosen = [{name: q for name, q in made.items() if only in name} for made, _ in layers]
    names = [name for made in chosen for name in made]
    with CheckpointWriter(folder, IDENTITY, len(layers)) as writer:
        for index, (made, (_, transposed)) in enumerate(zip(chosen, layers, strict=True)):
            kept = kept_tensors(decoder, index, names)
            writer.write_layer(index, made, kept, {}, transposed & made.keys())
        about = {"model": f"tiny {kind}", "method": "sse", "left_out": {"lm_head": "outside the decoder layers"}}
        writer.finish(kept_tensors(decoder, None, names), checkpoint, about)
    return open_quantized(folder)
