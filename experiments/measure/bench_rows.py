"""The benchmark of one weight: its cases are timed in rounds, and each becomes a line of the CSV.

The cases take turns, so that a drift of the clock rates affects all of them. A call is slower after the long calls of
the reference and the peers. So these come last in a round, and the next round begins with untimed calls of its first
case. call_us of the kernels is measured in separate rounds, before the reference runs and the peers are imported,
because afterwards every call takes the host longer. That also affects every shape after the first one, unless
`--no-peers --backends triton` is given.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

import torch

from experiments.measure.bench_cases import TOKENS, Case, block_hessian_cases, cases, sample_weight
from experiments.measure.bench_clock import Clock, quantiles
from experiments.measure.bench_gram import gram_cases, gram_task
from experiments.measure.bench_peers import PACKAGES, available, gram_peer_cases, note_of, peer_cases
from experiments.provenance import device_name, git_state, installed, versions
from quantkit import FORMATS


@dataclass(frozen=True)
class Settings:
    """The settings for each weight.

    dtype: name of a torch dtype. rounds: number of times per case. gram: every method and the peers' GPTQ on one Gram
    matrix, with their output errors, instead of the cases of bench_cases.
    """

    device: str
    dtype: str
    backends: Sequence[str]
    block_sizes: Sequence[int]
    rounds: int
    peers: bool
    block_hessians: bool
    formats: Sequence[str] = tuple(FORMATS)
    gram: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """A line of the CSV; times are microseconds, quantiles over `iterations`."""

    kind: str  # kernel, copy, launch, or peer
    tool: str
    operation: str  # a method, gptq_mse, gptq_expanded_mse, admm, dequantize, amax, block_hessians, copy, launch
    format: str
    block_size: int | None
    backend: str
    rows: int
    columns: int
    dtype: str
    global_scale: str
    gpu_us_median: float | None
    gpu_us_20: float | None
    gpu_us_80: float | None
    call_us_median: float | None
    call_us_20: float | None
    call_us_80: float | None
    bytes: int
    floor_us: float | None
    ratio_to_copy: float | None
    output_error: float | None  # percent, under the Gram matrix
    iterations: int
    device: str
    commit: str
    dirty: bool | None
    versions: str
    note: str  # why a peer has no times


def cases_of(shape: tuple[int, int], settings: Settings) -> tuple[list[Case], list[Iterator[Case]]]:
    """(quantkit's cases, an iterator of each peer's cases)."""
    rows, columns = shape
    weight = sample_weight(rows, columns).to(settings.device, getattr(torch, settings.dtype))
    if settings.gram:
        task = gram_task(weight)
        methods = list(gram_cases(task, settings.backends, settings.formats, settings.block_sizes))
        return methods, gram_peer_cases(task) if settings.peers else []
    ours = list(cases(weight, settings.backends, settings.block_sizes, settings.formats))
    if settings.block_hessians and weight.is_cuda:
        ours += block_hessian_cases(columns, weight.dtype, settings.device)
    return ours, peer_cases(weight) if settings.peers and weight.is_cuda else []


def run_shape(shape: tuple[int, int], clock: Clock, bandwidth: float | None, settings: Settings) -> list[BenchRow]:
    """The rows of one shape. bandwidth: bytes per second of a large copy, for floor_us; None on a CPU."""
    ours, peers = cases_of(shape, settings)
    quick = [case for case in ours if case.backend != "reference"]  # kernels, the copy, the launch
    slow = [case for case in ours if case.backend == "reference"]
    for case in quick:
        _prepare(case, clock)
    for _ in range(settings.rounds):
        for case in quick:
            clock.time_call(case)
    others = [*slow, *available(peers)]
    for case in others:
        _prepare(case, clock)
    for _ in range(settings.rounds):
        clock.settle(quick[0])
        for case in quick:
            clock.time_gpu(case)
        for case in (case for case in others if not case.note):
            clock.time_gpu(case)
            clock.time_call(case)
    return bench_rows([*ours, *(case for case in others if case.kind == "peer")], shape, bandwidth, settings)


def _prepare(case: Case, clock: Clock) -> None:
    """Prepare and judge a case. A peer that cannot run gets the error as its note. An error of quantkit is raised."""
    if case.note:
        return
    try:
        found = clock.prepare(case)
        if case.judge is not None:
            case.output_error = case.judge(found)
    except Exception as error:
        if case.kind != "peer":
            raise
        case.note = note_of(error)
        print(f"{case.tool} {case.operation} {case.format} left out: {case.note}", file=sys.stderr)


def bench_rows(
    timed: list[Case], shape: tuple[int, int], bandwidth: float | None, settings: Settings
) -> list[BenchRow]:
    copy = next(case for case in timed if case.operation == "copy")
    packages = versions() | installed(PACKAGES)
    return [_row(case, copy, shape, bandwidth, settings, packages) for case in timed]


def _row(
    case: Case,
    copy: Case,
    shape: tuple[int, int],
    bandwidth: float | None,
    settings: Settings,
    packages: dict[str, str],
) -> BenchRow:
    commit, dirty = git_state()
    gpu, call, copied = (quantiles(times) for times in (case.gpu_us, case.call_us, copy.gpu_us))
    return BenchRow(
        kind=case.kind,
        tool=case.tool,
        operation=case.operation,
        format=case.format,
        block_size=case.block_size,
        backend=case.backend,
        rows=TOKENS if case.operation == "block_hessians" else shape[0],
        columns=shape[1],
        dtype=settings.dtype,
        global_scale=case.global_scale,
        gpu_us_median=gpu[0],
        gpu_us_20=gpu[1],
        gpu_us_80=gpu[2],
        call_us_median=call[0],
        call_us_20=call[1],
        call_us_80=call[2],
        bytes=case.bytes,
        floor_us=None if bandwidth is None else round(1e6 * case.bytes / bandwidth, 3),
        ratio_to_copy=None if copied[0] is None or gpu[0] is None else round(gpu[0] / copied[0], 3),
        output_error=None if case.output_error is None else round(case.output_error, 4),
        iterations=len(case.call_us),
        device=device_name(settings.device),
        commit=commit,
        dirty=dirty,
        versions=" ".join(f"{name}={version}" for name, version in packages.items()),
        note=case.note,
    )


def to_csv(lines: list[BenchRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(BenchRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(line) for line in lines)
    return text.getvalue()
