"""The provenance of a result, with and without git, and without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from experiments import provenance
from experiments.config import BackendConfig


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.git_state.cache_clear()


def make_repository(folder: Path) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(
            ["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    for name in ("quantkit/a.py", "results/table.csv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")


def test_a_copy_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_COMMIT", "abc")
    assert provenance.git_state(tmp_path) == ("abc", False)


def test_commit_and_dirty(tmp_path: Path) -> None:
    make_repository(tmp_path)
    commit, dirty = provenance.git_state(tmp_path)
    assert len(commit) == 40 and dirty is False


@pytest.mark.parametrize(
    ("changed", "dirty"), [("quantkit/a.py", True), ("quantkit/new.py", True), ("results/table.csv", False)]
)
def test_only_code_makes_a_result_dirty(tmp_path: Path, changed: str, dirty: bool) -> None:
    make_repository(tmp_path)
    (tmp_path / changed).write_text("2")
    assert provenance.git_state(tmp_path)[1] is dirty


def test_an_archive_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_repository(tmp_path)
    assert provenance.git_state(tmp_path / "quantkit") == ("unknown", None)
    provenance.git_state.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert provenance.git_state(tmp_path) == ("unknown", None)


def test_versions() -> None:
    found = provenance.versions()
    assert {"python", "torch", "triton", "numpy"} <= found.keys()


def test_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert provenance.resolve_device("cpu") == "cpu"
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert provenance.resolve_device("auto") == "cpu"
    for device in ("cuda", "cuda:1", "gpu"):
        with pytest.raises(ValueError, match=f"device={device}"):
            provenance.resolve_device(device)
    monkeypatch.setattr(provenance, "GPU_NODES", ("/",))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert provenance.resolve_device("auto") == "cuda"
    assert provenance.resolve_device("cuda:0") == "cuda:0"
    with pytest.raises(ValueError, match="device=cuda:1"):
        provenance.resolve_device("cuda:1")


def test_backend_follows_the_library() -> None:
    from quantkit import resolve_backend

    assert provenance.resolve_backend_name(BackendConfig("auto"), "cpu") == resolve_backend("auto", "cpu")
    assert provenance.resolve_backend_name(BackendConfig("auto"), "cuda") == resolve_backend("auto", "cuda")
    assert provenance.resolve_backend_name(BackendConfig("triton"), "cpu") == "triton"


def test_a_processor_has_a_name() -> None:
    assert provenance.device_name("cpu")
