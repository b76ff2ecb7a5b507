"""Raw runs → the committed records of one name, results/records/NAME.jsonl. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.evaluation_record import EvaluationRecord
from experiments.files import write_atomically
from experiments.record import RunRecord, read_records, read_records_of
from experiments.reporting import ReportError
from experiments.reporting.evaluations import Evaluated, label_of
from experiments.reporting.labels import FORMATS
from experiments.reporting.rows import method_label, record_order

RECORDS = Path("results/records")
RESERVED = ("published", "summary", "model_summary")  # names of other generated blocks
ALL = "all"


@dataclass(frozen=True)
class Collected:
    """The result of `collect`: the file, and lines to print."""

    path: Path
    lines: list[str]


def collect(name: str, source: Path, root: Path, models: Sequence[str] = ()) -> Collected:
    """Merge the runs in `source` into the committed records `name`. A run that they already have is replaced.

    models: the models whose runs are taken, or "all". The default is the models of the records, or for new records the
    model of the newest run.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in RESERVED:
        raise ReportError(
            f"--collect {name}: use small letters, digits, - and _, and not the words {', '.join(RESERVED)}"
        )
    damaged: list[str] = []
    found = read_records(source, damaged)
    if damaged and not found:
        raise ReportError(f"{source} has no record that can be read: {damaged[0]}")
    if not found:
        raise ReportError(f"{source} has no runs; run `make run` or `python experiments/run.py` first")
    path = root / RECORDS / f"{name}.jsonl"
    known = {_key(record): record for record in read_lines(path)}
    wanted = _wanted(models, found, list(known.values()))
    taken = [record for record in found if ALL in wanted or str(record.model) in wanted]
    if not taken:
        raise ReportError(
            f"{source} has no runs of {', '.join(wanted)}, only of {_models(found)}; name a model: --model MODEL"
        )
    before, kept = dict(known), 0
    for record in taken:
        old = known.get(key := _key(record))
        if old is not None and old.status == "ok" != record.status:
            kept += 1
        else:
            known[key] = record
    now = [known[key] for key in dict.fromkeys(_key(record) for record in taken)]
    replaced = sum(known[key] is not record for key, record in before.items())
    records = sorted(known.values(), key=record_order)
    write_atomically(path, "".join(f"{record.to_json()}\n" for record in records))
    lines = [f"{path.relative_to(root)}: {len(records)} records, {len(known) - len(before)} new, {replaced} replaced"]
    lines += [f"  taken: {line}" for line in described(taken)]
    if left := [record for record in found if record not in taken]:
        lines.append(f"  left out: {_models(left)}; to take them: --model MODEL, or --model {ALL}")
    for count, what in (
        (sum(r.status != "ok" for r in now), "without a result"),
        (kept, "without a result, kept out: the earlier record has one"),
        (sum(bool(r.dirty) for r in now), "from uncommitted code"),
    ):
        if count:
            lines.append(f"  {count} run{'s' * (count > 1)} {what}")
    return Collected(path, [*lines, *(f"  left out: {line}" for line in damaged)])


def collect_evaluations(name: str, source: Path, root: Path) -> Collected:
    """Merge the evaluations of whole models in `source` into the committed records `name`."""
    damaged: list[str] = []
    found = read_records_of(EvaluationRecord, source, damaged)
    if not found:
        why = f": {damaged[0]}" if damaged else "; run `python experiments/evaluate.py model.path=FOLDER` first"
        raise ReportError(f"{source} has no evaluation that can be read{why}")
    path = root / RECORDS / f"{name}.jsonl"
    known = {(record.run_id, record.device_name): record for record in read_evaluations(path)}
    before = dict(known)
    known |= {(record.run_id, record.device_name): record for record in found if record.status == "ok"}
    records = sorted(known.values(), key=_evaluation_order)
    write_atomically(path, "".join(f"{record.to_json()}\n" for record in records))
    replaced = sum(known[key] is not record for key, record in before.items())
    lines = [f"{path.relative_to(root)}: {len(records)} records, {len(known) - len(before)} new, {replaced} replaced"]
    if failed := sum(record.status != "ok" for record in found):
        lines.append(f"  {failed} without a result, left out")
    if dirty := sum(bool(record.dirty) for record in found):
        lines.append(f"  {dirty} from uncommitted code")
    return Collected(path, [*lines, *(f"  left out: {line}" for line in damaged)])


def read_evaluations(path: Path) -> list[EvaluationRecord]:
    """The evaluations of a .jsonl file; a missing file has none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [EvaluationRecord.from_json(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _evaluation_order(record: EvaluationRecord) -> tuple[str, ...]:
    subject = vars(Evaluated.of(record)).values()
    return (*map(str, subject), str(record.format), label_of(record), record.run_id, str(record.device_name))


def described(records: Iterable[RunRecord]) -> list[str]:
    """A line for each model and text: the number of runs, and their formats, methods, block sizes and backends."""
    by_source: dict[tuple[str, str], list[RunRecord]] = {}
    for record in sorted(records, key=record_order):
        by_source.setdefault((record.model or "no model", record.data or "no text"), []).append(record)
    return [
        f"{model} on {data}: {len(runs)} run{'s' * (len(runs) > 1)}, "
        + " × ".join(
            ", ".join(dict.fromkeys(values))
            for values in (
                [FORMATS.get(run.format, run.format) for run in runs],
                [method_label(run) for run in runs],
                [f"block size {run.block_size}" for run in runs],
                [run.backend for run in runs],
            )
        )
        for (model, data), runs in by_source.items()
    ]


def read_lines(path: Path) -> list[RunRecord]:
    """The records of a .jsonl file; a missing file has none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [RunRecord.from_json(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]


def _key(record: RunRecord) -> tuple[str, str | None]:
    return record.run_id, record.device_name


def _wanted(models: Sequence[str], found: list[RunRecord], known: list[RunRecord]) -> list[str]:
    if models:
        return list(models)
    if known:
        return list(dict.fromkeys(str(record.model) for record in known))
    return [str(max(found, key=lambda record: record.started_at or "").model)]


def _models(records: Iterable[RunRecord]) -> str:
    counts = Counter(str(record.model) for record in records)
    return ", ".join(f"{model} ({count} run{'s' * (count > 1)})" for model, count in counts.items())
