"""Rows of a weight make up for each other's errors, by the Gram matrix of the loss's gradients at the layer's outputs.

To second order, an error D = W − W_q changes the loss by tr(G D H Dᵀ) / 2 if gradients and inputs are independent:
G = Σ g gᵀ over tokens, the *output Gram matrix*, is the other factor of Kronecker-factored curvature (Martens and
Grosse, 2015, arXiv:1503.05671). G = R Rᵀ with R upper triangular gives

    tr(G D H Dᵀ) = Σ_p ‖(Rᵀ D)_p‖²_H    with    (Rᵀ D)_p = R_ppᵀ D_p + Σ_{k<p} R_kpᵀ D_k

for panels p of rows. Panel p's term depends on no later panel. With all panels before it fixed, a method of this
package quantizes

    target_p = W_p + R_pp⁻ᵀ Σ_{k<p} R_kpᵀ D_k    under H

So this is GPTQ over rows, around GPTQ over columns. Rows of one panel are solved at once: R_pp couples them, and that
is left out. Rows are visited by descending diagonal of G, or in their own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from quantkit.layer import gptq
from quantkit.layer.common import LayerResult, LayerTask, block_values

__all__ = ["solve"]

P = TypeVar("P")


def solve(
    solve_layer: Callable[[LayerTask, P | None], LayerResult], prepare: Callable[[LayerTask], P], task: LayerTask
) -> LayerResult:
    """Codes and scales by ``solve_layer``; panel by panel if the task has an output Gram matrix.

    prepare: what the panels share, so that it is made once.
    """
    if task.output_gram is None or not len(task.weight):
        return solve_layer(task, None)
    order = _row_order(task.output_gram, task.options.order)
    upper = gptq.factor(task.output_gram, task.options.output_damping, order, "output_").float()
    prepared = prepare(task)
    weight = task.weight.float()[order]
    error = torch.zeros_like(weight)
    parts = []
    for start in range(0, len(weight), task.options.rows):
        panel = slice(start, min(start + task.options.rows, len(weight)))
        target = weight[panel] + _feedback(upper, error, panel)
        parts.append(solve_layer(replace(task, weight=target, output_gram=None), prepared))
        error[panel] = weight[panel] - block_values(parts[-1].codes, parts[-1].scales, task)
    back = order.argsort()
    codes, scales, candidates = (torch.cat(found)[back] for found in list(zip(*parts, strict=True))[:3])
    return LayerResult(codes, scales, candidates, None)


def _row_order(output_gram: Tensor, order: str) -> Tensor:
    """int64 ``[rows]``."""
    if order == "natural":
        return torch.arange(len(output_gram), dtype=torch.int64, device=output_gram.device)
    return output_gram.diagonal().argsort(descending=True, stable=True)


def _feedback(upper: Tensor, error: Tensor, panel: slice) -> Tensor:
    """``R_pp⁻ᵀ Σ_{k<p} R_kpᵀ D_k``, float32 ``[rows of the panel, K]``."""
    sums = upper[: panel.start, panel].mT @ error[: panel.start]
    return torch.linalg.solve_triangular(upper[panel, panel].mT, sums, upper=False)
