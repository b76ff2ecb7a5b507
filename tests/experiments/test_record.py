"""Records: a written record is read back, and other files are errors."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from experiments.files import CHECKSUM
from experiments.record import FIELDS, LATER_FIELDS, SPARSE_FIELDS, RecordError, RunRecord, read_record, read_records

RECORD = RunRecord(
    run_id="nvfp4-b16-sse-1",
    sweep="s",
    status="ok",
    reason=None,
    format="nvfp4",
    block_size=16,
    method="sse",
    backend="reference",
    requested_backend="auto",
    device="cpu",
    global_scale="amax",
    model_origin="a 4-bit release – really",
    weight_error=0.0789,
    versions={"torch": "2"},
)


def test_round_trip(tmp_path: Path) -> None:
    assert RunRecord.from_json(RECORD.to_json()) == RECORD
    path = RECORD.write(tmp_path / "run")
    assert path == tmp_path / "run" / "record.json"
    assert read_record(path) == RECORD


def test_the_order_of_the_fields_is_kept() -> None:
    settings, objective = {"scale": "joint"}, [2.0, 1.5]
    weighted = dataclasses.replace(RECORD, hessian_weighting="loss", hessian_groups=1, hessian_samples=2)
    more = {"method_settings": settings, "objective": objective, "hessian_matmul": "tf32"}
    full = dataclasses.replace(weighted, verified_to_hessian=0.4, **more)
    assert tuple(json.loads(full.to_json())) == (*FIELDS, CHECKSUM)
    assert RunRecord.from_json(full.to_json()) == full
    plain = tuple(name for name in FIELDS if name not in SPARSE_FIELDS)
    assert tuple(json.loads(RECORD.to_json())) == (*plain, CHECKSUM)
    assert FIELDS[:4] == ("run_id", "sweep", "status", "reason") and FIELDS[-1] == "schema_version"


def test_one_line_of_plain_text() -> None:
    assert "\n" not in RECORD.to_json() and "– really" in RECORD.to_json()


def test_numbers_that_json_lacks_become_null() -> None:
    record = dataclasses.replace(RECORD, weight_error=float("nan"), output_error=float("inf"))
    values = json.loads(record.to_json())
    assert values["weight_error"] is None and values["output_error"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(colour="red"), "unknown fields colour"),
        (lambda v: v.pop("weight_error"), "missing fields weight_error"),
        (lambda v: v.update(schema_version=99), "schema_version 99"),
        (lambda v: v.pop("schema_version"), "schema_version None"),
        (lambda v: v.update(status="fine"), "fine"),
    ],
)
def test_what_is_no_record_says_why(change, message: str) -> None:
    values = RECORD.to_dict()
    change(values)
    with pytest.raises(RecordError, match=message):
        RunRecord.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_text_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"record\.json"):
        read_record(path)


def test_an_interrupted_write_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RECORD.write(tmp_path)

    def interrupted(source: object, target: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataclasses.replace(RECORD, weight_error=0.5).write(tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]
    assert read_record(tmp_path / "record.json") == RECORD


def test_a_folder_of_runs_and_of_lines(tmp_path: Path) -> None:
    second = dataclasses.replace(RECORD, run_id="b")
    RECORD.write(tmp_path / "a")
    second.write(tmp_path / "b")
    (tmp_path / "unfinished").mkdir()
    assert read_records(tmp_path) == [RECORD, second]
    assert read_records(tmp_path / "missing") == []

    (tmp_path / "main.jsonl").write_text(f"{RECORD.to_json()}\n\n{second.to_json()}\n", encoding="utf-8")
    assert read_records(tmp_path) == [RECORD, second] * 2
    (tmp_path / "main.jsonl").write_text(f"{RECORD.to_json()}\n{{\n", encoding="utf-8")
    with pytest.raises(RecordError, match=r"main\.jsonl:2"):
        read_records(tmp_path)


def test_a_record_from_before_a_field_has_none(tmp_path: Path) -> None:
    values = RECORD.to_dict()
    for name in LATER_FIELDS:
        del values[name]
    assert RunRecord.from_dict(values) == RECORD


def test_a_changed_digit_or_word_is_found() -> None:
    text = RECORD.to_json()
    for old, new in (("0.0789", "0.0798"), ("a 4-bit release", "a 8-bit release"), ('"ok"', '"failed"')):
        with pytest.raises(RecordError, match="checksum is not that of its values; delete it or run it again"):
            RunRecord.from_json(text.replace(old, new))


def test_a_record_from_before_the_checksum_is_read() -> None:
    assert RunRecord.from_json(json.dumps(RECORD.to_dict())) == RECORD
