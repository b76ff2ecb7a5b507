"""All PTX text is in ptx.py, and each text uses the operands that its constraints declare."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from quantkit import E2M1
from quantkit.kernels import ptx

KERNELS = Path(ptx.__file__).parent
OTHERS = sorted(path for path in KERNELS.glob("*.py") if path.name != "ptx.py")
# An instruction with its type, an operand, a register's declaration, or the constraints of operands.
PTX = re.compile(r"\b[a-z0-9]+(\.[a-z0-9_]+)*\.([bfsu](8|16|32|64)|[bf]?f?16x2)\b|\$\d|\.reg\b|=&?[rfdlh](,|$)")

ASSEMBLIES = {
    "reciprocal f32": ptx.reciprocal("f32"),
    "reciprocal f64": ptx.reciprocal("f64"),
    "reciprocal_root": ptx.reciprocal_root(),
    "magnitude max": ptx.magnitude("max"),
    "magnitude min": ptx.magnitude("min"),
    "max_magnitude_x2 bf16": ptx.max_magnitude_x2("bf16"),
    "max_magnitude_x2 f16": ptx.max_magnitude_x2("f16"),
    "convert_to_fp16x2": ptx.convert_to_fp16x2("rn"),
    "pack_levels": ptx.pack_levels(),
    "pack_quotients": ptx.pack_quotients(E2M1),
    **{
        f"{writer.__name__} {size}": writer(size)
        for writer in (ptx.rotate, ptx.fp16_norm, ptx.fp16_norm_x2, ptx.fp32_error, ptx.hessian_bounds_x2)
        for size in (16, 32)
    },
}


def texts(path: Path) -> list[str]:
    """The strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return [node.value for node in strings if id(node) not in docstrings]


def test_only_ptx_py_holds_ptx() -> None:
    assert len(OTHERS) >= 8
    assert {path.name: text for path in OTHERS for text in texts(path) if PTX.search(text)} == {}


def test_the_pattern_finds_ptx() -> None:
    assert all(PTX.search(assembly.text) and PTX.search(assembly.constraints) for assembly in ASSEMBLIES.values())
    assert all(any(PTX.search(line) for line in assembly.text.split(";")) for assembly in ASSEMBLIES.values())


def test_every_inline_assembly_comes_from_a_writer() -> None:
    calls = [
        node
        for path in OTHERS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.inline_asm_elementwise"
    ]
    assert len(calls) >= 10
    for call in calls:
        text, constraints = (ast.unparse(argument) for argument in call.args[:2])
        assert text.removesuffix(".text") == constraints.removesuffix(".constraints") != constraints, text


def test_the_writers_know_no_triton() -> None:
    nodes = ast.walk(ast.parse(Path(ptx.__file__).read_text()))
    imported = [ast.unparse(node) for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any("triton" in line for line in imported)


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_a_text_uses_exactly_the_operands_of_its_constraints(name: str) -> None:
    text, constraints = ASSEMBLIES[name].text, ASSEMBLIES[name].constraints.split(",")
    assert {int(number) for number in re.findall(r"\$(\d+)", text)} == set(range(len(constraints)))
    outputs = [constraint.startswith("=") for constraint in constraints]
    assert outputs == sorted(outputs, reverse=True) and outputs[0]


def test_shared_memory_reads_no_operand() -> None:
    """It has an input only because Triton needs an operand for the result's shape."""
    text, constraints = ptx.shared_memory("buffer", 512, alignment=16).text, "=r,r"
    assert ptx.shared_memory("buffer", 512, alignment=16).constraints == constraints
    assert re.findall(r"\$\d+", text) == ["$0"] and ".align 16 .b8 buffer[512]" in text
