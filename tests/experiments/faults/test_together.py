"""Processes that start the same sweep at once share its work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import REPO_ROOT
from tests.experiments import tiny_models
from tests.experiments.faults.sizes import note, size

PROCESSES = size(3, 8)
RUNS = 8


@pytest.mark.slow
@pytest.mark.timeout(size(300, 1800))
def test_processes_of_one_sweep_capture_once_and_record_every_run_once(tmp_path: Path) -> None:
    """Also where the process that captures, and holds the lock, is killed: another one goes on."""
    tiny_models.qwen3(tmp_path / "model")
    tiny_models.write_text(tmp_path / "text")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.experiments.faults.together", str(tmp_path), str(PROCESSES)],
        cwd=REPO_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, killed = json.loads(done.stdout)
    assert whole["wrong"] == [] and killed["wrong"] == []
    assert whole["status"] == [0] * PROCESSES and killed["status"] == [0] * (PROCESSES - 1)
    assert killed["killed"] == -9
    once = ("capture", "backward pass")
    assert [whole["times"][phase] for phase in once] == [1, 1] and [killed["times"][phase] for phase in once] == [2, 1]
    assert whole["times"]["quantizing"] == whole["times"]["recording"] == killed["times"]["recording"] == RUNS
    note("same sweep at once", processes=PROCESSES, runs=RUNS, captures=1, captures_with_a_kill=2)
