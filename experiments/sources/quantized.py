"""Reads quantkit's own checkpoint folder: a whole model with quantized layers. model/checkpoint.py writes it.

model-00001-of-00031.safetensors …   one shard for each decoder layer, and a last one for the rest of the model
model.safetensors.index.json, config.json, tokenizer files     as in the hub's layout
layers.jsonl                         the writer's journal: the layers' records, with their times; nothing depends on it
quantkit.json                        the manifest: every file's size and sha256, and what each tensor is

A quantized matrix P has three tensors: P.codes uint8 [N, K/2], P.scales uint8 [N, K/block_size] and P.global_scale
float32 []. The experts of one fused parameter have P.codes [E, N, K/2], P.scales [E, N, K/block_size] and
P.global_scale [] or [E, 1, 1]. Other tensors are stored under their names in the original checkpoint, bit for bit.

A folder may come from anywhere. Names cannot lead out of it, sizes and hashes are checked before a file is used, and
nothing in it is run. Imports no transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.files import SourceError, one_line, unsealed
from experiments.sources.hashes import file_hashes
from quantkit import FORMATS, QuantizedTensor

MANIFEST_NAME = "quantkit.json"
MANIFEST_VERSION = 1
MANIFEST_BYTES = 1 << 28  # the manifest of the largest model has some MB
QUANT_METHOD = "quantkit"  # in config.json, so that other programs refuse the folder instead of misreading it
PARTS = ("codes", "scales", "global_scale")
AGAIN = "Copy the folder again, or run the command that wrote it again: it redoes what is damaged."

Entry = dict[str, Any]


def is_quantized_folder(folder: Path) -> bool:
    return (folder / MANIFEST_NAME).is_file()


def describe(tensor: QuantizedTensor, transposed: bool = False) -> Entry:
    """The manifest's entry of a quantized matrix, without its file. Raises ValueError for a format without a name.

    transposed: the model stores the matrix as [in_features, out_features].
    """
    if FORMATS.get(tensor.format.name) != tensor.format:
        raise ValueError(f"format {tensor.format.name} is none of {', '.join(FORMATS)}: a checkpoint cannot name it")
    return {
        "shape": list(tensor.shape),
        "format": tensor.format.name,
        "block_size": tensor.block_size,
        "method": tensor.method,
        "nearest_codes": tensor.nearest_codes,
        "transposed": transposed,
    }


def parts_of(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors in which a quantized matrix is stored, on the CPU."""
    return {f"{name}.{part}": alone(getattr(tensor, part)) for part in PARTS}


def alone(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory that it shares with no other, as safetensors wants it."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def assemble(name: str, entry: Entry, read: Callable[[str], Tensor]) -> QuantizedTensor:
    """The quantized matrix `name` from its stored parts. Raises ValueError where they do not fit its entry."""
    tensors = {part: read(f"{name}.{part}") for part in PARTS}
    *rows, columns = (int(size) for size in entry["shape"])
    size = int(entry["block_size"])
    layout = FORMATS.get(entry["format"])
    if layout is None:
        raise ValueError(f"format {entry['format']} is none of {', '.join(FORMATS)}")
    if size < 1 or columns % size or columns % 2:
        raise ValueError(f"{columns} columns are not a whole number of blocks of {size}")
    expected = {"codes": (*rows, columns // 2), "scales": (*rows, columns // size)}
    for part, shape in expected.items():
        found = tensors[part]
        if found.dtype != torch.uint8 or tuple(found.shape) != shape:
            raise ValueError(f"{name}.{part} is {found.dtype} {list(found.shape)}, not uint8 {list(shape)}")
    scale, allowed = tensors["global_scale"], [()] if len(rows) == 1 else [(), (rows[0], 1, 1)]
    if scale.dtype != torch.float32 or tuple(scale.shape) not in allowed:
        raise ValueError(f"{name}.global_scale is {scale.dtype} {list(scale.shape)}, not float32 {list(allowed[-1])}")
    method = entry["method"]
    return QuantizedTensor(
        codes=tensors["codes"],
        scales=tensors["scales"],
        global_scale=scale,
        format=layout,
        block_size=size,
        method=None if method is None else str(method),
        nearest_codes=bool(entry["nearest_codes"]),
    )


def tensor_name(name: str, entry: Entry) -> str:
    """The model's tensor that a quantized matrix replaces: a module's weight, or the fused parameter of experts."""
    return f"{name}.weight" if len(entry["shape"]) == 2 else name


class QuantizedCheckpoint:
    """An open folder. A shard's hash is checked when its first tensor is read.

    about: what the writer noted of method, calibration and model. identity: hash of what determines the folder's bytes.
    names: the quantized matrices. kept: the other tensors.
    """

    def __init__(self, folder: Path | str, cache: Path | None = None) -> None:
        """cache: the folder that keeps hashes between processes. Raises SourceError for a damaged folder."""
        self.folder, self.cache = Path(folder).expanduser(), cache
        self._manifest = self._read_manifest()
        self.about: dict[str, Any] = self._manifest["about"]
        self.identity = str(self._manifest["identity"])
        self._entries: dict[str, Entry] = self._manifest["quantized"]
        self._kept: dict[str, str] = self._manifest["kept"]
        self._made = {tensor_name(name, entry): name for name, entry in self._entries.items()}
        self.names, self.kept = list(self._entries), list(self._kept)
        self._intact: set[str] = set()
        self._check_files()

    def quantized(self, name: str) -> QuantizedTensor:
        """The quantized matrix `name`, such as model.layers.0.self_attn.q_proj, bit for bit. Raises SourceError."""
        if name not in self._entries:
            raise SourceError(f"{self.folder}: {name} is no quantized matrix there; names lists them.")
        entry = self._entries[name]
        with self._open(entry["file"]) as file:
            try:
                return assemble(name, entry, file.get_tensor)
            except Exception as error:  # safetensors has an error class of its own
                raise self._damaged(entry["file"], f"{name}: {one_line(error)}") from None

    def is_transposed(self, name: str) -> bool:
        """Whether the model stores the quantized matrix `name` as [in_features, out_features]."""
        return bool(self._entries[name]["transposed"])

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantized, as stored; or the dequantized weight of that name, float32.

        Raises SourceError for a name that is neither in `kept` nor the model's name of a quantized matrix.
        """
        if name in self._made:
            matrix = self.quantized(self._made[name]).dequantize()
            return matrix.mT.contiguous() if self._entries[self._made[name]]["transposed"] else matrix
        if name not in self._kept:
            raise SourceError(f"{self.folder}: no tensor {name} there; kept and model_names list them.")
        with self._open(self._kept[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
            except Exception as error:
                raise self._damaged(self._kept[name], f"{name}: {one_line(error)}") from None
        return tensor

    @property
    def model_names(self) -> dict[str, str]:
        """Every name that `tensor` takes → the file that holds it."""
        return {name: self._entries[own]["file"] for name, own in self._made.items()} | self._kept

    @property
    def files(self) -> Mapping[str, Entry]:
        """File name → size in bytes and sha256, without the manifest."""
        return dict(self._manifest["files"])

    def verify(self) -> None:
        """Raises SourceError, naming the file, if any byte of the folder differs from what was written."""
        for name in self._manifest["files"]:
            self._check_hash(name)

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST_NAME
        if not path.is_file():
            raise SourceError(
                f"{self.folder}: no finished quantkit checkpoint, {MANIFEST_NAME} is missing. The command that writes "
                "it continues where it stopped."
            )
        try:
            if path.stat().st_size > MANIFEST_BYTES:
                raise ValueError(f"more than {MANIFEST_BYTES} bytes")
            manifest = unsealed(json.loads(path.read_text(encoding="utf-8")))
            if manifest["version"] != MANIFEST_VERSION:
                raise SourceError(
                    f"{path} has version {manifest['version']}, this release reads {MANIFEST_VERSION}. Quantize again."
                )
            _check_manifest(manifest)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, SourceError):
                raise
            raise SourceError(f"{path} is damaged ({one_line(error)}). {AGAIN}") from None
        return dict(manifest)

    def _check_files(self) -> None:
        """Sizes of all files, and the hashes of the small ones, which other programs read."""
        for name, entry in self._manifest["files"].items():
            path = self.folder / name
            if not path.is_file():
                raise SourceError(f"{path} is missing. {AGAIN}")
            if path.stat().st_size != entry["bytes"]:
                raise self._damaged(name, f"{path.stat().st_size} bytes instead of {entry['bytes']}")
            if not name.endswith(".safetensors"):
                self._check_hash(name)

    def _check_hash(self, name: str) -> None:
        if name in self._intact:
            return
        path = self.folder / name
        if file_hashes([path], self.cache)[path] != self._manifest["files"][name]["sha256"]:
            raise self._damaged(name, f"its sha256 is not that of {MANIFEST_NAME}")
        self._intact.add(name)

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        self._check_hash(name)
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise self._damaged(name, one_line(error)) from None

    def _damaged(self, name: str, why: str) -> SourceError:
        return SourceError(f"{self.folder / name} is damaged ({why}). {AGAIN}")


def open_quantized(folder: Path | str, cache: Path | None = None) -> QuantizedCheckpoint:
    """A finished folder of quantkit. Raises SourceError, naming the file, for one that is unfinished or damaged."""
    return QuantizedCheckpoint(folder, cache)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raises an error of any of Python's kinds for a manifest of another shape, or with names that lead elsewhere."""
    for name, entry in manifest["files"].items():
        if name in ("", ".", "..", MANIFEST_NAME) or Path(name).name != name or "\\" in name or "\0" in name:
            raise ValueError(f"{name!r} is no name of a file in the folder")
        int(entry["bytes"]), str(entry["sha256"])
    shards = {name for name in manifest["files"] if name.endswith(".safetensors")}
    holders = [entry["file"] for entry in manifest["quantized"].values()] + list(manifest["kept"].values())
    if (unknown := set(holders) - shards) != set():
        raise ValueError(f"{sorted(unknown)[0]} is not among its files")
    made = [tensor_name(name, entry) for name, entry in manifest["quantized"].items()]
    if len({*made, *manifest["kept"]}) < len(made) + len(manifest["kept"]):
        raise ValueError("a tensor is listed twice")
    for entry in manifest["quantized"].values():
        if len(entry["shape"]) not in (2, 3):
            raise ValueError(f"a matrix of shape {entry['shape']}")
        entry["format"], entry["block_size"], entry["method"], entry["nearest_codes"], entry["transposed"]
    dict(manifest["about"]), str(manifest["identity"])
