"""One W&B run for each model that is quantized, and no record that depends on W&B."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import quantize_model as entry
from experiments.model import checkpoint, walk
from experiments.model.checkpoint import CheckpointWriter
from experiments.model_record import ModelRecord
from experiments.record import read_record_of
from tests.experiments.model.test_walk import composed, run_for
from tests.experiments.test_tracking import complete_run, offline_files, steps_of, summary_of
from tests.experiments.tiny_models import NUM_LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")

TRACKED = ("tracking=wandb", "hessian=output")


def record_in(folder: Path) -> ModelRecord:
    (path,) = folder.glob("nvfp4-*/record.json")
    return read_record_of(ModelRecord, path)


def test_a_model_is_logged_once_with_all_its_layers(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Interrupted after the second layer, continued, and found finished."""
    values, console = composed(tiny, tmp_path, *TRACKED), entry.ModelConsole()
    real = CheckpointWriter.write_layer

    def interrupted(self: CheckpointWriter, index: int, *args: Any) -> None:
        real(self, index, *args)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointWriter, "write_layer", interrupted)
        entry.run(values, console)
    assert offline_files(tmp_path) == []
    entry.run(values, console)
    record = record_in(tmp_path)
    entry.run(values, console)
    entry.run(composed(tiny, tmp_path, *TRACKED, "export=modelopt"), console)
    assert console.counts == {"done": 1, "skipped": 2, "unsupported": 0, "failed": 0}
    assert "wandb" not in capfd.readouterr().err

    (file,) = offline_files(tmp_path)
    records = complete_run(file)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.run_group) == (record.run_id, record.sweep)
    layers = checkpoint.layer_records(tmp_path / record.run_id / "model")
    assert [layer["index"] for layer in layers] == list(range(NUM_LAYERS)) and record.resumed_layers == 2
    logged = steps_of(records)
    assert list(logged) == list(range(NUM_LAYERS))
    for layer in layers:
        own = logged[layer["index"]]
        for name in ("naive_weight_error", "weight_error", "naive_output_error", "output_error", "hidden_error"):
            assert own[f"layers/{name}"] == layer[name]
        assert {name for name in own if name.startswith("layers/seconds/")} == {
            f"layers/seconds/{phase}" for phase in layer["seconds"]
        }
    summary = summary_of(records)
    assert summary["output_error"] == record.output_error and summary["hidden_error"] == layers[-1]["hidden_error"]
    assert summary["seconds"] == record.seconds and summary["resumed_layers"] == 2
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_a_failed_model_is_logged_as_failed(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walk.Walk, "_solve", lambda *_: 1 / 0)
    entry.run(composed(tiny, tmp_path, *TRACKED), entry.ModelConsole())
    (file,) = offline_files(tmp_path)
    records = complete_run(file)
    assert summary_of(records)["status"] == "failed" and steps_of(records) == {}
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [1]


@pytest.mark.parametrize("damage", ["no wandb", "no journal"])
def test_a_failure_of_wandb_is_a_warning_and_the_record_is_complete(
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    if damage == "no wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    else:
        monkeypatch.setattr(checkpoint, "layer_records", lambda folder: (folder / "none").read_text())
    console = entry.ModelConsole()
    entry.run(composed(tiny, tmp_path, *TRACKED), console)
    record = record_in(tmp_path)
    assert record.status == "ok" and console.close() == 0
    log = (tmp_path / record.run_id / "run.log").read_text()
    assert f"W&B did not log {record.run_id}" in log and "tracking=none turns W&B off" in log


def test_none_writes_nothing_and_changes_no_identity(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    entry.run(composed(tiny, tmp_path, "tracking=none", "method=naive"), entry.ModelConsole())
    assert not (tmp_path / "wandb").exists()
    plain, tracked = (run_for(tiny, tmp_path, f"tracking={name}", "method=naive") for name in ("none", "wandb"))
    assert record_in(tmp_path).run_id == plain.run_id == tracked.run_id and plain.identity == tracked.identity
    assert plain.settings == tracked.settings and "tracking" not in plain.settings
