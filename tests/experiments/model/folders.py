"""Whole tiny models in quantkit's own folder, quantized layer by layer without calibration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.config import ModelConfig, ModelSource
from experiments.model.checkpoint import CheckpointWriter, kept_tensors
from experiments.sources.checkpoints import Checkpoint, open_checkpoint
from experiments.sources.decoder import Decoder, build_whole
from experiments.sources.modules import linear_modules
from quantkit import QuantizedTensor, quantize

IDENTITY = "0123456789"


def source(folder: Path) -> ModelConfig:
    return ModelConfig("tiny", ModelSource.hub, path=str(folder), dtype="float32")


def matrices(layer: nn.Module, size: int) -> Iterator[tuple[str, str, bool]]:
    """(name of the module or of the experts' parameter, the parameter's name, whether it is stored as [in, out])."""
    for path, target in linear_modules(layer):
        if target.in_features % size == 0:
            yield path, f"{path}.weight", target.transposed
    for path, module in layer.named_modules():
        if hasattr(module, "is_transposed"):
            for name, parameter in module.named_parameters(recurse=False):
                width = parameter.shape[1 if module.is_transposed else 2] if parameter.dim() == 3 else 1
                if width % size == 0:
                    yield f"{path}.{name}", f"{path}.{name}", module.is_transposed


def quantize_layer(
    decoder: Decoder, index: int, size: int = 16, **options: Any
) -> tuple[dict[str, QuantizedTensor], set[str]]:
    """(name → matrix, those stored as [in, out]) of a loaded layer."""
    layer, made, transposed = decoder.stack[index], {}, set()
    for name, parameter, turned in matrices(layer, size):
        weight = layer.get_parameter(parameter)
        full = f"{decoder.path}.{index}.{name}"
        made[full] = quantize(weight.mT if turned else weight, block_size=size, **({"method": "naive"} | options))
        transposed |= {full} if turned else set()
    return made, transposed


def write(folder: Path, checkpoint: Checkpoint, stop: int | None = None, **options: Any) -> CheckpointWriter:
    """Writes `folder`, unless it stops before layer `stop`. Continues what is there. Returns the closed writer."""
    decoder = build_whole(checkpoint, "float32")
    depth = len(decoder.stack)
    made = {index: quantize_layer(decoder, index, **options) for index in range(depth)}
    names = [name for quantized, _ in made.values() for name in quantized]
    with CheckpointWriter(folder, IDENTITY, depth) as writer:
        for index, (quantized, transposed) in made.items():
            if index == stop:
                return writer
            if index not in writer.finished:
                writer.write_layer(
                    index, quantized, kept_tensors(decoder, index, names), {"seconds": index / 8}, transposed
                )
        if not writer.is_complete:
            writer.finish(kept_tensors(decoder, None, names), checkpoint, {"method": "naive"})
    return writer


def expected(checkpoint: Checkpoint, **options: Any) -> Any:
    """The whole model with its weights replaced by the dequantized ones, by a route without any file."""
    decoder = build_whole(checkpoint, "float32")
    model = copy.deepcopy(decoder.model)
    for index in range(len(decoder.stack)):
        made, transposed = quantize_layer(decoder, index, **options)
        for name, q in made.items():
            value = q.dequantize()
            parameter = model.get_parameter(f"{name}.weight" if value.dim() == 2 else name)
            with torch.no_grad():
                parameter.copy_(value.mT if name in transposed else value)
    return model


def open_source(folder: Path) -> Checkpoint:
    return open_checkpoint(source(folder), folder.parent / "cache")
