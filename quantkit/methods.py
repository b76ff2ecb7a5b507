"""The front door's table: what each method of quantize() needs, what it promises, and what solves it.

A method quantizes a whole weight. It stands on search.py, whose *objectives* choose the scale of one block. naive, sse
and hessian apply the objective of their name to every block on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor

from quantkit.formats import BlockFormat
from quantkit.search import OBJECTIVES, Found, Objective, quantize_matrix

__all__ = ["METHODS", "Method", "Problem", "get_method"]

NEEDS = (None, "hessian", "gram")


class Problem(NamedTuple):
    """A checked task for a method.

    matrix: float16, bfloat16 or float32 ``[rows, K]``; global_scale: float32 scalar, or None for the one that
    :func:`quantkit.search.quantize_matrix` takes by itself; rule: of the naive scale; hessians: ``[K/block_size,
    block_size, block_size]`` for a method that needs "hessian"; gram: ``[K, K]`` for one that needs "gram"; backend:
    "reference" or "triton"; name: what errors call hessians and gram. Tensors are on one device.
    """

    matrix: Tensor
    fmt: BlockFormat
    block_size: int
    global_scale: Tensor | None
    rule: str
    hessians: Tensor | None
    gram: Tensor | None
    backend: str
    count_candidates: bool
    check_finite: bool
    name: str


@dataclass(frozen=True)
class Method:
    """A way to quantize a weight.

    solve: Problem → codes, scales, global scale, candidates and flags.
    objective: of search.py, by which it chooses scales. Backend "triton" needs its kernel.
    needs: "hessian" (block Hessians), "gram" (the whole Gram matrix), or None. What is not needed is refused.
    is_optimal: no representable scale is better, as verify judges it (docs/theory.md).
    nearest_codes: every code is round-to-nearest at the scale of its block.
    """

    name: str
    solve: Callable[[Problem], Found]
    objective: Objective
    needs: str | None = None
    is_optimal: bool = False
    nearest_codes: bool = True

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise ValueError(f"method {self.name!r} needs {self.needs!r}; known needs: {', '.join(map(str, NEEDS))}")

    @property
    def needs_hessian(self) -> bool:
        return self.needs == "hessian"

    @property
    def has_kernel(self) -> bool:
        return self.objective.has_kernel

    @classmethod
    def of_objective(cls, objective: Objective) -> Method:
        """The method that applies ``objective`` to every block on its own."""

        def solve(problem: Problem) -> Found:
            return quantize_matrix(
                problem.matrix,
                problem.fmt,
                problem.block_size,
                objective.name,
                hessians=problem.hessians,
                global_scale=problem.global_scale,
                rule=problem.rule,
                backend=problem.backend,
                count_candidates=problem.count_candidates,
                check_finite=problem.check_finite,
                name=problem.name,
            )

        needs = "hessian" if objective.needs_factors else None
        return cls(objective.name, solve, objective, needs, objective.is_optimal)


METHODS: Mapping[str, Method] = MappingProxyType(
    {name: Method.of_objective(OBJECTIVES[name]) for name in ("naive", "sse", "hessian")}
)


def get_method(name: str) -> Method:
    """The method called ``name``. Raises ValueError with the known names."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]
