"""The target of a layer whose inputs come from quantized layers before it.

    T = W + (α W D + α_r R)(H_q + δ I)⁻¹

    H_q = Σ w x_q x_qᵀ,   D = C − H_q = Σ w (x − x_q) x_qᵀ,   R = Σ w (r − r_q) x_qᵀ,   δ = damping · mean(diag H_q)

x [in_features] is the input of the layer in the original model and x_q in the quantized one, r and r_q the residual
stream [out_features] to which the layer's output is added, w the token's weight, C = Σ w x x_qᵀ. With α = 1 and without
damping, T x_q is the least-squares fit of W x, as in Qronos (Zhang et al., 2025, arXiv:2505.11695). With α_r = 1, it
also fits what the stream beside the layer lacks. Where x_q = x, D is zero and T = W, whatever α is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.layer.common import damped


def corrected(
    weight: Tensor,
    hessian: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    alpha: float,
    residual_alpha: float,
    damping: float,
) -> Tensor:
    """T, float32 [out_features, in_features].

    weight: W [out_features, in_features]; hessian: H_q [in_features, in_features]; shift: D, as H_q; residual: R, as W.
    A term whose factor is 0 or whose sum is None is left out. The solution is in float64. Raises ValueError for an
    indefinite H_q.
    """
    weight = weight.float()
    change = None
    if shift is not None and alpha:
        change = alpha * (weight @ shift.float())
    if residual is not None and residual_alpha:
        change = residual_alpha * residual.float() if change is None else change.add_(residual, alpha=residual_alpha)
    if change is None:
        return weight
    factor, failed = torch.linalg.cholesky_ex(damped(hessian, damping, dtype=torch.float64))
    if int(failed):
        raise ValueError(
            f"the Hessian of a layer's inputs is not positive definite at damping={damping:g}; raise calibrate.damping"
        )
    return weight + torch.cholesky_solve(change.double().T, factor).T.float()
