"""A result's key covers its sources: after the smallest change, a source is read and its run is done again."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import run as entry
from experiments.capture import load
from experiments.capture.load import load_layer_inputs
from experiments.config import Config, LayerConfig, ModelConfig, ModelSource, Offline, compose
from experiments.console import Console, _is_used
from experiments.files import SourceError
from experiments.record import RunRecord, read_records
from experiments.sources import hashes, hub, models, revisions, twins
from experiments.sources.resolved import resolve
from experiments.sources.texts import load_text
from tests.experiments.tiny_models import change, configuration, qwen3, shard_of, text


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A checkpoint and a text for one test. Each run opens the cache again, as a new process does."""
    monkeypatch.setattr(load, "_memo", type(load._memo)())
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)  # remembered at once: what is remembered is what is tested here
    qwen3(tmp_path / "tiny")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text(text(60))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield configuration(tmp_path / "tiny", tmp_path / "texts", output_dir=str(tmp_path / "runs"), data__samples=4)
    torch.set_num_threads(threads)


def run(config: Config) -> tuple[str, RunRecord]:
    """(outcome of the run: done, skipped or failed; its record)."""
    load._memo.clear()
    console = Console()
    resolved = resolve(config)
    previous = entry.finished_record(resolved)
    if previous is not None:
        console.skipped(previous)
    else:
        entry.measure_and_record(resolved, console, again=False)
    (how,) = [name for name, count in console.counts.items() if count]
    return how, next(r for r in read_records(config.output_dir) if r.run_id == resolved.run_id)


def edit(file: Path, tensor: str, keep_time: bool = True) -> None:
    """Changes one value of one tensor. The file keeps its size and, if requested, its time of change."""
    before = file.stat()
    tensors = load_file(file)
    tensors[tensor].view(-1)[-1] += 0.5
    save_file(tensors, file)
    if keep_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert file.stat().st_size == before.st_size


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_checkpoint_edited_in_one_tensor_is_another_source(tiny: Config, keep_time: bool) -> None:
    how, first = run(tiny)
    assert how == "done" and run(tiny)[0] == "skipped"
    name = "model.layers.0.mlp.down_proj.weight"
    edit(Path(str(tiny.model.path)) / shard_of(name), name, keep_time)
    how, second = run(tiny)
    assert how == "done" and second.config_hash != first.config_hash and second.weight_error != first.weight_error
    assert second.model_revision != first.model_revision


def test_cached_inputs_of_an_edited_checkpoint_are_not_those_of_the_old_one(tiny: Config) -> None:
    before = load_layer_inputs(resolve(tiny))
    edit(Path(str(tiny.model.path)) / shard_of("embed_tokens"), "model.embed_tokens.weight")
    after = load_layer_inputs(resolve(tiny))
    assert not after.provenance.from_cache and not torch.equal(before.gram_calibration, after.gram_calibration)
    assert load_layer_inputs(resolve(tiny)).provenance.from_cache


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_every_file_that_is_read_is_in_the_key(tiny: Config, name: str) -> None:
    before = resolve(tiny)
    file = Path(str(tiny.model.path)) / name
    file.write_text(file.read_text() + " ")
    assert resolve(tiny).config_hash != before.config_hash and resolve(tiny).layer_folder() != before.layer_folder()


def test_a_hash_is_remembered_while_its_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    file, read = tmp_path / "a.safetensors", []
    real = hashes._read_all
    monkeypatch.setattr(hashes, "_read_all", lambda paths, cache: read.extend(paths) or real(paths, cache))
    file.write_bytes(b"one")
    one = hashes.file_hashes([file], tmp_path / "cache")
    monkeypatch.setattr(hashes, "_known", {})  # another process
    assert hashes.file_hashes([file], tmp_path / "cache") == one and read == [file]
    file.write_bytes(b"two")
    assert hashes.file_hashes([file], tmp_path / "cache") != one and read == [file, file]


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path) -> None:
    """A second change could fall into the same tick of the clock, and leave the same times."""
    file = tmp_path / "a"
    file.write_bytes(b"one")
    hashes.file_hashes([file], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_text_edited_by_one_letter_is_another_source(tiny: Config) -> None:
    _, first = run(tiny)
    file = Path(str(tiny.data.path)) / "train.txt"
    before, content = file.stat(), file.read_text()
    file.write_text("T" + content[1:])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    how, second = run(tiny)
    assert how == "done" and second.data_hash != first.data_hash and second.output_error != first.output_error


@pytest.mark.parametrize("name", ["train.parquet", "train.jsonl"])
def test_a_table_edited_by_one_letter_is_another_source(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    file = tmp_path / name

    def write(word: str) -> None:
        if name.endswith("jsonl"):
            file.write_text(json.dumps({"text": word}) + "\n")
        else:
            pyarrow.parquet.write_table(pyarrow.table({"text": [word]}), file)

    data = configuration(texts=file).data
    write("word")
    before = file.stat()
    assert load_text(data, tmp_path / "cache").read() == "word\n"
    write("ward")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert load_text(data, tmp_path / "cache").read() == "ward\n"


def bundle_of(config: Config, folder: Path) -> Config:
    load_layer_inputs(resolve(config))
    shutil.copytree(resolve(config).layer_folder(), folder)
    model = ModelConfig("bundle", ModelSource.bundle, path=str(folder))
    return change(config, model=model, layer=LayerConfig(), data__path=None)


def test_a_bundle_that_was_exchanged_is_another_source(tiny: Config, tmp_path: Path) -> None:
    bundle = bundle_of(tiny, tmp_path / "bundle")
    how, first = run(bundle)
    assert how == "done" and run(bundle)[0] == "skipped"
    shutil.rmtree(tmp_path / "bundle")
    bundle_of(change(tiny, data__heldout=0.5), tmp_path / "bundle")
    how, second = run(bundle)
    assert how == "done" and second.output_error != first.output_error


@pytest.mark.parametrize("name", ["calibration-00000.safetensors", "weight.safetensors", "gram.safetensors"])
def test_a_file_of_a_bundle_that_was_exchanged_is_noticed(tiny: Config, tmp_path: Path, name: str) -> None:
    """The manifest still lists the old file: reading the new one is an error, and the run is not finished."""
    bundle = change(bundle_of(tiny, tmp_path / "bundle"), data__calibration_tokens=32)
    assert run(bundle)[0] == "done" and run(bundle)[0] == "skipped"
    file = tmp_path / "bundle" / name
    edit(file, next(iter(load_file(file))))
    load._memo.clear()
    assert entry.finished_record(resolve(bundle)) is None
    with pytest.raises(SourceError, match=rf"{name} is missing or damaged"):
        list(load_layer_inputs(resolve(bundle)).batches())


@pytest.mark.parametrize(("key", "value"), [("model__dtype", "float16"), ("seed", 7)])
def test_what_a_bundle_does_not_follow_is_refused(tiny: Config, tmp_path: Path, key: str, value: Any) -> None:
    bundle = bundle_of(tiny, tmp_path / "bundle")
    error = resolve(change(bundle, **{key: value})).error
    assert isinstance(error, SourceError) and f"{key.replace('__', '.')}={value}: " in str(error)


def test_a_type_asked_for_holds_for_the_twin_too() -> None:
    def settled(*overrides: str) -> Any:
        return resolve(compose(["offline=always", "tracking=none", "device=cpu", *overrides]))

    twin, asked = settled(), settled("model.dtype=float16")
    assert (twin.config.model.dtype, asked.config.model.dtype) == ("float32", "float16")
    assert twin.run_id != asked.run_id and twin.layer_folder() != asked.layer_folder()
    assert settled("model.dtype=bfloat16").run_id == twin.run_id  # that of qwen3_4b's file: nobody asked for it


def test_a_branch_of_the_hub_that_moved_on_is_another_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(revisions, "_commits", {})
    model = ModelConfig("other", ModelSource.hub, repo="some/model", revision="main")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.txt").write_text("words")
    config = configuration(texts=tmp_path / "texts", model=model)

    def settled(commit: str) -> Any:
        monkeypatch.setattr(hub, "_answers", {})  # another process
        answer = SimpleNamespace(sha=commit)
        monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **options: answer)
        return resolve(config)

    first, again, second = settled("a" * 40), settled("a" * 40), settled("b" * 40)
    assert first.model.revision == "a" * 40 and first.config_hash == again.config_hash != second.config_hash
    assert first.layer_folder() != second.layer_folder()
    pinned = dataclasses.replace(model, revision="a" * 40)
    assert models.model_identity(pinned).key == f"hub:some/model@{'a' * 40}" == first.model.key


def test_a_source_that_changes_while_it_is_read_is_an_error(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.capture import forward

    real = forward.token_sequences
    file = Path(str(tiny.model.path)) / "config.json"

    def meanwhile(*arguments: Any) -> Any:
        file.write_text(file.read_text() + " ")
        return real(*arguments)

    monkeypatch.setattr(forward, "token_sequences", meanwhile)
    resolved = resolve(tiny)
    with pytest.raises(SourceError, match="changed while it was read"):
        load_layer_inputs(resolved)
    assert not (resolved.layer_folder() / "manifest.json").exists()


def test_the_offline_choice_is_no_part_of_the_key() -> None:
    asked = resolve(compose(["offline=always", "device=cpu"]))
    named = resolve(compose([f"model={twins.TWIN_MODEL}", f"data={twins.TWIN_DATA}", "device=cpu"]))
    assert asked.config.offline is Offline.always
    assert (asked.run_id, asked.config_hash) == (named.run_id, named.config_hash)


def test_what_a_bundle_does_not_use_is_said_once(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(twins, "_announced", set())
    bundle = bundle_of(tiny, tmp_path / "bundle")
    asked = compose(["model=bundle", f"model.path={bundle.model.path}", "data.samples=7", "device=cpu"])
    for _ in range(2):
        assert resolve(asked).config.data.samples == 4
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == "data.samples=7 is not used: the bundle was captured with 4"


@pytest.mark.parametrize(
    ("override", "used"),
    [
        ("model.dtype=float16", True),
        ("model.dtype=bfloat16", False),
        ("model.repo=another/model", False),
        ("data.seq_len=64", True),
        ("data.samples=9", False),
        ("data.heldout=.25", True),
        ("data.calibration_tokens=null", True),
        ("verify=True", True),
        ("seed=1", False),
        ("hydra.verbose=true", True),
        ("hessian=output", True),
        ("hessian.groups=4", False),
    ],
)
def test_a_heading_shows_the_values_that_are_used(override: str, used: bool) -> None:
    config = configuration(data__seq_len=64, model__dtype="float16", verify=True)
    assert _is_used(override, config) == used
