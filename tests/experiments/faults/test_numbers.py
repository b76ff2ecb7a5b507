"""The same configuration and seed give the same bytes, run to run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from experiments.config import REPO_ROOT
from quantkit import FORMATS, METHODS
from tests.experiments.faults.sizes import note, size

CODE = """
import hashlib, json, sys, torch
from quantkit import FORMATS, METHODS, quantize
from quantkit.metrics import output_error_from_gram, weight_error

rows, columns = int(sys.argv[1]), int(sys.argv[2])
generator = torch.Generator("cpu").manual_seed(0)
weight = torch.randn(rows, columns, generator=generator)
x = torch.randn(4 * columns, columns, generator=generator)
gram = x.T @ x
found = {}
for name in sys.argv[3].split(","):
    for method in METHODS.values():
        given = {} if method.needs is None else {"gram": gram}
        result = quantize(weight, name, FORMATS[name].block_sizes[0], method.name, **given)
        values = result.dequantize()
        digest = hashlib.sha256(result.codes.numpy().tobytes() + result.scales.numpy().tobytes())
        digest.update(repr([float(result.global_scale), weight_error(weight, values),
                            output_error_from_gram(weight, values, gram)]).encode())
        found[f"{name} {method.name}"] = digest.hexdigest()
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
def test_codes_scales_and_errors_are_the_same_bytes_run_to_run() -> None:
    """In processes of their own, with all threads, for every format and method."""
    shape = size(("24", "96", "nvfp4,mxfp4"), ("256", "768", ",".join(FORMATS)))

    def run(threads: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": "random"}
        command = [sys.executable, "-W", "ignore", "-c", CODE, *shape]
        done = subprocess.run(command, cwd=REPO_ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("2")
    assert len(json.loads(first)) == len(shape[2].split(",")) * len(METHODS)
    repeats = size(1, 5)
    assert all(run("2") == first for _ in range(repeats))
    note(
        "same numbers", repeats=repeats + 1, settings=len(json.loads(first)), rows=int(shape[0]), columns=int(shape[1])
    )
