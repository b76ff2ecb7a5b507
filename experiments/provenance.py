"""Provenance of a result: commit, versions, device. The names of host and user are not recorded."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.config import REPO_ROOT, BackendConfig

PACKAGES = ("torch", "triton", "transformers", "datasets", "gguf", "numpy", "hydra-core", "wandb")
# Folders on which a result depends. Changes elsewhere, such as regenerated tables, do not make a result dirty.
CODE = ("quantkit", "experiments", "conf")
# On Linux, a GPU that torch could use has one of these device nodes (NVIDIA, WSL, AMD).
GPU_NODES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


@functools.lru_cache(maxsize=1)
def git_state(root: Path = REPO_ROOT) -> tuple[str, bool | None]:
    """(commit, whether the code differs from it); ("unknown", None) without git or outside a clone.

    The environment variable QUANTKIT_COMMIT overrides git, for code that was copied to another machine.
    """
    if named := os.environ.get("QUANTKIT_COMMIT"):
        return named, False

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    try:
        # An archive that was unpacked inside another repository does not have that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown", None
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", *CODE))
    except (OSError, subprocess.SubprocessError):
        return "unknown", None


@functools.lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """Package → version: Python and the installed PACKAGES."""
    return {"python": platform.python_version()} | installed(PACKAGES)


def record_fields() -> dict[str, Any]:
    """The fields of every record that say what made it, and when."""
    commit, dirty = git_state()
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"commit": commit, "dirty": dirty, "versions": versions(), "started_at": started_at}


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Package → version of the installed ones among `packages`."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def resolve_device(requested: str) -> str:
    """`auto` → "cuda" where torch sees a GPU, else "cpu". Imports torch only where there may be one.

    Raises ValueError for a device that torch does not have.
    """
    may_have_gpu = sys.platform != "linux" or any(Path(node).exists() for node in GPU_NODES)
    if requested == "cpu" or (requested == "auto" and not may_have_gpu):
        return "cpu"

    import torch

    if requested == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(requested)
    except RuntimeError:
        raise ValueError(f"device={requested}: unknown; use auto, cpu, cuda or cuda:1.") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"device={requested}: this pipeline runs on cpu and cuda alone; use auto, cpu, cuda or cuda:1."
        )
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise ValueError(f"device={requested}: torch sees {torch.cuda.device_count()} GPUs; use device=cpu or auto.")
    return requested


def resolve_backend_name(
    backend: BackendConfig,
    device: str,
    method: str | None = None,
    block_size: int | None = None,
    format: str | None = None,
) -> str:
    """The backend that `auto` resolves to. The rule for a CPU is repeated here, because skipped runs need no torch."""
    if backend.name == "auto" and device == "cpu":
        return "reference"
    if backend.name == "auto":
        from quantkit import resolve_backend

        return resolve_backend("auto", device, method, block_size, format)
    return backend.name


def device_name(device: str) -> str:
    """The GPU's or the processor's model."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    return _processor_name()


@functools.lru_cache(maxsize=1)
def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name" and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()
