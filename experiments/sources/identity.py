"""The identity of a captured layer, which is all that it depends on, and its cache folder. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from experiments.config import Config, LayerConfig, Matmul, ModelSource, Weighting
from experiments.files import sha256_json
from experiments.sources.bundles import CAPTURE_VERSION, bundle_identity
from experiments.sources.hashes import file_hashes
from experiments.sources.models import ModelIdentity
from experiments.sources.texts import load_text

LOSS_VERSION = 1  # raise it when the same configuration gives different loss weights

Identity = dict[str, Any]  # plain JSON values


def source_identity(config: Config, model: ModelIdentity) -> Identity:
    """All that the inputs of the configured layer depend on: a bundle's manifest, else `layer_identity`."""
    if config.model.source == ModelSource.bundle:
        return bundle_identity(config.model, config.cache.folder) | _bundle_loss(config)
    return layer_identity(config, model)


def _bundle_loss(config: Config) -> Identity:
    """The hash of the loss weights that a run on a bundle reads, where it reads some and they are there."""
    path = Path(str(config.model.path)).expanduser() / loss_file(config)
    if config.hessian.weighting != Weighting.loss or not path.is_file():
        return {}
    return {"loss": file_hashes([path], config.cache.folder)[path]}


def layer_identity(config: Config, model: ModelIdentity) -> Identity:
    """All that a layer's captured inputs depend on; its hash is the cache key. Raises SourceError."""
    data = config.data
    return {
        "capture_version": CAPTURE_VERSION,
        "model": model.key,
        "tokenizer": model.tokenizer,
        "text": _text_identity(config),
        "layer": [config.layer.index, config.layer.module],
        "seq_len": data.seq_len,
        "samples": data.samples,
        "heldout": data.heldout,
        "seed": config.seed,
        "dtype": config.model.dtype,
    }


def _text_identity(config: Config) -> dict[str, str | None]:
    """split → sha256 of its text. The held-out text's is None if it is part of the calibration text."""
    if config.model.source == ModelSource.synthetic:
        return {"calibration": "synthetic", "heldout": None}
    data, cache = config.data, config.cache.folder
    held = load_text(data, cache, data.heldout_split).sha256 if data.heldout_split and data.heldout else None
    return {"calibration": load_text(data, cache).sha256, "heldout": held}


def folder_in_cache(config: Config, identity: Identity, layer: LayerConfig) -> Path:
    """The cache folder of `layer`: a readable name and the cache key. identity: that of any layer of the run."""
    key = sha256_json(identity | {"layer": [layer.index, layer.module]})[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{config.model.label}-l{layer.index}-{layer.module}")
    return config.cache.folder / "layers" / f"{name}-{key}"


def loss_file(config: Config) -> str:
    """The name of a layer's own loss weights, in its folder."""
    matmul = "" if config.hessian.matmul == Matmul.float32 else f"-{config.hessian.matmul}"
    return f"loss-g{config.hessian.groups}-s{config.hessian.samples}{matmul}.safetensors"


def losses_folder(config: Config, identity: Identity) -> Path:
    """The cache folder of the loss weights of all layers. identity: that of any layer of the run.

    They are computed in float32, whatever the dtype of the captured inputs; hessian.matmul may round factors.
    """
    of_all = {name: value for name, value in identity.items() if name not in ("layer", "dtype")}
    hessian: Identity = {"version": LOSS_VERSION, "groups": config.hessian.groups, "samples": config.hessian.samples}
    if config.hessian.matmul != Matmul.float32:
        hessian["matmul"] = str(config.hessian.matmul)
    if config.hessian.outputs:
        hessian["outputs"] = True
    key = sha256_json(of_all | {"loss": hessian})[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", config.model.label)
    return config.cache.folder / "losses" / f"{name}-{key}"
