"""Starts several processes of one sweep at once, and compares their end with that of an undisturbed sweep.

    python -m tests.experiments.faults.together FOLDER PROCESSES

Prints one JSON object for each of two trials, without a kill and with one of the process that captures: {"status": exit
status of each process, "times": {phase: how often it began}, "wrong": [what differs]}.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.experiments.faults.killer import PHASES, SECONDS, Victim, differences, finish, outcome, start, sweep

SWEEP = Victim(PHASES, sweep, outcome)


def together(root: Path, work: Path, count: int, kill: bool) -> dict[str, Any]:
    """kill: the first process that captures is killed in the middle of it."""
    children = dict(reversed(start(SWEEP, root, work)) for _ in range(count))  # pipe → process
    open_pipes, times = set(children), Counter[str]()
    killed: int | None = None
    deadline = time.monotonic() + SECONDS * 2
    while open_pipes and time.monotonic() < deadline:
        for pipe in select.select(list(open_pipes), [], [], 1.0)[0]:
            marks = os.read(pipe, 1 << 16).decode()
            if not marks:
                open_pipes.discard(pipe)
            times.update(line.removesuffix(" begins") for line in marks.splitlines() if line.endswith(" begins"))
            if kill and killed is None and "keeping begins" in marks:
                killed = children[pipe]
                os.killpg(killed, signal.SIGKILL)
    for child in children.values() if open_pipes else ():
        os.killpg(child, signal.SIGKILL)  # a deadlock
    status = {child: os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children.values()}
    others = [code for child, code in status.items() if child != killed]
    return {"status": others, "killed": status.get(killed or 0), "times": dict(times)}


def trials(root: Path, count: int) -> list[dict[str, Any]]:
    finish(SWEEP, root, root / "undisturbed")
    want = outcome(root / "undisturbed")
    found = []
    for kill in (False, True):
        work = root / f"together-{kill}"
        trial = together(root, work, count, kill)
        found.append(trial | {"wrong": differences(SWEEP, want, work)})
    return found


if __name__ == "__main__":
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    print(json.dumps(trials(Path(sys.argv[1]), int(sys.argv[2]))))
