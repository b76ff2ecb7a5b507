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
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments import launchers, sweep
from experiments.config import plain_config
from experiments.console import full_errors, reason
from experiments.evaluation_record import EvaluationRecord
from experiments.files import check_output
from experiments.model.evaluate_settings import EvaluationConfig
from experiments.model.evaluation import (
    ResolvedEvaluation,
    base_fields,
    execute,
    finished_evaluation,
    resolve_evaluation,
)
from experiments.overrides import refusal
from experiments.record import read_records_of
from experiments.run_log import AGAIN_LOG_NAME, LOG_NAME, run_log, status_of
from experiments.tracking import track_evaluation

log = logging.getLogger(__name__)

FAILED: list[str] = []  # why evaluations of this process failed


@hydra.main(version_base="1.3", config_path="../conf", config_name="evaluate")
def main(composed: DictConfig) -> None:
    """One evaluation. No error leaves this function, because Hydra would show only a sweep's first one."""
    failed = run(composed)
    if launchers.is_elsewhere():
        launchers.tell_outcome({"failed": int(failed is not None)})
    elif failed is not None:
        FAILED.append(failed)


def run(composed: DictConfig) -> str | None:
    """Why the evaluation failed, which is also printed; None if it did not."""
    try:
        config = plain_config(composed, EvaluationConfig)
        with launchers.own_device(config.device) as device:
            evaluate(replace(config, device=device))
    except Exception as error:
        print(f"error: {reason(error)}", file=sys.stderr, flush=True)
        if full_errors():
            traceback.print_exc()
        return reason(error)
    return None


def evaluate(config: EvaluationConfig) -> EvaluationRecord:
    """The record of an evaluation, which is also printed. Raises ValueError for whatever the user can mend.

    An evaluation that fails after its sources were found leaves a record that says so, and a log.
    """
    check_output(Path(config.output_dir))
    resolved = resolve_evaluation(config)
    previous = finished_evaluation(resolved)
    if previous is not None and not config.force:
        print(f"{described(previous)}\n  finished before; force=true evaluates again", flush=True)
        tell_cards(resolved)
        return previous
    log_file = resolved.run_dir / (LOG_NAME if previous is None else AGAIN_LOG_NAME)
    with run_log(log_file):
        log.info("%s\n%s", resolved.run_id, OmegaConf.to_yaml(OmegaConf.structured(resolved.config)))
        try:
            record = _execute(resolved)
        except Exception as error:
            log.info("%s\n%s", reason(error), traceback.format_exc())
            if previous is None:
                _failed(resolved, error).write(resolved.run_dir)
            raise
        path = record.write(resolved.run_dir)
        track_evaluation(record, resolved.settings, config.tracking, Path(config.output_dir))
    log_file.replace(resolved.run_dir / LOG_NAME)
    print(f"{described(record)}\n  record: {path}", flush=True)
    tell_cards(resolved)
    return record


def tell_cards(resolved: ResolvedEvaluation) -> None:
    """Put all evaluations of this model in output_dir into the model cards of its exports."""
    if resolved.model.path is None:
        return
    from experiments.model.card import put_into_cards

    found = read_records_of(EvaluationRecord, resolved.config.output_dir, damaged=[])
    revision = resolved.model_identity.revision
    same = [record for record in found if record.model_revision == revision and record.status == "ok"]
    same.sort(key=lambda record: record.started_at or "")
    for path in put_into_cards(Path(resolved.model.path).expanduser(), same):
        print(f"  model card: {path}", flush=True)


def _execute(resolved: ResolvedEvaluation) -> EvaluationRecord:
    started = time.perf_counter()
    fields = base_fields(resolved) | execute(resolved)
    return EvaluationRecord(**fields, status="ok", reason=None, duration_s=round(time.perf_counter() - started, 3))


def _failed(resolved: ResolvedEvaluation, error: Exception) -> EvaluationRecord:
    fields = base_fields(resolved)
    return EvaluationRecord(**fields, status=status_of(error), reason=reason(error))


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
    if (refused := refusal(sys.argv[1:], EvaluationConfig, "evaluate.py")) is not None:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    launchers.prepare()
    failed = 0
    try:
        main()
        if sweep.elsewhere is not None:
            failed = launchers.read_outcomes(sweep.elsewhere).get("failed", 0)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        return 130
    return 1 if FAILED or failed else 0


if __name__ == "__main__":
    sys.exit(cli())
