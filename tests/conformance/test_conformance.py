"""Scale bytes and codes against those of torchao, compressed-tensors and NVIDIA ModelOpt for the same weights.

record.py records the vectors and the packages' versions. All scale bytes are equal. Codes may differ by one step where
a quotient lies within float32 rounding of a tie, because the packages divide in another order.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from quantkit import QuantizedTensor, quantize
from quantkit.tensor import unpack_codes
from tests.conformance.record import MX_RULES, VECTORS

WEIGHTS = ("gaussian", "heavy", "spread")
PACKAGES = ("torchao", "nvidia-modelopt", "compressed-tensors")
TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def recorded(name: str) -> torch.Tensor:
    with safe_open(VECTORS, "pt") as file:
        return file.get_tensor(name)


def assert_same(q: QuantizedTensor, weight: torch.Tensor, source: str) -> None:
    scales, codes = recorded(f"{source}/scales"), recorded(f"{source}/codes")
    assert torch.equal(q.scales, scales), f"{int((q.scales != scales).sum())} of {scales.numel()} scale bytes differ"
    ours, theirs = unpack_codes(q.codes), unpack_codes(codes)
    differs = ours != theirs
    y = (weight / q.scale_values().repeat_interleave(q.block_size, -1)).abs()[differs]
    tie = (y[:, None] - TIES).abs().amin(-1) / y.clamp(min=0.25)
    # A zero keeps its sign here; some packages drop it.
    zero = (ours[differs] & 7 == 0) & (theirs[differs] & 7 == 0)
    assert ((tie < 1e-6) | zero).all()
    step = ((ours[differs] & 7).int() - (theirs[differs] & 7).int()).abs()
    assert (step <= 1).all()


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_nvfp4_naive_scale_bytes(name: str, package: str) -> None:
    weight = recorded(f"{name}/weight")
    assert_same(quantize(weight, "nvfp4", 16, "naive"), weight, f"{name}/nvfp4/{package}")


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_mxfp4_scale_rules(name: str, rule: str) -> None:
    weight = recorded(f"{name}/weight")
    q = quantize(weight, "mxfp4", 32, "naive", scale_rule=rule)
    assert_same(q, weight, f"{name}/mxfp4/torchao-{rule}")


def test_versions_are_recorded() -> None:
    with safe_open(VECTORS, "pt") as file:
        versions = json.loads(file.metadata()["versions"])
    assert set(versions) == {"torch", *PACKAGES} and tuple(map(int, versions["torchao"].split(".")[:2])) >= (0, 18)
