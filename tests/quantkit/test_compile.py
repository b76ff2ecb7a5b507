"""The Hessian kernel, compiled for an NVIDIA GPU that need not be there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMPILE = """
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from quantkit.formats import FORMATS
from quantkit.kernels import launch
from quantkit.kernels.hessian import hessian_kernel

format, block_size, dtype = sys.argv[1:]
options = launch._hessian(FORMATS[format], int(block_size), True, 0, torch.device("cpu")).constants
given = {key: options.pop(key) for key in ("num_warps", "maxnreg") if key in options}
options |= {"TARGET": "cuda", "OVERLAP": True}
types = dict.fromkeys(hessian_kernel.arg_names, "*fp32")
types |= dict.fromkeys(("codes_ptr", "scales_ptr", "candidates_ptr"), "*u8")
types |= {"weight_ptr": dtype, "flag_ptr": "*i32", "amax_ptr": "*i32", "rows": "i32", "num_blocks": "i32"}
types |= dict.fromkeys(options, "constexpr")
at = {name: (index,) for index, name in enumerate(hessian_kernel.arg_names)}
aligned = {at[name]: [["tt.divisibility", 16]] for name, type in types.items() if type.startswith("*")}
source = ASTSource(hessian_kernel, types, {at[name]: value for name, value in options.items()}, aligned)
kernel = compile(source, target=GPUTarget("cuda", 90, 32), options=given)
assert kernel.asm["ptx"].count("mma.sync")
"""


@pytest.mark.parametrize(
    ("format", "block_size", "dtype"),
    [("nvfp4", "16", "*bf16"), ("mxfp4", "32", "*fp32"), ("mxfp4", "16", "*fp16"), ("mxfp4", "32", "*bf16")],
)
def test_the_assembly_is_one_that_ptxas_takes(format: str, block_size: str, dtype: str) -> None:
    """What the interpreter cannot show."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, format, block_size, dtype], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
