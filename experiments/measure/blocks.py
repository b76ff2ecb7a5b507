"""Statistics of the blocks, as columns with one value per block, in the weight's order:

shift                  index of the chosen scale minus index of the naive scale, in steps of representable scales
candidates             number of scales evaluated; absent if candidates were not counted
squared_error          ‖q − w‖² of the block
squared_norm           ‖w‖²
squared_output_error   r H rᵀ with r = q − w and H the block's Hessian from the calibration tokens
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.files import replacing
from quantkit import QuantizedTensor
from quantkit.calibration import block_hessians

ERROR_BINS = 64


def block_columns(weight: Tensor, result: QuantizedTensor, naive: QuantizedTensor, gram: Tensor) -> dict[str, Tensor]:
    """Column → its values [out_features · num_blocks], on the CPU. weight [out_features, K]; gram [K, K].

    The byte of a scale is its index in the scale grid.
    """
    rows, num_blocks = result.scales.shape
    size = weight.shape[1] // num_blocks
    blocks = weight.float().unflatten(1, (num_blocks, size))
    residual = result.dequantize().unflatten(1, (num_blocks, size)) - blocks
    hessians = block_hessians(gram, size).to(residual.device)
    columns = {
        "row": torch.arange(rows, dtype=torch.int32, device="cpu").repeat_interleave(num_blocks),
        "block": torch.arange(num_blocks, dtype=torch.int32, device="cpu").repeat(rows),
        "scale": result.scales,
        "shift": result.scales.short() - naive.scales.short(),
        "squared_error": residual.square().sum(-1),
        "squared_norm": blocks.square().sum(-1),
        "squared_output_error": torch.einsum("mkb,kbc,mkc->mk", residual, hessians, residual),
    }
    if result.candidates is not None:
        columns["candidates"] = result.candidates
    return {name: values.cpu().flatten() for name, values in columns.items()}


def histograms(columns: Mapping[str, Tensor]) -> dict[str, tuple[list[int], list[float]]]:
    """Name → (counts, edges), from the columns of block_columns(); empty without blocks.

    The scale's shift and the candidates have one bin per integer. The relative error ‖q − w‖ / ‖w‖ has ERROR_BINS bins
    from 0. The error of a block of zeros is 0.
    """
    if not len(columns["shift"]):
        return {}
    whole = {"scale_shift": columns["shift"], "candidates": columns.get("candidates")}
    found = {name: _whole_numbers(values) for name, values in whole.items() if values is not None}
    norm = columns["squared_norm"].double()
    error = torch.where(norm > 0, columns["squared_error"].double() / norm, 0.0).sqrt()
    top = error.max().item() or 1.0
    counted, edges = torch.histogram(error, bins=ERROR_BINS, range=(0.0, top))
    return found | {"relative_error": (counted.long().tolist(), edges.tolist())}


def _whole_numbers(values: Tensor) -> tuple[list[int], list[float]]:
    """Counts of the integers from the least to the largest of ``values``, and the edges halfway between them."""
    values = values.long()
    least = int(values.min())
    counted = torch.bincount(values - least).tolist()
    return counted, [least - 0.5 + step for step in range(len(counted) + 1)]


def counts(values: Tensor | None) -> dict[str, int] | None:
    """Value → number of occurrences, in ascending order. The keys are strings, as in JSON."""
    if values is None:
        return None
    found, times = values.unique(return_counts=True)
    return {str(value): count for value, count in zip(found.tolist(), times.tolist(), strict=True)}


def write_blocks(columns: Mapping[str, Tensor], path: Path) -> None:
    """Write one Parquet file with these columns."""
    import pyarrow
    from pyarrow import parquet

    table: Any = pyarrow.table({name: values.numpy() for name, values in columns.items()})
    with replacing(path) as temporary:
        parquet.write_table(table, temporary, compression="zstd")
