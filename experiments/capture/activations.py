"""A layer's inputs: captured once, kept on the disk, read by every run.

A cached layer is a folder that needs nothing beside it, a layer bundle:

    weight.safetensors               the layer's weight [out_features, in_features]
    gram.safetensors                 G = XᵀX [in_features, in_features], calibration and held-out tokens apart
    calibration-00000.safetensors …  X [tokens, in_features], about 256 MiB a shard, whole sequences (cache.activations)
    manifest.json                    what all this is, with the sha256 of every file; written last

‖XΔWᵀ‖² = tr(ΔW G ΔWᵀ), so errors need G alone. Capture streams: it holds one shard, whatever the number of tokens.
Each file is written under a temporary name and renamed; a journal lists the finished shards, and an interrupted capture
goes on at the first missing one. Layers captured together share one forward pass, and those with the same input (q, k
and v; gate and up) one Gram matrix and one set of shards, hard-linked into each folder.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.config import Config, LayerConfig, ModelSource
from experiments.files import SourceError, sha256_file, sha256_json, write_atomically
from experiments.sources.models import model_identity
from experiments.sources.resolve import (
    CAPTURE_VERSION,
    MANIFEST_FIELDS,
    MANIFEST_NAME,
    layer_folder,
    layer_identity,
    load_text,
    read_bundle_manifest,
    was_substituted,
)
from quantkit.calibration import GramAccumulator

log = logging.getLogger(__name__)

JOURNAL_NAME = "capture.json"
WEIGHT_NAME = "weight.safetensors"
GRAM_NAME = "gram.safetensors"
MIB = 1 << 20
BATCH_TOKENS = 4096  # a forward pass
PASS_BYTES = 4 << 30  # Gram matrices and shards that one forward pass over the text may hold
MEMO_BYTES = 2 << 30  # layers that stay in memory between runs of a sweep
SPLITS = ("calibration", "heldout")


@dataclass(frozen=True)
class SourceInfo:
    """What was really used."""

    model: str
    model_revision: str | None
    model_origin: str | None
    tokenizer: str
    data: str
    data_hash: str
    data_split: str
    sequences: int
    dtype: str  # of the activations
    cache_key: str
    substituted: bool = False
    from_cache: bool = True


@dataclass(frozen=True)
class LayerInputs:
    """weight [out_features, in_features]; Gram matrices [in_features, in_features] float32; all on the CPU."""

    weight: Tensor
    gram_calibration: Tensor
    gram_heldout: Tensor | None
    tokens_calibration: int
    tokens_heldout: int
    provenance: SourceInfo
    _read: Callable[[str], Iterator[Tensor]] = field(repr=False)

    def batches(self, split: str = "calibration") -> Iterator[Tensor]:
        """The layer's inputs [tokens, in_features], a shard at a time. Raises SourceError when they were not kept."""
        if split not in SPLITS:
            raise ValueError(f"split={split}: use {' or '.join(SPLITS)}.")
        return self._read(split)

    @property
    def nbytes(self) -> int:
        grams = [g for g in (self.gram_calibration, self.gram_heldout) if g is not None]
        return sum(tensor.nbytes for tensor in (self.weight, *grams))


_memo: OrderedDict[str, LayerInputs] = OrderedDict()


def load_layer_inputs(config: Config, ahead: Sequence[LayerConfig] = ()) -> LayerInputs:
    """The configured layer, from memory, the cache, or a capture. Call it with a configuration after resolve_sources.

    ahead: layers of the same model and text that will be asked for later. A capture takes them along.
    A warm cache loads no model. Raises SourceError for everything that the user can mend.
    """
    source = config.model.source
    if source == ModelSource.bundle:
        folder = Path(str(config.model.path)).expanduser()
        key = f"{folder.resolve()}:{sha256_json(read_bundle_manifest(config.model))}"
    elif source == ModelSource.synthetic:
        key = sha256_json(layer_identity(config))
    else:
        folder = layer_folder(config)
        key = f"{folder}:{config.cache.activations}"
    if key in _memo:
        _memo.move_to_end(key)
        inputs = replace(_memo[key], provenance=replace(_memo[key].provenance, from_cache=True))
    elif source == ModelSource.bundle:
        inputs = _open_bundle(folder)
    elif source == ModelSource.synthetic:
        inputs = _synthetic(config, key[:16])
    else:
        cached = _open(folder, config)
        if cached is None:
            _capture_with(config, ahead)
            fresh = _open(folder, config)
            if fresh is None:
                raise SourceError(f"{folder} was captured but cannot be read back. Check the disk.")
            inputs = replace(fresh, provenance=replace(fresh.provenance, from_cache=False))
        else:
            inputs = cached
    _memo[key] = inputs
    while len(_memo) > 1 and sum(kept.nbytes for kept in _memo.values()) > MEMO_BYTES:
        _memo.popitem(last=False)
    return replace(inputs, provenance=replace(inputs.provenance, substituted=was_substituted(config)))


def _capture_with(config: Config, ahead: Sequence[LayerConfig]) -> None:
    try:
        prefetch_layer_inputs([config, *(replace(config, layer=layer) for layer in ahead)])
    except SourceError:
        # One of the others may not exist: that is its own run's failure, not this one's.
        if not ahead:
            raise
        prefetch_layer_inputs([config])


def limit_calibration(inputs: LayerInputs, tokens: int, seq_len: int, seed: int) -> LayerInputs:
    """The same layer with the Gram matrix of `tokens` calibration tokens, or of all where there are no more.

    A seeded shuffle chooses whole sequences, the last one from its beginning on; a larger number holds the smaller
    one's tokens. What is held out stays. Reads the activations: raises SourceError when they were not kept.
    """
    if tokens >= inputs.tokens_calibration:
        log.info("data.calibration_tokens=%d: there are %d, taking all", tokens, inputs.tokens_calibration)
        return inputs
    order = _shuffled(inputs.tokens_calibration // seq_len, seed)[: -(-tokens // seq_len)]
    rows = {sequence: seq_len for sequence in order}
    rows[order[-1]] = tokens - (len(order) - 1) * seq_len
    gram = GramAccumulator(inputs.gram_calibration.shape[0])
    first = 0
    for batch in inputs.batches("calibration"):
        sequences = batch.split(seq_len)
        chosen = [x[: rows[i]] for i, x in enumerate(sequences, start=first) if i in rows]
        if chosen:
            gram.update(torch.cat(chosen))
        first += len(sequences)
    return replace(inputs, gram_calibration=gram.gram, tokens_calibration=tokens)


def prefetch_layer_inputs(configs: Iterable[Config]) -> None:
    """Capture what the cache lacks of these layers; those of one model and text in one forward pass.

    A later load_layer_inputs of any of them reads the cache. Two processes that want the same layer capture it once.
    """
    groups: dict[str, list[Config]] = {}
    for config in configs:
        if config.model.source in (ModelSource.bundle, ModelSource.synthetic):
            continue
        same = layer_identity(config) | {"layer": None, "cache": asdict(config.cache), "device": config.device}
        groups.setdefault(sha256_json(same), []).append(config)
    for group in groups.values():
        config = group[0]
        layers = sorted({(c.layer.index, c.layer.module) for c in group})
        _capture(config, [LayerConfig(*layer) for layer in layers])


# --- reading ----------------------------------------------------------------------------------------------------------


def _open(folder: Path, config: Config) -> LayerInputs | None:
    """The cached layer, or None when it is not there, incomplete or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_text())
    except (FileNotFoundError, ValueError):
        return None
    wants_shards = config.cache.activations
    try:
        problem = _problem(folder, manifest, wants_shards)
    except (KeyError, TypeError, AttributeError):
        problem = f"{MANIFEST_NAME} is damaged"
    if problem:
        log.warning("%s: %s; capturing it again", folder, problem)
        return None
    if wants_shards and not manifest["activations"]:
        return None

    def rebuild() -> dict[str, Any]:
        _capture(config, [config.layer], force=True)
        return dict(json.loads((folder / MANIFEST_NAME).read_text()))

    return _inputs(folder, manifest, rebuild)


def _open_bundle(folder: Path) -> LayerInputs:
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    problem = _problem(folder, manifest, shards=False)
    if problem:
        raise SourceError(f"model.path={folder}: {problem}. Copy the bundle again.")
    return _inputs(folder, manifest, rebuild=None)


def _problem(folder: Path, manifest: dict[str, Any], shards: bool) -> str | None:
    """What is wrong with a cached layer. Weight and Gram matrices are read through; shards are when they are used."""
    if manifest.get("capture_version") != CAPTURE_VERSION:
        return f"capture version {manifest.get('capture_version')} is not {CAPTURE_VERSION}"
    if missing := MANIFEST_FIELDS - manifest.keys():
        return f"{MANIFEST_NAME} has no {min(missing)}"
    for name, entry in manifest["files"].items():
        if not _intact(folder / name, entry):
            return f"{name} is missing or damaged"
    for name, entry in manifest["shards"].items() if shards else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{name} is missing or cut short"
    return None


def _inputs(folder: Path, manifest: dict[str, Any], rebuild: Callable[[], dict[str, Any]] | None) -> LayerInputs:
    from safetensors.torch import load_file

    def read(split: str) -> Iterator[Tensor]:
        return _read_shards(folder, manifest, split, rebuild)

    grams = load_file(folder / GRAM_NAME)
    return LayerInputs(
        weight=load_file(folder / WEIGHT_NAME)["weight"],
        gram_calibration=grams["calibration"],
        gram_heldout=grams.get("heldout"),
        tokens_calibration=manifest["tokens"]["calibration"],
        tokens_heldout=manifest["tokens"]["heldout"],
        provenance=SourceInfo(**manifest["source"], cache_key=manifest["key"]),
        _read=read,
    )


def _read_shards(
    folder: Path, manifest: dict[str, Any], split: str, rebuild: Callable[[], dict[str, Any]] | None
) -> Iterator[Tensor]:
    if not manifest["activations"]:
        raise SourceError(
            f"{folder} keeps Gram matrices alone. Capture with cache.activations=true to read the inputs."
        )
    for name in sorted(manifest["shards"]):
        if manifest["shards"][name]["split"] != split:
            continue
        if not _intact(folder / name, manifest["shards"][name]):
            if rebuild is None:
                raise SourceError(f"{folder / name} is missing or damaged. Copy the bundle again.")
            log.warning("%s is missing or damaged; capturing it again", folder / name)
            manifest = rebuild()
        yield _load(folder / name)


def _intact(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]


def _load(path: Path) -> Tensor:
    from safetensors.torch import load_file

    return load_file(path)["inputs"]


# --- capture ----------------------------------------------------------------------------------------------------------


def _capture(config: Config, layers: Sequence[LayerConfig], force: bool = False) -> None:
    """Capture those of `layers` that the cache lacks. force: also those whose shards proved damaged on reading."""
    folders = {(layer.index, layer.module): layer_folder(config, layer) for layer in layers}
    with ExitStack() as locks:
        for folder in sorted(folders.values()):  # one order for all processes: no deadlock
            locks.enter_context(_lock(folder))
        if not force:
            layers = [x for x in layers if _open(folders[x.index, x.module], replace(config, layer=x)) is None]
        if not layers:
            return
        _Capture(config, layers, folders).run()


def _lock(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log.warning("waiting for another process that captures %s", folder.name)
        return lock.acquire()


class _Capture:
    """One capture of some layers of one model on one text."""

    def __init__(self, config: Config, layers: Sequence[LayerConfig], folders: dict[tuple[int, str], Path]) -> None:
        from experiments.sources.layers import build_decoder, check_layers, open_checkpoint

        self.config, self.layers, self.folders = config, layers, folders
        self.checkpoint = open_checkpoint(config.model, config.cache.folder)
        check_layers(self.checkpoint, layers)
        longest = getattr(self.checkpoint.config, "max_position_embeddings", None)
        if longest and config.data.seq_len > longest:
            raise SourceError(
                f"data.seq_len={config.data.seq_len}: {self.checkpoint.name} takes {longest} tokens at most."
            )
        self.tokens, self.data_info = _token_sequences(config, self.checkpoint.tokenizer())
        self.device = _device(config.device)
        self.model = build_decoder(self.checkpoint, layers, config.model.dtype, self.device)

    def run(self) -> None:
        for layers in self._passes():
            self._one_pass(layers)

    def _passes(self) -> Iterator[list[LayerConfig]]:
        """The layers, in order, as many at a time as PASS_BYTES allows."""
        from experiments.sources.layers import find_linear

        chosen: list[LayerConfig] = []
        held = 0
        for layer in self.layers:
            width = find_linear(self.model, layer, self.checkpoint.name).in_features
            cost = len(self.tokens) * 4 * width**2 + self.config.cache.activations * self.config.cache.shard_mib * MIB
            if chosen and held + cost > PASS_BYTES:
                yield chosen
                chosen, held = [], 0
            chosen.append(layer)
            held += cost
        yield chosen

    def _one_pass(self, layers: list[LayerConfig]) -> None:
        from tqdm import tqdm

        from experiments.sources.layers import InputTap

        seq_len = self.config.data.seq_len
        tap = InputTap(self.model, layers, self.checkpoint.name)
        shard_bytes = self.config.cache.shard_mib * MIB if self.config.cache.activations else None
        batch = max(1, BATCH_TOKENS // seq_len)
        if shard_bytes is not None:
            # No batch reaches over the end of a shard, so that a shard can be captured alone.
            smallest = min(shard_bytes // (seq_len * width * tap.dtype.itemsize) for width in tap.widths)
            batch = max(1, min(batch, smallest))
        writers = []
        for group, width in zip(tap.groups, tap.widths, strict=True):
            folders = [self.folders[layer.index, layer.module] for layer in group]
            counts = {split: len(ids) for split, ids in self.tokens.items()}
            writers.append(_Writer(folders, width, tap.dtype, seq_len, batch, counts, shard_bytes, self.device))
        name = f"{self.checkpoint.name} layer {layers[0].index} {layers[0].module}"
        name += f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        total = sum(len(ids) for ids in self.tokens.values())
        if not sys.stderr.isatty():  # where the bar is not shown
            print(f"Capturing the inputs of {name}: {total} sequences", flush=True)
        with tqdm(total=total, desc=f"capture {name}", unit="seq", disable=None) as bar:
            for split, ids in self.tokens.items():
                for first in range(0, len(ids), batch):
                    wanting = {i for i, writer in enumerate(writers) if not writer.reread(split, first)}

                    def consume(
                        group: int, x: Tensor, split: str = split, first: int = first, wanting: set[int] = wanting
                    ) -> None:
                        if group in wanting:
                            writers[group].add(split, first, x)

                    if wanting:
                        tap.run(ids[first : first + batch], consume)
                    bar.update(len(ids[first : first + batch]))
        for group, writer in zip(tap.groups, writers, strict=True):
            self._finish(group, writer, str(tap.dtype).removeprefix("torch."))

    def _finish(self, group: list[LayerConfig], writer: _Writer, dtype: str) -> None:
        from experiments.sources.layers import load_weight

        model = model_identity(self.config.model)
        source = {
            "model": model.name,
            "model_revision": model.revision,
            "model_origin": self.config.model.origin,
            "tokenizer": model.tokenizer,
            "dtype": dtype,
            **self.data_info,
        }
        files = writer.finish()
        for layer in group:
            folder = self.folders[layer.index, layer.module]
            weight = _save(folder / WEIGHT_NAME, {"weight": load_weight(self.checkpoint, layer)})
            manifest = {
                "capture_version": CAPTURE_VERSION,
                "key": folder.name.rpartition("-")[2],
                "layer": asdict(layer),
                "data": _plain(asdict(self.config.data)) | {"path": None, "calibration_tokens": None},
                "seed": self.config.seed,
                "source": source,
                "tokens": {split: len(self.tokens.get(split, ())) * self.config.data.seq_len for split in SPLITS},
                "activations": self.config.cache.activations,
                "files": {WEIGHT_NAME: weight, **files},
                "shards": writer.shards,
            }
            write_atomically(folder / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
            (folder / JOURNAL_NAME).unlink(missing_ok=True)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, str) else value for key, value in values.items()}


class _Writer:
    """Streams one module's inputs into Gram matrices and shards.

    Shards hold whole batches of sequences, so a damaged or missing one is captured anew by the same forward passes.
    """

    def __init__(
        self,
        folders: list[Path],
        width: int,
        dtype: torch.dtype,
        seq_len: int,
        batch: int,
        counts: dict[str, int],
        shard_bytes: int | None,
        device: str,
    ) -> None:
        self.folder, *self.siblings = folders
        self.width, self.dtype, self.seq_len, self.batch, self.counts = width, dtype, seq_len, batch, counts
        self.grams = {split: GramAccumulator(width, device) for split in counts}
        self.shard_sequences = 0
        if shard_bytes is not None:
            fitting = shard_bytes // (seq_len * width * dtype.itemsize)
            self.shard_sequences = max(batch, fitting // batch * batch)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shards: dict[str, dict[str, Any]] = {}
        self.finished = self._finished_before()
        self.buffer: Tensor | None = None
        self.from_disk = False

    def _finished_before(self) -> dict[str, dict[str, Any]]:
        for name in (JOURNAL_NAME, MANIFEST_NAME):
            try:
                return dict(json.loads((self.folder / name).read_text())["shards"])
            except (FileNotFoundError, ValueError, KeyError, TypeError):
                continue
        return {}

    def reread(self, split: str, first: int) -> bool:
        """Whether the batch from sequence `first` on lies in a shard that is on the disk and intact."""
        if not self.shard_sequences:
            return False
        if first % self.shard_sequences == 0:
            name, entry = self._describe(split, first)
            known = self.finished.get(name, {})
            self.from_disk = {key: known.get(key) for key in entry} == entry and _intact(self.folder / name, known)
            if self.from_disk:
                self.shards[name] = known
                # In the batches of the capture: the sum is the same to the last bit.
                for x in _load(self.folder / name).split(self.batch * self.seq_len):
                    self.grams[split].update(x)
        return self.from_disk

    def add(self, split: str, first: int, x: Tensor) -> None:
        """x [tokens, in_features]: the inputs of the sequences from `first` on."""
        self.grams[split].update(x)
        if not self.shard_sequences:
            return
        start = first // self.shard_sequences * self.shard_sequences
        name, entry = self._describe(split, start)
        if self.buffer is None:
            self.buffer = _new_buffer(entry["rows"], self.width, self.dtype)
        offset = (first - start) * self.seq_len
        self.buffer[offset : offset + len(x)] = x
        if offset + len(x) == entry["rows"]:
            self.shards[name] = entry | _save(self.folder / name, {"inputs": self.buffer})
            self.buffer = None
            write_atomically(self.folder / JOURNAL_NAME, json.dumps({"shards": self.finished | self.shards}, indent=1))

    def _describe(self, split: str, start: int) -> tuple[str, dict[str, Any]]:
        sequences = min(self.shard_sequences, self.counts[split] - start)
        name = f"{split}-{start // self.shard_sequences:05d}.safetensors"
        rows = sequences * self.seq_len
        return name, {
            "split": split,
            "first_sequence": start,
            "rows": rows,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write the Gram matrices and fill the sibling folders. Returns their entries for the manifest."""
        grams = {split: accumulator.gram.float().cpu() for split, accumulator in self.grams.items()}
        entry = _save(self.folder / GRAM_NAME, grams)
        for stale in self.folder.glob("*-[0-9]*.safetensors"):
            if stale.name not in self.shards:
                stale.unlink()
        for sibling in self.siblings:
            sibling.mkdir(parents=True, exist_ok=True)
            for name in (GRAM_NAME, *self.shards):
                _link(self.folder / name, sibling / name)
        return {GRAM_NAME: entry}


def _new_buffer(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, width, dtype=dtype)


def _save(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write under a temporary name and rename. Returns size and sha256, for the manifest."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file(tensors, temporary)
    entry = {"bytes": temporary.stat().st_size, "sha256": sha256_file(temporary)}
    os.replace(temporary, path)
    return entry


def _link(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


def _device(name: str) -> str:
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


# --- sequences --------------------------------------------------------------------------------------------------------


def _token_sequences(
    config: Config, tokenize: Callable[[str], list[int]]
) -> tuple[dict[str, Tensor], dict[str, str | int]]:
    """split → token ids [sequences, seq_len], and what the record says of them.

    The text is cut into sequences; a seeded shuffle chooses `data.samples` of them and holds out the last share. With
    data.heldout_split, the held-out sequences come from that text and the others from the calibration text.
    """
    data, cache = config.data, config.cache.folder
    text = load_text(data, cache)
    available = _cut(tokenize(text.read()), config, text.split)
    order = _shuffled(len(available), config.seed)
    if not data.heldout:
        order = order[: data.samples]
        chosen = {"calibration": available[sorted(order)]}
        info = {"data": text.name, "data_hash": text.sha256, "data_split": text.split}
    elif data.heldout_split:
        other = load_text(data, cache, data.heldout_split)
        if other.sha256 == text.sha256:
            raise SourceError(
                f"data.heldout_split={data.heldout_split}: that is the text of calibration ({text.name}, "
                f"split {text.split}). Name another split, or leave it out to hold out sequences of this one."
            )
        elsewhere = _cut(tokenize(other.read()), config, other.split)
        share = max(1, round(data.samples * data.heldout))
        held = _shuffled(len(elsewhere), config.seed)[:share]
        order = order[: max(1, data.samples - share)]
        chosen = {"calibration": available[sorted(order)], "heldout": elsewhere[sorted(held)]}
        digest = sha256_json([text.sha256, other.sha256])
        info = {"data": text.name, "data_hash": digest, "data_split": f"{text.split}, held out: {other.split}"}
    else:
        order = order[: data.samples]
        share = max(1, round(len(order) * data.heldout))
        if share >= len(order):
            raise SourceError(
                f"data.heldout={data.heldout:g} leaves no calibration sequence of {len(order)}. Use more text, a "
                "smaller data.seq_len, or data.heldout=0."
            )
        chosen = {"calibration": available[sorted(order[:-share])], "heldout": available[sorted(order[-share:])]}
        info = {"data": text.name, "data_hash": text.sha256, "data_split": text.split}
    count = sum(len(ids) for ids in chosen.values())
    if count < data.samples:
        log.info("%s has %d sequences of %d tokens, fewer than data.samples=%d; taking all", text.name, count,
                 data.seq_len, data.samples)  # fmt: skip
    return chosen, {**info, "sequences": count}


def _cut(ids: list[int], config: Config, split: str) -> Tensor:
    """[sequences, seq_len]; the rest is dropped. Raises SourceError for a text shorter than one sequence."""
    seq_len = config.data.seq_len
    count = len(ids) // seq_len
    if count == 0:
        raise SourceError(
            f"data={config.data.name}: split {split} has {len(ids)} tokens, fewer than one sequence of "
            f"data.seq_len={seq_len}. Use a longer text or a smaller data.seq_len."
        )
    return torch.tensor(ids[: count * seq_len]).view(count, seq_len)


def _shuffled(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# --- synthetic --------------------------------------------------------------------------------------------------------

SYNTHETIC_RANK = 32  # directions that the channels share
HEAVY_SHARE = 1 / 128  # of the channels, as a language model's outlier channels
HEAVY_FACTOR = 20.0


def _synthetic(config: Config, key: str) -> LayerInputs:
    """A seeded layer: X = (noise + z F) · channel scale, with correlated channels of which a few are heavy."""
    model, data, seed = config.model, config.data, config.seed
    dtype: torch.dtype = getattr(torch, model.dtype)
    width = model.in_features
    weight = (torch.randn(model.out_features, width, generator=_generator(seed, 0)) * model.std).to(dtype)
    channels = _generator(seed, 1)
    scale = (torch.randn(width, generator=channels) * 0.5).exp()
    heavy = torch.randperm(width, generator=channels)[: max(1, int(width * HEAVY_SHARE))]
    scale[heavy] *= HEAVY_FACTOR
    factors = torch.randn(SYNTHETIC_RANK, width, generator=channels) / SYNTHETIC_RANK**0.5
    share = max(1, round(data.samples * data.heldout)) if data.heldout else 0
    if share >= data.samples:
        raise SourceError(
            f"data.heldout={data.heldout:g} of data.samples={data.samples} leaves no calibration sequence."
        )
    ranges = {"calibration": range(data.samples - share), "heldout": range(data.samples - share, data.samples)}

    def read(split: str) -> Iterator[Tensor]:
        for sequence in ranges[split]:
            own = _generator(seed, 2 + sequence)
            noise = torch.randn(data.seq_len, width, generator=own)
            noise += torch.randn(data.seq_len, SYNTHETIC_RANK, generator=own) @ factors
            yield (noise * scale).to(dtype)

    grams = {split: GramAccumulator(width) for split in SPLITS if ranges[split]}
    for split, accumulator in grams.items():
        for batch in read(split):
            accumulator.update(batch)
    return LayerInputs(
        weight=weight,
        gram_calibration=grams["calibration"].gram,
        gram_heldout=grams["heldout"].gram if share else None,
        tokens_calibration=len(ranges["calibration"]) * data.seq_len,
        tokens_heldout=share * data.seq_len,
        provenance=SourceInfo(
            model=f"synthetic {model.out_features}x{width}",
            model_revision=None,
            model_origin=model.origin,
            tokenizer="none",
            data="synthetic",
            data_hash=key,
            data_split="seeded",
            sequences=data.samples,
            dtype=model.dtype,
            cache_key=key,
            from_cache=False,
        ),
        _read=read,
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1_000_003 + stream)
