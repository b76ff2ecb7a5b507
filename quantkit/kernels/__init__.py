"""The objectives as fused Triton kernels: one pass reads the weight and writes packed codes and scale bytes.

naive, sse, hessian and amax mirror the modules of the same name in ``quantkit.reference``. device.py has the functions
that they share, ptx.py their PTX, launch.py their launches. Importing any of these modules but ptx needs Triton.
"""

import functools
import importlib.util
from types import ModuleType

__all__ = ["BLOCK_SIZES", "PANEL_BLOCK_SIZES", "SEARCHED_SCALES", "available", "joint_launcher", "launcher"]

PANEL_BLOCK_SIZES = (16,)  # of the joint kernel with feedback: at 32 it takes minutes to compile
BLOCK_SIZES = (16, 32)  # of the kernels
# The fractional scales that the kernels can search. device.search_unit is clamped to keep scales and their reciprocals
# normal numbers. With scales in this range, a clamped scale is so large that every element rounds to zero, or so small
# that its float32 error equals that of all zeros.
SEARCHED_SCALES = (2.0**-40, 2.0**60)


@functools.cache
def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def launcher() -> ModuleType:
    """The module launch.py, which needs Triton. Cached, because an import statement costs time at each call."""
    from quantkit.kernels import launch

    return launch


@functools.cache
def joint_launcher() -> ModuleType:
    """The module that starts the joint kernel, which needs Triton."""
    from quantkit.kernels import launch_joint

    return launch_joint
