"""The experts of a fused weight ``[E, N, K]``, each quantized on its own where one has Hessians or a global scale of
its own.

What is given once holds for all experts. The result is, byte for byte, that of a loop over the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quantkit.calibration import check_finite
from quantkit.formats import BlockFormat
from quantkit.reference.amax import global_scale_of
from quantkit.tensor import QuantizedTensor

__all__ = ["AMAX_PER_EXPERT", "has_own", "quantize_each", "shared_global_scale"]

AMAX_PER_EXPERT = "amax_per_expert"

Given = Tensor | Sequence[Tensor] | None


def has_own(
    weight: Tensor, activations: Given, gram: Tensor | None, hessian: Tensor | None, global_scale: object
) -> bool:
    """Whether something is given for each expert of ``weight [E, N, K]``; always False for other weights."""
    if weight.ndim != 3:
        return False
    return (
        _own_scale(global_scale, len(weight))
        or isinstance(activations, list | tuple)
        or (isinstance(gram, Tensor) and gram.ndim == 3)
        or (isinstance(hessian, Tensor) and hessian.ndim == 4)
    )


def shared_global_scale(weight: Tensor, fmt: BlockFormat, finite: bool, headroom: bool = False) -> Tensor:
    """Float32 scalar of the amax of all experts. finite: raise ValueError for NaN and Inf in ``weight``."""
    weight = weight.detach()
    scale = global_scale_of(weight, fmt, headroom)
    if finite and not bool(scale.isfinite()):
        check_finite(weight, "weight")
    return scale


def quantize_each(
    quantize: Callable[..., QuantizedTensor],
    weight: Tensor,
    activations: Given,
    gram: Tensor | None,
    hessian: Tensor | None,
    global_scale: str | float | Tensor | None,
    init: QuantizedTensor | None = None,
) -> QuantizedTensor:
    """``quantize`` of each expert, put together. Raises its error with the expert's number before it."""
    number = len(weight)
    if not number:
        raise ValueError(f"weight {list(weight.shape)} has no expert, so nothing can be given for each")
    own_scale = _own_scale(global_scale, number)
    if isinstance(global_scale, Tensor):
        scales: list[str | float | Tensor | None] = list(global_scale) if own_scale else [global_scale] * number
    else:
        scales = ["amax" if own_scale else global_scale] * number
    given = {
        "activations": _of_each(activations, "activations", number, 0),
        "gram": _of_each(gram, "gram", number, 3),
        "hessian": _of_each(hessian, "hessian", number, 4),
        "global_scale": scales,
        "init": [None if init is None else init[expert] for expert in range(number)],
    }
    found = []
    for expert in range(number):
        try:
            found.append(quantize(weight[expert], **{name: values[expert] for name, values in given.items()}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"expert {expert}: {error}") from error
    first = found[0]
    return QuantizedTensor(
        torch.stack([q.codes for q in found]),
        torch.stack([q.scales for q in found]),
        torch.stack([q.global_scale for q in found]).view(number, 1, 1) if own_scale else first.global_scale,
        first.format,
        first.block_size,
        None if first.candidates is None else torch.stack([q.candidates for q in found if q.candidates is not None]),
        first.method,
        first.nearest_codes,
    )


def _own_scale(global_scale: object, number: int) -> bool:
    if isinstance(global_scale, Tensor):
        return global_scale.shape == (number, 1, 1)
    return isinstance(global_scale, str) and global_scale == AMAX_PER_EXPERT


def _of_each(given: Given, name: str, number: int, dimensions: int) -> Sequence[Tensor | None]:
    """One for each expert: from a sequence, or a tensor of so many ``dimensions``; another is that of all."""
    if given is None or (isinstance(given, Tensor) and given.ndim != dimensions):
        return [given] * number
    if len(given) != number:
        raise ValueError(f"{name} holds {len(given)} experts, the weight has {number}; pass one for each")
    return list(given)
