"""The capture: forward passes over the text that write the inputs of chosen layers to the cache.

Layers that are captured together share a forward pass. Of two processes that need the same layer, one captures it.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from experiments.capture.cache import complete_manifest
from experiments.capture.inputs import SPLITS, check_width
from experiments.capture.progress import BAR, Progress, ticking, waiting
from experiments.capture.shards import Layout, ShardWriter
from experiments.capture.store import JOURNAL_NAME, PARTIAL_NAME, WEIGHT_NAME, Entry, save_tensors
from experiments.capture.tokens import token_sequences
from experiments.capture.writing import lock
from experiments.config import LayerConfig
from experiments.files import SourceError, write_sealed, writing
from experiments.sources.bundles import CAPTURE_VERSION, MANIFEST_NAME
from experiments.sources.models import EMBEDDING_NAME, LAYER_NAME, model_name
from experiments.sources.resolved import Resolved

log = logging.getLogger(__name__)

MIB = 1 << 20
BATCH_TOKENS = 4096  # per forward pass
KEEP_SECONDS = 10.0  # at least, between two saves of an unfinished capture
PASS_BYTES = 4 << 30  # memory limit of the Gram matrices and shard buffers of one pass over the text


def capture_layers(resolved: Resolved, layers: Sequence[LayerConfig], force: bool = False) -> None:
    """Capture the `layers` of the run's model and text that the cache lacks. Raises SourceError.

    force: capture all of them, because a shard was found damaged on reading.
    """
    layers = [LayerConfig(*key) for key in sorted({(layer.index, layer.module) for layer in layers})]
    with ExitStack() as locks:
        for folder in sorted(resolved.layer_folder(layer) for layer in layers):  # a fixed order avoids deadlocks
            locks.enter_context(lock(folder))
        if not force:
            wanted = resolved.config.cache.activations
            layers = [layer for layer in layers if complete_manifest(resolved.layer_folder(layer), wanted) is None]
        if layers:
            with writing(resolved.config.cache.folder):
                with waiting(f"reading {model_name(resolved.config.model)}"):
                    capture = _Capture(resolved, layers)
                capture.run()


class _Capture:
    """One capture of some layers of one model on one text."""

    def __init__(self, resolved: Resolved, layers: Sequence[LayerConfig]) -> None:
        from experiments.sources.checkpoints import open_checkpoint
        from experiments.sources.decoder import Decoder, check_layers

        self.resolved, self.config, self.layers = resolved, resolved.config, layers
        self.checkpoint = open_checkpoint(self.config.model, self.config.cache.folder)
        check_layers(self.checkpoint, layers)
        self._check_length()
        dtype: torch.dtype = getattr(torch, self.config.model.dtype)
        self.decoder = Decoder(self.checkpoint, layers, dtype, resolved.device)
        own = self.config.layer
        if own in layers:
            check_width(self.config, self.decoder.target(own).in_features, self.checkpoint.name)
        self.sequences = token_sequences(self.config, self.checkpoint.tokenizer())
        self._check_ids()
        self.decoder.load()

    def _check_ids(self) -> None:
        size = getattr(self.checkpoint.config.get_text_config(decoder=True), "vocab_size", None)
        largest = max(int(ids.max()) for ids in self.sequences.ids.values())
        if isinstance(size, int) and largest >= size:
            raise SourceError(
                f"{self.checkpoint.name}: the tokenizer gives id {largest}, config.json has vocab_size {size}. "
                "Give the tokenizer of this checkpoint."
            )

    def _check_length(self) -> None:
        config = self.checkpoint.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None)
        if longest and self.config.data.seq_len > longest:
            raise SourceError(
                f"data.seq_len={self.config.data.seq_len}: {self.checkpoint.name} takes {longest} tokens at most."
            )

    @property
    def shard_bytes(self) -> int | None:
        return self.config.cache.shard_mib * MIB if self.config.cache.activations else None

    def run(self) -> None:
        for layers in self._passes():
            self._one_pass(layers)

    def _passes(self) -> Iterator[list[LayerConfig]]:
        """The layers in order, in groups that PASS_BYTES allows."""
        chosen: list[LayerConfig] = []
        held = 0
        for layer in self.layers:
            width = self.decoder.target(layer).in_features
            cost = len(self.sequences.ids) * 4 * width**2 + (self.shard_bytes or 0)
            if chosen and held + cost > PASS_BYTES:
                yield chosen
                chosen, held = [], 0
            chosen.append(layer)
            held += cost
        yield chosen

    def _one_pass(self, layers: list[LayerConfig]) -> None:
        from experiments.capture.tap import InputTap

        tap = InputTap(self.decoder, layers)
        batch = self._batch(tap)
        writers = [
            ShardWriter(
                folders=[self.resolved.layer_folder(layer) for layer in group],
                layout=self._layout(number, tap, batch),
                device=self.resolved.device,
            )
            for number, group in enumerate(tap.groups)
        ]
        self._stream(tap, writers, batch, self._title(layers))
        for group, writer in zip(tap.groups, writers, strict=True):
            if writer.rows["calibration"]:
                self._finish(group, writer)
        self._tell_routed(tap, writers)

    def _tell_routed(self, tap: Any, writers: list[ShardWriter]) -> None:
        """Print the number of tokens of each captured expert. Raises SourceError for one without tokens."""
        total = len(self.sequences.ids["calibration"]) * self.config.data.seq_len
        starved = []
        for group, writer in zip(tap.groups, writers, strict=True):
            if not writer.layout.routed:
                continue
            rows, width, layer = writer.rows["calibration"], writer.layout.width, group[0]
            if not rows:
                starved.append(layer)
                continue
            few = f", fewer than its {width} inputs: too few to calibrate on" if rows < width else ""
            print(f"layer {layer.index} {layer.module}: the router sends it {rows} of {total} tokens{few}", flush=True)
        if starved:
            raise SourceError(
                f"layer.module={starved[0].module}: the router of layer {starved[0].index} sends it none of {total} "
                f"calibration tokens. Raise data.samples={self.config.data.samples}, or choose another expert."
            )

    def _batch(self, tap: Any) -> int:
        """Sequences per forward pass. No batch crosses a shard's end, so that a single shard can be captured again."""
        seq_len = self.config.data.seq_len
        batch = max(1, BATCH_TOKENS // seq_len)
        if self.shard_bytes is None:
            return batch
        smallest = min(self.shard_bytes // (seq_len * width * tap.dtype.itemsize) for width in tap.widths)
        return max(1, min(batch, smallest))

    def _layout(self, group: int, tap: Any, batch: int) -> Layout:
        return Layout(
            width=tap.widths[group],
            dtype=tap.dtype,
            seq_len=self.config.data.seq_len,
            batch=batch,
            sequences={split: len(ids) for split, ids in self.sequences.ids.items()},
            shard_bytes=self.shard_bytes,
            calls=1 if tap.routed[group] else self.decoder.calls_of(tap.groups[group][0]),
            routed=tap.routed[group],
        )

    def _title(self, layers: list[LayerConfig]) -> str:
        title = f"{self.checkpoint.name} layer {layers[0].index} {layers[0].module}"
        return f"{title} and {len(layers) - 1} more" if len(layers) > 1 else title

    def _stream(self, tap: Any, writers: list[ShardWriter], batch: int, title: str) -> None:
        """Run all sequences through the model, and pass each group's inputs to its writer."""
        from tqdm import tqdm

        total = self.sequences.count
        if not sys.stderr.isatty():  # then tqdm shows no bar
            print(f"Capturing the inputs of {title}: {total} sequences", flush=True)
        if kept := min(sum(writer.done.values()) for writer in writers):
            print(f"Continuing an interrupted capture at sequence {kept} of {total}", flush=True)
        keeper = _Keeper(writers)
        with ticking(tqdm(total=total, desc=f"capture {title}", bar_format=BAR, disable=None)) as bar, keeper:
            progress = Progress(self.decoder, bar)
            for split, ids in self.sequences.ids.items():
                for first in range(0, len(ids), batch):
                    part = ids[first : first + batch]
                    with progress.of(len(part)):
                        self._one_batch(tap, writers, split, first, part)
                    keeper.tick()

    def _one_batch(self, tap: Any, writers: list[ShardWriter], split: str, first: int, ids: Tensor) -> None:
        """Run ids [sequences, seq_len] for the writers that lack them; `first` is the number of the first sequence."""
        lacking = {number for number, writer in enumerate(writers) if not writer.reread(split, first)}

        def consume(group: int, x: Tensor) -> None:
            if group in lacking:
                self._check_finite(tap.groups[group][0], x)
                writers[group].add(split, first, x)

        if lacking:
            tap.run(ids, consume)

    def _check_finite(self, layer: LayerConfig, x: Tensor) -> None:
        if bool(x.isfinite().all()):
            return
        if (stored := self._stored_not_finite()) is not None:
            raise SourceError(
                f"{self.checkpoint.name}: {stored} holds NaN or Inf as it is stored, so no model.dtype helps. "
                "Download the checkpoint again, or give another one."
            )
        dtype = self.config.model.dtype
        wider = {"float16": "model.dtype=bfloat16 or float32", "bfloat16": "model.dtype=float32"}.get(dtype)
        remedy = f"Use {wider}" if wider else "Check the checkpoint's weights: there is no wider type"
        count = int((~x.isfinite()).sum())
        raise SourceError(
            f"layer {layer.index} {layer.module} of {self.checkpoint.name}: its inputs hold {count} NaN or Inf, with "
            f"the model in {dtype}. {remedy}."
        )

    def _stored_not_finite(self) -> str | None:
        """The name of a stored tensor with NaN or Inf among those that were loaded, if there is one."""
        for name in self.checkpoint.names:
            layer = LAYER_NAME.search(name)
            if not (EMBEDDING_NAME.search(name) or (layer and int(layer[1]) <= self.decoder.last)):
                continue
            values = self.checkpoint.read([name])[name]
            if values.is_floating_point() and not bool(values.isfinite().all()):
                return name
        return None

    def _finish(self, group: list[LayerConfig], writer: ShardWriter) -> None:
        files = writer.finish()
        self.resolved.check_unchanged()
        for layer in group:
            folder = self.resolved.layer_folder(layer)
            weight = save_tensors(folder / WEIGHT_NAME, {"weight": self.decoder.weight(layer)})
            manifest = self._manifest(layer, writer, {WEIGHT_NAME: weight, **files})
            (folder / PARTIAL_NAME).unlink(missing_ok=True)
            write_sealed(folder / JOURNAL_NAME, manifest)
            os.replace(folder / JOURNAL_NAME, folder / MANIFEST_NAME)  # so that none of the two is left over

    def _manifest(self, layer: LayerConfig, writer: ShardWriter, files: dict[str, Entry]) -> dict[str, Any]:
        data = self.config.data
        return {
            "capture_version": CAPTURE_VERSION,
            "key": self.resolved.layer_folder(layer).name.rpartition("-")[2],
            "layer": asdict(layer),
            "data": _plain(asdict(data)) | {"path": None, "calibration_tokens": None},
            "seed": self.config.seed,
            "source": self._source(str(writer.layout.dtype).removeprefix("torch.")),
            "tokens": {split: writer.rows.get(split, 0) for split in SPLITS},
            **({"routed": True} if writer.layout.routed else {}),
            "activations": self.config.cache.activations,
            "files": files,
            "shards": writer.shards,
        }

    def _source(self, dtype: str) -> dict[str, Any]:
        """The fields of SourceInfo that a manifest keeps."""
        model = self.resolved.model
        assert model is not None
        return {
            "model": model.name,
            "model_revision": model.revision,
            "model_origin": self.config.model.origin,
            "tokenizer": model.tokenizer,
            "dtype": dtype,
            "data": self.sequences.data,
            "data_hash": self.sequences.data_hash,
            "data_split": self.sequences.data_split,
            "sequences": self.sequences.count,
        }


class _Keeper:
    """Saves an unfinished capture when it is interrupted, and regularly, in at most a twentieth of the time."""

    def __init__(self, writers: Sequence[ShardWriter]) -> None:
        self.writers = writers
        self.next = time.monotonic() + KEEP_SECONDS

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None and not isinstance(error, (OSError, SourceError)):
            self._keep()

    def tick(self) -> None:
        started = time.monotonic()
        if started >= self.next:
            self._keep()
            ended = time.monotonic()
            self.next = ended + max(KEEP_SECONDS, 20 * (ended - started))

    def _keep(self) -> None:
        for writer in self.writers:
            writer.keep()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, str) else value for key, value in values.items()}
