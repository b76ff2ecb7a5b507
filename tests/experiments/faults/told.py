"""Runs a module of this folder on a tiny model and text, in a process of its own, and reads the JSON that it prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from experiments.config import REPO_ROOT
from tests.experiments import tiny_models


def told_by(module: str, folder: Path, *arguments: object) -> Any:
    """module: its name in this folder. It gets `folder`, with the model and the text, and the other arguments."""
    tiny_models.qwen3(folder / "model")
    tiny_models.write_text(folder / "text")
    command = [sys.executable, "-W", "ignore", "-m", f"tests.experiments.faults.{module}", folder, *arguments]
    done = subprocess.run(
        [str(word) for word in command],
        cwd=REPO_ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
