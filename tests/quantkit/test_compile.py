"""The Hessian kernel, compiled for an NVIDIA GPU that need not be there: its instructions get the layout they need."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from quantkit import bounds
from quantkit.formats import FORMATS
from quantkit.kernels import launch
from quantkit.kernels.device import format_constants
from quantkit.kernels.hessian import hessian_kernel

format, dtype = sys.argv[1:]
constants = format_constants(FORMATS[format], 32)
launch.TARGET = "cuda"
options = launch._hessian_options(constants)
given = {key: options.pop(key) for key in ("num_warps", "maxnreg")}
options |= {"FMT": constants, "COUNT": True, "TARGET": "cuda", "SLACK": bounds.SLACK}
types = dict.fromkeys(hessian_kernel.arg_names, "*u8") | {
    "weight_ptr": dtype, "factor_ptr": "*fp32", "inverse_root_ptr": "*fp32", "global_scale_ptr": "*fp32",
    "flag_ptr": "*i32", "rows": "i32", "num_blocks": "i32",
} | dict.fromkeys(options, "constexpr")
at = {name: (index,) for index, name in enumerate(hessian_kernel.arg_names)}
aligned = {at[name]: [["tt.divisibility", 16]] for name, type in types.items() if type.startswith("*")}
source = ASTSource(hessian_kernel, types, {at[name]: value for name, value in options.items()}, aligned)
kernel = compile(source, target=GPUTarget("cuda", 90, 32), options=given)
assert launch.mma_layouts(kernel.asm["ttgir"]) == {launch.MMA_LAYOUT}, launch.mma_layouts(kernel.asm["ttgir"])
launch._check_layout(kernel)
"""


@pytest.mark.parametrize(("format", "dtype"), [("nvfp4", "*bf16"), ("mxfp4", "*fp32")])
def test_products_on_tensor_cores_get_the_layout_that_they_are_written_for(format: str, dtype: str) -> None:
    """What the interpreter cannot show; Triton chooses the layout, and its versions differ."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, format, dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
