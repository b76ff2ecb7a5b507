"""Writes a finished folder of quantkit in the layout of an engine.

The export is a function of that folder's bytes, one shard at a time, so that memory holds one decoder layer. It is
written in `.FOLDER.partial`, checked there (selfcheck.py), and renamed: FOLDER is finished or does not exist. An
interrupted export starts again and gives the same bytes. A finished export is read again before it is taken for one:
if a byte of it has changed since, it is written again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.capture.store import save_tensors
from experiments.files import SourceError, listing, sealed, sync, write_atomically
from experiments.model import gguf_file
from experiments.model.card import About, card, evaluations_of
from experiments.model.checkpoint import FolderLock
from experiments.model.exportable import check_whole_groups
from experiments.model.selfcheck import Verdict, check_export
from experiments.model.stored_names import left_out, linear_layers, skeleton, stored_matrices
from experiments.sources.exported import CARD_NAME, EXPORT_NAME, damages, described_files, read_export
from experiments.sources.quantized import QuantizedCheckpoint, alone
from quantkit import QuantizedTensor
from quantkit.layouts import Layout, check_fused, get_layout

log = logging.getLogger(__name__)

INDEX_NAME = "model.safetensors.index.json"
OWN_FILES = ("config.json", INDEX_NAME)
# compressed-tensors and gpt-oss decode to bfloat16, whatever the model's dtype is.
DECODED = {"compressed_tensors": "bfloat16", "gpt_oss": "bfloat16"}


def export(
    source: QuantizedCheckpoint, folder: Path, layout_name: str, about: About | None = None, force: bool = False
) -> Verdict:
    """Write `folder`, and return what the self-check found. force: write a finished export of this model again.

    A finished one whose bytes have changed is written again, too, with a warning. Raises ValueError for what the layout
    cannot express, and SourceError for a folder with anything else in it, and for an export that the self-check finds
    wrong. A second process that exports to the same folder waits for the first.
    """
    layout = get_layout(layout_name)
    folder = folder.expanduser().resolve()
    with FolderLock(folder):
        finished = read_verdict(folder)
        if finished is None or (finished.identity, finished.layout) != (source.identity, layout.name):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                what = listing(folder) if folder.is_dir() else "a file"
                raise SourceError(
                    f"{folder} holds {what}, and no export of this model. Name another folder, or delete it."
                )
        elif changed := _damages(folder, source):
            log.warning("%s is damaged and is written again: %s", folder, "; ".join(changed[:3]))
        elif not force:
            for left in _beside(folder):  # of a forced export that was interrupted
                shutil.rmtree(left, ignore_errors=True)
            return finished
        return _export(source, folder, layout, about or About())


def _beside(folder: Path) -> tuple[Path, Path]:
    """The folder's names while it is unfinished, and when it is replaced."""
    return folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.replaced")


def _export(source: QuantizedCheckpoint, folder: Path, layout: Layout, about: About) -> Verdict:
    """Write the folder, in the place of an older one."""
    _refuse(source, layout)
    partial, replaced = _beside(folder)
    for left in (partial, replaced):
        shutil.rmtree(left, ignore_errors=True)
    partial.mkdir(parents=True)
    _write(source, partial, layout)
    verdict = check_export(partial, layout, source)
    for warning in verdict.warnings:
        log.warning("%s", warning)
    if not verdict.ok:
        raise SourceError(
            f"{partial} is not what was quantized: {'; '.join(verdict.problems[:3])}. It is not finished."
        )
    about = replace(about, tables=about.tables or evaluations_of(folder / CARD_NAME))
    write_atomically(partial / CARD_NAME, card(source, verdict.to_dict(), about))
    told = verdict.to_dict() | {"about": source.about, "files": described_files(partial)}
    write_atomically(partial / EXPORT_NAME, json.dumps(sealed(told), indent=1) + "\n")
    for path in (*partial.iterdir(), partial):
        sync(path)
    if folder.is_dir():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    return verdict


def read_verdict(folder: Path) -> Verdict | None:
    """Of a finished export; None if the folder is none."""
    told = read_export(folder)
    try:
        return None if told is None else Verdict(**{field.name: told[field.name] for field in fields(Verdict)})
    except KeyError:
        return None


def _damages(folder: Path, source: QuantizedCheckpoint) -> list[str]:
    told = read_export(folder)
    return [] if told is None else damages(folder, told, source.cache)


def _refuse(source: QuantizedCheckpoint, layout: Layout) -> None:
    """Raises ValueError for a model that the layout cannot express, before anything is written."""
    if layout.name == "gguf":
        gguf_file.refuse(source)
        return
    model = skeleton(source.folder)
    check_whole_groups(layout, source.names, linear_layers(model))
    scales: dict[str, QuantizedTensor] = {}
    for name in source.names:
        quantized = source.quantized(name)
        layout.check(quantized.format, quantized.block_size)
        _tensors(layout, model, name, quantized)
        scales[name] = _without_codes(quantized)
    if layout.shared_scales:
        check_fused(scales)


def _without_codes(quantized: QuantizedTensor) -> QuantizedTensor:
    """Its global scale without its codes, so that memory holds those of one weight."""
    return replace(quantized, codes=quantized.codes[:0].clone(), scales=quantized.scales[:0].clone())


def _write(source: QuantizedCheckpoint, folder: Path, layout: Layout) -> None:
    if layout.name == "gguf":
        gguf_file.write(source, folder)
        return
    model = skeleton(source.folder)
    weight_map: dict[str, str] = {}
    total = 0
    for file, tensors in _shards(source, layout, model):
        save_tensors(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / INDEX_NAME, index)
    _write_configuration(source, folder, layout, left_out(model, source.names))


def _shards(source: QuantizedCheckpoint, layout: Layout, model: Any) -> Any:
    """(file, its tensors by their names), one after the other."""
    where = source.model_names
    for file in sorted(set(where.values())):
        tensors: dict[str, Tensor] = {}
        for name in source.names:
            if where.get(f"{name}.weight", where.get(name)) == file:
                tensors |= _tensors(layout, model, name, source.quantized(name))
        tensors |= {name: source.tensor(name) for name in source.kept if where[name] == file}
        yield file, {name: alone(tensor) for name, tensor in tensors.items()}


def _tensors(layout: Layout, model: Any, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    """The weight's tensors as the model's checkpoints name them."""
    if layout.name == "gpt_oss":
        return layout.to_tensors(name, quantized)
    tensors: dict[str, Tensor] = {}
    for stored, matrix in stored_matrices(model, name, quantized):
        tensors |= layout.to_tensors(stored, matrix)
    return tensors


def _write_configuration(source: QuantizedCheckpoint, folder: Path, layout: Layout, ignored: list[str]) -> None:
    first = source.quantized(source.names[0])
    files = layout.config(first.format, first.block_size, ignored)
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    if layout.name in DECODED:
        config.pop("torch_dtype", None)
        config["dtype"] = DECODED[layout.name]
    _write_json(folder / "config.json", config | files.pop("config.json"))
    for name, entries in files.items():
        _write_json(folder / name, entries)
    for name in source.files:
        if not name.endswith(".safetensors") and name not in OWN_FILES:
            write_atomically(folder / name, (source.folder / name).read_bytes())


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
