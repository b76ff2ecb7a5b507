"""The methods as fused Triton kernels: one pass reads the weight and writes packed codes and scale bytes.

Each module mirrors the one of the same name in ``quantkit.reference``; device.py holds what they share, launch.py
starts them. Importing any of them needs Triton.
"""

import functools
import importlib.util

__all__ = ["available"]


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
