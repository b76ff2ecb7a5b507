"""The environment of every test: no network, no shared cache, and Triton's interpreter if there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

# Set before torch, triton, datasets or wandb are imported, because they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.interpreter import interpret_quickly

    interpret_quickly()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_CUDA:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pipeline's cache of this test alone."""
    cache = tmp_path / "quantkit-cache"
    monkeypatch.setenv("QUANTKIT_CACHE", str(cache))
    return cache
