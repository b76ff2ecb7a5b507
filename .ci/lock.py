"""Rewrites requirements.lock from pip's report of what it would install: pip install --dry-run --report - ... | lock.py

The comments at the head stay. CUDA's packages are left out, because torch's own wheel for a GPU brings them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"
BUILD = ("setuptools", "wheel")  # stay in the first block
OWN = ("quantkit",)
LEFT_OUT = ("nvidia-", "cuda-")
MARKERS = {"triton": '; sys_platform == "linux"'}


def locked(text: str, report: dict[str, list[dict[str, dict[str, str]]]]) -> str:
    """The lock's new text. text: the old one. report: pip's, with `install`."""
    found = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in report["install"]}
    names = sorted((name for name in found if not name.startswith((*LEFT_OUT, *OWN))), key=str.lower)
    # torch's local label, such as +cpu, is that of this machine's index.
    lines = {name: f"{name}=={found[name].partition('+')[0]}{MARKERS.get(name, '')}" for name in names}
    head = [line for line in text.splitlines()[: text[: text.index("setuptools==")].count("\n")]]
    build = [lines.pop(name) for name in BUILD]
    return "\n".join([*head, *build, "", *lines.values()]) + "\n"


if __name__ == "__main__":
    LOCK.write_text(locked(LOCK.read_text(encoding="utf-8"), json.load(sys.stdin)), encoding="utf-8")
