"""Whatever default dtype or device a caller has set, results are the same, byte for byte."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAKERS = {
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "zeros", "ones", "full", "empty", "empty_strided", "eye"),
    *("arange", "range", "linspace", "logspace", "rand", "randn", "randint", "randperm", "normal", "tril_indices"),
    *("triu_indices", "hann_window", "hamming_window", "blackman_window", "bartlett_window", "kaiser_window"),
}
DEFAULT_TYPES = {"Tensor", "FloatTensor", "DoubleTensor", "HalfTensor", "BFloat16Tensor", "LongTensor", "IntTensor"}


def sources() -> Iterator[Path]:
    for package in ("quantkit", "experiments"):
        yield from sorted((ROOT / package).rglob("*.py"))


def left_to_defaults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of the calls that make a tensor without dtype= and device=, and a generator without device."""
    names = {"torch"}
    direct = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname for alias in node.names if alias.name == "torch" and alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module == "torch":
            direct |= {alias.asname or alias.name: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id in names:
            name = function.attr
        elif isinstance(function, ast.Name) and function.id in direct:
            name = direct[function.id]
        else:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if (
            (name in MAKERS and not {"dtype", "device"} <= given)
            or name in DEFAULT_TYPES
            or (name == "Generator" and not node.args and "device" not in given)
        ):
            yield node.lineno, name


def test_no_tensor_is_made_without_dtype_and_device() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: torch.{name}"
        for path in sources()
        for line, name in left_to_defaults(ast.parse(path.read_text()))
    ]
    assert found == []


def test_such_a_call_is_seen() -> None:
    lines = ["import torch as t", "from torch import ones as o", "t.zeros(3, dtype=d)", "o(2)", "t.Generator()"]
    source = "\n".join([*lines, "t.full((), 1.0, dtype=d, device=e)", "t.Generator(e)"])
    assert list(left_to_defaults(ast.parse(source))) == [(3, "zeros"), (4, "ones"), (5, "Generator")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, str]]]:
    folder = tmp_path_factory.mktemp("every")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.every_function", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("default", ["float16", "bfloat16", "float64", "meta"])
def test_no_default_changes_a_byte(found: dict[str, dict[str, dict[str, str]]], default: str) -> None:
    want, got = found["results"]["float32"], found["results"][default]
    assert {name: value for name, value in got.items() if value != want.get(name)} == {}
    assert got.keys() == want.keys()
    assert all(len(value) == 16 for value in want.values()), want  # hashes, not errors


def test_every_public_function_was_called(found: dict[str, dict[str, dict[str, str]]]) -> None:
    assert found["missed"] == [], "let tests/every_function.py call them"
