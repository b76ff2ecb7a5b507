"""Both backends, each on the device that it can run on here."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Triton runs on the GPU where there is one, else interpreted on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
