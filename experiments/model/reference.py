"""The reference's final hidden states on the evaluated sequences, cached piece by piece.

Its logits, perplexity and top tokens follow from them by one product with lm_head, so a second evaluation on the same
text runs the reference's decoder no more. The files in their folder:

states-00000.safetensors …   final [sequences, seq_len, hidden], about PIECE_BYTES each
states-00000.json …          size and sha256 of the piece; written after it

An interrupted evaluation continues at the first missing piece. A damaged piece is found and computed again. Of two
processes that need a piece, one computes it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.capture.store import is_intact, load_tensors, save_tensors
from experiments.capture.writing import lock, writing
from experiments.files import sha256_json, write_atomically

log = logging.getLogger(__name__)

STATES_VERSION = 1  # raise it when the same model and text give other states
PIECE_BYTES = 1 << 28


@dataclass(frozen=True)
class StatesCache:
    """The cached states of one model on one list of sequences. cache: the folder of all caches, for messages."""

    cache: Path
    folder: Path

    @classmethod
    def of(cls, cache: Path, name: str, identity: dict[str, Any]) -> StatesCache:
        """identity: all that the states depend on, as plain JSON values."""
        key = sha256_json(identity | {"states_version": STATES_VERSION})[:16]
        return cls(cache, cache / "states" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}-{key}")

    def piece(self, number: int, compute: Callable[[], Tensor]) -> Tensor:
        """The states of a piece, on the CPU. compute: makes them where the cache lacks them."""
        path = self.folder / f"states-{number:05d}.safetensors"
        with lock(path):
            found = _read(path)
            if found is not None:
                return found
            states = compute().cpu().contiguous()
            with writing(self.cache):
                entry = save_tensors(path, {"final": states})
                write_atomically(path.with_suffix(".json"), json.dumps(entry))
            return states


def _read(path: Path) -> Tensor | None:
    """The piece, or None if it is missing or damaged."""
    try:
        entry = json.loads(path.with_suffix(".json").read_text())
        intact = is_intact(path, entry)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not intact:
        log.warning("%s is missing or damaged; computing it again", path)
        return None
    return load_tensors(path)["final"]


def pieces(count: int, batch: int, bytes_per_sequence: int) -> Iterator[tuple[int, slice]]:
    """(number, sequences) of each piece: whole batches, about PIECE_BYTES."""
    size = max(batch, PIECE_BYTES // max(1, bytes_per_sequence) // batch * batch)
    for number, first in enumerate(range(0, count, size)):
        yield number, slice(first, min(first + size, count))


def in_batches(ids: Tensor, batch: int, final: Callable[[Tensor], Tensor]) -> Tensor:
    """The states of ids [sequences, seq_len], batch by batch, on the CPU."""
    return torch.cat([final(part).cpu() for part in ids.split(batch)])
