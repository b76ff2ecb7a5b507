"""The exact optimum that the joint methods approach: least ``r H rᵀ`` over all codes, at each of many scales.

    minimise ‖(x − s∘q) A‖² over levels q,   H = A Aᵀ, A lower triangular

Component j of (x − s∘q) A depends on the elements from j on alone, so elements are fixed from the last to the first
(Schnorr and Euchner, 1994). A partial assignment whose cost exceeds the incumbent's error is dropped: no completion of
it is better. Partial assignments of all scales are extended together, the cheapest first, in pieces of bounded size.

Exact and in float64, for checks on a few blocks: time grows exponentially with the block size where A is far from
diagonal. Nothing of the searches is used here.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["least_error", "lower_factor"]

PIECE = 1 << 17  # partial assignments that are extended at a time
RELATIVE_DAMPING = 1e-9  # of the mean diagonal; keeps a singular Hessian's factor invertible


def lower_factor(hessian: Tensor) -> Tensor:
    """Float64 lower triangular A with A Aᵀ = ``hessian [n, n]``, positive semi-definite, up to RELATIVE_DAMPING."""
    values, vectors = torch.linalg.eigh(hessian.double())
    values = values.clamp(min=0) + RELATIVE_DAMPING * hessian.double().diagonal().mean()
    return torch.linalg.qr((vectors * values.sqrt()).mT).R.mT


def least_error(
    x: Tensor, factor: Tensor, steps: Tensor, levels: Tensor, incumbent: float, budget: int = 1 << 24
) -> float | None:
    """The least ``‖(x − s∘q) A‖²`` below ``incumbent``, or ``incumbent`` if nothing is below it.

    x: float64 ``[n]``; factor: float64 lower triangular A ``[n, n]``; steps: float64 ``[scales, n]``, a row s for each
    candidate; levels: float64 ``[count]``, all signed element values. None after ``budget`` partial assignments, when
    nothing is known.
    """
    size = len(x)
    least = incumbent
    start = torch.zeros(len(steps), size, dtype=torch.float64, device=x.device)
    cost = torch.zeros(len(steps), dtype=torch.float64, device=x.device)
    stack = [(size - 1, steps, start, cost)]
    while stack:
        element, own, residuals, cost = stack.pop()
        keep = cost < least
        own, residuals, cost = own[keep], residuals[keep], cost[keep]
        if element < 0:
            if len(cost):
                least = float(cost.min())
            continue
        # [assignments, levels]
        candidates = x[element] - own[:, element : element + 1] * levels
        known = residuals[:, element + 1 :] @ factor[element + 1 :, element]
        extended = cost.unsqueeze(1) + (candidates * factor[element, element] + known.unsqueeze(1)).square()
        which, level = (extended < least).nonzero(as_tuple=True)
        order = extended[which, level].argsort()
        which, level = which[order], level[order]
        budget -= len(which)
        if budget < 0:
            return None
        for part in reversed(range(0, len(which), PIECE)):  # the cheapest piece is taken up first
            of, at = which[part : part + PIECE], level[part : part + PIECE]
            longer = residuals[of]
            longer[:, element] = candidates[of, at]
            stack.append((element - 1, own[of], longer, extended[of, at]))
    return least
