"""The files of a captured layer. Its folder, a layer bundle, needs nothing beside it:

weight.safetensors               the layer's weight [out_features, in_features]
gram.safetensors                 G = XᵀX [in_features, in_features], calibration and held-out tokens apart
calibration-00000.safetensors …  X [tokens, in_features], about 256 MiB a shard, whole sequences (cache.activations)
manifest.json                    what all this is, with the sha256 of every file; written last
capture.json                     of an unfinished capture: its finished shards, and what partial.safetensors is
partial.safetensors              of an unfinished capture: its Gram matrices, and the inputs of the shard begun
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.files import replacing, sha256_file

JOURNAL_NAME = "capture.json"
PARTIAL_NAME = "partial.safetensors"
WEIGHT_NAME = "weight.safetensors"
GRAM_NAME = "gram.safetensors"

Entry = dict[str, Any]  # what the manifest says of a file: its size in bytes, its sha256, and of a shard what it holds


def is_intact(path: Path, entry: Entry) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> Entry:
    """Write a safetensors file. Returns its size and sha256. Raises OSError, of a full disk, say."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:  # tells the system's error by its number, in words
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        return {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}


def load_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def link(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy on a file system without hard links."""
    with replacing(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
