"""The W&B mirror, read back from disk as `wandb sync` would read it."""

from __future__ import annotations

import dataclasses
import json
import logging
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.config import TrackingConfig, TrackingMode
from experiments.record import RunRecord
from experiments.tracking import track

RECORD = RunRecord(
    run_id="nvfp4-b16-sse-reference-synthetic-l0-mlp.down_proj-synthetic-0123456789",
    sweep="20260101-000000-abcd",
    status="ok",
    reason=None,
    format="nvfp4",
    block_size=16,
    method="sse",
    backend="reference",
    requested_backend="auto",
    device="cpu",
    weight_error=0.0789,
    time_iterations=12,
)
CONFIG = {"format": {"name": "nvfp4"}, "block_size": 16}
WANDB = TrackingConfig("wandb")


def read_offline_run(path: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, part = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def offline_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def complete_run(file: Path) -> list[Any]:
    """The records of an offline run. W&B's own process completes the file shortly after finish() returns."""
    deadline = time.monotonic() + 30
    while True:
        records = list(read_offline_run(file))
        if any(r.HasField("exit") for r in records) or time.monotonic() > deadline:
            return records
        time.sleep(0.05)


def test_an_offline_run_holds_the_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    track(RECORD, CONFIG, WANDB, tmp_path)
    out, err = capfd.readouterr()
    assert out + err == ""

    (file,) = offline_files(tmp_path)
    records = complete_run(file)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.display_name, run.project) == (RECORD.run_id, RECORD.run_id, "quantkit")
    assert run.run_group == RECORD.sweep
    assert {"nvfp4", "sse", "reference", "ok"} <= set(run.tags)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["format"] == {"name": "nvfp4"} and config["block_size"] == 16
    summary = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for r in records
        if r.HasField("summary")
        for item in r.summary.update
    }
    assert summary["weight_error"] == 0.0789 and summary["time_iterations"] == 12 and summary["status"] == "ok"
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]

    # A repeated run is a second file under the same id; a failed one ends as failed.
    track(dataclasses.replace(RECORD, status="failed", reason="no"), CONFIG, WANDB, tmp_path)
    files = offline_files(tmp_path)
    assert len(files) == 2
    exits = {r.exit.exit_code for f in files for r in complete_run(f) if r.HasField("exit")}
    assert exits == {0, 1}

    # Neither the machine nor its user.
    for written in tmp_path.rglob("*"):
        if written.is_file() and written.suffix != ".log":
            assert socket.gethostname().encode() not in written.read_bytes(), written
    assert not any(r.run.host or r.run.git.remote_url for r in records if r.HasField("run"))


def test_none_and_disabled_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    track(RECORD, CONFIG, TrackingConfig("none"), tmp_path)
    track(RECORD, CONFIG, TrackingConfig("wandb", mode=TrackingMode.disabled), tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(RECORD, CONFIG, WANDB, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("mode", "reason"), [("offline", "import of wandb"), ("sideways", "WANDB_MODE=sideways")])
def test_a_failure_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: str, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_MODE", mode)
    with caplog.at_level(logging.WARNING):
        track(RECORD, CONFIG, WANDB, tmp_path)
    (message,) = (r.getMessage() for r in caplog.records)
    assert RECORD.run_id in message and reason in message and "tracking=none" in message
