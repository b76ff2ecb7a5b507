"""Layer bundles: folders with a captured layer, which need neither the model nor the text.

`capture/store.py` describes the files. This module reads only manifest.json and imports no torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.config import Config, DataConfig, DataSource, LayerConfig, ModelConfig
from experiments.files import SourceError, is_plain_name, listing, one_line, read_sealed
from experiments.sources.hashes import file_hashes

CAPTURE_VERSION = 1  # part of every cache key: raise it when the same configuration captures different values
MANIFEST_NAME = "manifest.json"
MANIFEST_FIELDS = frozenset(
    ("capture_version", "key", "layer", "data", "seed", "source", "tokens", "activations", "files", "shards")
)


def read_bundle_manifest(model: ModelConfig) -> dict[str, Any]:
    """The manifest.json of `model.path`. Raises SourceError for a folder that is no bundle of this version."""
    if model.path is None:
        raise SourceError("model=bundle needs model.path=<folder>: a folder of <cache>/layers, copied whole.")
    folder = Path(model.path).expanduser()
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found = f"found {listing(folder)}" if folder.is_dir() else "no such folder"
        raise SourceError(
            f"model.path={folder}: not a layer bundle, {MANIFEST_NAME} is missing ({found}). Copy a whole folder of "
            "<cache>/layers."
        )
    try:
        manifest = read_sealed(path)
        found = manifest["capture_version"]
        if found == CAPTURE_VERSION and (missing := MANIFEST_FIELDS - manifest.keys()):
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Copy the bundle again.") from None
    if found != CAPTURE_VERSION:
        raise SourceError(
            f"{path}: capture version {found}, this code reads {CAPTURE_VERSION}. Capture the layer again."
        )
    for name in _file_names(path, manifest):
        if not is_plain_name(name):
            raise SourceError(
                f"{path} names the file {name!r:.80}, which is outside of its folder. Copy the bundle again."
            )
    return manifest


def _file_names(path: Path, manifest: dict[str, Any]) -> list[str]:
    """The names of the bundle's files. Raises SourceError for values of other types than a capture writes."""
    for part in ("layer", "data", "source", "tokens", "files", "shards"):
        if not isinstance(manifest[part], dict):
            raise SourceError(f"{path} is damaged ({part} is {manifest[part]!r:.40}). Copy the bundle again.")
    entries = {**manifest["files"], **manifest["shards"]}
    for name, entry in entries.items():
        if not (
            isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        ):
            raise SourceError(f"{path} is damaged (the entry of {name!r:.80}). Copy the bundle again.")
    return list(entries)


def bundle_identity(model: ModelConfig, cache: Path | None = None) -> dict[str, Any]:
    """All that a run on a bundle depends on: the manifest, and the found hashes of files that differ from it.

    So a finished run is not skipped if a file was replaced. Reading such a file is then an error.
    """
    manifest = read_bundle_manifest(model)
    folder = Path(str(model.path)).expanduser()
    listed = {folder / name: entry for name, entry in {**manifest["files"], **manifest["shards"]}.items()}
    hashes = file_hashes((path for path in listed if path.is_file()), cache)
    found = {path.name: hashes.get(path) for path, entry in listed.items() if hashes.get(path) != entry["sha256"]}
    return manifest | ({"found": found} if found else {})


def resolve_bundle(config: Config) -> Config:
    """The configuration with the layer, text and seed with which the bundle was captured.

    Raises SourceError for a configured layer, dtype or seed that is not the bundle's.
    """
    manifest = read_bundle_manifest(config.model)
    layer, data = _layer_and_data(config.model, manifest)
    if config.layer not in (layer, LayerConfig()):
        raise SourceError(
            f"layer.index={config.layer.index} layer.module={config.layer.module}: {config.model.path} is a bundle of "
            f"layer {layer.index} {layer.module}. Leave layer.* out, or copy the bundle of that layer."
        )
    _refuse_other_values(config, manifest)
    data.calibration_tokens = config.data.calibration_tokens  # a choice among the bundle's tokens, made by this run
    return dataclasses.replace(config, layer=layer, data=data, seed=manifest["seed"])


def _layer_and_data(model: ModelConfig, manifest: dict[str, Any]) -> tuple[LayerConfig, DataConfig]:
    """Raises SourceError for values that no configuration takes."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    try:
        layer = LayerConfig(**manifest["layer"])
        data = DataConfig(**{key: value for key, value in manifest["data"].items() if key in known})
        data.source = DataSource(data.source)
        if not (isinstance(layer.index, int) and isinstance(layer.module, str) and isinstance(manifest["seed"], int)):
            raise TypeError("layer or seed")
        if not 0 <= manifest["seed"] < 2**32:
            raise ValueError(f"seed={manifest['seed']}")
    except (ValueError, TypeError) as error:
        raise SourceError(
            f"{Path(str(model.path)) / MANIFEST_NAME} is damaged ({one_line(error)}). Copy the bundle again."
        ) from None
    return layer, data


def _refuse_other_values(config: Config, manifest: dict[str, Any]) -> None:
    """Raises SourceError for values that differ from their defaults and from the bundle's: nothing would read them."""
    default = next(field.default for field in dataclasses.fields(ModelConfig) if field.name == "dtype")
    for name, value, usual, own in (
        ("model.dtype", config.model.dtype, default, manifest["source"].get("dtype")),
        ("seed", config.seed, 0, manifest["seed"]),
    ):
        if value not in (usual, own):
            raise SourceError(
                f"{name}={value}: {config.model.path} is a bundle that was captured with {name}={own}. Leave {name} "
                "out, or capture the layer anew from its model."
            )
