"""Row groups with Hessians of their own, and runs whose tokens weigh by loss."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.capture import load, weighted
from experiments.config import HessianConfig, MethodConfig, Weighting
from experiments.measure.groups import quantize_groups, statistics_of, verify_groups
from experiments.measure.stages import execute
from experiments.sources.resolved import resolve
from quantkit import quantize, verify
from quantkit.calibration import block_hessians
from quantkit.methods import METHODS
from tests.experiments.tiny_models import configuration

WITH_HESSIANS = [name for name, method in METHODS.items() if method.needs is not None]


def weight_and_grams(groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[10, 64] and [groups, 64, 64], of inputs that differ by group."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 64, generator=generator, dtype=torch.float32)
    x = torch.randn(groups, 200, 64, generator=generator, dtype=torch.float32) * torch.rand(
        groups, 1, 64, generator=generator, dtype=torch.float32
    )
    return weight, x.mT @ x


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("method", WITH_HESSIANS)
def test_each_group_has_the_codes_of_its_own_statistics(format: str, method: str) -> None:
    weight, grams = weight_and_grams(3)
    needs = METHODS[method].needs
    call = partial(quantize, format=format, backend="reference")
    given = statistics_of(needs, grams, 16, "cpu")
    result = quantize_groups(call, weight, given, method=method)
    assert result.shape == weight.shape
    whole = call(weight, method="naive")
    assert torch.equal(result.global_scale, whole.global_scale)
    first = 0
    for rows, statistics in zip(weight.split([4, 3, 3]), given, strict=True):
        options = {"global_scale": whole.global_scale} if whole.format.two_level else {}
        alone = call(rows, method=method, **statistics, **options)
        assert torch.equal(result.codes[first : first + len(rows)], alone.codes)
        assert torch.equal(result.scales[first : first + len(rows)], alone.scales)
        first += len(rows)


@pytest.mark.parametrize("method", WITH_HESSIANS)
def test_one_group_is_the_whole_weight(method: str) -> None:
    weight, grams = weight_and_grams(1)
    given = statistics_of(METHODS[method].needs, grams, 16, "cpu")
    result = quantize_groups(partial(quantize, backend="reference"), weight, given, method=method)
    alone = quantize(weight, method=method, backend="reference", **given[0])
    assert torch.equal(result.codes, alone.codes) and torch.equal(result.scales, alone.scales)
    assert torch.equal(result.global_scale, alone.global_scale)


def test_groups_are_judged_by_their_own_hessians() -> None:
    weight, grams = weight_and_grams(2)
    given = statistics_of("hessian", grams, 16, "cpu")
    result = quantize_groups(partial(quantize, backend="reference"), weight, given, method="hessian")
    found = verify_groups(result, weight, given)
    assert found.ok and found.blocks == 40
    assert not verify(result, weight, block_hessians(grams[0], 16)).ok
    other = quantize(weight, method="hessian", hessian=given[0]["hessian"], backend="reference")
    wrong = verify_groups(other, weight, given)
    assert wrong.violations and all(row >= 5 for row, _ in wrong.where)


def test_a_gap_is_the_largest_of_the_groups() -> None:
    weight, grams = weight_and_grams(2)
    given = statistics_of("hessian", grams, 16, "cpu")
    result = quantize_groups(partial(quantize, backend="reference"), weight, given, method="joint")
    found = verify_groups(result, weight, given, gap=16)
    parts = []
    for one, rows in zip(given, (slice(0, 5), slice(5, 10)), strict=True):
        part = dataclasses.replace(result, codes=result.codes[rows], scales=result.scales[rows])
        parts.append(verify(part, weight[rows], one["hessian"], gap=8))
    assert found.gap == max(part.gap for part in parts if part.gap is not None)
    assert found.judged and found.blocks == sum(part.blocks for part in parts)


@pytest.mark.parametrize("hessian", [HessianConfig(Weighting.loss), HessianConfig(Weighting.loss, groups=4)])
@pytest.mark.parametrize("method", WITH_HESSIANS)
def test_every_method_with_a_hessian_takes_either(tiny: SimpleNamespace, method: str, hessian: HessianConfig) -> None:
    common = {"method": MethodConfig(method), "cache__dir": str(tiny.cache), "verify": True}
    plain = execute(resolve(configuration(tiny.folder, tiny.texts, **common))).fields
    fields = execute(resolve(configuration(tiny.folder, tiny.texts, hessian=hessian, **common))).fields
    assert (fields["hessian_weighting"], fields["hessian_groups"], fields["hessian_samples"]) == (
        "loss",
        hessian.groups,
        1,
    )
    assert plain["hessian_weighting"] is None and plain["hessian_groups"] is None
    if METHODS[method].is_optimal:
        assert fields["verified_violations"] == plain["verified_violations"] == 0
    # Each minimizes another error; the plain one is what output error on the calibration tokens measures.
    assert fields["output_error"] != plain["output_error"]
    assert fields["output_error"] < 2 * plain["output_error"]


def test_a_method_without_hessians_makes_no_backward_pass(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_memo", type(load._memo)())
    monkeypatch.setattr(weighted, "_last", {})
    config = configuration(
        tiny.folder, tiny.texts, hessian=HessianConfig(Weighting.loss), method=MethodConfig("sse"),
        cache__dir=str(tmp_path),
    )  # fmt: skip
    assert execute(resolve(config)).fields["hessian_weighting"] is None
    assert not (tmp_path / "losses").exists()
