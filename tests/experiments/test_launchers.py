"""Sweeps whose runs other processes execute, by joblib and submitit, and GPUs that runs share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import launchers, provenance
from experiments.config import REPO_ROOT
from experiments.measure.timing import SHARED
from experiments.model_record import ModelRecord
from experiments.overrides import mistake
from experiments.record import RunRecord, read_record_of, read_records
from tests.experiments import tiny_models

VARYING = ("sweep", "started_at", "duration_s", "time_ms_median", "time_ms_p20", "time_ms_p80", "time_iterations",
           "time_timer", "time_device")  # fmt: skip


def sweep(folder: Path, name: str, *more: str) -> tuple[list[RunRecord], str]:
    """The records of a sweep of three runs, with a cache of its own, and all that was printed."""
    runs = folder / name
    command = [sys.executable, "-W", "ignore", "experiments/run.py", "-m", "method=naive,sse,hessian",
               f"model.path={folder / 'model'}", f"data.path={folder / 'text'}", "model.dtype=float32",
               "data.seq_len=32", "data.samples=16", "timing.min_run_s=0.001", "tracking=none", "device=cpu",
               f"output_dir={runs}", f"sweep={name}", *more]  # fmt: skip
    environment = os.environ | {"QUANTKIT_CACHE": str(folder / f"cache-{name}"), "OMP_NUM_THREADS": "1"}
    environment |= {"QUANTKIT_COMMIT": "tested", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    logs = "".join(path.read_text() for path in sorted(runs.rglob("*_log.*")))  # submitit's
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "3 runs in" in done.stdout and f"Records: {runs}" in done.stdout
    return read_records(runs), done.stdout + done.stderr + logs


def fixed(record: RunRecord) -> dict[str, Any]:
    return {name: value for name, value in record.to_dict().items() if name not in VARYING}


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("sweeps")
    tiny_models.qwen3(folder / "model")
    tiny_models.write_text(folder / "text")
    return SimpleNamespace(folder=folder, records=sweep(folder, "serial")[0])


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["processes", "jobs"])
def test_a_launchers_records_are_those_of_a_serial_sweep(serial: SimpleNamespace, preset: str) -> None:
    """The layer is captured once. No time is measured, because the runs share the processors."""
    if importlib.util.find_spec(launchers.PRESETS[preset]) is None:
        pytest.skip(f"{launchers.PRESETS[preset]} is not installed: pip install -e '.[launchers]'")
    records, printed = sweep(serial.folder, preset, f"hydra/launcher={preset}")
    assert [fixed(record) for record in records] == [fixed(record) for record in serial.records]
    assert printed.count("Capturing the inputs of") == 1 and "3 done" in printed
    assert all(record.time_timer == SHARED and record.time_ms_median is None for record in records)
    assert all(record.time_timer != SHARED and record.time_ms_median is not None for record in serial.records)
    assert not list((serial.folder / preset).rglob("*.tmp"))


@pytest.mark.slow
def test_models_of_other_processes_are_counted(serial: SimpleNamespace, tmp_path: Path) -> None:
    """One of two is not there: the exit status is 1, as in a serial sweep."""
    pytest.importorskip("joblib")
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    model, none = serial.folder / "model", tmp_path / "none"
    common = ["hydra/launcher=processes", f"data.path={serial.folder / 'text'}", "data.seq_len=32", "data.samples=4",
              "tracking=none", "device=cpu", f"cache.dir={tmp_path / 'cache'}"]  # fmt: skip
    scripts = {
        "quantize_model.py": ("method=naive", "model.dtype=float32", f"output_dir={tmp_path / 'models'}"),
        "evaluate.py": (f"reference={model}", "data.split=train", f"output_dir={tmp_path / 'evaluations'}"),
    }
    for script, own in scripts.items():
        command = [sys.executable, "-W", "ignore", f"experiments/{script}", "-m", f"model.path={model},{none}"]
        done = subprocess.run(
            [*command, *common, *own], cwd=REPO_ROOT, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"model.path={none}: no such folder" in done.stderr and "Traceback" not in done.stderr
        if script == "quantize_model.py":
            assert "2 models in" in done.stdout and "1 done, 1 failed" in done.stdout
    found = [read_record_of(ModelRecord, path).status for path in (tmp_path / "models").glob("nvfp4-*/record.json")]
    assert sorted(found) == ["failed", "ok"]
    assert len(list((tmp_path / "evaluations").glob("*/record.json"))) == 1


def test_a_launcher_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = "needs hydra-joblib-launcher, which is not installed; pip install -e '.[launchers]'"
    assert mistake(["hydra/launcher=processes"]) == f"hydra/launcher=processes: {said}"
    assert "hydra-submitit-launcher" in str(mistake(["-m", "hydra/launcher=slurm"]))


@pytest.fixture
def four_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of four GPUs, and a run that a launcher has started; its number is 6."""
    monkeypatch.setattr(launchers.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(launchers, "WAIT_SECONDS", 0.01)
    monkeypatch.setattr(launchers, "count_gpus", lambda: 4)
    monkeypatch.setattr(launchers, "launcher", lambda: "JoblibLauncher")
    started = SimpleNamespace(job=SimpleNamespace(num=6))
    monkeypatch.setattr(launchers, "HydraConfig", SimpleNamespace(get=lambda: started))


@pytest.mark.usefixtures("four_gpus")
def test_runs_spread_over_the_gpus_one_each() -> None:
    """Each takes the GPU of its number, or the next that is free. A fifth run waits until one is."""
    with ExitStack() as runs:
        taken = [runs.enter_context(launchers.free_gpu(4, first)) for first in (2, 2, 5)]
        assert taken == [2, 3, 1]
        assert runs.enter_context(launchers.own_device("auto")) == "cuda:0"
        found: list[str] = []

        def fifth() -> None:
            with launchers.own_device("auto") as device:
                found.append(device)

        waiting = threading.Thread(target=fifth)
        waiting.start()
        waiting.join(0.1)
        assert found == [] and waiting.is_alive()
    waiting.join(10)
    assert found == ["cuda:2"]  # 6 modulo 4


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("asked", ["cpu", "cuda", "cuda:3"])
def test_a_device_that_was_asked_for_is_taken(asked: str) -> None:
    with launchers.own_device(asked) as device:
        assert device == asked


@pytest.mark.parametrize("before", [None, "", "2,3"])
@pytest.mark.parametrize(
    ("name", "hidden", "seen"),
    [("LocalLauncher", "", "before"), ("LocalLauncher", "0", "0"), ("JoblibLauncher", "", "")],
)
def test_a_job_of_submitit_sees_the_gpus_of_its_command(
    monkeypatch: pytest.MonkeyPatch, before: str | None, name: str, hidden: str, seen: str
) -> None:
    """submitit sets CUDA_VISIBLE_DEVICES to nothing for a job without gpus_per_node. What a user asks for stays."""
    monkeypatch.setenv(launchers.KEPT, "of another command")
    if before is None:
        monkeypatch.delenv(launchers.VISIBLE, raising=False)
    else:
        monkeypatch.setenv(launchers.VISIBLE, before)
    launchers.keep_visible_gpus()
    monkeypatch.setenv(launchers.VISIBLE, hidden)
    monkeypatch.setattr(launchers, "launcher", lambda: name)
    with launchers.own_device("cpu"):
        assert os.environ.get(launchers.VISIBLE) == (before if seen == "before" else seen)


@pytest.mark.usefixtures("four_gpus")
def test_gpus_have_the_machines_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that two sweeps that see different GPUs, both from number 0 on, do not wait for each other."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with launchers.free_gpu(2, 0) as first:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,2")
        with launchers.free_gpu(2, 1) as second:
            assert (first, second) == (0, 0)


@pytest.mark.parametrize(
    ("by", "device", "shared"),
    [("BasicLauncher", "cpu", False), ("JoblibLauncher", "cpu", True), ("LocalLauncher", "cpu", True),
     ("SlurmLauncher", "cpu", True), ("JoblibLauncher", "cuda:1", False), ("SlurmLauncher", "cuda", False)],
)  # fmt: skip
def test_times_are_measured_on_devices_of_ones_own(
    monkeypatch: pytest.MonkeyPatch, by: str, device: str, shared: bool
) -> None:
    monkeypatch.setattr(launchers, "launcher", lambda: by)
    assert launchers.shares_device(device) == shared


def test_outcomes_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SimpleNamespace(sweep=SimpleNamespace(dir=str(tmp_path)))
    monkeypatch.setattr(launchers, "HydraConfig", SimpleNamespace(get=lambda: folder))
    assert launchers.read_outcomes(tmp_path) == {}
    for counts in ({"done": 1, "failed": 0}, {"done": 0, "failed": 1}, {"done": 1, "failed": 0}):
        launchers.tell_outcome(counts)
    assert launchers.read_outcomes(tmp_path) == {"done": 2, "failed": 1}
    assert json.loads((tmp_path / launchers.OUTCOMES_NAME).read_text().splitlines()[1])["failed"] == 1


def test_a_serial_run_has_no_launcher() -> None:
    assert launchers.launcher() == launchers.SERIAL and not launchers.is_elsewhere()
    assert launchers.count_gpus() == 0 or provenance.resolve_device("auto") == "cuda"
