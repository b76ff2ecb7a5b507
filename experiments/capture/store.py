"""The files of a captured layer. Their folder is a layer bundle, complete without other files:

weight.safetensors               the layer's weight [out_features, in_features]
gram.safetensors                 G = XᵀX [in_features, in_features], one for calibration and one for held-out tokens
calibration-00000.safetensors …  X [tokens, in_features], whole sequences, about 256 MiB per shard (cache.activations)
manifest.json                    model, text, layer and settings, with the sha256 of every file; written last
capture.json                     of an unfinished capture: its finished shards, and the entry of partial.safetensors
partial.safetensors              of an unfinished capture: its Gram matrices, and the inputs of the unfinished shard
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.files import replacing, sha256_file

JOURNAL_NAME = "capture.json"
PARTIAL_NAME = "partial.safetensors"
WEIGHT_NAME = "weight.safetensors"
GRAM_NAME = "gram.safetensors"

Entry = dict[str, Any]  # a file's entry in the manifest: size in bytes, sha256 and, for a shard, its contents


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
