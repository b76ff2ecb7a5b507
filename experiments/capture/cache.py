"""Reads captured layers from their folders. A damaged file is detected by its sha256."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from experiments.capture.inputs import LayerInputs, SourceInfo
from experiments.capture.store import GRAM_NAME, WEIGHT_NAME, is_intact, load_tensors
from experiments.files import SourceError, one_line, read_sealed
from experiments.sources.bundles import CAPTURE_VERSION, MANIFEST_FIELDS, MANIFEST_NAME

log = logging.getLogger(__name__)

Manifest = dict[str, Any]


def open_layer(folder: Path, activations: bool, rebuild: Callable[[], None]) -> LayerInputs | None:
    """The cached layer, or None if it is missing, incomplete or damaged.

    activations: whether its inputs are needed, too. rebuild: captures it again if a shard is found damaged on reading.
    """
    manifest = complete_manifest(folder, activations)
    return None if manifest is None else _inputs(folder, manifest, rebuild)


def open_bundle(folder: Path, manifest: Manifest) -> LayerInputs:
    """The layer of a bundle. Raises SourceError for a damaged file."""
    problem = _problem(folder, manifest, shards=False)
    if problem:
        raise SourceError(f"model.path={folder}: {problem}. Copy the bundle again.")
    try:
        return _inputs(folder, manifest, rebuild=None)
    except (KeyError, TypeError) as error:  # whole files, but not those that a capture writes
        raise SourceError(f"model.path={folder} is no captured layer ({error!r}). Copy the bundle again.") from None


def complete_manifest(folder: Path, activations: bool) -> Manifest | None:
    """The manifest of a complete cached layer, else None."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s is damaged (%s); capturing it again", folder / MANIFEST_NAME, one_line(error))
        return None
    try:
        problem = _problem(folder, manifest, shards=activations)
    except (KeyError, TypeError, AttributeError):
        problem = f"{MANIFEST_NAME} is damaged"
    if problem:
        log.warning("%s: %s; capturing it again", folder, problem)
        return None
    return None if activations and not manifest["activations"] else manifest


def _read_manifest(folder: Path) -> Manifest:
    return read_sealed(folder / MANIFEST_NAME)


def _problem(folder: Path, manifest: Manifest, shards: bool) -> str | None:
    """Describes what is wrong with a captured layer. Weight and Gram matrices are hashed here, shards when read."""
    if manifest.get("capture_version") != CAPTURE_VERSION:
        return f"capture version {manifest.get('capture_version')} is not {CAPTURE_VERSION}"
    if missing := MANIFEST_FIELDS - manifest.keys():
        return f"{MANIFEST_NAME} has no {min(missing)}"
    for name in (GRAM_NAME, WEIGHT_NAME):
        if name not in manifest["files"]:
            return f"{MANIFEST_NAME} lists no {name}"
    for name, entry in manifest["files"].items():
        if not is_intact(folder / name, entry):
            return f"{name} is missing or damaged"
    for name, entry in manifest["shards"].items() if shards else ():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return f"{name} is missing or cut short"
    return None


def _inputs(folder: Path, manifest: Manifest, rebuild: Callable[[], None] | None) -> LayerInputs:
    grams = load_tensors(folder / GRAM_NAME)
    return LayerInputs(
        weight=load_tensors(folder / WEIGHT_NAME)["weight"],
        gram_calibration=grams["calibration"],
        gram_heldout=grams.get("heldout"),
        tokens_calibration=manifest["tokens"]["calibration"],
        tokens_heldout=manifest["tokens"]["heldout"],
        provenance=SourceInfo(**manifest["source"], cache_key=manifest["key"]),
        _read=_Shards(folder, manifest, rebuild).read,
        routed=manifest.get("routed", False),
    )


@dataclass(frozen=True)
class _Shards:
    """The shards of one captured layer. rebuild: captures them again; None for a bundle."""

    folder: Path
    manifest: Manifest
    rebuild: Callable[[], None] | None

    def read(self, split: str) -> Iterator[Tensor]:
        """The inputs [tokens, in_features], shard by shard. Raises SourceError if they were not kept."""
        if not self.manifest["activations"]:
            raise SourceError(
                f"{self.folder} has only Gram matrices. Capture with cache.activations=true to read the inputs."
            )
        shards = self.manifest["shards"]
        for name in sorted(shards):
            if shards[name]["split"] != split:
                continue
            path = self.folder / name
            if not is_intact(path, shards[name]):
                shards = self._again(path)
            yield load_tensors(path)["inputs"]

    def _again(self, damaged: Path) -> dict[str, Any]:
        """Capture the layer again. Returns the shards of the new manifest."""
        if self.rebuild is None:
            raise SourceError(f"{damaged} is missing or damaged. Copy the bundle again.")
        log.warning("%s is missing or damaged; capturing it again", damaged)
        self.rebuild()
        return dict(_read_manifest(self.folder)["shards"])
