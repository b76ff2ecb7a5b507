"""Records → CSV files, tables and figures. Imports no torch.

    python experiments/report.py                  rebuild results/*.csv, results/figures and the generated blocks
                                                  of README.md and docs/results.md, from results/records
    python experiments/report.py --check          exit 1 where they differ from the records; change nothing. Figures'
                                                  data are compared; their pictures must only exist
    python experiments/report.py --runs [DIR]     print the tables of the runs in DIR, or of the single run in DIR;
                                                  write table.csv and table.md there
    python experiments/report.py --collect NAME   copy the runs to results/records/NAME.jsonl, to be committed. Runs of
                                                  other models than the file's are left out; --model takes them
                                                  NAME model: evaluations of whole models
    python experiments/report.py --track [GROUP]  log the CSV files and figures of results/ to W&B, offline by default

experiments/reporting/pages.py lists the generated blocks that a page can have.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.evaluation_record import EvaluationRecord
from experiments.files import write_atomically
from experiments.record import (
    FIELDS,
    RECORD_NAME,
    SPARSE_FIELDS,
    RecordError,
    RunRecord,
    read_record,
    read_records,
    read_records_of,
)
from experiments.reporting import ReportError

if TYPE_CHECKING:
    import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path("results/records")
RUNS = Path("results/runs")
EVALUATIONS = Path("results/evaluations/model.csv")  # of whole models; results/*.csv have runs of one layer
FIGURES_PAGE = "README.md"  # in the figures' folder
DIFF_LINES = 40  # shown per file
HOW_TO_RECORD = "run `make run`, then `python experiments/report.py --collect main`"


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    arguments = parse(argv, root)
    try:
        if arguments.runs:
            return report_runs(arguments.runs, root)
        if arguments.collect:
            return collect(arguments.collect, arguments.source or root / RUNS, root, arguments.models)
        if arguments.track is not None:
            return track(arguments.track, root)
        return check(root) if arguments.check else rebuild(root)
    except (ReportError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None, root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rebuild the result tables from the committed records.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit 1 where pages and records differ; change nothing")
    what.add_argument(
        "--runs", metavar="DIR", nargs="?", type=Path, const=root / RUNS,
        help="print the tables of raw runs, or of one run; default: results/runs",
    )  # fmt: skip
    what.add_argument("--collect", metavar="NAME", help="copy raw runs to results/records/NAME.jsonl")
    what.add_argument(
        "--track", metavar="GROUP", nargs="?", const="", help="log tables and figures to W&B; default: the newest sweep"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        type=Path,
        help="with --collect: the runs' folder; default: results/runs",
    )
    parser.add_argument(
        "--model", dest="models", metavar="MODEL", action="append", default=[],
        help="with --collect: take this model's runs, or `all`; may be repeated; default: the models that NAME has",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    for option, value in (("--from", arguments.source), ("--model", arguments.models)):
        if value and not arguments.collect:
            parser.error(f"{option} goes with --collect")
    return arguments


def rebuild(root: Path) -> int:
    from experiments.reporting.figures import FIGURES, FOLDER

    groups = read_groups(root)
    frames = figure_frames(root, groups)
    files: dict[Path, str | bytes] = {**expected_files(root, groups, frames)}
    for plot in FIGURES:
        if len(frames[plot.name]):
            files |= {root / FOLDER / name: data for name, data in plot.pictures(frames[plot.name]).items()}
        else:
            print(f"no figure {plot.name}: {plot.needs}", file=sys.stderr)
    changed = False
    for path, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        if not path.exists() or path.read_bytes() != data:
            write_atomically(path, data)
            print(f"wrote {path.relative_to(root)}")
            changed = True
    for path in unexpected_files(root, groups, frames):
        path.unlink()
        print(f"removed {path.relative_to(root)}: it follows from no record")
        changed = True
    if not changed:
        print(f"Nothing to change: every file follows from {RECORDS}. The tables of your own runs: --runs [DIR]")
    for line in unshown(root, groups):
        print(line)
    return 0


def unshown(root: Path, groups: dict[str, list[RunRecord]]) -> list[str]:
    """A line for each name of records that no page and no figure shows: its CSV file, and how a page gets its table."""
    from experiments.reporting.figure_data import FIGURE_RECORDS
    from experiments.reporting.pages import how_to_show, shown_on

    return [
        f"No page shows the records {name}. They are in results/{name}.csv; {how_to_show(name)}"
        for name in groups
        if name not in FIGURE_RECORDS and not shown_on(name, root)
    ]


def check(root: Path) -> int:
    groups = read_groups(root)
    frames = figure_frames(root, groups)
    wrong = [f"{path.relative_to(root)} follows from no record" for path in unexpected_files(root, groups, frames)]
    wrong += [f"{path.relative_to(root)} is not there" for path in pictures(root, frames) if not path.exists()]
    differing = len(wrong)
    print("".join(f"{line}\n" for line in wrong), end="")
    for path, text in expected_files(root, groups, frames).items():
        name = str(path.relative_to(root))
        diff = list(
            difflib.unified_diff(
                read(path).splitlines(), text.splitlines(), name, f"{name}, from the records", lineterm="", n=1
            )
        )
        if diff or not path.exists() or path.read_bytes() != text.encode():
            differing += 1
            print("\n".join(diff[:DIFF_LINES] or [f"{name} differs in its line ends"]))
            if len(diff) > DIFF_LINES:
                print(f"… and {len(diff) - DIFF_LINES} more lines")
    if differing:
        message = f"{differing} files differ from the records" if differing > 1 else "1 file differs from the records"
        print(f"error: {message}; run `python experiments/report.py` and commit the result", file=sys.stderr)
        return 1
    print("Pages, CSV files and figures agree with the records.")
    return 0


def report_runs(folder: Path, root: Path) -> int:
    """Print the tables of the runs in `folder`, or of the single run whose folder it is, and write them there."""
    from experiments.reporting.pages import PUBLISHED, as_markdown
    from experiments.reporting.published import read_published
    from experiments.reporting.rows import make_rows, row_frame
    from experiments.reporting.tables import make_tables, unfinished
    from experiments.reporting.verification import verification_tables

    if report_evaluations(folder):
        return 0
    own = folder / RECORD_NAME
    damaged: list[str] = []
    records = [read_record(own)] if own.exists() else read_records(folder, damaged)
    for line in damaged:
        print(f"left out: {line}", file=sys.stderr)
    if damaged and not records:
        raise ReportError(f"{folder} has no record that can be read")
    if not records:
        raise ReportError(f"{folder} has no runs; run `make run` or `python experiments/run.py` first")
    tables = make_tables(records, read_published(root / "results" / PUBLISHED)) + verification_tables(records)
    missing = unfinished(records)
    for table in tables:
        print(f"\n{table.terminal()}", end="")
    if missing:
        print("\nRuns without a result:")
        print("\n".join(f"  {line}" for line in missing))
    write_atomically(folder / "table.csv", row_frame(make_rows(records)).to_csv(index=False, lineterminator="\n"))
    write_atomically(folder / "table.md", as_markdown(tables, missing))
    print(f"\nAlso in {os.path.relpath(folder / 'table.md')} and {os.path.relpath(folder / 'table.csv')}")
    return 0


def report_evaluations(folder: Path) -> bool:
    """Print the tables of the evaluations of whole models in `folder`. False where there are none."""
    from experiments.reporting.evaluations import evaluation_tables
    from experiments.reporting.pages import as_markdown
    from experiments.reporting.records_csv import evaluations_csv

    records = read_records_of(EvaluationRecord, folder, damaged=[])
    if not records:
        return False
    tables = evaluation_tables(records)
    for table in tables:
        print(f"\n{table.terminal()}", end="")
    write_atomically(folder / "table.csv", evaluations_csv(records))
    write_atomically(folder / "table.md", as_markdown(tables))
    print(f"\nAlso in {os.path.relpath(folder / 'table.md')} and {os.path.relpath(folder / 'table.csv')}")
    return True


def collect(name: str, source: Path, root: Path, models: Sequence[str]) -> int:
    """Merge the runs in `source` into the committed records `name`, and print what was taken."""
    from experiments.reporting import collection, pages

    if name == pages.MODEL:
        done = collection.collect_evaluations(name, source, root)
    else:
        done = collection.collect(name, source, root, models)
    print("\n".join(done.lines))
    shown = ", ".join(map(str, pages.shown_on(name, root)))
    where = f", and their table to {shown}" if shown else ""
    print(f"Next: python experiments/report.py; it writes these records to results/{name}.csv{where}")
    return 0


def track(group: str, root: Path) -> int:
    """Log the CSV files and pictures of results/ as the report of a W&B group, by default the newest sweep."""
    from experiments.config import TrackingConfig
    from experiments.tracking import track_report

    records = read_records(root / RECORDS)
    if not records:
        raise ReportError(f"{RECORDS} has no records; {HOW_TO_RECORD}")
    if not group:
        group = max(records, key=lambda record: record.started_at or "").sweep
    elif not re.fullmatch(r"[A-Za-z0-9._-]{1,128}", group):
        raise ReportError(f"--track {group}: use up to 128 letters, digits, '.', - and _, or leave the group out")
    results, runs = root / "results", root / RUNS
    tables = {path.stem: path for path in sorted(results.glob("*.csv"))}
    tables |= {"evaluations": root / EVALUATIONS} if (root / EVALUATIONS).exists() else {}
    tables |= {f"figures/{path.stem}": path for path in sorted((results / "figures").glob("*.csv"))}
    figures = {path.stem: path for path in sorted((results / "figures").glob("*.png"))}
    facts = {"records": len(records), "commits": sorted({record.commit for record in records if record.commit})}
    try:
        logged = track_report(group, tables, figures, facts, TrackingConfig("wandb"), runs)
    except Exception as error:
        raise ReportError(f"W&B did not log the report ({error})") from error
    if not logged:
        print("Nothing logged: WANDB_MODE=disabled.")
        return 0
    print(f"Logged to W&B: {len(tables)} tables and {len(figures)} figures as report-{group}")
    return 0


def read_groups(root: Path) -> dict[str, list[RunRecord]]:
    """Name → the committed records of that name, without the evaluations of whole models."""
    from experiments.reporting.collection import read_lines
    from experiments.reporting.evaluations import NAME as MODEL

    paths = [path for path in sorted((root / RECORDS).glob("*.jsonl")) if path.stem != MODEL]
    groups = {path.stem: read_lines(path) for path in paths}
    if not any(groups.values()):
        raise ReportError(f"{RECORDS} has no records; {HOW_TO_RECORD}")
    return groups


def read_model_evaluations(root: Path) -> list[EvaluationRecord]:
    """The committed evaluations of whole models."""
    from experiments.reporting.collection import read_evaluations
    from experiments.reporting.evaluations import NAME as MODEL

    return read_evaluations(root / RECORDS / f"{MODEL}.jsonl")


def figure_frames(root: Path, groups: dict[str, list[RunRecord]]) -> dict[str, pd.DataFrame]:
    """Name → data of every figure; empty where its records are absent."""
    from experiments.reporting.figures import Sources, make_frames

    return make_frames(Sources.read(root, groups, read_model_evaluations(root)))


def expected_files(root: Path, groups: dict[str, list[RunRecord]], frames: dict[str, pd.DataFrame]) -> dict[Path, str]:
    """Path → the text that follows from the records, CSV files first."""
    from experiments.reporting.figures import FOLDER, figures_page, frame_csv
    from experiments.reporting.pages import PAGES, Material, fill
    from experiments.reporting.records_csv import evaluations_csv, records_csv

    evaluations = read_model_evaluations(root)
    drawn = {name: frame for name, frame in frames.items() if len(frame)}
    files = {root / "results" / f"{name}.csv": records_csv(records) for name, records in groups.items()}
    if evaluations:
        files[root / EVALUATIONS] = evaluations_csv(evaluations)
    files |= {root / FOLDER / f"{name}.csv": frame_csv(frame) for name, frame in drawn.items()}
    if drawn:
        files[root / FOLDER / FIGURES_PAGE] = figures_page(frames)
    material = Material(root, groups, frames, evaluations)
    for page in PAGES:
        if (root / page).exists():
            files[root / page] = fill(read(root / page), str(page), material)
    return files


def pictures(root: Path, frames: dict[str, pd.DataFrame]) -> list[Path]:
    from experiments.reporting.figures import FOLDER, PICTURES

    return [root / FOLDER / f"{name}.{kind}" for name, frame in frames.items() if len(frame) for kind in PICTURES]


def unexpected_files(root: Path, groups: dict[str, list[RunRecord]], frames: dict[str, pd.DataFrame]) -> list[Path]:
    """CSV files, and pictures and data of figures, whose records no longer exist."""
    from experiments.reporting.figures import FOLDER, PICTURES

    header = ",".join(takewhile(lambda name: name not in SPARSE_FIELDS, FIELDS)).encode()
    tables = [path for path in sorted((root / "results").glob("*.csv")) if path.read_bytes().startswith(header)]
    evaluations = root / EVALUATIONS
    tables += [evaluations] if evaluations.exists() and not read_model_evaluations(root) else []
    figures = [
        root / FOLDER / f"{name}.{kind}" for name in frames if not len(frames[name]) for kind in ("csv", *PICTURES)
    ]
    return [*(path for path in tables if path.stem not in groups), *(path for path in figures if path.exists())]


def read(path: Path) -> str:
    """The file's text; a missing file has none."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except UnicodeDecodeError:
        raise ReportError(f"{path}: not UTF-8 text; take it from the repository again") from None


if __name__ == "__main__":
    sys.exit(main())
