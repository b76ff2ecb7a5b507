"""Results that other projects published, and their tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.reporting.labels import FORMATS, METHODS, as_factor, as_number, as_percent
from experiments.reporting.rows import Subject
from experiments.reporting.table import Table

LABELS = METHODS | {"gptq": "GPTQ, blocks ordered, Hessian scales"}  # as qwantize has it


@dataclass(frozen=True)
class Published:
    """A published result, a line of `results/published/*.csv`. Errors are fractions, times are milliseconds."""

    model: str
    layer_index: int
    layer_module: str
    out_features: int
    in_features: int
    data: str
    format: str
    block_size: int
    method: str
    weight_error: float
    output_error: float
    reference_ms: float | None
    triton_ms: float | None
    speedup: float | None  # as published, from unrounded times
    source: str

    def describes(self, subject: Subject) -> bool:
        """Whether the subject has the same model, data, layer and block size; a local folder counts by its name."""
        same = ("layer_index", "layer_module", "out_features", "in_features", "block_size")
        return (
            all(getattr(self, name) == getattr(subject, name) for name in same)
            and _plain(subject.model) == _plain(self.model)
            and _plain(subject.data).startswith(_plain(self.data))
        )


def published_tables(published: Iterable[Published]) -> list[Table]:
    """The published results alone, one table per model, layer, text, block size and source."""
    by_subject: dict[tuple[Any, ...], list[Published]] = {}
    for line in published:
        layer = f"layer {line.layer_index} {line.layer_module} ({line.out_features} × {line.in_features})"
        key = (line.model, layer, line.data, line.block_size, line.source)
        by_subject.setdefault(key, []).append(line)
    return [
        Table(
            title=f"Published, not measured here: {model}, {layer}, {data}, block size {block_size}",
            notes=(f"Source: {source}",),
            frame=pd.DataFrame(
                {
                    "Format": [FORMATS.get(p.format, p.format) for p in lines],
                    "Method": [LABELS.get(p.method, p.method) for p in lines],
                    "Weight error": [as_percent(p.weight_error) for p in lines],
                    "Output error": [as_percent(p.output_error) for p in lines],
                    "PyTorch, ms": [as_number(p.reference_ms) for p in lines],
                    "Triton, ms": [as_number(p.triton_ms) for p in lines],
                    "Triton speed-up": [as_factor(p.speedup) for p in lines],
                }
            ),
        )
        for (model, layer, data, block_size, source), lines in by_subject.items()
    ]


def read_published(folder: Path) -> list[Published]:
    """All published results of all CSV files in `folder`."""
    lines: list[Published] = []
    for path in sorted(folder.glob("*.csv")):
        frame = pd.read_csv(path).astype(object)
        for values in frame.where(frame.notna(), None).to_dict("records"):
            lines.append(Published(**{str(name): value for name, value in values.items()}))
    return lines


def _plain(name: str | None) -> str:
    """The last part of a path, without brackets and punctuation: `Qwen3-4B (local)` equals `Qwen/Qwen3-4B`."""
    last = re.sub(r"\(.*\)", "", name or "").rpartition("/")[2]
    return re.sub(r"[^a-z0-9]", "", last.lower())
