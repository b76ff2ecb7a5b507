"""Names of formats, methods and backends as readers see them, and numbers as table cells. Imports no torch."""

from __future__ import annotations

NONE = "–"
FORMATS = {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}  # name → label, in the order of the rows
# The default global scale and naive rule, which the main tables use. Figures that compare them show the others.
DEFAULTS = {"nvfp4": ("amax", "nearest"), "mxfp4": ("none", "floor")}
METHODS = {
    "naive": "Naive",
    "sse": "SSE",
    "hessian": "Hessian",
    "gptq": "GPTQ, blocks ordered, Hessian scales",  # published alone
}
OPTIMAL = ("sse", "hessian")  # methods that promise the least error
BACKENDS = {"reference": "reference", "triton": "Triton"}


def rank(order: dict[str, str], name: str) -> tuple[int, str]:
    return (list(order).index(name) if name in order else len(order), name)


def as_percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.2f} %"


def as_factor(factor: float | None) -> str:
    return NONE if factor is None else f"{factor:.1f}×"


def as_number(value: float | None) -> str:
    return NONE if value is None else f"{value:g}"
