"""KL with one layer quantized at a time: which layers cost most.

A layer's parameters of the quantized model replace those of the reference, alone, and are put back. Layers are found by
comparing the two models' parameters, so this works for any folder whose modules have the reference's names.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from experiments.capture.progress import ticking
from experiments.files import SourceError
from experiments.model.comparing import Comparer
from experiments.model.intervals import estimate
from experiments.model.reference import in_batches
from experiments.sources.models import LAYER_NAME

LAYER_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n}/{total} layers [{elapsed}<{remaining}]"
RESAMPLES = 100  # the interval is not shown


def kl_by_layer(comparer: Comparer, unit: str) -> list[dict[str, Any]]:
    """[{layer, mean, error}] in the order of the model, nats a token. unit: linear or decoder.

    Raises SourceError if no layer differs.
    """
    from tqdm import tqdm

    reference, model = comparer.reference.network, comparer.model.network
    found = differing(reference, model, unit)
    if not found:
        raise SourceError("evaluate.layers: no layer of the model differs from the reference's. Leave it out.")
    comparer.reference.divide(comparer.ids)
    kept = in_batches(comparer.ids, comparer.batch, comparer.reference.final)
    alone = replace(comparer, model=comparer.reference, kept=kept)
    rows = []
    bar = tqdm(total=len(found), desc="one layer at a time", bar_format=LAYER_BAR, disable=None)
    with ticking(bar):
        for layer, names in found.items():
            with replaced(reference, model, names):
                kl = estimate(alone.run(layer, quiet=True).kl.mean(1), RESAMPLES, 0)
            rows.append({"layer": layer, "mean": kl.mean, "error": kl.error})
            bar.update()
    return rows


def differing(reference: nn.Module, model: nn.Module, unit: str) -> dict[str, list[str]]:
    """Layer → the parameters in which the two models differ. unit linear: the module's name; decoder: `layer N`."""
    mine = dict(model.named_parameters())
    found: dict[str, list[str]] = {}
    for name, parameter in reference.named_parameters():
        number = LAYER_NAME.search(name)
        if number is None or name not in mine or mine[name].shape != parameter.shape:
            continue
        if torch.equal(parameter, mine[name].to(parameter.dtype)):
            continue
        layer = name.removesuffix(".weight") if unit == "linear" else f"layer {number[1]}"
        found.setdefault(layer, []).append(name)
    return found


@contextmanager
def replaced(reference: nn.Module, model: nn.Module, names: list[str]) -> Iterator[None]:
    """A context in which these parameters of the reference have the model's values."""
    before = {name: reference.get_parameter(name).data for name in names}
    try:
        for name in names:
            reference.get_parameter(name).data = model.get_parameter(name).data.to(before[name].dtype)
        yield
    finally:
        for name in names:
            reference.get_parameter(name).data = before[name]
