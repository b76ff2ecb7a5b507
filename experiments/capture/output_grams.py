"""Gram matrices of the loss's gradients at the outputs of linear modules, summed in the pass that gives loss weights.

    G = Σ_t Σ_n g_tn g_tnᵀ        g_tn = ∂/∂y_t Σ_s −log p(ŷ_sn),   ŷ_sn drawn from the model's own p

y [tokens, out_features] is a module's output, n counts the drawn labels. G ⊗ H, with H the weighted Hessian of the
inputs, approximates the curvature of the loss in the module's weight (Kronecker-factored: Martens and Grosse 2015,
arXiv:1503.05671; two-sided Hessians for rounding: Tseng et al. 2025, arXiv:2505.22988). Only the relation between the
elements of G matters, so it is neither divided by tokens nor by labels.

A piece of the text has sums of its own. Those of all pieces are added in the order of the pieces, so the bytes do not
depend on which process computed which piece. The totals are in main memory, and are saved at the end and now and then.
Where main memory has no room for them, they are on disk, and each piece is added there. Files, beside the pieces'
weights:
outputs-00009-00007.safetensors   layer_name → float32 [out_features, out_features] of nine pieces and decoder layer 7
partial-00002-00007.safetensors   the same of piece 2, by one of several processes, until totals with it are saved
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from experiments.capture.gradients import layer_name, matmul
from experiments.capture.store import Entry, load_tensors, save_tensors
from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.sources.decoder import Decoder
from experiments.sources.modules import linear_modules

SAVE_SECONDS = 60.0  # at least, between two saves of the totals
SAVE_SHARE = 20  # times what a save took, at least, between two saves: they cost 5 % at most
MEMORY_SHARE = 2  # the available main memory is this many times what the totals take, at least
Parts = Iterator[tuple[int, dict[str, Tensor]]]  # decoder layer, and layer_name → Gram matrix on the CPU
FILES = re.compile(r"(?:partial|outputs)-\d{5,}-(?P<layer>\d{5,})\.safetensors")


class OutputSums:
    """The sums of one piece, on the decoder's device. sums: layer_name → float32 [out_features, out_features]."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.layers = [
            {layer_name(LayerConfig(index, path)) for path, _ in linear_modules(layer)}
            for index, layer in enumerate(decoder.stack)
        ]
        self.names = set().union(*self.layers)
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        """gradient: [tokens, out_features] at an output. Those of fused experts are left out."""
        if name not in self.names:
            return
        gradient = gradient.float()
        with matmul("float32"):
            if name in self.sums:
                self.sums[name].addmm_(gradient.T, gradient)
            else:
                self.sums[name] = gradient.T @ gradient

    def parts(self, names: Collection[str]) -> Parts:
        """Those of the modules `names`, by decoder layer, on the CPU. Raises SourceError for overflow."""
        for index, own in enumerate(self.layers):
            grams = {name: self.sums[name] for name in sorted(own.intersection(names, self.sums))}
            for name, gram in grams.items():
                if not _is_finite(gram):
                    raise SourceError(
                        f"{self.decoder.name}: squares of the loss's gradients at {name} are beyond float32. Use "
                        "hessian=loss."
                    )
            if grams:
                yield index, {name: gram.cpu() for name, gram in grams.items()}


def _is_finite(gram: Tensor) -> bool:
    """On the gram's device, without a matrix of its size: NaN is its own least and largest value."""
    return bool(torch.stack(torch.aminmax(gram)).isfinite().all())


def save_parts(folder: Path, piece: int, parts: Parts) -> dict[str, Entry]:
    """Writes the sums of a piece, to be added later."""
    entries = {}
    for index, grams in parts:
        file = f"partial-{piece:05d}-{index:05d}.safetensors"
        entries[file] = save_tensors(folder / file, grams)
    return entries


def read_parts(folder: Path, files: Iterable[str]) -> Parts:
    """What `save_parts` wrote."""
    for file in files:
        yield _layer_of(file), load_tensors(folder / file)


def check_fits(decoder: Decoder) -> None:
    """Raises SourceError if the sums of a piece exceed the free memory of the decoder's device."""
    need, free = bytes_of(decoder), free_bytes(decoder.device)
    if need > free:
        raise SourceError(
            f"hessian.outputs=true: the Gram matrices of the outputs of {decoder.name} take {need / 2**30:.1f} GiB "
            f"({need} bytes), and {decoder.device} has {free / 2**30:.1f} GiB free. Use hessian=loss."
        )


def has_room(decoder: Decoder) -> bool:
    """Whether main memory has room for the totals. It holds the sums of a piece, too, if the decoder's device is the
    CPU."""
    need = bytes_of(decoder) * (2 if decoder.device.type == "cpu" else 1)
    return MEMORY_SHARE * need <= free_bytes(torch.device("cpu"))


def bytes_of(decoder: Decoder) -> int:
    """4 Σ N² over the decoder's linear modules: the bytes of all sums."""
    shapes = [t.as_matrix(t.module.weight).shape for layer in decoder.stack for _, t in linear_modules(layer)]  # type: ignore[arg-type]
    return sum(4 * shape[0] ** 2 for shape in shapes)


def free_bytes(device: torch.device) -> int:
    """Bytes that a process can still allocate on the device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    import psutil

    return int(psutil.virtual_memory().available)


@dataclass(frozen=True)
class Totals:
    """The sums over the first pieces, on disk. pieces and sequences: their number. files: of the decoder layers, with
    their entries."""

    pieces: int = 0
    sequences: int = 0
    files: Mapping[str, Entry] = field(default_factory=dict)

    def remove_others(self, folder: Path, partial: Collection[str] = ()) -> None:
        """Removes the files of all sums but these and `partial`."""
        for path in folder.glob("*.safetensors"):
            if FILES.fullmatch(path.name) and path.name not in self.files and path.name not in partial:
                path.unlink()


class RunningTotals:
    """The totals while pieces are added. saved: those on disk. pieces: number of those that are added.

    in_memory: the totals are in main memory, and `save` writes them. Else `add` does, and memory holds one layer.
    """

    def __init__(self, folder: Path, saved: Totals, in_memory: bool) -> None:
        self.folder, self.saved, self.in_memory = folder, saved, in_memory
        self.pieces, self.sequences = saved.pieces, saved.sequences
        self.grams: dict[int, dict[str, Tensor]] | None = None  # None: those of `saved`
        self.next = time.monotonic() + SAVE_SECONDS

    def add(self, sequences: int, parts: Parts) -> None:
        """Adds the next piece. The first one's matrices become the totals, in place."""
        added = ((index, total) for index, grams in parts if (total := self._with(index, grams)))
        pieces, sequences = self.pieces + 1, self.sequences + sequences
        if self.in_memory:
            self.grams = dict(added)
        else:
            self.saved = _write(self.folder, pieces, sequences, added)
        self.pieces, self.sequences = pieces, sequences

    @property
    def is_due(self) -> bool:
        """Whether the last save, or the start, is long enough ago for `save`."""
        return time.monotonic() >= self.next

    def save(self) -> None:
        """Write the totals, in new files, unless they are on disk."""
        if self.grams is None or self.pieces == self.saved.pieces:
            return
        started = time.monotonic()
        self.saved = _write(self.folder, self.pieces, self.sequences, self.grams.items())
        ended = time.monotonic()
        self.next = ended + max(SAVE_SECONDS, SAVE_SHARE * (ended - started))

    def _with(self, index: int, grams: dict[str, Tensor]) -> dict[str, Tensor]:
        """A layer's totals with a piece's sums `grams`. A module has one if every piece has its sums."""
        if not self.pieces:
            return grams
        before = self._before(index)
        return {name: before[name].add_(gram) for name, gram in grams.items() if name in before}

    def _before(self, index: int) -> dict[str, Tensor]:
        if self.grams is not None:
            return self.grams.get(index, {})
        file = _total_file(self.saved.pieces, index)
        saved = load_tensors(self.folder / file) if file in self.saved.files else {}
        # They are mapped: a removed file would keep its space on the disk.
        return {name: gram.clone() for name, gram in saved.items()} if self.in_memory else saved


def _write(folder: Path, pieces: int, sequences: int, layers: Iterable[tuple[int, dict[str, Tensor]]]) -> Totals:
    files = {}
    for index, grams in layers:
        file = _total_file(pieces, index)
        files[file] = save_tensors(folder / file, grams)
    return Totals(pieces, sequences, files)


def by_layer(folder: Path, files: Iterable[str]) -> dict[int, Path]:
    """Decoder layer → its file, of the files of Totals."""
    return {_layer_of(file): folder / file for file in files}


def _total_file(pieces: int, index: int) -> str:
    return f"outputs-{pieces:05d}-{index:05d}.safetensors"


def _layer_of(file: str) -> int:
    match = FILES.fullmatch(file)
    assert match is not None
    return int(match["layer"])
