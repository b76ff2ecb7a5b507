"""One evaluation of a whole model, one record: the fields of `EvaluationRecord`, in order, are the columns of the CSV.

KL is in nats a token, over the scored tokens of the text; perplexities are those of the same tokens. An interval
(`_low`, `_high`) is the 95 % bootstrap interval over sequences, an `_error` the standard error over sequences. Beside
the record, tokens.npz has every token's values, so that a later evaluation can be paired with it. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from experiments.record import Record

SCHEMA_VERSION = 1
TOKENS_NAME = "tokens.npz"
PEER_LABELS = {  # settings["tool"] of other tools' models by peers.py → their names in tables, without the version
    "llmcompressor_rtn": "llm-compressor, round to nearest",
    "llmcompressor_gptq": "llm-compressor, GPTQ",
    "modelopt_max": "ModelOpt, max",
    "modelopt_mse": "ModelOpt, MSE",
    "modelopt_local_hessian": "ModelOpt, Local-Hessian",
    "modelopt_gptq": "ModelOpt, GPTQ",
    "autoround": "AutoRound, learned rounding",
}


@dataclass(frozen=True)
class EvaluationRecord(Record):
    VERSION: ClassVar[int] = SCHEMA_VERSION

    model: str  # the run that made quantkit's own folder, else the folder's name
    label: str | None = None  # evaluate.label, its name in tables
    model_revision: str | None = None
    reference: str | None = None
    reference_revision: str | None = None
    reference_origin: str | None = None  # one sentence that every table with this model must show

    # What quantkit's own folder says of itself; null for other folders, unless evaluate.* tells it.
    format: str | None = None
    block_size: int | None = None
    method: str | None = None
    settings: dict[str, Any] | None = None  # of method and calibration
    bits_per_weight: float | None = None  # of the quantized layers, scales included
    quantize_s: float | None = None
    quantize_device: str | None = None
    file_bytes: int | None = None  # of all weights as stored
    parameters: int | None = None

    data: str | None = None
    data_hash: str | None = None
    data_split: str | None = None
    substituted: bool | None = None  # an offline twin replaced the configured text
    calibrated_on: int | None = None  # evaluated sequences that are among the calibration's; null: not known
    seq_len: int | None = None
    sequences: int | None = None
    tokens: int | None = None  # scored
    protocol: str | None = None  # all, or llama_cpp: the second half of each sequence
    sequences_hash: str | None = None  # of the reference, the token ids and the protocol: what a pair has in common
    seed: int | None = None
    resamples: int | None = None
    dtype: str | None = None
    tf32: bool | None = None
    device: str | None = None
    device_name: str | None = None

    kl_mean: float | None = None
    kl_error: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    kl_max: float | None = None
    same_top: float | None = None  # share of tokens where both find the same token the most probable
    same_top_low: float | None = None
    same_top_high: float | None = None
    reference_ppl: float | None = None
    reference_ppl_low: float | None = None
    reference_ppl_high: float | None = None
    ppl: float | None = None
    ppl_low: float | None = None
    ppl_high: float | None = None
    ppl_ratio: float | None = None
    ppl_ratio_low: float | None = None
    ppl_ratio_high: float | None = None

    paired_with: str | None = None  # the other run; the differences are this one's KL less the other's
    paired_mean: float | None = None
    paired_error: float | None = None
    paired_low: float | None = None
    paired_high: float | None = None

    kl_by_position: list[list[float]] | None = None  # [first position, mean] of groups of positions
    kl_by_layer: list[dict[str, Any]] | None = None  # KL with one layer quantized at a time: layer, mean, error

    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    started_at: str | None = None  # UTC, ISO 8601
    duration_s: float | None = None
    schema_version: int = SCHEMA_VERSION


FIELDS: tuple[str, ...] = EvaluationRecord.fields()
