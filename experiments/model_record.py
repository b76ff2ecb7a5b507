"""One quantized model, one record: the fields of `ModelRecord`, in order, are the columns of the CSV.

Errors are fractions, durations are seconds. The records of the layers are in layers.jsonl of the model's own folder.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.record import Record

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ModelRecord(Record):
    VERSION: ClassVar[int] = SCHEMA_VERSION
    SPARSE: ClassVar[tuple[str, ...]] = (
        "hessian_matmul",
        "hessian_outputs",
        "rows",
        "output_damping",
        "without_outputs",
    )

    format: str
    block_size: int
    method: str
    method_settings: dict[str, Any]
    calibrate: str
    alpha: float
    residual_alpha: float
    hessian_weighting: str
    hessian_groups: int
    hessian_samples: int
    backend: str
    device: str
    device_name: str | None = None
    folder: str | None = None  # of the quantized model

    model: str | None = None
    model_revision: str | None = None
    model_origin: str | None = None
    model_dtype: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    data_hash: str | None = None
    data_split: str | None = None
    substituted: bool | None = None  # an offline twin replaced the configured model or text
    seq_len: int | None = None
    sequences: int | None = None
    tokens: int | None = None
    seed: int | None = None

    layers: int | None = None
    matrices: int | None = None
    weights: int | None = None  # quantized ones
    bits_per_weight: float | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # linear layer → why it is not quantized
    few_tokens: dict[str, int] = field(default_factory=dict)  # expert → its tokens, fewer than calibrate.min_tokens
    warned: int | None = None  # matrices with warnings in their record, of a text too short
    naive_weight_error: float | None = None  # these four: root mean square over the matrices
    weight_error: float | None = None
    naive_output_error: float | None = None
    output_error: float | None = None
    hidden_error: float | None = None  # ‖h_q − h‖ / ‖h‖ after the last layer
    hessian_matmul: str | None = None  # None: float32
    hessian_outputs: bool | None = None  # rows of a weight made up for each other's errors; None: they did not
    rows: int | None = None  # of hessian_outputs: those that are solved together
    output_damping: float | None = None
    without_outputs: int | None = None  # of hessian_outputs: matrices without gradients at their outputs

    seconds: dict[str, float] = field(default_factory=dict)  # by phase
    peak_device_bytes: int | None = None
    processes: int | None = None  # that shared the work
    resumed_layers: int | None = None  # taken over from an interrupted run

    # layout → the verdict of the self-check, with the export's folder; see model/selfcheck.py
    exports: dict[str, dict[str, Any]] = field(default_factory=dict)

    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    started_at: str | None = None  # UTC, ISO 8601
    duration_s: float | None = None
    schema_version: int = SCHEMA_VERSION
