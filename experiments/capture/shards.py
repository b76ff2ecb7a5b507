"""Writes a captured layer: its inputs are streamed into Gram matrices and shards.

Memory holds one shard at a time. A journal lists the finished shards. The Gram matrices and the unfinished shard are
saved regularly, so that an interrupted capture continues where it stopped. Layers with the same input (q, k and v; gate
and up) share one Gram matrix and one set of shards, hard-linked into each folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.capture.store import (
    GRAM_NAME,
    JOURNAL_NAME,
    PARTIAL_NAME,
    Entry,
    is_intact,
    load_tensors,
    save_tensors,
)
from experiments.files import link, read_sealed, write_sealed
from experiments.sources.bundles import MANIFEST_NAME
from quantkit.calibration import GramAccumulator


@dataclass(frozen=True)
class Layout:
    """The division of one module's inputs into shards of whole batches, so that a single shard can be captured again.

    width: in_features.
    batch: sequences per forward pass.
    sequences: split → number of sequences.
    shard_bytes: size of a shard; None keeps no shards.
    calls: number of calls of the module in a pass, each of which sees every token.
    routed: the module is an expert, which sees only the tokens that a router sends to it.
    """

    width: int
    dtype: torch.dtype
    seq_len: int
    batch: int
    sequences: dict[str, int]
    shard_bytes: int | None
    calls: int = 1
    routed: bool = False

    @property
    def shard_sequences(self) -> int:
        """Sequences in a full shard; 0 if no shards are kept."""
        if self.shard_bytes is None:
            return 0
        fitting = self.shard_bytes // (self.seq_len * self.calls * self.width * self.dtype.itemsize)
        return max(self.batch, fitting // self.batch * self.batch)

    def shard(self, split: str, first: int) -> tuple[str, Entry]:
        """(file name, manifest entry) of the shard that begins with sequence `first`."""
        sequences = min(self.shard_sequences, self.sequences[split] - first)
        name = f"{split}-{first // self.shard_sequences:05d}.safetensors"
        rows = {"sequences": sequences} if self.routed else {"rows": sequences * self.seq_len * self.calls}
        return name, {
            "split": split,
            "first_sequence": first,
            **rows,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def ends_shard(self, split: str, first: int) -> bool:
        """Whether the batch that begins with sequence `first` is the last one of its shard."""
        end = min(first + self.batch, self.sequences[split])
        return end == self.sequences[split] or end % self.shard_sequences == 0


class ShardWriter:
    """Writes one module's inputs, batch by batch in order, to the first of `folders`, and links the others to them."""

    def __init__(self, folders: list[Path], layout: Layout, device: str) -> None:
        self.folder, *self.siblings = folders
        self.layout = layout
        self.grams = {split: GramAccumulator(layout.width, device) for split in layout.sequences}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[str, Entry] = {}
        self.finished = self._finished_before()
        self.rows = dict.fromkeys(layout.sequences, 0)
        self.buffer: Tensor | None = None
        self.parts: list[Tensor] = []
        self.from_disk = False
        self.done = dict.fromkeys(layout.sequences, 0)  # sequences that are in the Gram matrices
        self.whole = True  # not in the middle of a batch
        self.partial: Entry | None = None
        self._resume()
        self.resumed = dict(self.done)

    def _finished_before(self) -> dict[str, Entry]:
        for name in (JOURNAL_NAME, MANIFEST_NAME):
            try:
                return dict(read_sealed(self.folder / name)["shards"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
        return {}

    def reread(self, split: str, first: int) -> bool:
        """Whether the batch that begins with sequence `first` was counted before, or is in an intact shard on disk."""
        if first < self.resumed[split]:
            return True
        size = self.layout.shard_sequences
        if not size:
            return False
        if first % size == 0 or first == self.resumed[split]:
            start = first // size * size
            name, entry = self.layout.shard(split, start)
            known = self.finished.get(name, {})
            self.from_disk = {key: known.get(key) for key in entry} == entry and is_intact(self.folder / name, known)
            if self.from_disk:
                self.shards[name] = known
                self.whole = False
                self._add_to_gram(split, self.folder / name, known, (first - start) // self.layout.batch)
                self.done[split] = min(start + size, self.layout.sequences[split])
                self.buffer, self.parts, self.whole = None, [], True
        return self.from_disk

    def _add_to_gram(self, split: str, shard: Path, entry: Entry, skip: int) -> None:
        """Adds a shard without its first `skip` batches. Batches are those of the capture, for bitwise equal sums."""
        layout = self.layout
        batches = entry["batches"] if layout.routed else layout.batch * layout.seq_len * layout.calls
        for x in load_tensors(shard)["inputs"].split(batches)[skip:]:
            self._count(split, x)

    def _count(self, split: str, x: Tensor) -> None:
        self.rows[split] += len(x)
        if len(x):
            self.grams[split].update(x)

    def add(self, split: str, first: int, x: Tensor) -> None:
        """x [tokens, in_features]: the inputs of a batch that begins with sequence `first`."""
        self.whole = False
        self._count(split, x)
        if self.layout.shard_sequences:
            self._put(split, first, x)
        self.done[split] = min(first + self.layout.batch, self.layout.sequences[split])
        self.whole = True

    def _put(self, split: str, first: int, x: Tensor) -> None:
        """Adds x to the unfinished shard, which is written when it is full."""
        size = self.layout.shard_sequences
        start = first // size * size
        name, entry = self.layout.shard(split, start)
        if self.layout.routed:
            self.parts.append(x.cpu())
        else:
            if self.buffer is None:
                self.buffer = _new_buffer(entry["rows"], self.layout)
            offset = (first - start) * self.layout.seq_len * self.layout.calls
            self.buffer[offset : offset + len(x)] = x
        if self.layout.ends_shard(split, first):
            self._save(name, entry)

    def _save(self, name: str, entry: Entry) -> None:
        if self.layout.routed:
            self.buffer = torch.cat(self.parts)
            entry |= {"rows": len(self.buffer), "batches": [len(part) for part in self.parts]}
        assert self.buffer is not None
        self.shards[name] = entry | save_tensors(self.folder / name, {"inputs": self.buffer})
        self.buffer, self.parts = None, []
        self._write_journal()

    def _write_journal(self) -> None:
        journal = {"shards": self.finished | self.shards, "partial": self.partial}
        write_sealed(self.folder / JOURNAL_NAME, journal)

    def keep(self) -> None:
        """Keep the capture as far as it is. Nothing, where it stopped in the middle of a batch or has not begun."""
        if not self.whole or self.done == self.resumed:
            return
        tensors = {f"{split}.{name}": x for split, gram in self.grams.items() for name, x in _tensors(gram).items()}
        inputs = torch.cat(self.parts) if self.parts else self.buffer
        if inputs is not None:
            tensors["inputs"] = inputs
        entry = save_tensors(self.folder / PARTIAL_NAME, tensors)
        self.partial = entry | {
            "layout": self._layout_as_text(),
            "done": dict(self.done),  # as they are now, and not as they will be at the journal's next writing
            "rows": dict(self.rows),
            "shards": dict(self.shards),
            "parts": [len(part) for part in self.parts],
            "numbers": {split: _numbers(gram) for split, gram in self.grams.items()},
        }
        self._write_journal()

    def _layout_as_text(self) -> str:
        return repr(self.layout)

    def _resume(self) -> None:
        """Take up what `keep` wrote, if it is whole and of this very layout, and its shards are."""
        try:
            partial = dict(read_sealed(self.folder / JOURNAL_NAME)["partial"])
            listed = {PARTIAL_NAME: partial, **partial["shards"]}
            fits = partial["layout"] == self._layout_as_text()
            if not fits or not all(is_intact(self.folder / name, entry) for name, entry in listed.items()):
                return
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return
        tensors = load_tensors(self.folder / PARTIAL_NAME)
        for split, gram in self.grams.items():
            for name, x in _tensors(gram).items():
                setattr(gram, name, tensors[f"{split}.{name}"].to(x.device, copy=True))
            vars(gram).update(partial["numbers"][split])
        self.done, self.rows, self.shards = (dict(partial[name]) for name in ("done", "rows", "shards"))
        self.partial = partial
        if partial["parts"]:
            self.parts = list(tensors["inputs"].split(partial["parts"]))
        else:
            self.buffer = tensors.get("inputs")

    def finish(self) -> dict[str, Entry]:
        """Write the Gram matrices and fill the sibling folders. Returns their entries for the manifest."""
        grams = {split: gram.gram.cpu() for split, gram in self.grams.items() if self.rows[split]}
        entry = save_tensors(self.folder / GRAM_NAME, grams)
        for stale in self.folder.glob("*-[0-9]*.safetensors"):
            if stale.name not in self.shards:
                stale.unlink()
        for sibling in self.siblings:
            for name in (GRAM_NAME, *self.shards):
                link(self.folder / name, sibling / name)
        return {GRAM_NAME: entry}


def _tensors(gram: GramAccumulator) -> dict[str, Tensor]:
    return {name: value for name, value in vars(gram).items() if isinstance(value, Tensor)}


def _numbers(gram: GramAccumulator) -> dict[str, int | float]:
    return {name: value for name, value in vars(gram).items() if isinstance(value, (int, float))}


def _new_buffer(rows: int, layout: Layout) -> Tensor:
    return torch.empty(rows, layout.width, dtype=layout.dtype, device="cpu")
