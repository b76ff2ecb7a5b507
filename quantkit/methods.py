"""The methods by name: what each needs, what it promises, and how its reference chooses the scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.reference import hessian, naive, sse
from quantkit.reference.common import ScaleChoice

__all__ = ["METHODS", "Method", "get_method"]


@dataclass(frozen=True)
class Method:
    """A way to choose the scales of blocks.

    choose_scales: the reference. Of float32 blocks ``[rows, num_blocks, block_size]``, with the format, the global
        scale, the naive scale's rule, and the factors of the block Hessians (None without them).
    needs_hessian: block Hessians are required; otherwise they are refused.
    is_optimal: no representable scale is better, as verify judges it (docs/theory.md).
    has_kernel: kernels/launch.py starts a twin; without one, backend "auto" takes the reference on a GPU, too.
    """

    name: str
    choose_scales: Callable[[Tensor, BlockFormat, Tensor, str, HessianFactors | None], ScaleChoice]
    needs_hessian: bool = False
    is_optimal: bool = False
    has_kernel: bool = True


def _naive(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    return naive.choose_scales(blocks, fmt, global_scale, rule)


def _sse(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    return sse.choose_scales(blocks, fmt, global_scale)


def _hessian(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    assert factors is not None
    return hessian.choose_scales(blocks, fmt, global_scale, factors)


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (
            Method("naive", _naive),
            Method("sse", _sse, is_optimal=True),
            Method("hessian", _hessian, needs_hessian=True, is_optimal=True),
        )
    }
)


def get_method(name: str) -> Method:
    """The method called ``name``. Raises ValueError with the known names."""
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known methods: {', '.join(METHODS)}")
    return METHODS[name]
