"""Tiny versions of every causal decoder of transformers: about 4 layers of 32 channels, with depth-dependent features.

One list of small sizes serves all models. SPECIAL has further values that single configurations need.
"""

from __future__ import annotations

import inspect
from typing import Any

VOCABULARY = 96
UNSET = object()  # leave the key out

_SIZES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    32: "hidden_size d_model n_embd dim word_embed_proj_dim embedding_size emb_dim",
    48: (
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff encoder_ffn_dim decoder_ffn_dim dff dim_ff "
        "block_ff_dim mlp_hidden_size feed_forward_size"
    ),
    24: (
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size shared_intermediate_size q_lora_rank"
    ),
    4: (
        "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_attention_heads "
        "n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_decoder_attention_heads "
        "num_encoder_attention_heads attention_heads rotary_dim index_topk num_experts n_routed_experts "
        "num_local_experts moe_num_experts mamba_d_conv time_step_rank linear_num_value_heads "
        "linear_conv_kernel_dim"
    ),
    2: (
        "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads index_n_heads num_experts_per_tok "
        "num_experts_per_token moe_topk moe_k top_k_experts zero_expert_num zero_expert_num_ mamba_expand "
        "n_mamba_heads linear_num_key_heads altup_num_inputs num_kv_shared_layers eos_token_id"
    ),
    8: (
        "head_dim kv_channels dim_head global_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
        "sliding_window sliding_window_size attention_window_size local_attention window_size "
        "attention_chunk_size mamba_d_state mamba_n_heads mamba_d_head mamba_chunk_size state_size chunk_size "
        "mamba_num_heads mamba_head_dim linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input "
        "laurel_rank"
    ),
    16: "kv_lora_rank qk_head_dim index_head_dim mamba_headdim",
    1: (
        "n_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups mamba_ngroups bos_token_id "
        "decoder_start_token_id cls_token_id"
    ),
    64: (
        "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
        "max_source_positions seq_length mamba_d_ssm"
    ),
    0: "pad_token_id",
    3: "sep_token_id unk_token_id",
}
SMALL = {key: value for value, keys in _SIZES.items() for key in keys.split()}


def _each(kinds: str, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {kind: dict(values) for kind in kinds.split()}


SPECIAL: dict[str, dict[str, Any]] = {
    **_each("qwen3_moe mellum", {"num_experts": 4}),
    **_each(
        "axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu",
        {"num_key_value_heads": 4},
    ),
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2, "n_routed_experts": 4},
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "num_experts": 16,
        "num_expert_group": 2,
        "topk_group": 1,
        "layer_group_size": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": UNSET,
        "mlp_layer_types": UNSET,
    },
    "kimi_linear": {"num_key_value_heads": 4, "num_experts": 8, "linear_head_dim": 8, "linear_num_heads": 4},
    "kolibri1": {"num_local_experts": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention", "sliding_attention"],
        "per_layer_config": {"01": {"kv_lora_rank": 8}, "03": {"kv_lora_rank": 8}},
        "head_dim": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
    },
    **_each(
        "gemma4_text gemma4_unified_text",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "per_layer_config": {"01": {"head_dim": 16}, "03": {"head_dim": 16}},
            "num_hidden_layers": 4,
        },
    ),
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    **_each("hunyuan_v1_dense hunyuan_v1_moe", {"head_dim": 8}),
    "ministral": {
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "state_size": 8, "chunk_size": 8},
    "qwen4_exp_text": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "ple_embed_dim": 16,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 1,
        "hc_lowrank": 8,
        "heads_per_ngram": 2,
        "indexer_head_dim": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local", "local", "local"],
        "local_attn_chunk_length": 8,
        "attention_head_size": 8,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
        "pronunciation_vocab_size": 96,
        "shape_vocab_size": 96,
        "is_decoder": True,
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"], "is_decoder": True},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
        "layers_block_type": UNSET,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention", "hybrid"],
        "hybrid_layer_ids": [1, 3, 5],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "num_mem_blocks": 1,
        "use_mamba_kernels": False,
        "num_query_groups": UNSET,
        "kv_channels": UNSET,
        "adapter_rank": 4,
    },
    "zaya": {
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "router_hidden_size": 8,
        "num_key_value_heads": 2,
        "layer_types": ["hybrid", "hybrid", "hybrid", "hybrid"],
    },
    **_each(
        "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
        "roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl",
        {"is_decoder": True},
    ),
}

# Models that no configuration makes tiny, or that are not text-only decoders.
NOT_TINY = {
    "blt": "its table of hashed bytes has 3 million rows in every configuration",
    "dots3_note": "made of images, sound and text; its text model is dots3_note_text",
    "emu3": "made of images and text; the text model has a mapping of its own",
    "fuyu": "made of images and text",
    "gemma3": "made of images and text; its text model is gemma3_text",
    "gemma3n": "made of images, sound and text, and its image tower needs timm; its text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model, whose keys and values it reads",
    "gemma4_unified": "made of images, sound and text; its text model is gemma4_unified_text",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it reads",
    "got_ocr2": "made of images and text",
    "moshi": "made of sound and text",
    "moss_transcribe_diarize": "made of sound and text",
    "musicgen": "made of sound and text",
    "musicgen_melody": "made of sound and text",
}


def kinds() -> list[str]:
    """The model types for which transformers has a causal decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _tiny(CONFIG_MAPPING[kind])


def _tiny(cls: Any) -> Any:
    special = SPECIAL.get(cls.model_type, {})
    known = set(inspect.signature(cls.__init__).parameters)
    known |= {field for base in cls.__mro__ for field in getattr(base, "__annotations__", {})}
    known -= set(getattr(cls, "attribute_map", {}))
    values = {key: value for key, value in SMALL.items() if key in known and _is_set(cls, key)}
    for part, part_cls in getattr(cls, "sub_configs", {}).items():
        if part not in special and part_cls.__name__ != "AutoConfig" and hasattr(part_cls, "model_type"):
            values[part] = _tiny(part_cls).to_dict()
    values |= special
    return cls(**{key: value for key, value in values.items() if value is not UNSET})


def _is_set(cls: Any, key: str) -> bool:
    """Whether the default configuration has a value there; None switches a part off."""
    try:
        return getattr(cls(), key, None) is not None
    except Exception:  # a configuration without defaults, or a value that differs between layers
        return True
