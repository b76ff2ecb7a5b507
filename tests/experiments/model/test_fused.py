"""Layers that engines fuse share a global scale."""

from __future__ import annotations

import torch

from experiments.model.fused import fused_groups, invertible, shared_global_scale
from quantkit import get_format
from quantkit.layouts import exact_global_scale

SEVEN = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


def test_groups_follow_from_the_names() -> None:
    groups = fused_groups(SEVEN)
    assert groups == [tuple(SEVEN[:3]), (SEVEN[3],), tuple(SEVEN[4:6]), (SEVEN[6],)]


def test_layers_of_different_modules_are_not_fused() -> None:
    names = ["experts.0.gate_proj", "experts.1.gate_proj", "experts.0.up_proj", "experts.1.up_proj"]
    assert fused_groups(names) == [("experts.0.gate_proj", "experts.0.up_proj"), (names[1], names[3])]


def test_groups_can_be_set() -> None:
    assert fused_groups(SEVEN, [["gate_proj", "down_proj"]]) == [
        *((name,) for name in SEVEN[:4]), (SEVEN[4], SEVEN[6]), (SEVEN[5],)
    ]  # fmt: skip
    assert fused_groups(SEVEN, []) == [(name,) for name in SEVEN]


def test_the_shared_scale_is_that_of_the_largest_magnitude() -> None:
    weights = [torch.full((2, 16), value, dtype=torch.float32, device="cpu") for value in (0.0, -5.0, 3.0)]
    assert float(shared_global_scale(weights, get_format("nvfp4"))) == torch.tensor(5.0).div(6 * 448).item()
    assert float(shared_global_scale(weights[:1], get_format("nvfp4"))) == 1
    assert float(shared_global_scale(weights, get_format("mxfp4"))) == 1


def test_a_scale_of_nvfp4_becomes_one_that_a_divisor_inverts() -> None:
    scale = torch.tensor(0.0123, dtype=torch.float32, device="cpu")
    found = invertible(scale, get_format("nvfp4"))
    assert torch.equal(found, exact_global_scale(scale)) and float(found) > float(scale)
    for name in ("mxfp4", "nvint4", "fp4_ue5m3"):
        assert invertible(scale, get_format(name)) is scale
    for extreme in (1e-38, 1e38):  # no divisor may be exact there
        far = torch.tensor(extreme, dtype=torch.float32, device="cpu")
        assert invertible(far, get_format("nvfp4")) is far
