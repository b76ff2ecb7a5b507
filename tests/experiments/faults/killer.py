"""Kills a real sweep with SIGKILL at random moments, starts it again, and compares the ends.

    python -m tests.experiments.faults.killer FOLDER MOMENTS SEED

FOLDER has a tiny checkpoint in model/ and texts in text/. Prints one JSON object: {"runs": number of runs of the sweep,
"killed": {phase: kills in it}, "again": kills of a second start, "wrong": [what differs from an undisturbed sweep]}.

A sweep is a process of its own: the command of experiments/run.py, then that of experiments/report.py. It is forked
from this one, which has imported the packages but computed nothing, because importing takes most of a start's time.
Each kill hits a phase in turn, in a random one of its occurrences, at a random moment of it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import runpy
import select
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import (
    report,
    run,  # noqa: F401  imported before the forks, as reporting below
)
from experiments.capture import forward, losses, shards
from experiments.config import REPO_ROOT
from experiments.files import TEMPORARY
from experiments.measure import stages
from experiments.record import RunRecord
from experiments.reporting import collection, figures, pages  # noqa: F401
from experiments.sources import hashes

SWEEP = (
    *("-m", "format=nvfp4", "method=naive,hessian", "hessian=output,loss", "layer.module=mlp.down_proj,mlp.up_proj"),
    *("model.dtype=float32", "data.seq_len=32", "data.samples=16", "data.heldout=0.25", "cache.shard_mib=1"),
    *("record.blocks=true", "timing=none", "tracking=none", "offline=never", "device=cpu", "sweep=killed"),
)
SECONDS = 120.0  # a sweep that takes longer hangs
TIMES = ("started_at", "duration_s", "checksum")  # of a record, differ from run to run
# Phase → (owner, name) of the function that is one occurrence of it.
PHASES: dict[str, tuple[Any, str]] = {
    "hashing": (hashes, "_read_all"),
    "capture": (forward._Capture, "run"),
    "keeping": (shards.ShardWriter, "keep"),
    "backward pass": (losses._Pass, "run"),
    "quantizing": (stages, "quantize_layer"),
    "blocks": (stages, "keep_blocks"),
    "recording": (RunRecord, "write"),
    "reporting": (report, "report_runs"),
    "collecting": (report, "collect"),
}


@dataclass(frozen=True)
class Victim:
    """What is killed. work: (root, own folder) → exit status. outcome: folder → all that it leaves, without times.

    phases: as PHASES.
    """

    phases: dict[str, tuple[Any, str]]
    work: Callable[[Path, Path], int]
    outcome: Callable[[Path], dict[str, Any]]


@dataclass(frozen=True)
class Moment:
    phase: str
    occurrence: int
    seconds: float  # after the phase began


def marked(phase: str, function: Callable[..., Any], pipe: int) -> Callable[..., Any]:
    """The function, telling when it begins and ends."""

    def call(*arguments: Any, **options: Any) -> Any:
        os.write(pipe, f"{phase} begins\n".encode())
        try:
            return function(*arguments, **options)
        finally:
            os.write(pipe, f"{phase} ends\n".encode())

    return call


def sweep(root: Path, work: Path) -> int:
    """The whole of what a user runs: the sweep and its report."""
    forward.MIB = 1 << 15  # a shard is 4 sequences
    forward.BATCH_TOKENS = losses.BATCH_TOKENS = 64
    losses.PIECE_TOKENS = 128
    forward.KEEP_SECONDS = 0.0
    forward.time.monotonic = lambda: 0.0  # type: ignore[attr-defined]  # each batch is late: it is kept
    os.environ["QUANTKIT_COMMIT"] = "killed"  # whatever is edited meanwhile
    os.environ["QUANTKIT_CACHE"] = str(work / "cache")
    runs = work / "runs"
    sys.argv = ["run.py", *SWEEP, f"model.path={root / 'model'}", f"data.path={root / 'text'}", f"output_dir={runs}"]
    try:
        runpy.run_path(str(REPO_ROOT / "experiments" / "run.py"), run_name="__main__")
    except SystemExit as ended:
        status = int(ended.code or 0)
    status = status or report.main(["--runs", str(runs)], work)
    return status or report.main(["--collect", "main", "--from", str(runs)], work)


def start(victim: Victim, root: Path, work: Path) -> tuple[int, int]:
    """(process id, pipe of its marks)"""
    work.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    os.setsid()
    log = os.open(work / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    status = 99
    try:
        for phase, (owner, name) in victim.phases.items():
            setattr(owner, name, marked(phase, getattr(owner, name), writer))
        status = victim.work(root, work)
    finally:
        sys.stdout.flush()
        os._exit(status)


def finish(victim: Victim, root: Path, work: Path) -> tuple[int, list[tuple[str, float]]]:
    """A process without a kill: (exit status, its marks with their times). A status of -9 is a hang."""
    child, pipe = start(victim, root, work)
    marks = []
    deadline = time.monotonic() + SECONDS
    with os.fdopen(pipe, "rb", buffering=0) as reader:
        while (left := deadline - time.monotonic()) > 0:
            if select.select([reader], [], [], left)[0]:
                line = reader.readline()
                if not line:
                    break
                marks.append((line.decode().strip(), time.monotonic()))
        else:
            os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), marks


def kill_at(victim: Victim, root: Path, work: Path, moment: Moment) -> str | None:
    """Start the process and kill it. Returns the phase that it was in; None if it ended before."""
    child, pipe = start(victim, root, work)
    inside: list[str] = []
    seen = 0
    with os.fdopen(pipe, "rb", buffering=0) as reader:

        def read() -> bool:
            nonlocal seen
            line = reader.readline().decode().strip()
            phase, _, what = line.rpartition(" ")
            if what == "begins":
                inside.append(phase)
                seen += phase == moment.phase
            elif what == "ends":
                inside.remove(phase)
            return bool(line)

        while seen <= moment.occurrence and read():
            pass
        time.sleep(moment.seconds)
        os.killpg(child, signal.SIGKILL)
        while read():  # what it did until then
            pass
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return (inside[-1] if inside else "between") if status == -signal.SIGKILL else None


def occurrences(marks: list[tuple[str, float]]) -> dict[str, list[float]]:
    """Phase → the durations of its occurrences."""
    found: dict[str, list[float]] = {}
    begun: dict[str, float] = {}
    for mark, at in marks:
        phase, _, what = mark.rpartition(" ")
        if what == "begins":
            begun[phase] = at
        else:
            found.setdefault(phase, []).append(at - begun[phase])
    return found


def outcome(work: Path) -> dict[str, Any]:
    """All that a sweep leaves, without times: file → its contents."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        name = str(path.relative_to(work))
        if path.name in ("log", "run.log", "multirun.yaml") or path.name.endswith(".lock"):
            continue
        if path.name == "record.json":
            found[name] = {key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES}
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        elif path.suffix == ".csv":
            found[name] = list(csv.reader(io.StringIO(path.read_text())))
        elif path.parent.name != "hashes":  # a hash of a new file is not kept at once
            found[name] = path.read_bytes()
    return found


def differences(victim: Victim, want: dict[str, Any], work: Path) -> list[str]:
    got = victim.outcome(work)
    wrong = [f"{name} is missing" for name in want.keys() - got.keys()]
    wrong += [f"{name} was not there" for name in got.keys() - want.keys()]
    wrong += [f"{name} differs" for name in want.keys() & got.keys() if want[name] != got[name]]
    parts = (part for path in work.rglob("*") for part in (path.name,))
    return wrong + [f"{part} is left" for part in parts if TEMPORARY.fullmatch(part) or part.startswith(".tmp")]


def survive(victim: Victim, root: Path, moments: int, seed: int) -> dict[str, Any]:
    chance = random.Random(seed)
    status, marks = finish(victim, root, root / "undisturbed")
    want = victim.outcome(root / "undisturbed")
    lasting = occurrences(marks)
    wrong = [f"undisturbed it ended with {status}"] * bool(status)
    wrong += [f"undisturbed it has no {phase}" for phase in victim.phases.keys() - lasting.keys()]
    killed: Counter[str] = Counter()
    again = 0
    for number in range(moments if not wrong else 0):
        work = root / f"killed-{number}"
        phase = list(victim.phases)[number % len(victim.phases)]
        kills = 0
        while kills == 0 or (kills < 3 and chance.random() < 0.5):  # a start after a kill may be killed, too
            occurrence = chance.randrange(len(lasting[phase]))
            seconds = chance.random() * lasting[phase][occurrence]
            hit = kill_at(victim, root, work, Moment(phase, occurrence, seconds))
            if hit is None:
                break
            killed[hit] += 1
            again += kills > 0
            kills += 1
            phase = chance.choice(list(victim.phases))
        status, _ = finish(victim, root, work)
        found = [f"ended with {status}"] * bool(status) + differences(victim, want, work)
        wrong += [f"after kill {number} in {phase}: {line}" for line in found]
        if not found:
            shutil.rmtree(work)
    runs = sum(name.endswith("record.json") for name in want)
    return {"runs": runs, "killed": dict(killed), "again": again, "wrong": wrong}


if __name__ == "__main__":
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    victim = Victim(PHASES, sweep, outcome)
    print(json.dumps(survive(victim, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
