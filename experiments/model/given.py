"""Codes that descent begins with (init=FOLDER): of a folder of quantkit, or of another tool in an engine's layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, told_as
from experiments.model.evaluate_settings import MODEL_FOLDER
from experiments.model.select import Matrix, Selection
from experiments.model.stored_names import stored_rows
from experiments.sources.checkpoints import DequantizedCheckpoint, HoldsCodes, open_checkpoint
from experiments.sources.quantized import is_quantized_folder
from quantkit import QuantizedTensor
from quantkit.formats import BlockFormat


def given_model(folder: str) -> ModelConfig:
    """The folder, or that of a run of quantize_model.py."""
    inner = Path(folder).expanduser() / MODEL_FOLDER
    return ModelConfig("init", ModelSource.hub, path=str(inner) if is_quantized_folder(inner) else folder)


class GivenCodes:
    """The quantized matrices of a folder, by the names of a model's matrices."""

    def __init__(self, folder: str, cache: Path, fmt: BlockFormat, block_size: int) -> None:
        """Raises SourceError for a folder without codes, or with codes of another format or block size."""
        with told_as("init"):
            checkpoint = open_checkpoint(given_model(folder), cache)
        if not isinstance(checkpoint, HoldsCodes | DequantizedCheckpoint):
            raise SourceError(f"init={folder}: no NVFP4 or MXFP4 codes there. Leave init out to begin with gptq.")
        self.folder, self.checkpoint = folder, checkpoint
        own = isinstance(checkpoint, DequantizedCheckpoint)
        self.names = set(checkpoint.stored.names if own else checkpoint.matrices.values())  # type: ignore[union-attr]
        first = self._read(min(self.names))
        if (first.format, first.block_size) != (fmt, block_size):
            raise SourceError(
                f"init={folder} holds {first.format.name} with block size {first.block_size}, not {fmt.name} with "
                f"{block_size}. Ask for format={first.format.name} block_size={first.block_size}."
            )

    def check(self, model: Any, selection: Selection) -> None:
        """Raises SourceError where the folder lacks a matrix of `model`, or has other shapes in its first layer."""
        for matrix in (matrix for layer in selection.layers for matrix in layer):
            if matrix.full_name not in self.names:
                for name in stored_rows(model, matrix.full_name, _shape(matrix)[:-1]):
                    self._check_name(name)
        for matrix in next(layer for layer in selection.layers if layer):
            self.matrix(model, matrix, _shape(matrix))

    def matrix(self, model: Any, matrix: Matrix, shape: torch.Size) -> QuantizedTensor:
        """The codes of a matrix of `model`, of that shape. Raises SourceError where the folder lacks them."""
        where = f"init={self.folder}: {matrix.full_name}"
        if matrix.full_name in self.names:
            found = self._read(matrix.full_name)
            if found.shape != shape:
                raise SourceError(f"{where} is {list(found.shape)} there, not {list(shape)}. Give the same model.")
            return found
        stored = stored_rows(model, matrix.full_name, shape[:-1])
        parts = [(rows, self._read(name)) for name, rows in stored.items()]
        if any(len(q.codes) != len(rows) or q.shape[-1] != shape[-1] for rows, q in parts):
            raise SourceError(f"{where} has another shape there. Give the same model.")
        return _joined(where, parts, shape)

    def _check_name(self, name: str) -> None:
        if name not in self.names:
            raise SourceError(
                f"init={self.folder} has no codes of {name}. Leave it out (model.exclude), or begin without init."
            )

    def _read(self, name: str) -> QuantizedTensor:
        self._check_name(name)
        if isinstance(self.checkpoint, DequantizedCheckpoint):
            return self.checkpoint.stored.quantized(name)
        return self.checkpoint.quantized(name)


def _shape(matrix: Matrix) -> torch.Size:
    """[out_features, in_features], or that of experts; of a model on any device."""
    target = matrix.target
    return target.as_matrix(getattr(target.module, target.parameter)).shape


def _joined(what: str, parts: list[tuple[Tensor, QuantizedTensor]], shape: torch.Size) -> QuantizedTensor:
    """One matrix [N, K], or experts [E, N, K], of the parts with their row numbers. The rows of a matrix share a global
    scale, and so do those of an expert."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    first = parts[0][1]
    codes, scales = (
        torch.cat([getattr(q, name) for _, q in parts])[order].reshape(*shape[:-1], -1) for name in ("codes", "scales")
    )
    of_rows = torch.cat([q.global_scale.expand(len(rows)) for rows, q in parts])[order].reshape(shape[:-1])
    if not bool((of_rows == of_rows[..., :1]).all()):
        raise SourceError(f"{what} has unequal global scales of matrices that the model joins. Begin without init.")
    scale = of_rows[..., 0] if len(shape) == 2 else of_rows[:, 0].view(-1, 1, 1)
    return replace(first, codes=codes, scales=scales, global_scale=scale.clone())
