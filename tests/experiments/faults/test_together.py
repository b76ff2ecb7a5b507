"""Processes that start the same sweep at once share its work."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experiments.faults.sizes import note, size
from tests.experiments.faults.told import told_by

PROCESSES = size(3, 8)
RUNS = 8


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
def test_processes_of_one_sweep_capture_once_and_record_every_run_once(tmp_path: Path) -> None:
    """Also where the process that captures, and holds the lock, is killed: another one goes on."""
    whole, killed = told_by("together", tmp_path, PROCESSES)
    assert whole["wrong"] == [] and killed["wrong"] == []
    assert whole["status"] == [0] * PROCESSES and killed["status"] == [0] * (PROCESSES - 1)
    assert killed["killed"] == -9
    once = ("capture", "backward pass")
    assert [whole["times"][phase] for phase in once] == [1, 1] and [killed["times"][phase] for phase in once] == [2, 1]
    assert whole["times"]["quantizing"] == whole["times"]["recording"] == killed["times"]["recording"] == RUNS
    note("same sweep at once", processes=PROCESSES, runs=RUNS, captures=1, captures_with_a_kill=2)
