"""The kernels, compiled for NVIDIA GPUs without having one."""

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

target, capability, format, block_size, dtype, *names = sys.argv[1:]
launch.target_of = lambda device: target
launch._pdl = lambda device: {"PDL": int(capability) >= 90}
fmt, size, any_kind = FORMATS[format], int(block_size), ((torch.float32, True), torch.device("cpu"))
kernels = {
    "naive": lambda: launch._naive(fmt, size, fmt.scale_rules[0], 256, 64, *any_kind),
    "sse": lambda: launch._sse(fmt, size, True, 256, 64, *any_kind),
    "hessian": lambda: launch._hessian(fmt, size, True, 0, True, 64, 1, *any_kind),
    "factorize": lambda: launch._factorize(size, 1, *any_kind),
    "amax": lambda: launch._amax(True, 64, *any_kind),
    "dequantize": lambda: launch._dequantize(fmt, size, 64, None, None, None, any_kind[1]),
    "block_hessians": lambda: launch._block_hessians(size, 64, 64, (torch.bfloat16, True), any_kind[1]),
}
for name in names or kernels:
    kernel = kernels[name]()
    jit, constants = kernel.kernel, {**kernel.constants}
    options = {key: constants.pop(key) for key in ("num_warps", "maxnreg") if key in constants}
    types = {argument: "*fp32" if argument.endswith("_ptr") else "i32" for argument in jit.arg_names}
    types |= dict.fromkeys(("codes_ptr", "scales_ptr", "candidates_ptr"), "*u8")
    types |= dict.fromkeys(("flag_ptr", "flags_ptr", "amax_ptr"), "*i32")
    types |= dict.fromkeys(("weight_ptr", "activations_ptr"), dtype)
    types |= dict.fromkeys(constants, "constexpr")
    types = {argument: types[argument] for argument in jit.arg_names}
    if name == "amax":
        types["parts_ptr"] = "*i32"
    at = {argument: (index,) for index, argument in enumerate(jit.arg_names)}
    aligned = {at[argument]: [["tt.divisibility", 16]] for argument, type in types.items() if type.startswith("*")}
    source = ASTSource(jit, types, {at[argument]: value for argument, value in constants.items()}, aligned)
    compiled = compile(source, target=GPUTarget("cuda", int(capability), 32), options=options)
    assert name != "hessian" or target != "cuda" or compiled.asm["ptx"].count("mma.sync")
    assert compiled.asm["cubin"], name
"""


def compile_for(*arguments: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("format", "block_size", "dtype"),
    [("nvfp4", "16", "*bf16"), ("mxfp4", "32", "*fp32"), ("mxfp4", "16", "*fp16"), ("mxfp4", "32", "*bf16")],
)
def test_the_assembly_is_one_that_ptxas_takes(format: str, block_size: str, dtype: str) -> None:
    """The interpreter does not run PTX, so only ptxas checks it."""
    compile_for("cuda", "90", format, block_size, dtype, "hessian")


@pytest.mark.parametrize(
    ("target", "capability", "format"),
    [("plain", "75", "mxfp4"), ("plain", "80", "nvfp4"), ("cuda", "89", "nvfp4"), ("cuda", "100", "mxfp4")],
)
def test_every_kernel_compiles_for_other_gpus(target: str, capability: str, format: str) -> None:
    compile_for(target, capability, format, "16", "*bf16")
