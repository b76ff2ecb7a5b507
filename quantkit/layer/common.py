"""Shared by the methods of a whole weight: the task, the damped Hessian, and one pass over the block columns.

Both methods visit the block columns in order. Block b's target is the weight plus a correction for the errors
D = W − W_q of other blocks. A matrix M_b is the metric of its own error. A solved block changes the later targets:

    target_c ← target_c + change_b · F_bc        for all later blocks c

gptq.py and descent.py define the correction, M_b and the feedback matrix F. Blocks are grouped in panels of columns: a
change reaches the rest of its panel at once, and the columns after the panel by one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit import kernels, parallel
from quantkit.formats import BlockFormat
from quantkit.reference.common import effective_scale
from quantkit.reference.joint import ROUNDS
from quantkit.search import OBJECTIVES, Factors, factorize, quantize_matrix
from quantkit.tensor import unpack_codes

__all__ = [
    "ORDERS",
    "LayerOptions",
    "LayerResult",
    "LayerTask",
    "Pass",
    "block_values",
    "columns_over_blocks",
    "damped",
    "diagonal_blocks",
    "factors_of",
    "objective_of",
    "panels",
    "submatrix",
    "visiting_order",
]

ORDERS = ("natural", "descending")
PANEL_COLUMNS = 256
ROWS = 512  # of a product for the objective
CPU_ROWS = 640  # solved by one thread: fewer cost more in PyTorch's calls than a second core gains


@dataclass(frozen=True)
class LayerOptions:
    """Settings of gptq and descent.

    scale: objective of search.py that chooses the scale of a block: "naive", "sse", "hessian" or "joint".
    order: of the block columns: by "descending" mean diagonal of the Hessian, or "natural". Blocks keep their columns.
    damping: share of the Hessian's mean diagonal that is added to its diagonal.
    sweeps: number of sweeps of block descent, for the method "descent".
    rows: of the weight that are solved together, with an output Gram matrix (rows.py).
    output_damping: share of the output Gram matrix's mean diagonal that is added to its diagonal.
    """

    scale: str = "joint"
    order: str = "descending"
    damping: float = 0.01
    sweeps: int = 4
    rows: int = 32
    output_damping: float = 0.3

    def __post_init__(self) -> None:
        if self.scale not in OBJECTIVES:
            raise ValueError(f"unknown scale {self.scale!r}; known ways to choose one: {', '.join(OBJECTIVES)}")
        if self.order not in ORDERS:
            raise ValueError(f"unknown order {self.order!r}; known orders: {', '.join(ORDERS)}")
        for name, usual in (("damping", 0.01), ("output_damping", 0.3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}; {usual} is usual")
        for name in ("sweeps", "rows"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {value!r}")


def damped(gram: Tensor, damping: float, columns: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Copy of ``gram [K, K]`` in ``dtype`` with ``damping`` of its mean diagonal added to its diagonal.

    columns: int64 ``[K]``, an order of rows and columns. A Gram of zeros becomes the identity.
    """
    hessian = gram.to(dtype, copy=True) if columns is None else submatrix(gram, columns, dtype)
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal.add_(torch.where(mean > 0, mean * damping, 1.0))
    return hessian


def submatrix(matrix: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """``matrix[columns][:, columns]`` in ``dtype``, without a second copy of it. matrix: ``[K, K]``; columns: int64."""
    result = torch.empty(len(columns), len(columns), dtype=dtype, device=matrix.device)
    for part, rows in zip(result.split(PANEL_COLUMNS), columns.split(PANEL_COLUMNS), strict=True):
        part.copy_(matrix.index_select(0, rows).index_select(1, columns))
    return result


def diagonal_blocks(matrix: Tensor, block_size: int) -> Tensor:
    """``[K/block_size, block_size, block_size]``, a view of ``matrix [K, K]``."""
    blocks = matrix.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def objective_of(error: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ) of ``error [rows, K]``, summed in float64."""
    # By parts of the rows, whose products are all that is allocated. A Gram matrix of tiny activations is float64.
    rows_of = (rows.to(torch.promote_types(rows.dtype, hessian.dtype)) for rows in error.split(ROWS))
    parts = [((rows @ hessian) * rows).sum(dtype=torch.float64) for rows in rows_of]
    return float(torch.stack(parts).sum()) if parts else 0.0


def panels(columns: int) -> Iterator[slice]:
    """Slices of PANEL_COLUMNS columns."""
    for start in range(0, columns, PANEL_COLUMNS):
        yield slice(start, min(start + PANEL_COLUMNS, columns))


def columns_over_blocks(matrix: Tensor, panel: slice, inverses: Tensor) -> Tensor:
    """``A_kb B_b`` for the blocks b of a panel of columns, ``[K, width of the panel]``, in the dtype of A = ``matrix``.

    inverses: B ``[K/block_size, block_size, block_size]``.
    """
    size = inverses.shape[-1]
    own = inverses[panel.start // size : panel.stop // size].to(matrix.dtype)
    columns = matrix[:, panel].unflatten(1, (-1, size)).transpose(0, 1)
    return (columns @ own).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class LayerTask:
    """A checked task, all tensors on one device.

    weight: float16, bfloat16 or float32 ``[rows, K]``; gram: float32 or float64 ``[K, K]``; global_scale: float32
    scalar; rule: of the naive scale; backend: "reference" or "triton". start: for descent, packed codes ``[rows, K/2]``
    and scale bytes ``[rows, K/block_size]`` at that global scale, to begin with; None: those of GPTQ. output_gram:
    float32 or float64 ``[rows, rows]``, by which rows make up for each other's errors; None: they do not.
    """

    weight: Tensor
    gram: Tensor
    fmt: BlockFormat
    block_size: int
    global_scale: Tensor
    rule: str
    backend: str
    options: LayerOptions
    start: tuple[Tensor, Tensor] | None = None
    output_gram: Tensor | None = None


class LayerResult(NamedTuple):
    """codes, scales, candidates: as in :class:`quantkit.search.Found`; objective: for descent without an output Gram
    matrix, tr(D H Dᵀ) with the damped Hessian, at the start and after each sweep."""

    codes: Tensor
    scales: Tensor
    candidates: Tensor
    objective: tuple[float, ...] | None


def visiting_order(task: LayerTask) -> tuple[Tensor | None, Tensor | None]:
    """int64 (block columns ``[num_blocks]``, columns ``[K]``) in the order of solving; None for the natural order."""
    if task.options.order == "natural":
        return None, None
    mean = task.gram.diagonal().unflatten(0, (-1, task.block_size)).double().mean(1)
    order = mean.argsort(descending=True, stable=True)
    inside = torch.arange(task.block_size, dtype=torch.int64, device=order.device)
    return order, (order.unsqueeze(1) * task.block_size + inside).flatten()


class Pass:
    """The state of a weight whose block columns are solved in turn, in the order of the task's options.

    columns: int64 ``[K]``, the weight's columns in that order; None for the natural order. weight ``[rows, K]``, codes,
    scales and candidates (as in :class:`quantkit.search.Found`) and error, float32 D = W − W_q ``[rows, K]``, are in
    that order.
    """

    def __init__(self, task: LayerTask) -> None:
        self.task = task
        self.order, self.columns = visiting_order(task)
        self.weight = task.weight.contiguous() if self.columns is None else task.weight.index_select(1, self.columns)
        (rows, columns), device = task.weight.shape, task.weight.device
        self.codes = torch.zeros(rows, columns // 2, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(rows, columns // task.block_size, dtype=torch.uint8, device=device)
        self.candidates = torch.zeros_like(self.scales)
        self.error = torch.zeros(rows, columns, dtype=torch.float32, device=device)

    @classmethod
    def begin_with(cls, task: LayerTask, codes: Tensor, scales: Tensor) -> Pass:
        """The state in which the weight has these codes and scales, in its own order of blocks."""
        state = cls(task)
        state.replace(codes.clone(), scales.clone(), state.candidates)
        state.error.copy_(state.weight.float() - block_values(state.codes, state.scales, task))
        return state

    def in_order_of_weight(self) -> tuple[Tensor, Tensor, Tensor]:
        """(codes, scales, candidates) in the weight's own order of blocks."""
        if self.order is None:
            return self.codes, self.scales, self.candidates
        return self._reordered(self.order.argsort(), self.codes, self.scales, self.candidates)

    def replace(self, codes: Tensor, scales: Tensor, candidates: Tensor) -> None:
        """Takes codes, scales and candidates in the weight's own order of blocks; the error is not updated."""
        if self.order is not None:
            codes, scales, candidates = self._reordered(self.order, codes, scales, candidates)
        self.codes, self.scales, self.candidates = codes, scales, candidates

    def _reordered(
        self, order: Tensor, codes: Tensor, scales: Tensor, candidates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_block = codes.unflatten(1, (-1, self.task.block_size // 2))
        return by_block[:, order].flatten(1), scales[:, order], candidates[:, order]

    @property
    def _has_panel_kernel(self) -> bool:
        task = self.task
        return (
            task.backend == "triton" and task.options.scale == "joint" and task.block_size in kernels.PANEL_BLOCK_SIZES
        )

    def solve(
        self, panel: slice, target: Tensor, factors: Factors | None, feedback: Tensor, metrics: Tensor | None = None
    ) -> Tensor:
        """Solves the blocks of one panel of columns and returns their change, float32 ``[rows, width of the panel]``.

        target: float32 ``[rows, width]``, overwritten; feedback: float32 ``[width, width]``. With float64 ``metrics``,
        a block is replaced only where that lowers its error under them, and the change is that of D. Without metrics,
        every block is replaced, and the change is D.
        """
        if self._has_panel_kernel:
            assert factors is not None
            return kernels.joint_launcher().quantize_panel(
                self.weight,
                self.error,
                self.codes,
                self.scales,
                self.candidates,
                panel,
                target,
                factors.tensors[0],
                feedback,
                fmt=self.task.fmt,
                block_size=self.task.block_size,
                global_scale=self.task.global_scale,
                rounds=ROUNDS,
                descend=metrics is not None,
            )
        change = torch.empty_like(target)

        def solve_rows(rows: slice) -> None:
            self._solve_rows(rows, panel, target[rows], change[rows], factors, feedback, metrics)

        parallel.for_each(solve_rows, _row_pieces(target), target.device)
        return change

    def _solve_rows(
        self,
        rows: slice,
        panel: slice,
        target: Tensor,
        change: Tensor,
        factors: Factors | None,
        feedback: Tensor,
        metrics: Tensor | None,
    ) -> None:
        """solve() for some of the rows; writes to their ``target`` and ``change``."""
        size = self.task.block_size
        for start in range(0, target.shape[1], size):
            here, later = slice(start, start + size), slice(start + size, None)
            number = (panel.start + start) // size
            own = None if factors is None else factors[number]
            metric = None if metrics is None else metrics[number]
            change[:, here] = self._replace(rows, number, target[:, here], own, metric)
            target[:, later].addmm_(change[:, here], feedback[here, later])

    def _replace(
        self, rows: slice, number: int, target: Tensor, factors: Factors | None, metric: Tensor | None
    ) -> Tensor:
        """Solves block column ``number`` of ``rows`` for ``target [rows, block_size]``; returns its change."""
        task, size = self.task, self.task.block_size
        found = quantize_matrix(
            target,
            task.fmt,
            size,
            task.options.scale,
            factors=factors,
            global_scale=task.global_scale,
            rule=task.rule,
            backend=task.backend,
            count_candidates=True,
        )
        assert found.candidates is not None
        here, packed = slice(number * size, (number + 1) * size), slice(number * size // 2, (number + 1) * size // 2)
        weight, before = self.weight[rows, here].float(), self.error[rows, here]
        after = weight - block_values(found.codes, found.scales, task)
        codes, scales = self.codes[rows, packed], self.scales[rows, number : number + 1]
        self.candidates[rows, number : number + 1] = found.candidates
        if metric is None:
            change = after
        else:
            # Errors against the target, which includes the errors of other blocks.
            old, new = target - (weight - before), target - (weight - after)
            better = (_energy(new, metric) < _energy(old, metric)).unsqueeze(1)
            after = torch.where(better, after, before)
            change = after - before
            found = found._replace(
                codes=torch.where(better, found.codes, codes), scales=torch.where(better, found.scales, scales)
            )
        codes.copy_(found.codes)
        scales.copy_(found.scales)
        before.copy_(after)
        return change


def factors_of(task: LayerTask, metrics: Tensor) -> Factors | None:
    """Factors of ``metrics [K/block_size, block_size, block_size]``; None for an objective without factors."""
    scale = task.options.scale
    return factorize(metrics, task.backend, objective=scale) if OBJECTIVES[scale].needs_factors else None


def _row_pieces(target: Tensor) -> list[tuple[slice]]:
    """Rows are independent. On a CPU, pieces of them take its cores; their number does not depend on the threads."""
    rows = len(target)
    pieces = max(1, rows // CPU_ROWS) if target.device.type == "cpu" else 1
    return [(slice(rows * i // pieces, rows * (i + 1) // pieces),) for i in range(pieces)]


def block_values(codes: Tensor, scales: Tensor, task: LayerTask) -> Tensor:
    """Float32 ``[rows, n · block_size]`` of packed codes and scale bytes ``[rows, n]``."""
    levels = task.fmt.element.decode_signed(unpack_codes(codes)).unflatten(-1, (scales.shape[-1], -1))
    return (levels * effective_scale(scales, task.fmt, task.global_scale).unsqueeze(-1)).flatten(-2)


def _energy(errors: Tensor, metric: Tensor) -> Tensor:
    errors = errors.double()
    return ((errors @ metric) * errors).sum(-1)
