"""Quantizes the matrices of one step of a decoder layer, from the sums over their inputs.

Matrices that engines fuse share one global scale, from the largest magnitude among their targets. The error of a
matrix is that of its output on the inputs it will see, against its target:  √( tr(Δ H_q Δᵀ) / tr(T H_q Tᵀ) ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experiments.model.fused import fused_groups, shared_global_scale
from experiments.model.select import Matrix
from experiments.model.settings import QuantizeConfig
from experiments.model.sums import Sums
from experiments.model.targets import corrected
from quantkit import QuantizedTensor, get_method, quantize
from quantkit.calibration import block_hessians
from quantkit.formats import get_format
from quantkit.layer.common import objective_of
from quantkit.metrics import weight_error

DAMPING = 0.01  # of the targets, for methods without a damping of their own


@dataclass(frozen=True)
class Work:
    """A matrix before quantization. weight: [out_features, in_features]. sums: of its inputs; None for a method
    without."""

    matrix: Matrix
    weight: Tensor
    sums: Sums | None


@dataclass(frozen=True)
class Solved:
    """quantized: of the weight's shape. values: the dequantized weight, float32. record: plain values."""

    matrix: Matrix
    quantized: QuantizedTensor
    values: Tensor
    record: dict[str, Any]


class Solver:
    """Quantizes by the options of a configuration."""

    def __init__(self, config: QuantizeConfig, backend: str) -> None:
        self.config, self.backend = config, backend
        self.format = get_format(config.format.name)
        self.method = get_method(config.method.name)

    def solve(self, step: Sequence[Work]) -> list[Solved]:
        """All matrices of a step, in its order."""
        by_name = {work.matrix.name: work for work in step}
        solved: dict[str, Solved] = {}
        for names in fused_groups(by_name, self.config.fused):
            targets = {name: self._target(by_name[name]) for name in names}
            scale = self._global_scale(list(targets.values()))
            for name in names:
                solved[name] = self._one(by_name[name], targets[name], scale)
        return [solved[name] for name in by_name]

    def _target(self, work: Work) -> Tensor:
        if work.sums is None:
            return work.weight.float()
        calibrate, damping = self.config.calibrate, self.config.method.damping or DAMPING
        parts = work.weight.tensor_split(work.sums.num_groups)
        firsts = [sum(len(part) for part in parts[:number]) for number in range(len(parts))]
        targets = []
        for number, (rows, first) in enumerate(zip(parts, firsts, strict=True)):
            hessian, shift, residual = work.sums.of_group(number)
            own = None if residual is None else residual[first : first + len(rows)]
            targets.append(corrected(rows, hessian, shift, own, calibrate.alpha, calibrate.residual_alpha, damping))
        return torch.cat(targets)

    def _global_scale(self, targets: Sequence[Tensor]) -> str | float | Tensor | None:
        wanted = self.config.format.global_scale
        if self.format.two_level and wanted in (None, "amax", "headroom"):
            return shared_global_scale(targets, self.format, wanted == "headroom")
        return wanted

    def _one(self, work: Work, target: Tensor, scale: str | float | Tensor | None) -> Solved:
        config = self.config
        rule = config.format.rule
        own: dict[str, Any] = {
            "format": self.format,
            "block_size": config.block_size,
            "global_scale": scale,
            "scale_rule": rule,
        }
        naive = quantize(target, method="naive", backend=self.backend, **own)
        hessians = [] if work.sums is None else [work.sums.of_group(i)[0] for i in range(work.sums.num_groups)]
        if self.method.name == "naive":
            quantized = naive
        else:
            settings = {"method": self.method.name, "backend": self.backend, **own, **config.method.settings}
            quantized = self._quantize(target, hessians, settings)
        values = quantized.dequantize()
        before = _errors(work.weight, target, naive.dequantize(), hessians, "naive_")
        record = {
            "name": work.matrix.full_name,
            "shape": list(work.weight.shape),
            "global_scale": float(quantized.global_scale.max()),
            **before,
            **_errors(work.weight, target, values, hessians, ""),
            "correction": weight_error(work.weight.float(), target),
        }
        if quantized.objective is not None:
            record["objective"] = list(quantized.objective)
        # A copy, because a checkpoint's tensors share no memory.
        return Solved(work.matrix, replace(quantized, global_scale=quantized.global_scale.clone()), values, record)

    def _quantize(self, target: Tensor, hessians: Sequence[Tensor], settings: dict[str, Any]) -> QuantizedTensor:
        if self.method.needs is None:
            return quantize(target, **settings)
        parts = [
            quantize(rows, **self._given(hessian), **settings)
            for rows, hessian in zip(target.tensor_split(len(hessians)), hessians, strict=True)
        ]
        if len(parts) == 1:
            return parts[0]
        codes, scales = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scales"))
        return replace(parts[0], codes=codes, scales=scales, objective=None)

    def _given(self, hessian: Tensor) -> dict[str, Any]:
        if self.method.needs == "gram":
            return {"gram": hessian}
        return {"hessian": block_hessians(hessian, self.config.block_size)}


def _errors(
    weight: Tensor, target: Tensor, values: Tensor, hessians: Sequence[Tensor], prefix: str
) -> dict[str, float]:
    """The weight's relative error, and the output's against the target."""
    errors = {f"{prefix}weight_error": weight_error(weight.float(), values)}
    if hessians:
        errors[f"{prefix}output_error"] = output_error(target, values, hessians)
    return errors


def output_error(target: Tensor, values: Tensor, hessians: Sequence[Tensor]) -> float:
    """√( Σ tr(Δ H Δᵀ) / Σ tr(T H Tᵀ) ) over groups of rows with a Hessian [in_features, in_features] each."""
    energies = []
    for matrix in (values - target, target):
        groups = zip(matrix.tensor_split(len(hessians)), hessians, strict=True)
        energies.append(sum(objective_of(rows, hessian.float()) for rows, hessian in groups))
    error, norm = energies
    return (max(error, 0.0) / norm) ** 0.5 if norm > 0 else 0.0


def mean_error(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Root mean square of an error over matrices; None if they lack it."""
    found = [record[name] for record in records if name in record]
    return (sum(value**2 for value in found) / len(found)) ** 0.5 if found else None
