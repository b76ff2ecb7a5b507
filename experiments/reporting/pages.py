"""Records → the generated blocks of Markdown pages.

A block stands between `<!-- BEGIN GENERATED: name -->` and `<!-- END GENERATED: name -->`. Its name is one of

    NAME               every table of results/records/NAME.jsonl
    model              the evaluations of whole models, results/records/model.jsonl
    model_peers        those of other tools' models, beside quantkit's of the same format
    model_summary      one of their tables, in five columns: the best row of each format and method
    summary            one figure and one table of output errors, at the smallest block size
    published          the tables of results/published
    reliability        the tests of faults, load and bad input at full size, results/reliability.json
    layers:NAME        its held-out errors, with a column for each layer
    methods:NAME       its held-out errors, with a line for each format and a column for each method
    figure:NAME        a picture of results/figures with its caption
    bench:NAME         every kernel of results/bench/NAME.csv
    speed:NAME         eight of these rows: every method and dequantize, at the smallest block size
    gram:NAME          time and output error of every method and the peers' GPTQ, from a benchmark with --gram
    scaling:NAME       the growth of time with the rows, from a benchmark of several numbers of rows
    whole_model:NAME   whole models by phase and number of GPUs, from a file of bench_model.py

Text outside the blocks is left alone. Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.evaluation_record import EvaluationRecord
from experiments.record import RunRecord
from experiments.reporting import ReportError
from experiments.reporting.evaluations import NAME as MODEL
from experiments.reporting.evaluations import evaluation_summary, evaluation_tables, peer_table
from experiments.reporting.figure_data import SETTINGS, Sources
from experiments.reporting.figures import FIGURES, FOLDER
from experiments.reporting.pivots import by_layer, by_method
from experiments.reporting.published import published_tables, read_published
from experiments.reporting.reliability import reliability_table
from experiments.reporting.scaling import scaling_tables
from experiments.reporting.speed import brief_speed_tables, gram_tables, speed_tables
from experiments.reporting.table import Table
from experiments.reporting.tables import make_tables, summary_table, unfinished
from experiments.reporting.verification import verification_tables
from experiments.reporting.whole import whole_model_tables

PAGES = tuple(map(Path, ("README.md", "docs/results.md", "docs/reliability.md", "docs/whole_models.md")))
TABLES_PAGE = PAGES[1]  # where a new table belongs
PUBLISHED = "published"
FAULTS = "reliability"
SUMMARY = "summary"
MODEL_SUMMARY = "model_summary"
MODEL_PEERS = "model_peers"
NO_PEERS = "No model of another tool has been evaluated on the same text yet.\n"
SUMMARY_FIGURE = "output_error"
SUMMARY_WIDTH = 400  # of the picture, in pixels, so that picture, table and text fit on one screen
OPTIMALITY = "optimality"  # its table has the results of verify
FIGURE = "figure:"
BENCHMARKS: dict[str, Callable[[pd.DataFrame], list[Table]]] = {
    "bench": speed_tables,
    "speed": brief_speed_tables,
    "gram": gram_tables,
    "scaling": scaling_tables,
    "whole_model": whole_model_tables,
}
PIVOTS: dict[str, Callable[[Iterable[RunRecord]], list[Table]]] = {"layers": by_layer, "methods": by_method}
HOW_TO_BENCH = (
    "run `python experiments/bench.py --out results/bench/NAME.csv` on a GPU, with --shapes rows for scaling, with "
    "--gram and a NAME that ends in gram for gram; for whole_model, run bench_model.py"
)
HOW_TO_RECORD = "run `make run`, then `python experiments/report.py --collect main`"
HOW_TO_EVALUATE = (
    "run `python experiments/evaluate.py model.path=FOLDER`, then `python experiments/report.py --collect model --from "
    "results/runs/model`"
)
MARKER = re.compile(r"^<!-- (BEGIN|END) GENERATED: (\S+) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Material:
    """The data of a page's blocks."""

    root: Path
    groups: dict[str, list[RunRecord]]  # by the name of their file in results/records
    frames: dict[str, pd.DataFrame]  # data of the figures; empty where their records are absent
    evaluations: Sequence[EvaluationRecord] = ()  # of whole models


@dataclass(frozen=True)
class Block:
    name: str
    start: int  # of the text between the two markers
    stop: int


def blocks(text: str, page: str) -> Iterator[Block]:
    """The generated blocks of a page, in order. Raises ReportError for a marker without its partner."""
    markers = list(MARKER.finditer(text))
    for begin, end in zip(markers[::2], [*markers[1::2], None], strict=False):
        name = begin[2]
        if begin[1] != "BEGIN" or end is None or end[1] != "END" or end[2] != name:
            line = text.count("\n", 0, begin.start()) + 1
            raise ReportError(f"{page}:{line}: a generated block needs its BEGIN and then its END line ({name})")
        yield Block(name, begin.end(), end.start())


def fill(text: str, page: str, material: Material) -> str:
    """`text` with new content in every generated block."""
    parts, position = [], 0
    for block in blocks(text, page):
        parts += [text[position : block.start], f"\n\n{_content(block.name, page, material)}\n"]
        position = block.stop
    return "".join([*parts, text[position:]])


def shown_on(name: str, root: Path) -> list[Path]:
    """The pages that have a block of this name."""
    found = []
    for page in PAGES:
        text = (root / page).read_text(encoding="utf-8") if (root / page).exists() else ""
        if any(block.name.rpartition(":")[2] == name for block in blocks(text, str(page))):
            found.append(page)
    return found


def how_to_show(name: str) -> str:
    begin, end = (f"<!-- {word} GENERATED: {name} -->" for word in ("BEGIN", "END"))
    return f"to show its table, put these two lines into {TABLES_PAGE}, then run report.py again:\n{begin}\n{end}"


def _content(name: str, page: str, material: Material) -> str:
    kind, _, which = name.partition(":")
    if name == PUBLISHED:
        return as_markdown(published_tables(read_published(material.root / "results" / PUBLISHED)))
    if name == FAULTS:
        return as_markdown([reliability_table(material.root)])
    if name == SUMMARY:
        return _summary(page, material)
    if name.startswith(FIGURE):
        return _figure(name, page, material)
    if name == MODEL_PEERS:
        peers = peer_table(material.evaluations)
        return NO_PEERS if peers is None else peers.markdown()
    if name in (MODEL, MODEL_SUMMARY):
        return _evaluations(name, page, material)
    if which and kind in BENCHMARKS:
        return _benchmark(name, page, material)
    pivot = PIVOTS.get(kind) if which else None
    group = which if pivot else name
    if group not in material.groups:
        raise ReportError(f"{page} shows results/records/{group}.jsonl, which does not exist; {HOW_TO_RECORD}")
    records = material.groups[group]
    if pivot:
        return as_markdown(pivot(records), unfinished(records))
    if name == OPTIMALITY:
        return as_markdown(verification_tables(records), unfinished(records))
    published = read_published(material.root / "results" / PUBLISHED)
    return as_markdown(make_tables(records, published), unfinished(records))


def _summary(page: str, material: Material) -> str:
    """The picture, the table below it, and one caption for both, because they have the same subject."""
    plot = next(plot for plot in FIGURES if plot.name == SUMMARY_FIGURE)
    frame = material.frames[plot.name]
    if frame.empty:
        raise ReportError(f"{page} shows {SUMMARY}, but there are no such records: {plot.needs}")
    errors = ["weight_error", "output_error", "output_error_heldout"]
    runs = Sources(material.groups).runs("main", SETTINGS, errors[:2], also=errors[2:])
    picture = f'<img src="{_figures_folder(page)}{plot.name}.png" alt="{plot.title}" width="{SUMMARY_WIDTH}">'
    return f"{picture}\n\n{summary_table(runs).markdown()}\n{plot.text(frame)}\n"


def _evaluations(name: str, page: str, material: Material) -> str:
    summary = evaluation_summary(material.evaluations)
    if summary is None:
        raise ReportError(
            f"{page} shows {name}, but results/records/{MODEL}.jsonl has no evaluations; {HOW_TO_EVALUATE}"
        )
    return summary.markdown() if name == MODEL_SUMMARY else as_markdown(evaluation_tables(material.evaluations))


def _figure(name: str, page: str, material: Material) -> str:
    drawn = {f"{FIGURE}{plot.name}": plot for plot in FIGURES if len(material.frames[plot.name])}
    if name not in drawn:
        raise ReportError(f"{page} shows {name}, but no figure with data has that name; see reporting/figures.py")
    plot = drawn[name]
    return plot.markdown(material.frames[plot.name], _figures_folder(page))


def _benchmark(name: str, page: str, material: Material) -> str:
    kind, _, which = name.partition(":")
    path = Path("results/bench") / f"{which}.csv"
    if not (material.root / path).exists():
        raise ReportError(f"{page} shows {name}, but there is no {path}; {HOW_TO_BENCH}")
    found = BENCHMARKS[kind](pd.read_csv(material.root / path))
    if not found:
        raise ReportError(f"{page} shows {name}, but {path} has no times for it; {HOW_TO_BENCH}")
    return as_markdown(found)


def _figures_folder(page: str) -> str:
    """The figures' folder as a link from the page."""
    return f"{Path(os.path.relpath(FOLDER, Path(page).parent)).as_posix()}/"


def as_markdown(tables: Sequence[Table], missing: Sequence[str] = ()) -> str:
    texts = [table.markdown() for table in tables]
    if missing:
        texts.append("Runs without a result:\n\n" + "".join(f"- {line}\n" for line in missing))
    return "\n".join(texts)
