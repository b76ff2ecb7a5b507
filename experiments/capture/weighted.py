"""Caches a layer's loss-weighted Gram matrices beside its activations.

The files are in the layer's folder, so a bundle has them, too:
loss-g1-s1.safetensors   weights [tokens, groups] and gram [groups, in_features, in_features] of the calibration tokens
loss-g1-s1.json          size and sha256 of the former

The number after g is hessian.groups, the one after s hessian.samples. The held-out Gram matrix stays unweighted,
because the output error weighs all tokens equally.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.capture.inputs import LayerInputs, LossWeights
from experiments.capture.losses import load_loss_weights
from experiments.capture.store import is_intact, load_tensors, save_tensors
from experiments.capture.writing import lock
from experiments.config import ModelSource
from experiments.files import SourceError, read_sealed, write_sealed, writing
from experiments.sources.identity import loss_file
from experiments.sources.resolved import Resolved
from quantkit.calibration import GramAccumulator

log = logging.getLogger(__name__)

_last: dict[Path, LossWeights] = {}  # the last layer's, because consecutive runs of a sweep often share the layer


def weigh_by_loss(resolved: Resolved, inputs: LayerInputs) -> LayerInputs:
    """The layer with its loss weights. Raises SourceError if they are not available."""
    config = resolved.config
    is_bundle = config.model.source == ModelSource.bundle
    folder = Path(str(config.model.path)).expanduser() if is_bundle else resolved.layer_folder()
    path = folder / loss_file(config)
    if path not in _last:
        with writing(config.cache.folder):
            loss = _of_bundle(path) if is_bundle else _of_cache(path, resolved, inputs)
        _last.clear()
        _last[path] = loss
    return replace(inputs, loss=_last[path])


def _of_bundle(path: Path) -> LossWeights:
    loss = _open(path)
    if loss is None:
        problem = "is damaged" if path.is_file() else "is missing"
        raise SourceError(
            f"hessian=loss: {path} {problem}, and a bundle has no model to compute loss weights from. Run hessian=loss "
            "where the model is and copy the layer's folder again, or use hessian=output."
        )
    return loss


def _of_cache(path: Path, resolved: Resolved, inputs: LayerInputs) -> LossWeights:
    if inputs.routed:
        raise SourceError(
            f"layer.module={resolved.config.layer.module}: experts have no loss weights, since a router chooses their "
            "tokens. Use hessian=output."
        )
    loss = _open(path)  # without a lock, which a cache that cannot be written does not have
    if loss is not None:
        return loss
    with lock(path):
        loss = _open(path)
        if loss is None:
            weights = load_loss_weights(resolved, resolved.config.layer)
            loss = LossWeights(weights, weighted_gram(inputs, weights, resolved.device))
            with writing(resolved.config.cache.folder):
                entry = save_tensors(path, {"weights": loss.weights, "gram": loss.gram})
                write_sealed(path.with_suffix(".json"), entry)
    return loss


def _open(path: Path) -> LossWeights | None:
    """The file's contents; None if it is missing or damaged."""
    try:
        entry = read_sealed(path.with_suffix(".json"))
        if is_intact(path, entry):
            return LossWeights(**load_tensors(path))
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    log.warning("%s is missing or damaged", path)
    return None


def weighted_gram(inputs: LayerInputs, weights: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Σ_t w_t x_t x_tᵀ of the calibration tokens, float32 [groups, in_features, in_features] on the CPU.

    weights: [tokens, groups]. Reads the activations. Raises SourceError if they were not kept.
    """
    if len(weights) != inputs.tokens_calibration:
        raise SourceError(
            f"there are {len(weights)} loss weights for {inputs.tokens_calibration} calibration tokens: the module is "
            "called more than once per token. Use hessian=output."
        )
    gram = GramAccumulator(inputs.weight.shape[1], device, groups=weights.shape[1])
    first = 0
    for batch in inputs.batches("calibration"):
        gram.update(batch.to(device), weights[first : first + len(batch)])
        first += len(batch)
    return gram.gram.cpu()
