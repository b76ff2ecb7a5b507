"""The choice of a run's sources: the switch to the offline twins."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from experiments.config import CONF_DIR, Config, DataConfig, DataSource, Offline, compose
from experiments.files import SourceError
from experiments.sources import hub as hub_module
from experiments.sources import models
from experiments.sources.identity import folder_in_cache, layer_identity
from experiments.sources.twins import choose_sources, refuse_idle_paths
from tests.experiments.tiny_models import change

HUB_DATA = DataConfig(
    "wikitext2", DataSource.hub, repo="Salesforce/wikitext", subset="wikitext-2-raw-v1", revision="b08"
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A hub that answers with `answers[repository]`, and an empty local cache."""
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


def test_nothing_is_said_to_be_missing_that_was_not_asked_for(
    hub: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    """And what is said is said once."""
    for _ in range(2):
        choose_sources(default(offline=Offline.always))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "offline=always" in message and "were not asked for" in message and "model=smollm2_135m" in message
    assert "cannot be had" not in message and "offline=never" not in message


def test_of_a_hub_that_was_not_asked_no_more_is_said(
    hub: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    choose_sources(default())
    (message,) = [record.getMessage() for record in caplog.records]
    assert "not in the local cache; the hub was not asked, as HF_HUB_OFFLINE is set" in message
    with pytest.raises(SourceError, match="the hub was not asked, as HF_HUB_OFFLINE is set"):
        choose_sources(default(offline=Offline.never))


def test_a_hub_that_failed_is_not_said_to_be_switched_off(hub: SimpleNamespace) -> None:
    """This process itself has set HF_HUB_OFFLINE."""
    unreachable(hub)
    choose_sources(default())
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(SourceError, match="the hub was not asked again after it had failed") as caught:
        choose_sources(change(default(offline=Offline.never), model__repo="another/model"))
    assert "HF_HUB_OFFLINE" not in str(caught.value)


def test_the_model_and_the_text_are_announced_once_each(
    hub: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable(hub)
    (tmp_path / "train.txt").write_text("words")
    for _ in range(2):
        choose_sources(default(data__path=str(tmp_path)))
        choose_sources(default())
    one, two = [record.getMessage() for record in caplog.records]
    assert "model=smollm2_135m" in one and "data=" not in one and "data=python_docs" in two and "model=" not in two


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
    """A server that accepts connections and never answers, like a network that drops packets."""
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


def test_deciding_the_sources_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from experiments.config import compose; from experiments.sources.twins import choose_sources;"
        "choose_sources(compose(['model=smollm2_135m', 'data=python_docs']));"
        "choose_sources(compose(['model=synthetic']));"
        "sys.exit(bool({'torch', 'transformers', 'datasets', 'pandas'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF_DIR.parent, check=False).returncode == 0
