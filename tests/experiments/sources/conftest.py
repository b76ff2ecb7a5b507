"""Each test chooses its sources again, and has no hub unless it makes one."""

from __future__ import annotations

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from experiments.sources import hub as hub_module
from experiments.sources import texts, twins


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test chooses its sources again, and may switch the hub's libraries to offline without affecting others."""
    monkeypatch.setattr(hub_module, "_answers", {})
    monkeypatch.setattr(twins, "_announced", set())
    monkeypatch.setattr(hub_module, "_gave_up", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    texts._say_once.cache_clear()
