"""Scaled rotary embeddings in GGUF files: from config.json's rope_parameters and back.

    default    no key
    linear     rope.scaling.type, rope.scaling.factor: positions are divided by the factor
    yarn       the same two keys, and rope.scaling.original_context_length
    llama3     a tensor rope_freqs.weight, float32 [head_dim/2]: llama.cpp divides each frequency by its own factor

transformers needs the four parameters of llama3 (Llama 3.1 and later), which the tensor does not have. Exports have
them in a key of their own, which is checked against the tensor. A file of another tool is read if its tensor is that of
the published Llama models, and refused if not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.files import SourceError
from experiments.sources.gguf_names import Architecture

FREQUENCIES = "rope_freqs.weight"
PARAMETERS = "quantkit.rope_parameters"  # key of the GGUF file
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
PUBLISHED = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))  # of Llama 3.1 and 3.3, and of Llama 3.2


def rope_type(config: Mapping[str, Any]) -> str:
    """transformers' name of the way in which rotary embeddings are scaled. config: of transformers, as a dict."""
    rope = rope_parameters(config)
    return str(rope.get("rope_type", rope.get("type", "default")))


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Empty where config.json has none. config: as for `rope_type`."""
    return dict(config.get("rope_parameters") or config.get("rope_scaling") or {})


def rope_theta(config: Mapping[str, Any]) -> float:
    """The base of the frequencies; 10000 where it is not told, as in transformers. config: as for `rope_type`."""
    return float(rope_parameters(config).get("rope_theta") or config.get("rope_theta") or 10000.0)


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of an attention head. config: as for `rope_type`."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def frequency_factors(parameters: Mapping[str, Any], theta: float, head_dim: int) -> Tensor:
    """float32 [head_dim/2]: by how much llama3 divides each frequency, from transformers' frequencies.

    parameters: those of LLAMA3, by name. theta: rope_theta.
    """
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(rope: dict[str, Any]) -> Tensor:
        config = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=2**31,  # of no effect; transformers warns where a length is above it
            rope_parameters=rope | {"rope_theta": theta},
        )
        with torch.device("cpu"):  # some of transformers' tensors name none
            found: Tensor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))[0]
        return found.float()

    plain = frequencies({"rope_type": "linear", "factor": 1.0})
    return plain / frequencies({"rope_type": "llama3", **{name: parameters[name] for name in LLAMA3}})


def add_scaling(writer: Any, config: Mapping[str, Any]) -> None:
    """Write the keys of a GGUF file. config: as for `rope_type`."""
    from gguf import RopeScalingType

    rope, kind = rope_parameters(config), rope_type(config)
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
    if kind == "llama3":
        writer.add_string(PARAMETERS, json.dumps({name: rope[name] for name in LLAMA3}))


def read_scaling(
    file: str,
    architecture: Architecture,
    header: Mapping[str, Any],
    factors: Tensor | None,
    theta: float,
    head_dim: int,
) -> dict[str, Any] | None:
    """rope_parameters of a GGUF file; None where nothing is scaled.

    file: its name, for errors. header: its keys. factors: the tensor FREQUENCIES, if it has one. theta: rope_theta.
    Raises SourceError for a way of scaling that is not read.
    """
    prefix = f"{architecture.name}.rope"
    factor = float(header.get(f"{prefix}.scaling.factor", header.get(f"{prefix}.scale_linear", 0.0))) or 1.0
    told = str(header.get(f"{prefix}.scaling.type", "linear" if factor != 1.0 else "none"))  # llama.cpp's default
    kind = "llama3" if factors is not None else "default" if told == "none" else told
    if kind not in ("default", *architecture.ropes) or (factors is not None and told != "none"):
        raise SourceError(
            f"{file} scales its rotary embedding in a way that is not read from GGUF files ({told}). Give the original "
            "checkpoint."
        )
    if kind == "default":
        return None
    scaled = {"rope_type": kind, "rope_theta": theta}
    if factors is not None:
        return scaled | _llama3(file, header.get(PARAMETERS), factors, theta, head_dim)
    if kind == "yarn":
        length = int(header[f"{prefix}.scaling.original_context_length"])
        # llama.cpp's defaults, and no key for the last one.
        scaled |= {"original_max_position_embeddings": length, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    return scaled | {"factor": factor}


def _llama3(file: str, told: str | None, factors: Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The parameters that give these factors. told: the value of PARAMETERS, if the file has it."""
    if told is not None:
        own = _parsed(told)
        if own is None or not torch.equal(frequency_factors(own, theta, head_dim), factors):
            raise SourceError(f"{file} is damaged: {PARAMETERS} does not give its {FREQUENCIES}. Copy it again.")
        return own
    for values in PUBLISHED:
        known = dict(zip(LLAMA3, values, strict=True))
        made = frequency_factors(known, theta, head_dim)
        if made.shape == factors.shape and torch.allclose(made, factors, rtol=1e-5, atol=0.0):
            return known
    raise SourceError(
        f"{file} scales its rotary embedding by a {FREQUENCIES} that is not of Llama 3, and does not say how. Give the "
        "original checkpoint."
    )


def _parsed(told: str) -> dict[str, Any] | None:
    try:
        own = json.loads(told)
        return {name: own[name] for name in LLAMA3} if all(float(own[name]) > 0 for name in LLAMA3) else None
    except (ValueError, KeyError, TypeError):
        return None
