"""Writes quantkit's own checkpoint folder, a decoder layer at a time; sources/quantized.py describes and reads it.

While the folder FOLDER is unfinished, its files are in `.FOLDER.partial` beside it. The journal, layers.jsonl, lists
the finished layers with their records and the hashes of their shards. The last step renames the whole folder, so FOLDER
is finished or does not exist. An interrupted writer continues: a layer counts as finished if its shard has the bytes
of the journal. The same tensors give the same bytes; times are in the journal alone, on which no other file depends.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from experiments.capture.store import is_intact, save_tensors
from experiments.config import CacheConfig, ModelConfig, ModelSource
from experiments.files import FULL, SourceError, check_writable, listing, sealed, sha256_file, sync, write_atomically
from experiments.sources.checkpoints import Checkpoint, DequantizedCheckpoint
from experiments.sources.decoder import Decoder, build_whole
from experiments.sources.quantized import (
    MANIFEST_NAME,
    MANIFEST_VERSION,
    PARTS,
    QUANT_METHOD,
    Entry,
    QuantizedCheckpoint,
    alone,
    assemble,
    describe,
    open_quantized,
    parts_of,
    tensor_name,
)
from quantkit import QuantizedTensor

__all__ = [
    "CheckpointWriter",
    "FolderLock",
    "QuantizedCheckpoint",
    "kept_tensors",
    "layer_records",
    "load_dequantized",
    "open_quantized",
]

log = logging.getLogger(__name__)

JOURNAL_NAME = "layers.jsonl"
INDEX_NAME = "model.safetensors.index.json"
REST = "rest"  # key of the last shard in the journal


def load_dequantized(folder: Path | str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Any:
    """transformers' causal language model with the dequantized weights of a finished folder, in eval mode.

    Codes are dequantized in float32 and rounded to `dtype` once. Raises SourceError for a folder that is unfinished,
    damaged or of another kind.
    """
    model = ModelConfig("quantized", ModelSource.hub, path=str(folder))
    checkpoint = DequantizedCheckpoint(model, open_quantized(folder, CacheConfig().folder))
    return build_whole(checkpoint, str(dtype).removeprefix("torch."), device).model


def kept_tensors(decoder: Decoder, index: int | None, quantized: Collection[str]) -> dict[str, Tensor]:
    """The checkpoint's tensors of decoder layer `index` that no quantized matrix replaces, as stored, by their names.

    index: None for the tensors outside the layers. quantized: names of the quantized matrices of the whole model, each
    that of a linear module or of a fused parameter of experts. A stored tensor from which transformers makes several
    parameters, some of them quantized, is replaced by the others under their names in the model.
    """
    stored, prefix = decoder.stored, f"{decoder.path}."
    replaced = {f"{name}.weight" for name in quantized} | set(quantized)
    made: dict[str, list[str]] = {key: [] for key in decoder.checkpoint.names}
    for name, entries in stored.sources.items():
        for key, _ in entries:
            made[key].append(name)

    def layer_of(names: list[str]) -> int | None:
        inside = {int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix)}
        return inside.pop() if len(inside) == 1 else None

    tensors: dict[str, Tensor] = {}
    for key, names in made.items():
        left = [name for name in names if name not in replaced]
        if layer_of(names) != index or (names and not left):
            continue
        if left == names:
            tensors |= decoder.checkpoint.read([key])
        else:
            tensors |= {name: stored.tensor(name, None) for name in left}
    return tensors


def layer_records(folder: Path | str) -> list[dict[str, Any]]:
    """The records of a finished folder's decoder layers, in order. Raises OSError or ValueError."""
    _, *lines = (Path(folder).expanduser() / JOURNAL_NAME).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return sorted((entry["record"] for entry in entries if entry["shard"] != REST), key=lambda record: record["index"])


class CheckpointWriter:
    """A context in which this process alone writes `folder`; another process that wants to waits at its beginning.

    finished: index of a decoder layer → its record, of those written before whose bytes are intact. A damaged one is
    missing there and can be written again.
    is_complete: the folder is finished, of this identity, and every byte is intact. Then there is nothing to write.
    """

    def __init__(self, folder: Path | str, identity: str, num_layers: int, force: bool = False) -> None:
        """identity: hash of all that determines the bytes. force: write a finished folder of this identity again.

        Raises SourceError for a folder with anything else in it, such as another identity's checkpoint.
        """
        self.folder = Path(folder).expanduser().resolve()
        self.identity, self.num_layers, self.force = identity, num_layers, force
        self.partial = self.folder.with_name(f".{self.folder.name}.partial")
        self.replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        self.shards: dict[str, Entry] = {}
        self.is_complete = False
        self._lock = FolderLock(self.folder)
        with self._full_disk():
            self._lock.acquire()
            try:
                self._begin()
            except BaseException:
                self._lock.release()
                raise

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write the folder. What is unfinished stays for a later writer."""
        self._lock.release()

    @property
    def finished(self) -> Mapping[int, dict[str, Any]]:
        return {int(key): entry["record"] for key, entry in self.shards.items() if key != REST}

    def quantized(self, index: int) -> dict[str, QuantizedTensor]:
        """Name → quantized matrix of a finished layer, on the CPU, bit for bit as it was written."""
        from safetensors import safe_open

        entry = self.shards[str(index)]
        folder = self.folder if self.is_complete else self.partial
        with safe_open(folder / entry["file"], framework="pt") as file:
            return {name: assemble(name, own, file.get_tensor) for name, own in entry["quantized"].items()}

    def write_layer(
        self,
        index: int,
        quantized: Mapping[str, QuantizedTensor],
        kept: Mapping[str, Tensor],
        record: dict[str, Any],
        transposed: Collection[str] = (),
    ) -> None:
        """Write a layer's shard, then the journal. The layer is finished when this returns.

        quantized: matrices [out_features, K] by the names of their modules, or [E, out_features, K] by the name of a
        fused parameter. transposed: those that the model stores as [in, out]. kept: the layer's other tensors.
        record: plain values for layers.jsonl; times may be among them.
        """
        if not 0 <= index < self.num_layers:
            raise ValueError(f"layer {index}: the model has the layers 0 to {self.num_layers - 1}")
        self._write(str(index), quantized, kept, transposed, record)

    def finish(
        self,
        rest: Mapping[str, Tensor],
        around: Checkpoint,
        about: dict[str, Any],
        quantized: Mapping[str, QuantizedTensor] | None = None,
    ) -> None:
        """Write the other files, and rename the folder to its final name.

        rest: the tensors outside the layers. quantized: quantized matrices outside the layers, such as lm_head.
        around: the model's original checkpoint, from which config.json and the tokenizer come. about: plain values for
        the manifest, without times. Raises ValueError if a layer is missing.
        """
        missing = [index for index in range(self.num_layers) if str(index) not in self.shards]
        if missing:
            raise ValueError(f"layer {missing[0]} is not written yet, so {self.folder} cannot be finished")
        if REST not in self.shards:
            self._write(REST, quantized or {}, rest, (), {})
        with self._full_disk():
            self._write_around(around)
            self._write_manifest(about)
            self._rename()
        self.is_complete = True

    # --- the beginning ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self.folder.is_mount():
            raise SourceError(f"{self.folder} is a mount point, which cannot be renamed. Name a folder in it.")
        check_writable(self.folder.parent)
        found = self.folder / JOURNAL_NAME
        if found.is_file():
            shards, _ = self._journal(found)
            self.is_complete = self._is_intact() and not self.force
            if self.is_complete:
                self.shards = shards
                shutil.rmtree(self.partial, ignore_errors=True)
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            what = listing(self.folder) if self.folder.is_dir() else "a file"
            raise SourceError(f"{self.folder} holds {what}, and no checkpoint of quantkit. Name another folder.")
        if not self.is_complete:
            self._resume()
        shutil.rmtree(self.replaced, ignore_errors=True)

    def _is_intact(self) -> bool:
        """Whether the finished folder is; a damaged one becomes unfinished, so that only the damaged part is redone."""
        try:
            open_quantized(self.folder).verify()
        except SourceError as error:
            log.warning("%s", error)
            shutil.rmtree(self.partial, ignore_errors=True)
            self.folder.rename(self.partial)
            return False
        return True

    def _resume(self) -> None:
        """Take over the finished layers of an interrupted writer, and remove what it left half-written."""
        self.partial.mkdir(parents=True, exist_ok=True)
        shards, forced = self._journal(self.partial / JOURNAL_NAME)
        if self.force and not forced:  # of a run before this one was forced
            shards = {}
        for key, entry in shards.items():
            if is_intact(self.partial / entry["file"], entry):
                self.shards[key] = entry
            else:
                log.warning("%s is missing or damaged; it is written again", self.partial / entry["file"])
        kept = {entry["file"] for entry in self.shards.values()}
        for path in self.partial.iterdir():
            if path.name not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._write_journal()

    def _journal(self, path: Path) -> tuple[dict[str, Entry], bool]:
        """(finished shards, whether they are of a forced run). Raises SourceError for those of another identity."""
        try:
            head, *lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            identity, forced = head["identity"], bool(head["forced"])
            shards = {str(line["shard"]): dict(line) for line in lines}
            if any(entry["file"] != self._file(key) for key, entry in shards.items()):
                raise ValueError("a shard of another name")
        except FileNotFoundError:
            return {}, False
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{path} is damaged. Delete {path.parent} and start again.") from None
        if identity != self.identity:
            raise SourceError(
                f"{path.parent} belongs to another model, text or settings (identity {identity}, not {self.identity}). "
                "Name another folder, or delete this one."
            )
        return shards, forced

    # --- writing ------------------------------------------------------------------------------------------------------

    def _file(self, key: str) -> str:
        number = self.num_layers + 1 if key == REST else int(key) + 1
        return f"model-{number:05d}-of-{self.num_layers + 1:05d}.safetensors"

    def _write(
        self,
        key: str,
        quantized: Mapping[str, QuantizedTensor],
        kept: Mapping[str, Tensor],
        transposed: Collection[str],
        record: dict[str, Any],
    ) -> None:
        entries = {own: describe(q, own in transposed) for own, q in quantized.items()}
        tensors = {part: tensor for own, q in quantized.items() for part, tensor in parts_of(own, q).items()}
        if twice := tensors.keys() & kept.keys():
            raise ValueError(f"{min(twice)} is both a part of a quantized matrix and a kept tensor")
        tensors |= {own: alone(tensor) for own, tensor in kept.items()}
        path = self.partial / self._file(key)
        with self._full_disk():
            saved = save_tensors(path, tensors)
            sync(path)
            self.shards[key] = {
                "shard": key,
                "file": path.name,
                **saved,
                "tensor_bytes": sum(tensor.nbytes for tensor in tensors.values()),
                "quantized": entries,
                "kept": sorted(kept),
                "record": record,
            }
            self._write_journal()

    def _write_journal(self) -> None:
        head = {"identity": self.identity, "forced": self.force}
        lines = "".join(json.dumps(line) + "\n" for line in (head, *self._in_order()))
        write_atomically(self.partial / JOURNAL_NAME, lines)

    def _in_order(self) -> list[Entry]:
        keys = [*map(str, range(self.num_layers)), REST]
        return [self.shards[key] for key in keys if key in self.shards]

    def _write_around(self, around: Checkpoint) -> None:
        quantized = [own for entry in self._in_order() for own in entry["quantized"].items()]
        kinds = sorted({(own["format"], own["block_size"]) for _, own in quantized})
        groups = [{"format": name, "block_size": size} for name, size in kinds]
        changes: dict[str, Any] = {"quantization_config": {"quant_method": QUANT_METHOD, "groups": groups}}
        if "lm_head.weight" in {tensor_name(*own) for own in quantized}:
            changes["tie_word_embeddings"] = False  # the embedding is not quantized
        around.save_around(self.partial, changes)

    def _write_manifest(self, about: dict[str, Any]) -> None:
        entries = self._in_order()
        quantized = {own: value | {"file": e["file"]} for e in entries for own, value in e["quantized"].items()}
        kept = {name: entry["file"] for entry in entries for name in entry["kept"]}
        weight_map = {f"{own}.{part}": value["file"] for own, value in quantized.items() for part in PARTS} | kept
        size = {"total_size": sum(entry["tensor_bytes"] for entry in entries)}
        index = {"metadata": size, "weight_map": dict(sorted(weight_map.items()))}
        write_atomically(self.partial / INDEX_NAME, json.dumps(index, indent=2) + "\n")
        manifest = {
            "version": MANIFEST_VERSION,
            "identity": self.identity,
            "about": about,
            "files": self._files(),
            "quantized": quantized,
            "kept": kept,
        }
        write_atomically(self.partial / MANIFEST_NAME, json.dumps(sealed(manifest), indent=1) + "\n")

    def _files(self) -> dict[str, Entry]:
        """Size and sha256 of every file but the journal and the manifest."""
        files = {entry["file"]: {key: entry[key] for key in ("bytes", "sha256")} for entry in self._in_order()}
        for path in sorted(self.partial.iterdir()):
            if path.name not in {JOURNAL_NAME, MANIFEST_NAME, *files}:
                files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                sync(path)
        return files

    def _rename(self) -> None:
        sync(self.partial)
        if self.folder.is_dir() and any(self.folder.iterdir()):
            self.folder.rename(self.replaced)
        self.partial.rename(self.folder)
        sync(self.folder.parent)
        shutil.rmtree(self.replaced, ignore_errors=True)

    @contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Raises SourceError in the place of the system's error of a full disk."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise SourceError(
                f"{self.folder} cannot be written ({error.strerror}). Free some space and start again: it continues "
                "where it stopped."
            ) from None


class FolderLock:
    """A context in which no other process writes a folder; waits for one that does.

    The lock is a file beside the folder. The system releases it when the process ends.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock

        self.folder = folder
        self.path = folder.with_name(f".{folder.name}.lock")
        self.lock = FileLock(self.path)

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        from filelock import Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=1)
        except Timeout:
            log.warning("waiting for another process that writes %s", self.folder)
            self.lock.acquire()

    def release(self) -> None:
        if self.lock.is_locked:
            with suppress(OSError):
                self.path.unlink()  # while it is locked; one who waits sees that and makes a new file
            self.lock.release()
