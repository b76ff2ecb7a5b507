"""The table of quantize()'s methods: what each one needs and promises, and the function that solves it.

A method quantizes a whole weight. It stands on search.py, whose *objectives* choose the scale of one block. naive, sse,
hessian and joint apply the objective of their name to every block on its own. gptq and descent (layer/) let the blocks
of a row, and with an output Gram matrix also the rows, make up for each other's errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple, TypeVar

from torch import Tensor

from quantkit.formats import BlockFormat
from quantkit.layer import descent, gptq, rows
from quantkit.layer.common import LayerOptions, LayerResult, LayerTask
from quantkit.reference.amax import global_scale_of
from quantkit.search import OBJECTIVES, Found, Objective, quantize_matrix

__all__ = ["METHODS", "Method", "Problem", "get_method"]

P = TypeVar("P")  # what a method prepares for a Gram matrix
NEEDS = (None, "hessian", "gram")
LAYER_OPTIONS = ("scale", "order", "damping", "rows", "output_damping")  # of every method of quantkit/layer


class Problem(NamedTuple):
    """A checked task for a method.

    matrix: float16, bfloat16 or float32 ``[rows, K]``.
    global_scale: float32 scalar, or None for the default of :func:`quantkit.search.quantize_matrix`.
    rule: rounding of the naive scale.
    hessians: ``[K/block_size, block_size, block_size]`` for a method that needs "hessian", else None.
    gram: ``[K, K]`` for a method that needs "gram", else None.
    backend: "reference" or "triton".
    name: the name of hessians or gram in errors.
    start, output_gram: as in :class:`quantkit.layer.common.LayerTask`.

    All tensors are on one device.
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
    options: LayerOptions
    start: tuple[Tensor, Tensor] | None = None
    output_gram: Tensor | None = None


@dataclass(frozen=True)
class Method:
    """A way to quantize a weight.

    solve: Problem → codes, scales, global scale, candidates and flags.
    objective: the criterion of search.py for its scales. Backend "triton" needs the kernel of this objective.
    needs: "hessian" (block Hessians), "gram" (the whole Gram matrix), or None. Any other statistic is an error.
    is_optimal: no representable scale is better, as verify judges it (docs/theory.md).
    nearest_codes: every code is round-to-nearest at the scale of its block.
    options: settings of LayerOptions that it takes.
    takes_init: it can begin with given codes and scales.
    takes_output_gram: rows can make up for each other's errors.
    """

    name: str
    solve: Callable[[Problem], Found]
    objective: Objective
    needs: str | None = None
    is_optimal: bool = False
    nearest_codes: bool = True
    options: tuple[str, ...] = ()
    takes_init: bool = False
    takes_output_gram: bool = False

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
        """The method that applies ``objective`` to every block independently."""

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
        return cls(objective.name, solve, objective, needs, objective.is_optimal, objective.nearest_codes)

    @classmethod
    def of_layer(
        cls,
        name: str,
        solve_layer: Callable[[LayerTask, P | None], LayerResult],
        prepare: Callable[[LayerTask], P],
        options: tuple[str, ...],
        takes_init: bool = False,
    ) -> Method:
        """A method of quantkit/layer, which needs the Gram matrix."""

        def solve(problem: Problem) -> Found:
            if problem.global_scale is None:
                problem = problem._replace(global_scale=global_scale_of(problem.matrix, problem.fmt))
            assert problem.gram is not None and problem.global_scale is not None
            task = LayerTask(
                problem.matrix,
                problem.gram,
                problem.fmt,
                problem.block_size,
                problem.global_scale,
                problem.rule,
                problem.backend,
                problem.options,
                problem.start,
                problem.output_gram,
            )
            found = rows.solve(solve_layer, prepare, task)
            candidates = found.candidates if problem.count_candidates else None
            return Found(found.codes, found.scales, problem.global_scale, candidates, None, found.objective)

        return cls(
            name,
            solve,
            OBJECTIVES["joint"],
            "gram",
            nearest_codes=False,
            options=options,
            takes_init=takes_init,
            takes_output_gram=True,
        )


METHODS: Mapping[str, Method] = MappingProxyType(
    {name: Method.of_objective(OBJECTIVES[name]) for name in ("naive", "sse", "hessian", "joint")}
    | {
        "gptq": Method.of_layer("gptq", gptq.solve, gptq.prepare, LAYER_OPTIONS),
        "descent": Method.of_layer(
            "descent", descent.solve, descent.prepare, (*LAYER_OPTIONS, "sweeps"), takes_init=True
        ),
    }
)


def get_method(name: str) -> Method:
    """The method called ``name``. Raises ValueError with the known names."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]
