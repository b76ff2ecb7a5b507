"""The W&B mirror, read back from disk as `wandb sync` would read it."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from experiments import report, tracking
from experiments.config import TrackingConfig, TrackingMode
from experiments.evaluation_record import EvaluationRecord
from experiments.measure.blocks import histograms
from experiments.model_record import ModelRecord
from experiments.record import FIELDS, SPARSE_FIELDS, RunRecord
from experiments.reporting.records_csv import records_csv
from experiments.tracking import (
    AS_HISTOGRAMS,
    MEASURED,
    MODEL_MEASURED,
    track,
    track_evaluation,
    track_model,
    track_report,
)

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
HISTOGRAMS = {"scale_shift": ([3, 0, 5], [-1.5, -0.5, 0.5, 1.5]), "candidates": ([8], [9.5, 10.5])}
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
        piece = data[position + 7 : position + 7 + length]
        if len(piece) < length:
            return  # still being written
        part += piece
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
    from google.protobuf.message import DecodeError

    deadline = time.monotonic() + 120  # under load
    while True:
        late = time.monotonic() > deadline
        try:
            records = list(read_offline_run(file))
        except DecodeError:  # read while it was written
            if late:
                raise
        else:
            if late or any(r.HasField("exit") for r in records):
                return records
        time.sleep(0.05)


def summary_of(records: list[Any]) -> dict[str, Any]:
    return {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for r in records
        if r.HasField("summary")
        for item in r.summary.update
    }


def logged_by(records: list[Any]) -> dict[str, Any]:
    """The arguments of run.log(), with media as W&B describes them. A dictionary is split into its entries."""
    logged: dict[str, Any] = {}
    for item in (item for r in records if r.HasField("history") for item in r.history.item):
        *parents, name = item.nested_key or [item.key]
        place = logged
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = json.loads(item.value_json)
    return logged


def test_an_offline_run_holds_the_record(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    track(RECORD, CONFIG, WANDB, tmp_path, lambda: HISTOGRAMS)
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
    # Settings are in the configuration, measurements in the summary, unknown values in neither.
    assert config["record"]["sweep"] == RECORD.sweep and config["record"]["device"] == "cpu"
    assert "model" not in config["record"] and "scale_shifts" not in config["record"]
    summary = summary_of(records)
    assert summary["weight_error"] == 0.0789 and summary["time_iterations"] == 12 and summary["status"] == "ok"
    shown = {name for name in summary if not name.startswith(("_", "blocks/"))}
    assert shown == {name for name in MEASURED if getattr(RECORD, name) is not None}
    assert config["record"].keys() | set(MEASURED) | set(AS_HISTOGRAMS) <= set(FIELDS)
    logged = logged_by(records)
    for name, (counts, edges) in HISTOGRAMS.items():
        assert logged[f"blocks/{name}"] == {"_type": "histogram", "values": counts, "bins": edges}
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]

    # A repeated run is a second file under the same id; a failed one ends as failed.
    track(dataclasses.replace(RECORD, status="failed", reason="no"), CONFIG, WANDB, tmp_path)
    files = offline_files(tmp_path)
    assert len(files) == 2
    exits = {r.exit.exit_code for f in files for r in complete_run(f) if r.HasField("exit")}
    assert exits == {0, 1}

    # Neither the machine nor its user. As a word, because W&B's random ids may have a short name's letters.
    host = re.compile(rb"\b" + re.escape(socket.gethostname().encode()) + rb"\b")
    assert host.search(b"on " + socket.gethostname().encode() + b"\n")
    for written in tmp_path.rglob("*"):
        if written.is_file() and written.suffix != ".log":
            assert not host.search(written.read_bytes()), written
    assert not any(r.run.host or r.run.git.remote_url for r in records if r.HasField("run"))


def test_an_evaluation_of_a_whole_model_is_held_too(tmp_path: Path) -> None:
    record = EvaluationRecord(
        run_id="descent-vs-tiny-1", sweep="s", status="ok", reason=None, model="descent", format="nvfp4",
        method="descent", protocol="all", kl_mean=0.027, kl_p999=1.5, ppl_ratio=1.02, paired_with="other",
        paired_mean=-0.001, kl_by_position=[[0, 0.1]], duration_s=2.0,
    )  # fmt: skip
    track_evaluation(record, {"seed": 0}, WANDB, tmp_path)
    (file,) = offline_files(tmp_path)
    records = complete_run(file)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.run_group, run.job_type) == (record.run_id, "s", "evaluation")
    assert {"evaluation", "nvfp4", "descent", "ok"} == set(run.tags)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 0 and config["record"]["protocol"] == "all" and config["record"]["paired_with"] == "other"
    assert not {"kl_mean", "kl_by_position"} & config["record"].keys()
    summary = {name: value for name, value in summary_of(records).items() if not name.startswith("_")}
    measured = ("status", "kl_mean", "kl_p999", "ppl_ratio", "paired_mean", "duration_s")
    assert summary == {name: getattr(record, name) for name in measured}


MODEL = ModelRecord(
    run_id="nvfp4-b16-gptq-sequential-tiny-words-1", sweep="s", status="ok", reason=None, format="nvfp4", block_size=16,
    method="gptq", method_settings={"damping": 0.01}, calibrate="sequential", alpha=0.5, residual_alpha=0.5,
    hessian_weighting="loss", hessian_groups=1, hessian_samples=1, backend="reference", device="cpu", layers=2,
    left_out={"lm_head": "not in the decoder"}, few_tokens={"experts.0": 3, "experts.7": 9}, naive_output_error=0.09,
    output_error=0.05, hidden_error=0.03, seconds={"loss": 1.5, "solve": 0.5}, resumed_layers=1, processes=1,
    exports={"modelopt": {"folder": "modelopt", "weights": 14, "equal": 14, "problems": []}}, duration_s=2.0,
)  # fmt: skip
LAYERS: list[dict[str, Any]] = [
    {"index": 0, "naive_weight_error": 0.1, "weight_error": 0.12, "naive_output_error": 0.08, "output_error": 0.04,
     "hidden_error": 0.01, "matrices": [{"name": "q", "weight_error": 0.1}], "seconds": {"solve": 0.2, "forward": 0.1},
     "duration_s": 0.4},
    {"index": 1, "naive_weight_error": 0.2, "weight_error": 0.22, "naive_output_error": 0.1, "output_error": 0.06,
     "hidden_error": 0.03, "few_tokens": {"experts.0": 3, "experts.7": 9}, "without_outputs": ["experts"],
     "matrices": [], "seconds": {"solve": 0.3}, "duration_s": 0.6},
]  # fmt: skip


def steps_of(records: list[Any]) -> dict[int, dict[str, Any]]:
    """Step → what run.log() logged for it, without W&B's own values."""
    return {
        r.history.step.num: {
            key: json.loads(item.value_json)
            for item in r.history.item
            if not (key := ".".join(item.nested_key) or item.key).startswith("_")
        }
        for r in records
        if r.HasField("history")
    }


def test_a_quantized_model_is_a_series_of_layers(tmp_path: Path) -> None:
    track_model(MODEL, {"seed": 0}, WANDB, tmp_path, lambda: LAYERS)
    (file,) = offline_files(tmp_path)
    records = complete_run(file)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.run_group, run.job_type) == (MODEL.run_id, "s", "model")
    assert {"model", "nvfp4", "gptq", "reference", "ok"} == set(run.tags)
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["seed"] == 0 and config["record"]["calibrate"] == "sequential" and config["record"]["alpha"] == 0.5
    assert config["record"]["left_out"] == MODEL.left_out and "output_error" not in config["record"]
    assert steps_of(records) == {
        0: {"layers/naive_weight_error": 0.1, "layers/weight_error": 0.12, "layers/naive_output_error": 0.08,
            "layers/output_error": 0.04, "layers/hidden_error": 0.01, "layers/seconds/solve": 0.2,
            "layers/seconds/forward": 0.1, "layers/duration_s": 0.4},
        1: {"layers/naive_weight_error": 0.2, "layers/weight_error": 0.22, "layers/naive_output_error": 0.1,
            "layers/output_error": 0.06, "layers/hidden_error": 0.03, "layers/few_tokens": 2,
            "layers/without_outputs": 1, "layers/seconds/solve": 0.3, "layers/duration_s": 0.6},
    }  # fmt: skip
    # The model's own errors, not those of its last layer.
    summary = {name: value for name, value in summary_of(records).items() if not name.startswith("_")}
    named = ("status", "layers", "naive_output_error", "output_error", "hidden_error", "seconds", "resumed_layers")
    named += ("processes", "exports", "duration_s")
    assert summary == {name: getattr(MODEL, name) for name in named} | {"few_tokens": 2}
    assert config["record"].keys() | set(MODEL_MEASURED) <= set(ModelRecord.fields())


def test_a_group_has_a_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """`report.py --track`: every CSV file and picture of results/, in the group of the newest sweep."""
    results = tmp_path / "results"
    (results / "figures").mkdir(parents=True)
    (results / "records").mkdir()
    older = dataclasses.replace(RECORD, started_at="2026-01-01T00:00:00+00:00", commit="0123")
    newer = dataclasses.replace(RECORD, run_id="b", sweep="newer", started_at="2026-01-02T00:00:00+00:00")
    for name, records in (("main", [newer, older]), ("other", [older])):
        lines = [record.to_json() for record in records]
        (results / "records" / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
        (results / f"{name}.csv").write_text(records_csv(records), encoding="utf-8")
    picture = results / "figures" / "error.png"
    Image.new("RGB", (3, 2), "red").save(picture)

    (results / "figures" / "error.csv").write_text("method,error\nsse,0.5\n", encoding="utf-8")

    assert report.main(["--track"], tmp_path) == 0
    out, err = capfd.readouterr()
    assert out == "Logged to W&B: 3 tables and 1 figures as report-newer\n" and err == ""
    (file,) = offline_files(results / "runs")
    records = complete_run(file)
    (run,) = (r.run for r in records if r.HasField("run"))
    assert (run.run_id, run.run_group, run.job_type) == ("report-newer", "newer", "report")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["records"] == 3 and config["commits"] == ["0123"]
    summary = summary_of(records)
    assert summary["tables"] == 3 and summary["figures"] == 1
    logged = logged_by(records)
    names = {"tables/main", "tables/other", "tables/figures/error", "figures/error"}
    assert {name for name in logged if "/" in name} == names
    image = logged["figures/error"]
    assert image["_type"] == "image-file" and image["caption"] == "error"
    assert (file.parent / "files" / image["path"]).read_bytes() == picture.read_bytes()
    table = json.loads((file.parent / "files" / logged["tables/main"]["path"]).read_text(encoding="utf-8"))
    columns = [name for name in FIELDS if name not in SPARSE_FIELDS]
    assert table["columns"] == columns
    assert [row[columns.index("sweep")] for row in table["data"]] == ["newer", RECORD.sweep]
    assert [row[columns.index("weight_error")] for row in table["data"]] == [0.0789, 0.0789]
    assert [row[columns.index("commit")] for row in table["data"]] == [None, "0123"]

    # A group can be named, and what cannot be logged is an error: here nothing is complete without it.
    assert report.main(["--track", "mine"], tmp_path) == 0
    assert len(offline_files(results / "runs")) == 2
    assert report.main(["--track", "my/group"], tmp_path) == 1
    assert "--track my/group" in capfd.readouterr().err


def test_a_report_that_cannot_be_logged_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main(["--track"], tmp_path) == 1
    assert "has no records" in capsys.readouterr().err
    RECORD.write(tmp_path / "results" / "records" / "one")
    monkeypatch.setenv("WANDB_MODE", "sideways")
    assert report.main(["--track"], tmp_path) == 1
    assert "WANDB_MODE=sideways" in capsys.readouterr().err


def test_histograms_count_every_block() -> None:
    columns = {
        "shift": torch.tensor([-2, 0, 0, 1], dtype=torch.int16),
        "candidates": torch.tensor([10, 9, 10, 10], dtype=torch.uint8),
        "squared_error": torch.tensor([1.0, 4.0, 0.0, 0.0]),
        "squared_norm": torch.tensor([4.0, 4.0, 4.0, 0.0]),
    }
    made = histograms(columns)
    assert made["scale_shift"] == ([1, 0, 2, 1], [-2.5, -1.5, -0.5, 0.5, 1.5])
    assert made["candidates"] == ([1, 3], [8.5, 9.5, 10.5])
    counts, edges = made["relative_error"]
    assert len(edges) == len(counts) + 1 and (edges[0], edges[-1]) == (0, 1)
    # Errors of 1/2, 1, 0 and, of the block of zeros, 0.
    assert {index: count for index, count in enumerate(counts) if count} == {0: 2, 32: 1, 63: 1}

    del columns["candidates"]
    columns["squared_error"] = torch.zeros(4)
    made = histograms(columns)
    assert "candidates" not in made and made["relative_error"][0][0] == 4
    assert histograms({name: values[:0] for name, values in columns.items()}) == {}


def test_none_and_disabled_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail

    def unwanted() -> Any:
        raise AssertionError("made for nobody")

    track(RECORD, CONFIG, TrackingConfig("none"), tmp_path, unwanted)
    track(RECORD, CONFIG, TrackingConfig("wandb", mode=TrackingMode.disabled), tmp_path, unwanted)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    track(RECORD, CONFIG, WANDB, tmp_path, unwanted)
    track_model(MODEL, CONFIG, WANDB, tmp_path, unwanted)
    assert not track_report("sweep", {}, {}, {}, WANDB, tmp_path)
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


@pytest.mark.parametrize("answers", [False, True])
def test_online_without_a_server_logs_offline_and_waits_once(
    answers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """answers: a server that accepts the connection and never answers."""
    monkeypatch.setattr(tracking, "SERVER_SECONDS", 0.2)
    monkeypatch.setenv("WANDB_MODE", "online")
    asked, modes = [], []
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        settings = SimpleNamespace(settings=SimpleNamespace(base_url=url))
        monkeypatch.setattr("wandb.setup", lambda: asked.append(url) or settings)  # type: ignore[func-returns-value]
        monkeypatch.setattr(tracking, "_log_run", lambda record, config, how, mode, *rest: modes.append(mode))
        tracking._server_problem.cache_clear()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                track(RECORD, CONFIG, WANDB, tmp_path)
    tracking._server_problem.cache_clear()
    assert modes == ["offline"] * 3 and asked == [url]
    (message,) = (r.getMessage() for r in caplog.records)
    assert url in message and "wandb sync" in message and ("did not answer" in message) == answers


def test_a_server_that_answers_is_logged_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_server_problem", lambda: None)
    assert tracking._usable("online") == "online" and tracking._usable("offline") == "offline"


def test_no_run_waits_longer_than_half_a_minute_for_a_server(tmp_path: Path) -> None:
    assert tracking._common(WANDB, "online", tmp_path)["settings"].init_timeout <= 30


def test_a_report_of_a_group_with_a_long_name_has_a_name_that_wandb_takes() -> None:
    assert tracking.report_id("main") == "report-main"
    long = {tracking.report_id("x" * 127 + end) for end in "ab"}
    assert len(long) == 2 and all(len(name) <= 128 for name in long)
