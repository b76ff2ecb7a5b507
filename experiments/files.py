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
CHECKSUM = "checksum"  # the key of a JSON object's own sha256
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of a disk that takes no more

CLOSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ESTALE,
)  # of an unreadable one


class SourceError(ValueError):
    """A source that is missing, damaged or unsuitable; the message names it and the remedy."""


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until the file's bytes, or the folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with their checksum, so that a damaged digit or word is found on reading."""
    return values | {CHECKSUM: sha256_json(json.loads(json.dumps(values)))}  # as read: keys are sorted as texts


def unsealed(values: Any) -> Any:
    """The values without their checksum. Raises ValueError if it is not theirs. Files of older versions have none."""
    if not isinstance(values, dict) or CHECKSUM not in values:
        return values
    rest = {key: value for key, value in values.items() if key != CHECKSUM}
    if values[CHECKSUM] != sha256_json(rest):
        raise ValueError(f"its {CHECKSUM} is not that of its values")
    return rest


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError for whatever is not JSON, or nested too deeply for Python's reader."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write the values with their checksum, as JSON, atomically."""
    write_atomically(path, json.dumps(sealed(values), indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises ValueError for a damaged file, and OSError for one that cannot be read."""
    values = unsealed(parse_json(path.read_bytes()))
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, found {type(values).__name__}")
    return values


def one_line(error: BaseException) -> str:
    """The error's message without line breaks."""
    return " ".join(str(error).split())


@contextmanager
def named(what: str) -> Iterator[None]:
    """Whatever a library raises for a damaged file becomes a SourceError, `what: message`. A panic of Rust is no
    Exception."""
    try:
        yield
    except (SourceError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise SourceError(f"{what}: {one_line(error)}") from None


def is_plain_name(name: str) -> bool:
    """Whether this names a file in a folder itself: neither another folder's file nor the folder."""
    return name not in ("", ".", "..") and "\0" not in name and Path(name).name == name


def leaves(path: Path, folder: Path) -> bool:
    """Whether `path` in `folder` is a link to a file elsewhere, other than to the hub's own cache of files."""
    if not path.is_symlink():
        return False
    real, own = path.resolve(), folder.resolve()
    kept = own.parent.parent / "blobs" if own.parent.name == "snapshots" else own
    return not (real.is_relative_to(own) or real.is_relative_to(kept))


def listing(folder: Path) -> str:
    names = sorted(entry.name + "/" * entry.is_dir() for entry in folder.iterdir())
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") if names else "nothing"


def check_writable(folder: Path) -> None:
    """Creates a missing folder. Raises OSError where no file can be written in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(TRIAL_BYTES))  # a full disk still takes empty files
        file.flush()


def check_output(folder: Path, setting: str = "output_dir") -> None:
    """Like check_writable, but raises SourceError. setting: the name of the setting that names the folder."""
    try:
        check_writable(folder)
    except OSError as error:
        why = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        raise SourceError(f"{setting}={folder} cannot be written: {why}; free some space or choose another.") from None


@contextmanager
def told_as(setting: str) -> Iterator[None]:
    """Errors about model.path name `setting` instead, which holds that path."""
    try:
        yield
    except SourceError as error:
        raise SourceError(str(error).replace("model.path=", f"{setting}=", 1)) from None


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
        os.set_inheritable(held.fileno(), True)  # a child that writes here and outlives this process holds it, too
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


@contextmanager
def writing(cache: Path) -> Iterator[None]:
    """Raises SourceError in the place of the system's error of a full disk, or of a cache that belongs to others."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise SourceError(
                f"cache.dir={cache}: it cannot be written ({error.strerror}). Free some space, or set cache.dir to "
                "another folder."
            ) from None
        if error.errno in CLOSED:
            raise SourceError(
                f"cache.dir={cache}: {error.filename or 'a file'} cannot be read or written ({error.strerror}). "
                "Allow it, or set cache.dir to another folder."
            ) from None
        raise
