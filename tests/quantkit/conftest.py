"""Both backends, each on a device on which it runs here."""

from __future__ import annotations

import pytest
import torch

from tests.inputs import WITHOUT_KERNEL


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves out the Triton cases of searches without a kernel."""
    items[:] = [item for item in items if not _lacks_kernel(item)]


def _lacks_kernel(item: pytest.Item) -> bool:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if params.get("backend") != "triton":
        return False
    # A test of all formats that names no method is one of the searches.
    return (params.get("format"), params.get("method", "hessian")) in WITHOUT_KERNEL


@pytest.fixture(params=["reference", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device(backend: str) -> str:
    """Triton runs on the GPU if there is one, else interpreted on the CPU."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
