"""Quantizes a weight in groups of rows, each with its own Hessians, under one global scale.

A group is a range of neighbouring rows, as `Tensor.tensor_split` gives. A single group is the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from quantkit import QuantizedTensor, verify
from quantkit.calibration import block_hessians
from quantkit.verify import Verification

Statistics = Mapping[str, Tensor]  # quantize()'s argument hessian or gram by its name, or neither


def statistics_of(needs: str | None, grams: Tensor, block_size: int, device: str) -> list[Statistics]:
    """The statistics of each group for a method that needs "hessian", "gram" or None. grams: [groups, K, K]."""
    if needs is None:
        return [{}]
    if needs == "gram":
        return [{"gram": gram.to(device)} for gram in grams]
    return [{"hessian": block_hessians(gram, block_size).to(device)} for gram in grams]


def quantize_groups(
    quantize: Callable[..., QuantizedTensor], weight: Tensor, given: Sequence[Statistics], **options: object
) -> QuantizedTensor:
    """quantize(rows, **statistics, **options) of each group, joined to one tensor. weight: [rows, K].

    The global scale of a two-level format is the whole weight's.
    """
    if len(given) == 1:
        return quantize(weight, **given[0], **options)
    naive = quantize(weight, method="naive")
    if naive.format.two_level:
        options = {**options, "global_scale": naive.global_scale}
    parts = [quantize(rows, **one, **options) for rows, one in zip(weight.tensor_split(len(given)), given, strict=True)]
    candidates = [part.candidates for part in parts if part.candidates is not None]
    return replace(
        parts[0],
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        candidates=torch.cat(candidates) if candidates else None,
    )


def verify_groups(result: QuantizedTensor, weight: Tensor, given: Sequence[Statistics], gap: int = 0) -> Verification:
    """The joint result of verify() on all groups, each with its own Hessians.

    gap: as in verify(), divided among the groups. The gap found is the largest of theirs.
    """
    found: list[Verification] = []
    first, places = 0, []
    rows_of = [tensor.tensor_split(len(given)) for tensor in (weight, result.codes, result.scales)]
    for one, rows, codes, scales in zip(given, *rows_of, strict=True):
        part = verify(replace(result, codes=codes, scales=scales), rows, one.get("hessian"), -(-gap // len(given)))
        places += [(first + row, block) for row, block in part.where]
        first += len(rows)
        found.append(part)
    return replace(
        found[0],
        blocks=sum(part.blocks for part in found),
        violations=sum(part.violations for part in found),
        worst_excess=max(part.worst_excess for part in found),
        where=tuple(places),
        wrong_codes=sum(part.wrong_codes for part in found),
        judged=all(part.judged for part in found),
        gap=max((part.gap for part in found if part.gap is not None), default=None),
    )
