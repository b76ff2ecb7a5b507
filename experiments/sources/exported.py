"""What an exported folder says of itself: quantkit_export.json, with the self-check's verdict and every file's hash.

    about    what quantkit's own folder says of method, calibration and model
    files    file name → bytes and sha256; not of the model card, which changes when the model is evaluated

Imports neither torch nor transformers. model/export.py writes the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.files import SourceError, is_plain_name, one_line, parse_json, unsealed
from experiments.sources.hashes import file_hashes

EXPORT_NAME = "quantkit_export.json"
CARD_NAME = "README.md"
UNHASHED = (EXPORT_NAME, CARD_NAME)
AGAIN = (
    f"Run the command that exported it again, which writes it again, or delete {EXPORT_NAME} if the change is your own."
)


def described_files(folder: Path, cache: Path | None = None) -> dict[str, dict[str, Any]]:
    """`files` of a folder as it is now."""
    paths = sorted(path for path in folder.iterdir() if path.name not in UNHASHED)
    hashes = file_hashes(paths, cache)
    return {path.name: {"bytes": path.stat().st_size, "sha256": hashes[path]} for path in paths}


def read_export(folder: Path) -> dict[str, Any] | None:
    """The whole of quantkit_export.json; None if it is missing or damaged."""
    try:
        told = unsealed(parse_json((folder / EXPORT_NAME).read_bytes()))
        for name, entry in told["files"].items():
            if not is_plain_name(name):
                return None
            int(entry["bytes"]), str(entry["sha256"])
        return dict(told)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def damages(folder: Path, told: dict[str, Any], cache: Path | None = None) -> list[str]:
    """What differs from what was exported, file by file. told: of read_export.

    cache: the folder that keeps hashes between processes, so that unchanged files are not read again.
    """
    found = []
    for name, entry in told["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            found.append(f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}")
        else:
            try:
                if file_hashes([path], cache)[path] != entry["sha256"]:
                    found.append(f"{name} has another sha256")
            except SourceError as error:
                found.append(one_line(error))
    return found


def check_export_intact(folder: Path, cache: Path | None = None) -> None:
    """Raises SourceError, naming file and remedy, for an export whose bytes have changed. Other folders pass."""
    if not (folder / EXPORT_NAME).exists():
        return
    told = read_export(folder)
    if told is None:
        raise SourceError(
            f"{folder / EXPORT_NAME} is damaged. Delete {folder} and export again, or delete that file to use the "
            "others unchecked."
        )
    if found := damages(folder, told, cache):
        raise SourceError(f"{folder} is damaged: {'; '.join(found[:3])}. {AGAIN}")
