"""What a whole model lost: KL to its reference over held-out text, and perplexities; with `-m`, for several folders.

    python experiments/evaluate.py model.path=FOLDER reference=smollm2_135m

FOLDER: one of quantize_model.py, or any other that transformers loads. The record of an evaluation is written last; a
finished evaluation is shown again, unless `force=true`. conf/evaluate.yaml lists the settings.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from datetime import datetime, timezone
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig

from experiments.console import full_errors, reason
from experiments.evaluation_record import EvaluationRecord
from experiments.model.evaluate_settings import EvaluationConfig, to_evaluation
from experiments.model.evaluation import (
    base_fields,
    execute,
    finished_evaluation,
    resolve_evaluation,
)

log = logging.getLogger(__name__)

FAILED: list[str] = []


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    try:
        evaluate(to_evaluation(composed))
    except Exception as error:
        FAILED.append(reason(error))
        print(f"error: {reason(error)}", file=sys.stderr, flush=True)
        if full_errors():
            traceback.print_exc()


def evaluate(config: EvaluationConfig) -> EvaluationRecord:
    """The record of an evaluation, which is also printed. Raises ValueError for whatever the user can mend."""
    resolved = resolve_evaluation(config)
    record = None if config.force else finished_evaluation(resolved)
    if record is not None:
        print(f"{described(record)}\n  finished before; force=true evaluates again", flush=True)
        return record
    started = time.perf_counter()
    begun = datetime.now(timezone.utc).isoformat(timespec="seconds")
    fields = base_fields(resolved) | {"started_at": begun} | execute(resolved)
    record = EvaluationRecord(**fields, status="ok", reason=None, duration_s=time.perf_counter() - started)
    path = record.write(resolved.run_dir)
    print(f"{described(record)}\n  record: {path}", flush=True)
    return record


def described(record: EvaluationRecord) -> str:
    """The result in a few lines."""
    return "\n".join(
        [
            f"{record.model} against {record.reference}",
            f"  {record.data}, split {record.data_split}: {record.sequences} × {record.seq_len} tokens, "
            f"{record.tokens:,} scored ({record.protocol}); {record.dtype}, {record.device_name}",
            f"  KL           {_with_interval(record, 'kl')} nats a token, standard error {_short(record.kl_error)}",
            f"               median {_short(record.kl_median)}, 99 % {_short(record.kl_p99)}, "
            f"99.9 % {_short(record.kl_p999)}, largest {_short(record.kl_max)}",
            f"  same top     {_short(record.same_top)} [{_short(record.same_top_low)}, {_short(record.same_top_high)}]",
            f"  perplexity   {_short(record.ppl)}, the reference's {_short(record.reference_ppl)}: ratio "
            f"{_with_interval(record, 'ppl_ratio')}",
            *_paired(record),
        ]
    )


def _paired(record: EvaluationRecord) -> list[str]:
    if record.paired_with is None:
        return []
    return [f"  less the KL of {record.paired_with}: {_with_interval(record, 'paired')}"]


def _with_interval(record: EvaluationRecord, name: str) -> str:
    mean = getattr(record, name if name == "ppl_ratio" else f"{name}_mean")
    low, high = getattr(record, f"{name}_low"), getattr(record, f"{name}_high")
    return _short(mean) + ("" if low is None else f" [{_short(low)}, {_short(high)}]")


def _short(value: float | None) -> str:
    """Four significant digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) < 1e-4 or abs(value) >= 1e4 else f"{value:#.4g}".rstrip(".")


def cli() -> int:
    """The exit status: 1 if an evaluation failed, 130 if interrupted."""
    try:
        main()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return 130
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(cli())
