"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.experiments.tiny_models import qwen3, write_text


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """One thread, because for tiny models waking a second one takes longer than the product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny model, and the folders of its checkpoint, of texts and of a cache."""
    folder = tmp_path_factory.mktemp("model")
    write_text(folder / "texts")
    return SimpleNamespace(
        folder=folder / "tiny", texts=folder / "texts", cache=folder / "cache", model=qwen3(folder / "tiny")
    )
