"""Linear layers that inference engines fuse to one matrix, which therefore share one global scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from quantkit.formats import NVFP4, BlockFormat
from quantkit.layouts import FUSED, exact_global_scale
from quantkit.reference.amax import global_scale_of

SMALL = 2.0**-100  # products with block scales are normal numbers


def fused_groups(names: Iterable[str], fused: Sequence[Sequence[str]] | None = None) -> list[tuple[str, ...]]:
    """The names in groups: layers of one module that `fused` (default: FUSED) lists together, and the others alone.

    names: in a decoder layer or a model, such as self_attn.q_proj.
    """
    names = list(names)
    rules = FUSED if fused is None else fused
    groups: dict[tuple[str, int], list[str]] = {}
    alone = len(rules)
    for name in names:
        parent, _, last = name.rpartition(".")
        rule = next((number for number, rule in enumerate(rules) if last in rule), None)
        key = (name, alone) if rule is None else (parent, rule)
        groups.setdefault(key, []).append(name)
    return [tuple(group) for group in groups.values()]


def shared_global_scale(weights: Iterable[Tensor], fmt: BlockFormat, headroom: bool = False) -> Tensor:
    """Float32 scalar: the global scale of the largest magnitude in all of `weights`; 1 for a single-level format."""
    largest = torch.stack([torch.linalg.vector_norm(w.float(), torch.inf) for w in weights])
    return global_scale_of(largest, fmt, headroom)


def invertible(scale: Tensor, fmt: BlockFormat) -> Tensor:
    """`scale`, or for NVFP4 the next larger one that checkpoints can store as a divisor without changing a weight."""
    if fmt != NVFP4 or not SMALL <= float(scale) <= 1 / SMALL:
        return scale
    return exact_global_scale(scale)
