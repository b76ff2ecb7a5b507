"""The readers of files from elsewhere, fuzzed by atheris, which looks for inputs that reach new code."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import REPO_ROOT
from tests.experiments.faults.sizes import note, size

RUNS = size(300, 20_000)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.parametrize("target", ["record", "manifest", "header", "checkpoint"])
def test_a_guided_input_is_read_or_refused_in_one_line(tmp_path: Path, target: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install -e '.[fuzz]'")
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.experiments.faults.guided",
        target,
        str(RUNS),
        str(tmp_path / "at"),
    ]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ended = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert sum(ended.values()) == RUNS and ended["refused"] > 0
    note(f"guided by coverage: {target}", cases=RUNS, ended=ended)
