"""Files: hashes, atomic writes, and the error class of the sources and the cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

TRIAL_BYTES = 1 << 16
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # the folders of `replacing`
LOCK_NAME = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of a disk that takes no more


class SourceError(ValueError):
    """A source that is missing, damaged or unsuitable; the message names it and the remedy."""


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def one_line(error: BaseException) -> str:
    """The error's message without line breaks."""
    return " ".join(str(error).split())


def listing(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


def check_writable(folder: Path) -> None:
    """Creates a missing folder. Raises OSError where no file can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))  # a full disk still takes empty files
        file.flush()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in a temporary folder beside `path`. What is written there replaces `path` if the block raises no error.

    A reader sees the old file or the whole new one. Creates a missing folder, and removes the temporary folders of
    processes that were killed. Libraries may make temporary files of their own in the temporary folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_orphans(path.parent)
    folder, held = _temporary_folder(path)
    try:
        with held:
            yield folder / path.name
            mode = os.fstat(held.fileno()).st_mode & 0o777
            (folder / path.name).chmod(mode)  # safetensors makes files that only their owner can read
            os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary_folder(path: Path) -> tuple[Path, IO[bytes]]:
    """A new folder beside `path`, and its lock file, which is held until it is closed or the process ends."""
    while True:
        folder = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        folder.mkdir()
        try:
            held = (folder / LOCK_NAME).open("xb")
        except FileNotFoundError:  # another process took it for an orphan, here or below
            continue
        _try_lock(held)
        if os.fstat(held.fileno()).st_nlink:
            return folder, held
        held.close()


def remove_orphans(folder: Path) -> None:
    """Removes the temporary folders of `replacing` whose writers have ended: the system has unlocked them."""
    try:
        names = os.listdir(folder)
    except OSError:  # no folder, or one that cannot be read
        return
    for name in filter(TEMPORARY.fullmatch, names):
        with suppress(OSError):
            _remove_orphan(folder / name)


def _remove_orphan(temporary: Path) -> None:
    try:
        with (temporary / LOCK_NAME).open("rb") as file:
            if _try_lock(file):
                shutil.rmtree(temporary)
    except FileNotFoundError:
        temporary.rmdir()  # killed before it had its lock


def _try_lock(file: IO[bytes]) -> bool:
    """Whether this process now holds the file's lock: not if another one does, or the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy on a file system without hard links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Like `replacing`, with an fsync before the old file is replaced, so a crash of the machine loses neither."""
    with replacing(path) as temporary, temporary.open("xb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
