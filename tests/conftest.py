"""What every test stands on: no network, no shared cache, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

# Before anything imports torch, triton, datasets or wandb: they read these once.
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


def interpret_quickly() -> None:
    """Triton's interpreter replaces all of triton.language at each call of a device function, which takes most of a
    kernel's time; at the first of a launch is enough. Without this the tests say the same, later."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    nothing = getattr(interpreter, "_LangPatchScope", lambda: None)  # not in every version of Triton
    replaced: set[frozenset[int]] = set()

    @functools.cache
    def languages(fn: Callable[..., object]) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)

    def replace_once(fn: Callable[..., object]) -> object:
        if languages(fn) in replaced:
            return nothing()
        replaced.add(languages(fn))
        return replace(fn)

    def run_afresh(self: object, *arguments: object, **options: object) -> None:
        replaced.clear()
        run(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, run_afresh


if not HAS_CUDA:
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
