"""Block descent on the layer's own objective tr(D H Dᵀ), D = W − W_q, starting from GPTQ's result or given codes.

With all other blocks fixed, the objective as a function of block b is, up to a constant, the error of quantizing

    target_b = W_b + Σ_{k≠b} D_k H_kb H_bb⁻¹     under the metric   H_bb

A block is replaced in a row only where that lowers the error, so the objective never rises. The feedback matrix is
F_kb = H_kb H_bb⁻¹. Unlike in GPTQ, a block compensates the errors of later blocks, too.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.layer import gptq
from quantkit.layer.common import (
    LayerResult,
    LayerTask,
    Pass,
    columns_over_blocks,
    damped,
    diagonal_blocks,
    factors_of,
    objective_of,
    panels,
    visiting_order,
)
from quantkit.search import Factors

__all__ = ["Prepared", "prepare", "solve"]

RISE = 1e-5  # relative; more than the objective's rounding error in float32


class Prepared(NamedTuple):
    """What weights with the same Gram matrix and options share. start: for GPTQ; sweeps: see _of_sweeps."""

    start: gptq.Prepared
    sweeps: tuple[Tensor, Tensor, Tensor, Factors | None]


def prepare(task: LayerTask) -> Prepared:
    """To solve several weights with the task's Gram matrix and options."""
    return Prepared(gptq.prepare(task), _of_sweeps(task))


def solve(task: LayerTask, prepared: Prepared | None = None) -> LayerResult:
    """Codes and scales by GPTQ, or ``task.start``, and ``task.options.sweeps`` sweeps.

    Raises ValueError for an objective beyond float32, and RuntimeError if it rises, which only a defect can cause.
    """
    start = prepared.start if prepared else None
    determined = start.determined if start else gptq.determined_channels(task.gram)
    state = gptq.run(task, start) if task.start is None else Pass.begin_with(task, *task.start)
    hessian, blocks, inverses, factors = prepared.sweeps if prepared else _of_sweeps(task)
    history = [objective_of(state.error, hessian)]
    for _ in range(task.options.sweeps):
        for panel in panels(hessian.shape[1]):
            feedback = columns_over_blocks(hessian, panel, inverses)  # F_kb = H_kb H_bb⁻¹
            # W_q + D F is the target, because F_bb = I: D_b cancels.
            target = state.weight[:, panel].float() - state.error[:, panel]
            target.addmm_(state.error, feedback)
            state.solve(panel, target, factors, feedback[panel], blocks)
        history.append(objective_of(state.error, hessian))
        if not math.isfinite(history[-1]) or not math.isfinite(history[-2]):
            raise ValueError(
                f"the layer's squared error is {history[-1]:g}, beyond float32; scale weight or activations down"
            )
        if not history[-1] <= history[-2] * (1 + RISE):
            raise RuntimeError(f"the objective rose from {history[-2]:.9g} to {history[-1]:.9g} in a sweep of descent")
    return gptq.finish(state, tuple(history), determined)


def _of_sweeps(task: LayerTask) -> tuple[Tensor, Tensor, Tensor, Factors | None]:
    """Damped Hessian ``[K, K]`` in the order of solving, its diagonal blocks in float64, their inverses and factors."""
    hessian = damped(task.gram, task.options.damping, visiting_order(task)[1])
    blocks = diagonal_blocks(hessian, task.block_size).double()
    return hessian, blocks, torch.linalg.inv(blocks), factors_of(task, blocks)
