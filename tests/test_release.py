"""The release: sdist and wheel are built, the wheel alone is installed elsewhere, and README's example runs."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from quantkit import __version__

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(what: str, source: Path, target: Path) -> Path:
    """A wheel or an sdist of the source tree, by the build backend itself, so that no network is needed."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{what}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_alone_runs_the_readme(tmp_path: Path) -> None:
    """The wheel is built from the sdist, as an installer without wheels would. No pipeline is in it."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "quantkit", source / "quantkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    sdist = build("sdist", source, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    wheel = build("wheel", tmp_path / "unpacked" / f"quantkit-{__version__}", tmp_path)
    assert wheel.name == f"quantkit-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "quantkit").rglob("*.py")}
    assert files == modules | {"quantkit/py.typed"}

    venv.create(tmp_path / "clean", with_pip=False)
    python = tmp_path / "clean" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    (packages,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    # torch, triton and safetensors, which are not to be fetched. Only paths of the clean environment's own are first.
    (packages / "requirements.pth").write_text(f"{Path(torch.__file__).resolve().parents[1]}\n")
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[:1]
    code = f"{example}\nimport quantkit\nprint(quantkit.__file__, quantkit.__version__)\n"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(packages / "quantkit" / "__init__.py"), __version__]


def test_the_changes_have_a_heading_for_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first is not None and first[1] == __version__
    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


LOCKED = re.compile(r"[A-Za-z0-9][\w.-]*==\d[\w.]*(; sys_platform == \"linux\")?")  # no local label, no address


def test_the_lock_has_names_and_versions_alone() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert all(LOCKED.fullmatch(line) for line in lines if line and not line.startswith("#"))


def test_a_refreshed_lock_leaves_out_where_the_packages_came_from() -> None:
    """Nor does it have CUDA's packages, the label of a build of torch, or quantkit itself."""
    found = {"Torch": "2.13.0+cpu", "nvidia-nccl": "2", "cuda-toolkit": "13", "quantkit": "0.2.0", "triton": "3.7.1",
             "setuptools": "84.2.1", "wheel": "0.48.0", "accelerate": "1.15.0"}  # fmt: skip
    entries = [
        {"metadata": {"name": name, "version": version}, "download_info": {"url": f"https://host/{name}.whl"}}
        for name, version in found.items()
    ]
    refreshed = runpy.run_path(str(ROOT / ".ci" / "lock.py"))["locked"]
    text = refreshed("# Head\n\n# Build\nsetuptools==1\nwheel==1\n\nold==1\n", {"install": entries})
    assert text == (
        "# Head\n\n# Build\nsetuptools==84.2.1\nwheel==0.48.0\n\naccelerate==1.15.0\nTorch==2.13.0\n"
        'triton==3.7.1; sys_platform == "linux"\n'
    )
