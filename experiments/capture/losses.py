"""Caches the loss weights of a model on a text. One backward pass gives those of all its layers.

The files in their folder:
weights-00000.safetensors …  layer_name → [tokens, groups] float32, whole sequences, PIECE_TOKENS tokens per piece
manifest.json                model and settings, with the sha256 of every piece; written last
capture.json                 the finished pieces, until the manifest lists them
weights-00000.json …         a finished piece of one of several processes, until the manifest lists it
outputs-…, partial-…         with hessian.outputs=true, the Gram matrices of output_grams.py

Only calibration sequences are used. An interrupted pass continues at the first missing piece. A damaged piece is
computed again, with the same bytes. Of two processes that need the same weights, one computes them. Memory holds one
piece and, with hessian.outputs=true, the sums of the Gram matrices over the pieces, where it has room for them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.capture.gradients import layer_name, loss_weights, matmul
from experiments.capture.output_grams import (
    OutputSums,
    RunningTotals,
    Totals,
    by_layer,
    check_fits,
    has_room,
    read_parts,
    save_parts,
)
from experiments.capture.progress import BAR, ticking, waiting
from experiments.capture.store import JOURNAL_NAME, Entry, is_intact, save_tensors
from experiments.capture.tokens import token_sequences
from experiments.capture.writing import lock
from experiments.config import LayerConfig
from experiments.files import SourceError, read_sealed, remove_orphans, write_sealed, writing
from experiments.sources.bundles import MANIFEST_NAME
from experiments.sources.decoder import Decoder
from experiments.sources.identity import losses_folder
from experiments.sources.resolved import Resolved

log = logging.getLogger(__name__)

PIECE_TOKENS = 1 << 15
BATCH_TOKENS = 1024  # a batch keeps the activations of all layers for the backward pass
LOGIT_BYTES = 1 << 28  # size limit of a batch's logits
Manifest = dict[str, Any]  # of a pass; so is its journal
SHARE_SUFFIX = ".json"  # of a piece's entry, until the journal has it
GRAPH_BYTES = 4 << 30  # a batch's activations beyond this are computed again in the backward pass, layer by layer


def graph_bytes(config: Any, tokens: int, seq_len: int) -> int:
    """About the bytes that the backward pass needs of the layers' activations, for a batch of `tokens`; float32.

    config: the model's, of transformers. Attention counts with its probabilities, as on a GPU.
    """
    text = config.get_text_config(decoder=True)
    hidden, heads = int(getattr(text, "hidden_size", 0)), int(getattr(text, "num_attention_heads", 0))
    inner = int(getattr(text, "intermediate_size", 0) or 4 * hidden)
    layers = int(getattr(text, "num_hidden_layers", 1))
    return 4 * tokens * layers * (12 * hidden + 3 * inner + 3 * heads * seq_len)


def loss_bytes(config: Any, parameters: int, seq_len: int) -> int:
    """About the memory, in bytes, of the loss weights of a model: parameters, a batch's activations and its logits.

    parameters: their number. A batch is one sequence, if not more fit.
    """
    text = config.get_text_config(decoder=True)
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    graph = graph_bytes(config, seq_len, seq_len)
    if graph > GRAPH_BYTES:  # the inputs of all layers, and the activations of one
        graph = 4 * seq_len * layers * int(getattr(text, "hidden_size", 0)) + 2 * graph // layers
    return 4 * parameters + graph + 3 * 4 * seq_len * int(text.vocab_size)


def load_loss_weights(resolved: Resolved, layer: LayerConfig) -> Tensor:
    """The weights [calibration tokens, groups] of a layer, float32 on the CPU; computed if the cache lacks them.

    Raises SourceError for a module without loss weights.
    """
    return open_loss_weights(resolved).of(layer)


def open_loss_weights(resolved: Resolved) -> LossPieces:
    """The weights of all layers, each read when it is asked for; computed if the cache lacks them or one is damaged."""
    folder = losses_folder(resolved.config, resolved.sources)
    with lock(folder):
        remove_orphans(folder)
        manifest = _complete(folder)
        if manifest is None:
            with writing(resolved.config.cache.folder):
                manifest = _Pass(resolved, folder).run()
    paths = tuple(folder / name for name in sorted(manifest["pieces"]))
    return LossPieces(paths, resolved.config.model.label, by_layer(folder, _totals(manifest).files))


def compute_share(resolved: Resolved, process: int, processes: int) -> None:
    """Compute this process's part of the pieces that the cache lacks, one in `processes`.

    When every process has done so, open_loss_weights computes nothing. A piece has the same bytes whoever makes it.
    """
    folder = losses_folder(resolved.config, resolved.sources)
    if _complete(folder) is None:
        with writing(resolved.config.cache.folder):
            _Pass(resolved, folder).run_share(process, processes)


@dataclass(frozen=True)
class LossPieces:
    """The files with the loss weights of a model's layers. model: its name in errors. outputs: decoder layer → the file
    with the Gram matrices of its outputs, if there are any."""

    paths: tuple[Path, ...]
    model: str
    outputs: Mapping[int, Path] = field(default_factory=dict)

    def of(self, layer: LayerConfig) -> Tensor:
        """[calibration tokens, groups], float32 on the CPU. Raises SourceError for a module without loss weights."""
        return torch.cat([_read(path, layer, self.model) for path in self.paths])

    def output_gram(self, layer: LayerConfig) -> Tensor | None:
        """G [out_features, out_features], float32 on the CPU, see output_grams.py. None for a module without."""
        from safetensors import safe_open

        name = layer_name(layer)
        if layer.index not in self.outputs:
            return None
        with safe_open(self.outputs[layer.index], framework="pt") as file:
            return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (no mapping)


def _complete(folder: Path) -> Manifest | None:
    """The manifest of a complete pass; else None."""
    try:
        manifest: Manifest = read_sealed(folder / MANIFEST_NAME)
        damaged = _damaged(folder, {**manifest["pieces"], **_totals(manifest).files})
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if damaged is not None:
        log.warning("%s is missing or damaged; computing it again", folder / damaged)
        return None
    return manifest


def _damaged(folder: Path, files: Mapping[str, Entry]) -> str | None:
    """The first file that is not what its entry says."""
    return next((name for name, entry in files.items() if not is_intact(folder / name, entry)), None)


def _totals(journal: Manifest) -> Totals:
    """The Gram matrices of outputs that a manifest or a journal lists."""
    return Totals(**journal["outputs"]) if "outputs" in journal else Totals()


def _read(path: Path, layer: LayerConfig, model: str) -> Tensor:
    from safetensors import safe_open

    name = layer_name(layer)
    with safe_open(path, framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 (no mapping)
            raise SourceError(
                f"layer.module={layer.module}: {model} has no loss weights of it, since it is an expert or called more "
                "than once per pass. Use hessian=output."
            )
        weights: Tensor = file.get_tensor(name)
    return weights


class _Pass:
    """The backward pass over the calibration text. The model is loaded when the first missing piece is reached."""

    def __init__(self, resolved: Resolved, folder: Path) -> None:
        from experiments.sources.checkpoints import open_checkpoint

        self.resolved, self.config, self.folder = resolved, resolved.config, folder
        self.checkpoint = open_checkpoint(self.config.model, self.config.cache.folder)
        self.ids = token_sequences(self.config, self.checkpoint.tokenizer()).ids["calibration"]
        self.finished = _finished_before(folder)
        self.totals = self._running_totals() if self.config.hessian.outputs else None
        self.shares = False  # this is one of several processes
        self.decoder: Any = None

    @property
    def batch(self) -> int:
        """Sequences per batch. A piece has whole batches, so that a single one can be computed again, bitwise equal."""
        vocabulary = self.checkpoint.config.get_text_config(decoder=True).vocab_size
        return max(1, min(BATCH_TOKENS, LOGIT_BYTES // (4 * vocabulary)) // self.config.data.seq_len)

    @property
    def piece(self) -> int:
        """Sequences per piece."""
        return max(self.batch, PIECE_TOKENS // self.config.data.seq_len // self.batch * self.batch)

    def run(self) -> Manifest:
        """Compute the missing pieces and write the manifest. Returns it."""
        from tqdm import tqdm

        total, name = len(self.ids), self.checkpoint.name
        if not sys.stderr.isatty():  # then tqdm shows no bar
            print(f"Computing the loss weights of all layers of {name}: {total} sequences", flush=True)
        pieces: dict[str, Entry] = {}
        with ticking(tqdm(total=total, desc=f"loss weights {name}", bar_format=BAR, disable=None)) as bar:
            for number, (file, first) in enumerate(self._files().items()):
                pieces[file] = self._piece(number, file, first, bar)
                if self.totals is not None and (self.totals.is_due or first + self.piece >= total):
                    self.totals.save()
                self._write_journal()
        return self._finish(pieces)

    def _write_journal(self) -> None:
        """List what is on disk. Then the sums of the pieces that are in the saved totals are not needed any more."""
        journal: Manifest = {"pieces": self.finished}
        if self.totals is not None:
            for file in list(self._files())[: self.totals.saved.pieces]:
                self.finished.get(file, {}).pop("outputs", None)
            journal["outputs"] = asdict(self.totals.saved)
        write_sealed(self.folder / JOURNAL_NAME, journal)
        if self.totals is not None:
            waits = [name for entry in self.finished.values() for name in entry.get("outputs", {})]
            self.totals.saved.remove_others(self.folder, waits)

    def run_share(self, process: int, processes: int) -> None:
        """Compute a part of the pieces, each with its entry beside it. The journal stays as it is."""
        from tqdm import tqdm

        self.shares = True
        files = list(enumerate(self._files().items()))[process::processes]
        with ticking(tqdm(total=len(self.ids) // processes, bar_format=BAR, disable=True if process else None)) as bar:
            for number, (file, first) in files:
                entry = self._piece(number, file, first, bar)
                write_sealed((self.folder / file).with_suffix(SHARE_SUFFIX), entry)

    def _files(self) -> dict[str, int]:
        """Name of each piece → its first sequence."""
        starts = range(0, len(self.ids), self.piece)
        return {f"weights-{first // self.piece:05d}.safetensors": first for first in starts}

    def _running_totals(self) -> RunningTotals:
        decoder = Decoder(self.checkpoint, [], torch.float32, self.resolved.device)  # on the meta device
        return RunningTotals(self.folder, self._totals_before(), has_room(decoder))

    def _totals_before(self) -> Totals:
        """The Gram matrices of outputs of the first pieces, if an earlier pass left them."""
        for name in (JOURNAL_NAME, MANIFEST_NAME):
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                totals = _totals(read_sealed(self.folder / name))
                same = totals.sequences == min(totals.pieces * self.piece, len(self.ids))
                return totals if same and _damaged(self.folder, totals.files) is None else Totals()
        return Totals()

    def _piece(self, number: int, file: str, first: int, bar: Any) -> Entry:
        count = min(self.piece, len(self.ids) - first)
        about = {"first_sequence": first, "sequences": count}
        known = self.finished.get(file, {})
        if {key: known.get(key) for key in about} == about and self._has(number, file, known):
            if self._adds(number) and self.totals is not None and not self.shares:
                self.totals.add(count, read_parts(self.folder, known["outputs"]))
            bar.update(count)
            return known
        sums = OutputSums(self._decoder()) if self._adds(number) else None
        batches = [self._weights(start, bar, sums) for start in range(first, first + count, self.batch)]
        names = sorted(set.intersection(*(set(batch) for batch in batches)))
        tensors = {name: torch.cat([batch[name] for batch in batches]) for name in names}
        entry: Entry = {**about, **save_tensors(self.folder / file, tensors)}
        if sums is not None and self.shares:
            entry["outputs"] = save_parts(self.folder, number, sums.parts(names))
        elif sums is not None and self.totals is not None:
            self.totals.add(count, sums.parts(names))
        self.finished[file] = entry
        return entry

    def _adds(self, number: int) -> bool:
        """Whether the Gram matrices of a piece's outputs are wanted and not yet in the totals."""
        return self.totals is not None and number >= self.totals.pieces

    def _has(self, number: int, file: str, known: Entry) -> bool:
        """Whether a piece's files are there. known: its entry."""
        if not is_intact(self.folder / file, known):
            return False
        if not self._adds(number):
            return True
        own = known.get("outputs", {})
        return bool(own) and _damaged(self.folder, own) is None

    def _decoder(self) -> Decoder:
        if self.decoder is None:
            from experiments.sources.decoder import build_whole

            with waiting(f"reading {self.checkpoint.name}"):
                self.decoder = build_whole(self.checkpoint, "float32", self.resolved.device)
            if self.totals is not None:
                check_fits(self.decoder)
        return self.decoder

    def _weights(self, first: int, bar: Any, sums: OutputSums | None) -> dict[str, Tensor]:
        """The weights of the batch that begins with sequence `first`. sums: to which its outputs are added."""
        decoder = self._decoder()
        ids = self.ids[first : first + self.batch]
        draws = torch.stack([self._draws(first + i) for i in range(len(ids))])
        recompute = graph_bytes(self.checkpoint.config, ids.numel(), ids.shape[1]) > GRAPH_BYTES
        with matmul(self.config.hessian.matmul):
            listen = None if sums is None else sums.add
            weights = loss_weights(decoder, ids, draws, self.config.hessian.groups, recompute, listen)
        bar.update(len(ids))
        return weights

    def _draws(self, sequence: int) -> Tensor:
        """[samples, seq_len] from [0, 1). They depend only on the seed and the sequence's number."""
        generator = torch.Generator("cpu").manual_seed(self.config.seed * 1_000_003 + sequence)
        shape = (self.config.hessian.samples, self.config.data.seq_len)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")

    def _finish(self, pieces: dict[str, Entry]) -> Manifest:
        self.resolved.check_unchanged()
        manifest: Manifest = {
            "key": self.folder.name.rpartition("-")[2],
            "model": self.checkpoint.name,
            "groups": self.config.hessian.groups,
            "samples": self.config.hessian.samples,
            "seed": self.config.seed,
            "tokens": self.ids.numel(),
            "pieces": pieces,
        }
        if self.totals is not None:
            manifest["outputs"] = asdict(self.totals.saved)
        write_sealed(self.folder / JOURNAL_NAME, manifest)
        for file in pieces:
            (self.folder / file).with_suffix(SHARE_SUFFIX).unlink(missing_ok=True)
        os.replace(self.folder / JOURNAL_NAME, self.folder / MANIFEST_NAME)  # last, so that nothing else is left over
        return manifest


def _finished_before(folder: Path) -> dict[str, Entry]:
    return _in_journal(folder) | _shared(folder)


def _shared(folder: Path) -> dict[str, Entry]:
    """The pieces of compute_share."""
    entries: dict[str, Entry] = {}
    for path in sorted(folder.glob(f"weights-*{SHARE_SUFFIX}")):
        with suppress(FileNotFoundError, ValueError, TypeError):
            entries[path.with_suffix(".safetensors").name] = dict(read_sealed(path))
    return entries


def _in_journal(folder: Path) -> dict[str, Entry]:
    for name in (JOURNAL_NAME, MANIFEST_NAME):
        try:
            return dict(read_sealed(folder / name)["pieces"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            continue
    return {}
