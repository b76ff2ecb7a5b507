"""Records → CSV files, tables and figures. Imports no torch.

    python experiments/report.py                  rebuild results/*.csv, results/figures and the generated blocks
                                                  of the README, from results/records
    python experiments/report.py --check          exit 1 where they differ from the records; change nothing. Of figures
                                                  the data are compared; that its picture is there is enough
    python experiments/report.py --runs [DIR]     print the tables of the runs in DIR; write its table.csv and table.md
    python experiments/report.py --collect NAME   copy the runs to results/records/NAME.jsonl, to be committed
    python experiments/report.py --track [GROUP]  log the CSV files and figures of results/ to W&B, offline by default

A generated block of a document stands between `<!-- BEGIN GENERATED: name -->` and `<!-- END GENERATED: name -->`; its
name is that of a file in results/records, `published`, `figure:NAME`, or `bench:NAME` or `scaling:NAME` for
results/bench/NAME.csv. Text outside is left alone.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # A script has its own folder first on the path, where `config` or `tables` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.files import write_atomically
from experiments.record import FIELDS, RecordError, RunRecord, read_records

if TYPE_CHECKING:
    import pandas as pd

    from experiments.reporting.table import Table

ROOT = Path(__file__).resolve().parent.parent
RECORDS = Path("results/records")
RUNS = Path("results/runs")
DOCUMENTS = (Path("README.md"),)
PUBLISHED = "published"
OPTIMALITY = "optimality"  # its table is of what verify found
FIGURE = "figure:"
BENCH = "bench:"  # a CSV file of experiments/bench.py
SCALING = "scaling:"  # likewise, of several numbers of rows
HOW_TO_BENCH = "run `python experiments/bench.py --out results/bench/NAME.csv` on a GPU, with --shapes rows for scaling"
FIGURES_PAGE = "README.md"  # in the figures' folder
MARKER = re.compile(r"^<!-- (BEGIN|END) GENERATED: (\S+) -->$", re.MULTILINE)
DIFF_LINES = 40  # shown of each file
HOW_TO_RECORD = "run `make run`, then `python experiments/report.py --collect main`"


class ReportError(ValueError):
    """What the user can mend; the message says how."""


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    arguments = parse(argv, root)
    try:
        if arguments.runs:
            return report_runs(arguments.runs, root)
        if arguments.collect:
            return collect(arguments.collect, arguments.source or root / RUNS, root)
        if arguments.track is not None:
            return track(arguments.track, root)
        return check(root) if arguments.check else rebuild(root)
    except (ReportError, RecordError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None, root: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Rebuild the result tables from the committed records.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="exit 1 where documents and records differ; change nothing")
    what.add_argument(
        "--runs", metavar="DIR", nargs="?", type=Path, const=root / RUNS, help="print the tables of raw runs"
    )
    what.add_argument("--collect", metavar="NAME", help="copy raw runs to results/records/NAME.jsonl")
    what.add_argument(
        "--track", metavar="GROUP", nargs="?", const="", help="log tables and figures to W&B; default: the newest sweep"
    )
    parser.add_argument("--from", dest="source", metavar="DIR", type=Path, help="with --collect: the runs' folder")
    arguments = parser.parse_args(argv)
    if arguments.source and not arguments.collect:
        parser.error("--from goes with --collect")
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
        print(f"Nothing to change: all follows from {RECORDS}. The tables of your own runs: --runs [DIR]")
    return 0


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
        if diff:
            differing += 1
            print("\n".join(diff[:DIFF_LINES]))
            if len(diff) > DIFF_LINES:
                print(f"… and {len(diff) - DIFF_LINES} more lines")
    if differing:
        message = f"{differing} file{'s' * (differing > 1)} differ from the records"
        print(f"error: {message}; run `python experiments/report.py` and commit the result", file=sys.stderr)
        return 1
    print("README, CSV files and figures agree with the records.")
    return 0


def report_runs(folder: Path, root: Path) -> int:
    """Print the tables of the runs in `folder`, and write them beside the runs."""
    from experiments.reporting.published import read_published
    from experiments.reporting.rows import make_rows, row_frame
    from experiments.reporting.tables import make_tables, unfinished
    from experiments.reporting.verification import verification_tables

    records = read_records(folder)
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


def collect(name: str, source: Path, root: Path) -> int:
    """Merge the runs in `source` into the committed records `name`; a run that is known is replaced."""
    from experiments.reporting.rows import record_order

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name == PUBLISHED:
        raise ReportError(f"--collect {name}: use small letters, digits, - and _, and not the word {PUBLISHED}")
    found = read_records(source)
    if not found:
        raise ReportError(f"{source} has no runs; run `make run` or `python experiments/run.py` first")
    path = root / RECORDS / f"{name}.jsonl"
    known = {(r.run_id, r.device_name): r for r in read_lines(path)}
    before, kept = dict(known), 0
    for record in found:
        old = known.get(key := (record.run_id, record.device_name))
        if old is not None and old.status == "ok" != record.status:
            kept += 1
        else:
            known[key] = record
    found = [known[key] for key in dict.fromkeys((r.run_id, r.device_name) for r in found)]
    replaced = sum(known[key] is not record for key, record in before.items())
    records = sorted(known.values(), key=record_order)
    write_atomically(path, "".join(f"{record.to_json()}\n" for record in records))
    print(f"{path.relative_to(root)}: {len(records)} records, {len(known) - len(before)} new, {replaced} replaced")
    for count, what in (
        (sum(r.status != "ok" for r in found), "without a result"),
        (kept, "without a result, which earlier records have: these stay"),
        (sum(bool(r.dirty) for r in found), "from uncommitted code"),
    ):
        if count:
            print(f"  {count} of the runs are {what}")
    print("Next: python experiments/report.py")
    return 0


def track(group: str, root: Path) -> int:
    """Log the CSV files and the pictures of results/ as the report of a W&B group: a sweep, the newest by default."""
    from experiments.config import TrackingConfig
    from experiments.tracking import track_report

    records = read_records(root / RECORDS)
    if not records:
        raise ReportError(f"{RECORDS} has no records; {HOW_TO_RECORD}")
    if not group:
        group = max(records, key=lambda record: record.started_at or "").sweep
    elif not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", group):
        raise ReportError(f"--track {group}: use up to 64 letters, digits, '.', - and _, or leave the group out")
    results, runs = root / "results", root / RUNS
    tables = {path.stem: path for path in sorted(results.glob("*.csv"))}
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
    """Name → the committed records of that name."""
    groups = {path.stem: read_lines(path) for path in sorted((root / RECORDS).glob("*.jsonl"))}
    if not any(groups.values()):
        raise ReportError(f"{RECORDS} has no records; {HOW_TO_RECORD}")
    return groups


def figure_frames(root: Path, groups: dict[str, list[RunRecord]]) -> dict[str, pd.DataFrame]:
    """Name → data of every figure; empty where its records are absent."""
    from experiments.reporting.figures import Sources, make_frames

    return make_frames(Sources.read(root, groups))


def expected_files(root: Path, groups: dict[str, list[RunRecord]], frames: dict[str, pd.DataFrame]) -> dict[Path, str]:
    """Path → the text that follows from the records. The CSV files come first."""
    from experiments.reporting.figures import FOLDER, figures_page, frame_csv
    from experiments.reporting.records_csv import records_csv

    drawn = {name: frame for name, frame in frames.items() if len(frame)}
    files = {root / "results" / f"{name}.csv": records_csv(records) for name, records in groups.items()}
    files |= {root / FOLDER / f"{name}.csv": frame_csv(frame) for name, frame in drawn.items()}
    if drawn:
        files[root / FOLDER / FIGURES_PAGE] = figures_page(frames)
    for document in DOCUMENTS:
        files[root / document] = fill(read(root / document), str(document), groups, frames, root)
    return files


def pictures(root: Path, frames: dict[str, pd.DataFrame]) -> list[Path]:
    from experiments.reporting.figures import FOLDER, PICTURES

    return [root / FOLDER / f"{name}.{kind}" for name, frame in frames.items() if len(frame) for kind in PICTURES]


def unexpected_files(root: Path, groups: dict[str, list[RunRecord]], frames: dict[str, pd.DataFrame]) -> list[Path]:
    """CSV files of records, and pictures and data of figures, that have lost their records."""
    from experiments.reporting.figures import FOLDER, PICTURES

    header = f"{','.join(FIELDS)}\n".encode()
    tables = [path for path in sorted((root / "results").glob("*.csv")) if path.read_bytes().startswith(header)]
    figures = [
        root / FOLDER / f"{name}.{kind}" for name in frames if not len(frames[name]) for kind in ("csv", *PICTURES)
    ]
    return [*(path for path in tables if path.stem not in groups), *(path for path in figures if path.exists())]


def fill(
    text: str, document: str, groups: dict[str, list[RunRecord]], frames: dict[str, pd.DataFrame], root: Path
) -> str:
    """`text` with every generated block written anew."""
    import pandas as pd

    from experiments.reporting.figures import FIGURES, FOLDER
    from experiments.reporting.published import published_tables, read_published
    from experiments.reporting.scaling import scaling_tables
    from experiments.reporting.speed import speed_tables
    from experiments.reporting.tables import make_tables, unfinished
    from experiments.reporting.verification import verification_tables

    published = read_published(root / "results" / PUBLISHED)
    drawn = {f"{FIGURE}{plot.name}": plot for plot in FIGURES if len(frames[plot.name])}
    parts, position = [], 0
    markers = list(MARKER.finditer(text))
    for begin, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        name = begin[2]
        if begin[1] != "BEGIN" or end is None or end[1] != "END" or end[2] != name:
            line = text.count("\n", 0, begin.start()) + 1
            raise ReportError(f"{document}:{line}: a generated block needs its BEGIN and then its END line ({name})")
        if name == PUBLISHED:
            block = as_markdown(published_tables(published))
        elif name in groups and name == OPTIMALITY:
            block = as_markdown(verification_tables(groups[name]), unfinished(groups[name]))
        elif name.startswith((BENCH, SCALING)):
            path = root / "results" / "bench" / f"{name.partition(':')[2]}.csv"
            if not path.exists():
                raise ReportError(f"{document} shows {name}, but there is no {path.relative_to(root)}; {HOW_TO_BENCH}")
            found = (speed_tables if name.startswith(BENCH) else scaling_tables)(pd.read_csv(path))
            if not found:
                raise ReportError(
                    f"{document} shows {name}, but {path.relative_to(root)} has no times for it; {HOW_TO_BENCH}"
                )
            block = as_markdown(found)
        elif name in drawn:
            block = drawn[name].markdown(frames[drawn[name].name], f"{FOLDER.as_posix()}/")
        elif name.startswith(FIGURE):
            raise ReportError(
                f"{document} shows {name}, which no figure with data is called; see experiments/reporting/figures.py"
            )
        elif name in groups:
            block = as_markdown(make_tables(groups[name], published), unfinished(groups[name]))
        else:
            raise ReportError(f"{document} shows {RECORDS / name}.jsonl, which does not exist; {HOW_TO_RECORD}")
        parts += [text[position : begin.end()], f"\n\n{block}\n"]
        position = end.start()
    return "".join([*parts, text[position:]])


def as_markdown(tables: list[Table], missing: list[str] | None = None) -> str:
    blocks = [table.markdown() for table in tables]
    if missing:
        blocks.append("Runs without a result:\n\n" + "".join(f"- {line}\n" for line in missing))
    return "\n".join(blocks)


def read_lines(path: Path) -> list[RunRecord]:
    lines = read(path).splitlines()
    return [RunRecord.from_json(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]


def read(path: Path) -> str:
    """The file's text; a missing file has none."""
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main())
