"""What an export cannot express, refused before a model is quantized."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.config import CONF_DIR, compose_as
from experiments.model import gguf_file
from experiments.model.gguf_vocabulary import read_vocabulary
from experiments.model.select import Matrix, Selection
from experiments.model.settings import QuantizeConfig
from experiments.model.stored_names import linear_layers, stored_rows
from experiments.sources.checkpoints import Checkpoint, SafetensorsCheckpoint
from experiments.sources.decoder import Decoder
from experiments.sources.models import tokenizer_folder
from quantkit.formats import get_format
from quantkit.layouts import Layout, fused_groups, get_layout

OWN_SCALES = ("search",)  # global scales that each layer chooses for itself


def check_options(config: QuantizeConfig) -> None:
    """Raises ValueError for a format, block size or global scale that `export` cannot express, and names the
    alternative."""
    if config.export is None:
        return
    layout, fmt = get_layout(str(config.export)), get_format(config.format.name)
    layout.check(fmt, config.block_size)
    if not layout.shared_scales or not fmt.two_level:
        return
    if config.format.global_scale in OWN_SCALES:
        raise ValueError(
            f"format.global_scale={config.format.global_scale} gives each layer its own, and engines that read "
            f"export={layout.name} join layers with one global scale; use amax or headroom, or export=gguf"
        )
    for group in () if config.fused is None else _joined():
        if not any(group <= set(own) for own in config.fused or ()):
            raise ValueError(
                f"fused={config.fused} does not have {', '.join(sorted(group))} in one list, and engines that read "
                f"export={layout.name} join them; leave fused out, or use export=gguf"
            )


def _joined() -> list[set[str]]:
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return [set(group) for group in fused_groups(names)]


def check_checkpoint(config: QuantizeConfig, checkpoint: Checkpoint) -> None:
    """Raises ValueError for a kind of model or a tokenizer that `export` cannot express, before a weight is read."""
    if str(config.export) != "gguf":
        return
    known = checkpoint.config.to_dict()
    gguf_file.check_config(known)
    gguf_file.check_format(known, get_format(config.format.name))
    if isinstance(checkpoint, SafetensorsCheckpoint):
        read_vocabulary(tokenizer_folder(checkpoint.model))


def check_model(config: QuantizeConfig, decoder: Decoder, selection: Selection) -> None:
    """Raises ValueError for a model or a selection of its layers that `export` cannot express."""
    if config.export is None:
        return
    layout = get_layout(str(config.export))
    matrices = [matrix for layer in selection.layers for matrix in layer]
    if layout.name == "gguf":
        two_level = get_format(config.format.name).two_level
        _all_experts(decoder.model, selection.names)
        gguf_file.check_columns((m.full_name, m.target.in_features) for m in matrices if two_level)
    elif layout.name == "gpt_oss":
        _only_experts(matrices)
    else:
        for matrix in matrices:
            if matrix.experts:
                stored_rows(decoder.model, matrix.full_name, torch.Size((2, 2)))
        check_whole_groups(layout, selection.names, linear_layers(decoder.model))


def _all_experts(model: nn.Module, quantized: Iterable[str]) -> None:
    chosen = set(quantized)
    for name, _ in model.named_parameters():
        if ".experts." in name and not name.endswith("bias") and name.removesuffix(".weight") not in chosen:
            raise ValueError(
                f"{name}: export=gguf writes quantized experts alone; quantize all (model.include, model.exclude), "
                "or use export=compressed_tensors"
            )


def _only_experts(matrices: Iterable[Matrix]) -> None:
    dense = [matrix.full_name for matrix in matrices if not matrix.experts]
    if dense:
        raise ValueError(
            f"export=gpt_oss stores experts alone, and {dense[0]} would be quantized, too; add "
            "'model.include=[\"*.experts.*\"]', or use export=compressed_tensors"
        )


def check_whole_groups(layout: Layout, quantized: Iterable[str], linear: Iterable[str]) -> None:
    """Raises ValueError where only some of the layers that engines join are quantized."""
    chosen = set(quantized)
    for group in fused_groups(linear) if layout.shared_scales else ():
        missing = [name for name in group if name not in chosen]
        if 0 < len(missing) < len(group):
            raise ValueError(
                f"engines that read {layout.name} join {', '.join(group)}, and {missing[0]} is not quantized; quantize "
                "all of them or none (model.include, model.exclude)"
            )


GROUPS = ("model", "format", "method", "calibrate", "hessian", "data")  # of conf/, which a command names
TOLD = ("block_size", "seed", "data.samples", "data.seq_len")  # even where they are the defaults
PLACES = ("model.path", "data.path", "init")  # told by their last part, so that a card is the same everywhere
NOT_TOLD = ("cache", "tracking", "device", "offline", "force", "output_dir", "sweep", "export")


def command_of(config: QuantizeConfig) -> str:
    """The command that quantizes the same model again: conf/'s groups, and every setting that differs from theirs."""
    chosen = {group: _choice(config, group) for group in GROUPS}
    named = [f"{group}={name}" for group, name in chosen.items() if (CONF_DIR / group / f"{name}.yaml").is_file()]
    default = _settings(compose_as("quantize_model", QuantizeConfig, named))
    own = _settings(config)
    words = [*named, *(f"{name}={own[name]}" for name in TOLD)]
    words += [
        f"{name}={_word(Path(str(value)).name if name in PLACES and value is not None else value)}"
        for name, value in own.items()
        if name not in TOLD and value != default.get(name)
    ]
    words += [] if config.export is None else [f"export={config.export}"]
    return " ".join(["python experiments/quantize_model.py", *map(shlex.quote, words)])


def _choice(config: QuantizeConfig, group: str) -> str:
    names = {"calibrate": config.calibrate.mode, "hessian": config.hessian.weighting}
    return str(names[group] if group in names else getattr(config, group).name)


def _settings(config: QuantizeConfig) -> dict[str, Any]:
    """Name of a setting, as on the command line → its value."""
    found: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if name in NOT_TOLD:
            continue
        if not isinstance(value, dict):
            found[name] = value
            continue
        settings = value.pop("settings", None) or {}  # of a method, beside its name
        found |= {f"{name}.{key}": each for key, each in (value | settings).items()}
    return found


def _word(value: Any) -> str:
    """A value in Hydra's words."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(_word, value))}]"
    return f'"{value}"' if isinstance(value, str) and set(value) & set("*?[]{},=: ") else str(value)
