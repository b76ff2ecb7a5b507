"""GPTQ with the scale of each block searched inside the loop.

    H = R Rᵀ, R upper triangular,  so  tr(D H Dᵀ) = Σ_b ‖(D R)_b‖²  with  (D R)_b = D_b R_bb + Σ_{k<b} D_k R_kb

Block b's term depends on no later block. With all blocks before it fixed, it is the error of quantizing

    target_b = W_b + Σ_{k<b} D_k R_kb R_bb⁻¹     under the metric   M_b = R_bb R_bbᵀ,     D = W − W_q

M_b is the Schur complement of H, which excludes the error that later blocks can compensate. So scale and codes are
chosen by M_b, and the feedback matrix is F_kb = R_kb R_bb⁻¹. With H⁻¹ = UᵀU this is GPTQ's own recursion (Frantar et
al., 2022, arXiv:2210.17323), because U = R⁻¹. No inverse is formed here. R comes from the Cholesky factor of H with
rows and columns reversed.

Differences from GPTQ: search.py solves a whole block at once, instead of column by column at scales that are fixed
before. The order is that of the columns or of the Hessian's diagonal, by whole blocks.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit.layer.common import (
    LayerResult,
    LayerTask,
    Pass,
    block_values,
    columns_over_blocks,
    damped,
    diagonal_blocks,
    factors_of,
    objective_of,
    panels,
    visiting_order,
)
from quantkit.search import Factors, quantize_matrix

__all__ = ["Prepared", "determined_channels", "factor", "finish", "prepare", "run", "solve"]

# With this small damping, a pivot below UNDETERMINED times the damping is noise: other channels determine the channel.
# On Gaussian tokens with the covariance of real layers, the count of larger pivots is the rank within 2 %.
PROBE_DAMPING = 1e-6
UNDETERMINED = 100


class Prepared(NamedTuple):
    """What weights with the same Gram matrix and options share. determined: see determined_channels; factors: of the
    metrics M_b; feedback: F ``[K, K]``, float32."""

    determined: int
    factors: Factors | None
    feedback: Tensor


def prepare(task: LayerTask) -> Prepared:
    """To solve several weights with the task's Gram matrix and options."""
    return Prepared(determined_channels(task.gram), *_columns(task))


def solve(task: LayerTask, prepared: Prepared | None = None) -> LayerResult:
    """Codes and scales by GPTQ; see finish for a Gram matrix of too few tokens."""
    determined = prepared.determined if prepared else determined_channels(task.gram)
    return finish(run(task, prepared), None, determined)


def run(task: LayerTask, prepared: Prepared | None = None) -> Pass:
    """The state after one pass over the block columns."""
    factors, feedback = (prepared.factors, prepared.feedback) if prepared else _columns(task)
    state = Pass(task)
    target = state.weight.float().clone()
    for panel in panels(target.shape[1]):
        change = state.solve(panel, target[:, panel].contiguous(), factors, feedback[panel, panel])
        target[:, panel.stop :].addmm_(change, feedback[panel, panel.stop :])
    return state


def _columns(task: LayerTask) -> tuple[Factors | None, Tensor]:
    """Factors of the metrics M_b, and the feedback matrix F ``[K, K]``."""
    upper = factor(task.gram, task.options.damping, visiting_order(task)[1])
    corner = diagonal_blocks(upper, task.block_size).double()
    return factors_of(task, corner @ corner.mT), _scaled_columns(upper, torch.linalg.inv(corner))


def finish(state: Pass, history: tuple[float, ...] | None, determined: int) -> LayerResult:
    """The result in the weight's own order of blocks. determined: see determined_channels.

    If the Gram matrix does not determine every channel, this warns with the numbers. It then takes the scales of
    objective "hessian" instead, if they have the lower output error on the calibration tokens.
    """
    channels = state.error.shape[1]
    if determined < channels:
        warnings.warn(
            f"the Gram matrix determines {determined} of {channels} channels, damping the rest: "
            f"calibrate on more than {channels} tokens",
            stacklevel=2,
        )
        _keep_better(state)
    codes, scales, candidates = state.in_order_of_weight()
    return LayerResult(codes, scales, candidates, history)


def _keep_better(state: Pass) -> None:
    """Replaces the state by the result of objective "hessian", if that has a lower error under the undamped Gram."""
    task = state.task
    found = quantize_matrix(
        task.weight,
        task.fmt,
        task.block_size,
        "hessian",
        hessians=diagonal_blocks(task.gram, task.block_size).contiguous(),
        global_scale=task.global_scale,
        backend=task.backend,
        count_candidates=True,
    )
    codes, scales, _ = state.in_order_of_weight()
    weight = task.weight.float()
    own, other = (
        objective_of(weight - block_values(*pair, task), task.gram)
        for pair in ((codes, scales), (found.codes, found.scales))
    )
    if other < own:
        assert found.candidates is not None
        state.replace(found.codes, found.scales, found.candidates)


def determined_channels(gram: Tensor) -> int:
    """How many channels of ``gram [K, K]`` its tokens tell apart from the channels after them: about its rank.

    A channel without any activation counts, because no token will tell more of it.
    """
    lower, failed = _lower(gram, PROBE_DAMPING, None, torch.float64 if gram.device.type == "cpu" else gram.dtype)
    if failed:
        return failed - 1  # beyond, rounding of the Gram matrix itself has made it indefinite
    pivots, diagonal = lower.diagonal().double().square(), gram.diagonal().double().flip(0)
    noise = pivots < UNDETERMINED * PROBE_DAMPING * diagonal.mean()
    return len(pivots) - int((noise & (pivots < 0.01 * diagonal)).sum())


def factor(gram: Tensor, damping: float, columns: Tensor | None = None, name: str = "") -> Tensor:
    """Upper triangular R ``[K, K]`` with R Rᵀ = gram + damping · mean(diag gram) · I, in gram's dtype.

    columns: int64 ``[K]``, an order of rows and columns to take the Gram matrix in. In float64 on a CPU, and where
    float32 does not suffice. A Gram of zeros becomes the identity. name: a prefix of "gram" and "damping" in the error.
    Raises ValueError for an indefinite Gram matrix.
    """
    for dtype in (torch.float64,) if gram.device.type == "cpu" else (gram.dtype, torch.float64):
        lower, failed = _lower(gram, damping, columns, dtype)
        if not failed:
            return _reverse_(lower)
    raise ValueError(
        f"{name}gram is not positive semi-definite: with {damping:g} of its mean diagonal added it has no Cholesky "
        f"factor; accumulate it as XᵀX in float32 or better, or raise {name}damping"
    )


def _lower(gram: Tensor, damping: float, columns: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(Cholesky factor of the damped Gram matrix with rows and columns reversed, number of the first pivot that is not
    positive). The number is 0 for a positive definite matrix; otherwise the factor is undefined."""
    if columns is None:
        columns = torch.arange(len(gram), dtype=torch.int64, device=gram.device)
    reverse = damped(gram, damping, columns.flip(0), dtype)
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    torch.linalg.cholesky_ex(reverse, out=(reverse, info))
    return reverse.tril_(), int(info)


def _reverse_(matrix: Tensor) -> Tensor:
    """Reverses rows and columns of ``matrix [K, K]`` in place, a panel of rows from either end at a time."""
    size = len(matrix)
    for panel in panels(size // 2):
        top, bottom = matrix[panel], matrix[size - panel.stop : size - panel.start]
        reversed_top = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(reversed_top)
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)
    return matrix


def _scaled_columns(upper: Tensor, inverses: Tensor) -> Tensor:
    """Float32 ``R_kb R_bb⁻¹``, written over a float32 ``upper``."""
    feedback = upper.float()
    for panel in panels(upper.shape[1]):
        feedback[:, panel] = columns_over_blocks(upper, panel, inverses)
    return feedback
