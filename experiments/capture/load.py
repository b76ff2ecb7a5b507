"""Loads the inputs of a run's layer: from memory, a bundle, a seed, the cache, or a capture that fills the cache.

‖XΔWᵀ‖² = tr(ΔW G ΔWᵀ), so errors need only the Gram matrix G. A cached layer needs no model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.capture.cache import open_bundle, open_layer
from experiments.capture.forward import capture_layers
from experiments.capture.inputs import LayerInputs
from experiments.capture.synthetic import synthetic_layer
from experiments.config import LayerConfig, ModelSource
from experiments.files import SourceError, remove_orphans, writing
from experiments.sources.resolved import Resolved

MEMO_BYTES = 2 << 30  # layers that stay in memory between runs of a sweep

_memo: OrderedDict[str, LayerInputs] = OrderedDict()


def load_layer_inputs(resolved: Resolved, ahead: Sequence[LayerConfig] = ()) -> LayerInputs:
    """The layer of a run. Raises SourceError for every problem that the user can fix.

    ahead: layers of the same model and text that later runs need. A capture includes them.
    """
    key = _memo_key(resolved)
    if key in _memo:
        inputs = replace(_memo[key], provenance=replace(_memo[key].provenance, from_cache=True))
    else:
        with writing(resolved.config.cache.folder):
            inputs = _load(resolved, ahead)
    _remember(key, inputs)
    return replace(inputs, provenance=replace(inputs.provenance, substituted=resolved.substituted))


def _memo_key(resolved: Resolved) -> str:
    config = resolved.config
    if config.model.source == ModelSource.synthetic:
        return resolved.sources_hash
    if config.model.source == ModelSource.bundle:
        return f"{_bundle_folder(resolved).resolve()}:{resolved.sources_hash}"
    return f"{resolved.layer_folder()}:{config.cache.activations}"


def _remember(key: str, inputs: LayerInputs) -> None:
    """Adds the newest layer to the memo, and drops the oldest ones beyond MEMO_BYTES."""
    _memo[key] = inputs
    _memo.move_to_end(key)
    while len(_memo) > 1 and sum(kept.nbytes for kept in _memo.values()) > MEMO_BYTES:
        _memo.popitem(last=False)


def _load(resolved: Resolved, ahead: Sequence[LayerConfig]) -> LayerInputs:
    source = resolved.config.model.source
    if source == ModelSource.bundle:
        return open_bundle(_bundle_folder(resolved), resolved.sources)
    if source == ModelSource.synthetic:
        return synthetic_layer(resolved)
    cached = _open(resolved)
    if cached is not None:
        return cached
    _capture(resolved, ahead)
    fresh = _open(resolved)
    if fresh is None:
        raise SourceError(f"{resolved.layer_folder()} was captured but cannot be read back. Check the disk.")
    return replace(fresh, provenance=replace(fresh.provenance, from_cache=False))


def _bundle_folder(resolved: Resolved) -> Path:
    return Path(str(resolved.config.model.path)).expanduser()


def _open(resolved: Resolved) -> LayerInputs | None:
    def rebuild() -> None:
        capture_layers(resolved, [resolved.config.layer], force=True)

    remove_orphans(resolved.layer_folder())
    return open_layer(resolved.layer_folder(), resolved.config.cache.activations, rebuild)


def _capture(resolved: Resolved, ahead: Sequence[LayerConfig]) -> None:
    own = resolved.config.layer
    try:
        capture_layers(resolved, [own, *ahead])
    except SourceError:
        # One of the others may not exist. Its own run fails then, and this one goes on.
        if not ahead:
            raise
        capture_layers(resolved, [own])
