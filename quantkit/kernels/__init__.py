"""The methods as fused Triton kernels: one pass reads the weight and writes packed codes and scale bytes.

Each module mirrors the one of the same name in ``quantkit.reference``; device.py holds what they share, launch.py
starts them. Importing any of them needs Triton.
"""

import functools
import importlib.util
from types import ModuleType

__all__ = ["BLOCK_SIZES", "SEARCHED_SCALES", "available", "launcher"]

BLOCK_SIZES = (16, 32)  # of the kernels
# Fractional scales that the searches' float32 reaches: times any unit in which scales and their reciprocals are normal
# numbers, a scale beside amax is then large enough to leave zeros alone, or too small to tell its error from theirs.
SEARCHED_SCALES = (2.0**-40, 2.0**60)


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def launcher() -> ModuleType:
    """The module that starts the kernels; it needs Triton. Cached: an import statement costs time at each call."""
    from quantkit.kernels import launch

    return launch
