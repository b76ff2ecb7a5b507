"""Quantizes the matrices of one step of a decoder layer, from the sums over their inputs.

Matrices that engines fuse share one global scale, from the largest magnitude among their targets. The error of a
matrix is that of its output on the inputs it will see, against its target:  √( tr(Δ H_q Δᵀ) / tr(T H_q Tᵀ) ).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from experiments.model.experts import ExpertSums
from experiments.model.fused import fused_groups, invertible, shared_global_scale
from experiments.model.ranks import Ranks
from experiments.model.select import Matrix
from experiments.model.settings import QuantizeConfig
from experiments.model.sums import Sums
from experiments.model.targets import corrected
from quantkit import QuantizedTensor, get_method, quantize
from quantkit.calibration import block_hessians
from quantkit.formats import get_format
from quantkit.layer.common import objective_of
from quantkit.metrics import weight_error

Scale = str | float | Tensor | None  # quantize()'s global_scale
Start = Callable[[Matrix, torch.Size], QuantizedTensor]

DAMPING = 0.01  # of the targets, for methods without a damping of their own


@dataclass(frozen=True)
class Work:
    """A matrix before quantization.

    read: reads the weight, [out_features, in_features] or [experts, out_features, in_features], on `device`. sums: of
    its inputs; None for a method without. A part of the matrix is a group of rows or an expert, with sums of its own.
    read_outputs: reads the Gram matrix of the gradients at its outputs; None: there are none.
    """

    matrix: Matrix
    read: Callable[[Matrix], Tensor]
    device: torch.device
    sums: Sums | ExpertSums | None
    read_outputs: Callable[[Matrix], Tensor | None] | None = None

    @cached_property
    def weight(self) -> Tensor:
        return self.read(self.matrix)

    @property
    def num_parts(self) -> int:
        if self.matrix.experts:
            return len(self.weight)
        return 1 if self.sums is None else self.sums.num_groups

    def parts(self, tensor: Tensor) -> Sequence[Tensor]:
        return tensor.unbind(0) if self.matrix.experts else tensor.tensor_split(self.num_parts)

    def quantized_parts(self, quantized: QuantizedTensor) -> list[QuantizedTensor]:
        if self.matrix.experts:
            return [quantized[expert] for expert in range(self.num_parts)]
        each = zip(self.parts(quantized.codes), self.parts(quantized.scales), strict=True)
        return [replace(quantized, codes=codes, scales=scales) for codes, scales in each]

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(parts)) if self.matrix.experts else torch.cat(list(parts))

    def hessians(self) -> list[Tensor]:
        """[in_features, in_features] of each part; none without sums."""
        return [] if self.sums is None else [self.sums.of_group(number)[0] for number in range(self.num_parts)]

    def output_grams(self) -> list[Tensor] | None:
        """[rows, rows] of each part, float32 on `device`; None without gradients at the outputs."""
        gram = None if self.read_outputs is None or self.matrix.experts else self.read_outputs(self.matrix)
        if gram is None:
            return None
        rows = self.parts(torch.arange(len(gram), dtype=torch.int64, device="cpu"))
        own = (slice(int(part[0]), int(part[-1]) + 1) for part in rows)
        return [gram[part, part].contiguous().to(self.device) for part in own]


@dataclass(frozen=True)
class Solved:
    """quantized: of the weight's shape. values: the dequantized weight, float32. record: plain values."""

    matrix: Matrix
    quantized: QuantizedTensor
    values: Tensor
    record: dict[str, Any]


class Solver:
    """Quantizes by the options of a configuration."""

    def __init__(
        self, config: QuantizeConfig, backend: str, start: Start | None = None, ranks: Ranks | None = None
    ) -> None:
        """start: the codes of a matrix of that shape, with which the method begins."""
        self.config, self.backend, self.start, self.ranks = config, backend, start, ranks or Ranks()
        self.format = get_format(config.format.name)
        self.method = get_method(config.method.name)

    def solve(self, step: Sequence[Work]) -> list[Solved]:
        """All matrices of a step, in its order; each is solved by one process."""
        if not step:
            return []
        owners = self.ranks.shares([work.matrix.weights for work in step])
        targets = {number: self._target(work) for number, work in enumerate(step) if owners[number] == self.ranks.rank}
        scales = self._shared_scales(step, targets)
        solved = []
        for number, (work, owner) in enumerate(zip(step, owners, strict=True)):
            own = self._one(work, targets[number], scales[work.matrix.name]) if number in targets else None
            solved.append(self._share(work, own, owner))
        return solved

    def _shared_scales(self, step: Sequence[Work], targets: Mapping[int, Tensor]) -> dict[str, Scale]:
        """Matrix → the global scale of its fused group. targets: of the matrices that this process solves."""
        largest = torch.zeros(len(step), dtype=torch.float32, device=step[0].device)
        for number, target in targets.items():
            largest[number] = torch.linalg.vector_norm(target, torch.inf)
        largest = self.ranks.largest(largest)
        numbers = {work.matrix.name: number for number, work in enumerate(step)}
        scales: dict[str, Scale] = {}
        for group in fused_groups(numbers, self.config.fused):
            scales |= dict.fromkeys(group, self._global_scale([largest[numbers[name]] for name in group]))
        return scales

    def _share(self, work: Work, own: Solved | None, owner: int) -> Solved:
        """The solution of the process `owner`."""
        if self.ranks.size == 1:
            assert own is not None
            return own
        found = None
        if own is not None:
            q = own.quantized
            found = (q.method, q.nearest_codes, q.objective, own.record), (q.codes, q.scales, q.global_scale)
        (method, nearest, objective, record), tensors = self.ranks.share_tensors(found, owner, work.device)
        if own is not None:
            return own
        codes, scales, global_scale = tensors
        quantized = QuantizedTensor(
            codes,
            scales,
            global_scale,
            self.format,
            self.config.block_size,
            method=method,
            nearest_codes=nearest,
            objective=objective,
        )
        return Solved(work.matrix, quantized, quantized.dequantize(), record)

    def _target(self, work: Work) -> Tensor:
        if work.sums is None:
            return work.weight.float()
        calibrate = self.config.calibrate
        damping = calibrate.damping or self.config.method.damping or DAMPING
        targets, first = [], 0
        for number, rows in enumerate(work.parts(work.weight)):
            hessian, shift, residual = work.sums.of_group(number)
            own = None if residual is None else residual[first : first + len(rows)]
            targets.append(corrected(rows, hessian, shift, own, calibrate.alpha, calibrate.residual_alpha, damping))
            first += len(rows)
        return work.joined(targets)

    def _global_scale(self, targets: Sequence[Tensor]) -> Scale:
        """targets: those that share it, or their largest magnitudes."""
        wanted = self.config.format.global_scale
        if self.format.two_level and wanted in (None, "amax", "headroom"):
            return invertible(shared_global_scale(targets, self.format, wanted == "headroom"), self.format)
        return wanted

    def _one(self, work: Work, target: Tensor, scale: Scale) -> Solved:
        parts, hessians = work.parts(target), work.hessians()
        # Each expert has a global scale of its own, as engines store it.
        scales = [self._global_scale([part]) for part in parts] if work.matrix.experts else [scale] * len(parts)
        naive = self._join(work, [self._quantize("naive", part, own) for part, own in zip(parts, scales, strict=True)])
        given = [self._given(hessian) for hessian in hessians] or [{}] * len(parts)
        if self.start is not None:
            start = self.start(work.matrix, work.weight.shape).to(target.device)
            given = [own | {"init": q} for own, q in zip(given, work.quantized_parts(start), strict=True)]
            scales = [None] * len(parts)  # of the codes
        outputs = work.output_grams()
        if outputs is not None:
            given = [own | {"output_gram": gram} for own, gram in zip(given, outputs, strict=True)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            each = zip(parts, scales, given, strict=True)
            found = [self._quantize(self.method.name, part, own, **extra) for part, own, extra in each]
        quantized = self._join(work, found)
        values = quantized.dequantize()
        record = {
            "name": work.matrix.full_name,
            "shape": list(work.weight.shape),
            "global_scale": float(quantized.global_scale.max()),
            **_errors(work, target, naive.dequantize(), "naive_"),
            **_errors(work, target, values, ""),
            "correction": weight_error(work.weight.float(), target),
        }
        if self.config.hessian.outputs:
            record["outputs"] = outputs is not None
        if caught:  # of a text that does not determine every channel
            record["warnings"] = sorted({str(warning.message) for warning in caught})
        if quantized.objective is not None:
            record["objective"] = list(quantized.objective)
        return Solved(work.matrix, quantized, values, record)

    def _quantize(self, method: str, part: Tensor, scale: Scale, **given: Any) -> QuantizedTensor:
        settings: dict[str, Any] = self.config.method.settings if method == self.method.name else {}
        return quantize(
            part,
            self.format,
            self.config.block_size,
            method,
            backend=self.backend,
            global_scale=scale,
            scale_rule=self.config.format.rule,
            **settings | given,
        )

    def _given(self, hessian: Tensor) -> dict[str, Any]:
        if self.method.needs is None:
            return {}
        if self.method.needs == "gram":
            return {"gram": hessian}
        return {"hessian": block_hessians(hessian, self.config.block_size)}

    def _join(self, work: Work, parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
        """The parts as one tensor. The global scale is a copy, because tensors of a checkpoint share no memory."""
        first = parts[0]
        scale = first.global_scale.clone()
        if work.matrix.experts and self.format.two_level:
            scale = torch.stack([part.global_scale for part in parts]).view(-1, 1, 1)
        return replace(
            first,
            codes=work.joined([part.codes for part in parts]),
            scales=work.joined([part.scales for part in parts]),
            global_scale=scale,
            objective=first.objective if len(parts) == 1 else None,
        )


def _errors(work: Work, target: Tensor, values: Tensor, prefix: str) -> dict[str, float]:
    """The weight's relative error, and the output's against the target."""
    errors = {f"{prefix}weight_error": weight_error(work.weight.float(), values)}
    hessians = work.hessians()
    if hessians:
        errors[f"{prefix}output_error"] = output_error(work.parts(target), work.parts(values), hessians)
    return errors


def output_error(targets: Sequence[Tensor], values: Sequence[Tensor], hessians: Sequence[Tensor]) -> float:
    """√( Σ tr(Δ H Δᵀ) / Σ tr(T H Tᵀ) ) over the parts of a matrix [rows, in_features], each with its Hessian."""
    error = norm = 0.0
    for target, own, hessian in zip(targets, values, hessians, strict=True):
        energy = objective_of(own - target, hessian.float())
        error += 0.0 if energy < 0 else energy  # max(0.0, nan) would be 0
        norm += objective_of(target, hessian.float())
    if norm > 0:
        return (error / norm) ** 0.5
    return 0.0 if error == 0 else math.nan


def mean_error(records: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Root mean square of an error over matrices; None if they lack it."""
    found = [record[name] for record in records if name in record]
    return (sum(value**2 for value in found) / len(found)) ** 0.5 if found else None
