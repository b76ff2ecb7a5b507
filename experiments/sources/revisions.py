"""The commit of a branch or tag of the hub, because a branch that moves is another source. Makes no request."""

from __future__ import annotations

import re
from pathlib import Path

_commits: dict[tuple[str, str], str] = {}  # repository and branch or tag → the commit that the hub named


def is_commit(revision: str | None) -> bool:
    return revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def note_commit(repo: str, revision: str | None, commit: str | None) -> None:
    if commit is not None:
        _commits[repo, revision or "main"] = commit


def commit_of(repo: str, revision: str | None, kind: str) -> str:
    """The commit of a branch or tag: as noted in this process, else from the hub's cache, else the name itself."""
    from huggingface_hub import constants

    revision = revision or "main"
    if is_commit(revision):
        return revision
    if (repo, revision) in _commits:
        return _commits[repo, revision]
    folder = f"{kind}s--{repo.replace('/', '--')}"
    try:
        return (Path(constants.HF_HUB_CACHE) / folder / "refs" / revision).read_text().strip()
    except OSError:
        return revision
