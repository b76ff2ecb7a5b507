"""A new format: with one entry and one yaml file, the pipeline runs it and shows a row of a table."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.config import REPO_ROOT
from experiments.record import read_records

ENTRY = """
            BlockFormat("fp4_ue3m5", E2M1, ScaleGrid("ue3m5", 3, 5, 3, max_code=254), (16, 32), ("nearest",), True),
"""
LAST = "            INT4_UE4M4,\n"
YAML = "name: fp4_ue3m5\nglobal_scale: amax\nscale_rule: null\n"


@pytest.mark.slow
def test_adding_a_format_takes_one_entry_and_one_yaml(tmp_path: Path) -> None:
    """A copy of the code with the format, added as docs/pipeline.md says."""
    copy, runs = tmp_path / "copy", tmp_path / "runs"
    for folder in ("quantkit", "experiments", "conf"):
        shutil.copytree(REPO_ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    formats = copy / "quantkit" / "formats.py"
    text = formats.read_text()
    assert text.count(LAST) == 1
    formats.write_text(text.replace(LAST, LAST + ENTRY.lstrip("\n")))
    (copy / "conf" / "format" / "fp4_ue3m5.yaml").write_text(YAML)

    def command(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(copy)}
        done = subprocess.run(
            [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    small = ["model=synthetic", "model.out_features=32", "model.in_features=64", "data=synthetic", "data.samples=4"]
    small += ["data.seq_len=16", "tracking=none", "timing=none", "verify=true", f"output_dir={runs}"]
    command("experiments/run.py", "-m", "format=fp4_ue3m5", "method=naive,sse,hessian", *small)
    records = read_records(runs)
    assert sorted(r.method for r in records) == ["hessian", "naive", "sse"]
    assert all((r.status, r.format, r.global_scale) == ("ok", "fp4_ue3m5", "amax") for r in records)
    assert all(r.verified_violations == 0 for r in records if r.method != "naive")
    table = command("experiments/report.py", "--runs", str(runs))
    assert "FP4 UE3M5 SSE reference 16 amax" in " ".join(table.split())
