"""Whole models are timed by phase: a line for each run, the same bytes of all processes, and no run that hangs."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir

from experiments import bench_model, quantize_model  # noqa: F401 (the latter registers its schema)
from experiments.config import CONF_DIR


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_runs_are_timed_and_have_the_same_bytes(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "bench" / "model.csv"
    overrides = [
        *(f"model.path={tiny.folder}", f"data.path={tiny.texts}", "data.seq_len=32", "data.samples=8"),
        *("device=cpu", "model.dtype=float32"),
    ]
    records = tmp_path / "records"
    overrides += ["--records", str(records)]
    assert bench_model.main([*overrides, "--cases", "gptq", "--processes", "1", "2", "--out", str(out)]) == 0
    assert {path.name for path in (records / "gptq-2").iterdir()} == {"record.json", "run.log", "layers.jsonl"}
    one, two = lines(out)
    assert (one["case"], one["processes"], two["processes"]) == ("gptq", "1", "2")
    assert one["same_bytes"] == two["same_bytes"] == "True" and not one["note"]
    assert (one["layers"], one["hidden"], one["intermediate"], one["vocabulary"]) == ("4", "32", "64", "300")
    assert (one["sequences"], one["seq_len"], one["hessian_weighting"]) == ("8", "32", "loss")
    assert one["hessian_matmul"] == ""  # a CPU has no TF32
    phases = [float(one[f"{phase}_s"]) for phase in bench_model.PHASES]
    assert all(phase >= 0 for phase in phases) and 0 < sum(phases) < float(one["duration_s"]) < float(one["wall_s"])


@pytest.mark.parametrize(
    ("case", "method", "weighting", "two_sided"),
    [
        ("hessian", "hessian", "output", False),
        ("gptq", "gptq", "loss", False),
        ("gptq_float32", "gptq", "loss", False),
        ("descent", "descent", "loss", False),
        ("two_sided", "gptq", "loss", True),
        ("two_sided_descent", "descent", "loss", True),
    ],
)
def test_a_case_is_a_configuration(case: str, method: str, weighting: str, two_sided: bool) -> None:
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        config = compose("quantize_model", overrides=["model=smollm2_135m", *bench_model.CASES[case]])
    assert (config.method.name, config.hessian.weighting) == (method, weighting)
    assert bool(config.hessian.get("outputs")) == two_sided


def test_a_run_that_fails_or_is_too_late_has_a_note(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "model.csv"
    overrides = [f"model.path={tiny.folder}", f"data.path={tmp_path / 'none'}", "device=cpu"]
    assert bench_model.main([*overrides, "--cases", "hessian", "--out", str(out)]) == 1
    assert lines(out)[0]["note"] == "exit status 1"
    assert bench_model.main([*overrides, "--cases", "hessian", "--deadline", "0", "--out", str(out)]) == 1
    assert lines(out)[0]["note"] == "not run: the deadline was over"
    with pytest.raises(SystemExit):
        bench_model.main(["data.path=x", "--out", str(out)])


def test_a_run_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    child = f"import time\nwhile True:\n open({str(alive)!r}, 'a').write('.'); time.sleep(0.05)"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    seconds, error = bench_model.run([sys.executable, "-c", parent], 1, 2.0)
    assert error == "ended after 2 s" and seconds < 20
    size = alive.stat().st_size
    time.sleep(0.5)
    assert alive.stat().st_size == size
