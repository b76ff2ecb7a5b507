"""Sums over the tokens of a layer's inputs in the original and in the quantized model.

    H_q = Σ w x_q x_qᵀ,   D = Σ w (x − x_q) x_qᵀ,   R = Σ w (r − r_q) x_qᵀ

D is summed from differences instead of as C − H_q, so that it is exactly zero where both models have the same inputs.
Both factors of a product contain √w, as in quantkit.calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.model.ranks import Ranks
from quantkit.calibration import GramAccumulator


@dataclass(frozen=True)
class Inputs:
    """A batch of a layer's inputs, [tokens, features] each.

    x: of the quantized model, or of the only one. original: x of the original model. residual, residual_original: the
    residual stream to which the layer's output is added.
    """

    x: Tensor
    original: Tensor | None = None
    residual: Tensor | None = None
    residual_original: Tensor | None = None


class Sums:
    """hessian: H_q, float32 or float64 [in_features, in_features]. shift: D, as H_q. residual: R [out_features,
    in_features].

    groups: number of weights per token; all three then have it as their first dimension. shift and residual are None
    unless they are asked for.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device,
        groups: int | None = None,
        with_shift: bool = False,
        residual_features: int | None = None,
    ) -> None:
        self._gram = GramAccumulator(in_features, device, groups=groups)
        leading = () if groups is None else (groups,)
        self._device, self._shape = device, (*leading, in_features, in_features)

        def zeros(rows: int) -> Tensor:
            return torch.zeros(*leading, rows, in_features, dtype=torch.float32, device=device)

        self.shift = zeros(in_features) if with_shift else None
        self.residual = None if residual_features is None else zeros(residual_features)

    @property
    def hessian(self) -> Tensor:
        return self._gram.gram

    @property
    def num_groups(self) -> int:
        return self._gram.groups or 1

    @property
    def tokens(self) -> int:
        return self._gram.tokens

    def add(self, own: Sums | None, source: int, ranks: Ranks) -> None:
        """Adds the sums of a segment, which the process `source` has and the others do not."""
        header = [0, 0] if own is None else [own.tokens, int(own.tokens > 0 and own.hessian.dtype == torch.float64)]
        tokens, doubled = ranks.broadcast(torch.tensor(header, dtype=torch.int64, device=self._device), source).tolist()
        if not tokens:
            return
        dtype = torch.float64 if doubled else torch.float32
        self._gram.add(self._from(source, ranks, None if own is None else own.hessian, self._shape, dtype), tokens)
        for name in ("shift", "residual"):
            total = getattr(self, name)
            if total is not None:
                part = None if own is None else getattr(own, name)
                total += self._from(source, ranks, part, total.shape, torch.float32)

    def _from(self, source: int, ranks: Ranks, own: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The tensor of the process `source`."""
        if own is None:
            own = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        return ranks.broadcast(own, source)

    def update(self, inputs: Inputs, weights: Tensor | None = None) -> None:
        """weights: float32 [tokens, groups], or None for 1."""
        self._gram.update(inputs.x, weights)
        if self.shift is not None:
            assert inputs.original is not None
            _add(self.shift, inputs.original, inputs.x, inputs.x, weights)
        if self.residual is not None:
            assert inputs.residual is not None and inputs.residual_original is not None
            _add(self.residual, inputs.residual_original, inputs.residual, inputs.x, weights)

    def of_group(self, group: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hessian, shift, residual) of one group of rows."""
        if self._gram.groups is None:
            return self.hessian, self.shift, self.residual
        shift = None if self.shift is None else self.shift[group]
        return self.hessian[group], shift, None if self.residual is None else self.residual[group]


def _add(total: Tensor, one: Tensor, other: Tensor, x: Tensor, weights: Tensor | None) -> None:
    """Adds Σ w (one − other) xᵀ to `total`, of one group or of all."""
    difference = one.float() - other.float()
    if weights is None:
        _add_product(total, difference.to(x.dtype), x)
        return
    for part, root in zip(total, weights.sqrt().unbind(1), strict=True):
        column = root.unsqueeze(1).to(x.device)
        _add_product(part, (difference * column).to(x.dtype), (x.float() * column).to(x.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.bfloat16 and left.is_cuda:  # products are exact, and the tensor cores add them in float32
        torch.addmm(total, left.T, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float().T, right.float())
