"""Mixture of experts: the inputs of each expert's matrices, and their sums.

An expert sees the tokens that the router of the quantized model sends to it. The original model's inputs of the same
tokens come from the original experts at the same routing, so the rows of both belong together.

With loss weights, a token has the weight p² w at an expert: w is its weight at the output of all experts, p the
router's factor of the expert's output. All matrices of an expert use it.

An expert with n < min_tokens tokens has the Hessian H + (min_tokens − n) H̄, where H̄ is the mean per token of all
experts' Hessians. So the tokens that it lacks are replaced by average ones. Nothing corrects their inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from experiments.capture.tap import PRODUCTS
from experiments.files import SourceError
from experiments.model.layer import Call
from experiments.model.ranks import Ranks
from experiments.model.sums import Inputs, Sums
from experiments.sources.modules import Target


class ExpertSums:
    """Sums of each expert of a fused matrix. in_features: of the matrix. weighted: whether tokens have weights."""

    def __init__(
        self,
        number: int,
        in_features: int,
        device: torch.device,
        min_tokens: int,
        weighted: bool = False,
        with_shift: bool = False,
    ) -> None:
        self.min_tokens = min_tokens
        groups = 1 if weighted else None
        self._sums = [Sums(in_features, device, groups, with_shift) for _ in range(number)]
        self._mean: Tensor | None = None

    @property
    def num_groups(self) -> int:
        return len(self._sums)

    @property
    def tokens(self) -> list[int]:
        return [sums.tokens for sums in self._sums]

    def add(self, own: ExpertSums | None, source: int, ranks: Ranks) -> None:
        """Adds the sums of a segment, see Sums.add."""
        for expert, total in enumerate(self._sums):
            total.add(None if own is None else own._sums[expert], source, ranks)

    def update(self, expert: int, inputs: Inputs, weights: Tensor | None = None) -> None:
        """Adds rows of one expert. weights: [rows], or None for 1."""
        if len(inputs.x):
            self._sums[expert].update(inputs, None if weights is None else weights.unsqueeze(1))

    def few(self) -> dict[int, int]:
        """Expert → its tokens, of those with fewer than min_tokens."""
        return {expert: tokens for expert, tokens in enumerate(self.tokens) if tokens < self.min_tokens}

    def of_group(self, expert: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(hessian, shift, None) of one expert. Raises SourceError if no expert has seen a token."""
        sums, lacking = self._sums[expert], self.min_tokens - self.tokens[expert]
        if lacking <= 0 and self.tokens[expert]:
            return sums.of_group(0)
        lacking = max(lacking, 1)
        if not self.tokens[expert]:
            return lacking * self._mean_hessian(), None, None
        hessian, shift, _ = sums.of_group(0)
        return hessian + lacking * self._mean_hessian(), shift, None

    def _mean_hessian(self) -> Tensor:
        if self._mean is None:
            seen = [sums.of_group(0)[0] for sums, tokens in zip(self._sums, self.tokens, strict=True) if tokens]
            if not seen:
                raise SourceError("no expert of a layer has seen a token. Raise data.samples.")
            self._mean = torch.stack([hessian.double() for hessian in seen]).sum(0).div_(sum(self.tokens)).float()
        return self._mean


class _Rows(TorchFunctionMode):
    """A context that keeps the left factors of products with each expert's matrix."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        parameter: Tensor = getattr(target.module, target.parameter)
        self.storage = parameter.untyped_storage().data_ptr()
        self.first, self.stride = parameter.storage_offset(), parameter.stride(0)
        none = torch.empty(0, target.in_features, dtype=parameter.dtype, device=parameter.device)
        self.rows: list[Tensor] = [none] * len(parameter)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and args[1].untyped_storage().data_ptr() == self.storage:
            expert, beside = divmod(args[1].storage_offset() - self.first, self.stride)
            assert not beside
            self.rows[expert] = torch.cat([self.rows[expert], args[0].reshape(-1, args[0].shape[-1])])
        return func(*args, **(kwargs or {}))


def expert_rows(target: Target, call: Call) -> list[Tensor]:
    """The inputs [rows, in_features] of each expert's matrix in a call of the module of all experts."""
    seen = _Rows(target)
    with seen:
        target.module(*call.args, **call.kwargs)
    return seen.rows


def routed_weights(call: Call, number: int, weights: Tensor) -> list[Tensor]:
    """p² w of each expert's rows, float32, in the order of expert_rows.

    call: of the module of all experts. weights: w [tokens]. Raises SourceError for a module with other arguments than
    hidden states, indices [tokens, k] and factors [tokens, k] or [tokens, experts].
    """
    hidden, *routing = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    indices = [x for x in routing if not x.is_floating_point()]
    factors = [x for x in routing if x.is_floating_point()]
    if len(indices) != 1 or len(factors) != 1 or indices[0].shape[0] != hidden.shape[0]:
        raise SourceError("the experts of this model have no known routing, so hessian=loss has no weights for them. "
                          "Use hessian=output.")  # fmt: skip
    (index,), (factor,) = indices, factors
    found = []
    for expert in range(number):
        choice, token = index.T.eq(expert).nonzero(as_tuple=True)
        own = factor[token, choice] if factor.shape == index.shape else factor[token, expert]
        found.append(own.float().square() * weights[token])
    return found


def check_rows(call: Call, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raises SourceError if an expert's rows and weights cannot belong together."""
    for own, weight in zip(rows, weights, strict=True):
        if len(own) != len(weight):
            raise SourceError(
                f"an expert sees {len(own)} tokens where the router sends {len(weight)}, so hessian=loss has no "
                "weights for them. Use hessian=output."
            )
