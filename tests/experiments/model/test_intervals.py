"""Intervals cover what they say; paired ones are narrower."""

from __future__ import annotations

import math

import numpy as np
import pytest

from experiments.model.intervals import Estimate, by_position, estimate, exponential, paired, quantiles

RESAMPLES = 2000


def test_coverage() -> None:
    """Skewed values, as KL's are: 95 % of 400 intervals of 60 sequences hold the true mean, less the known shortfall.

    Four standard deviations of a binomial share of 400 are 4.4 %; the percentile bootstrap of 60 skewed values covers
    about 93 to 94 %.
    """
    generator = np.random.default_rng(0)
    true = math.exp(0.5 * 0.5**2)
    inside = 0
    for trial in range(400):
        found = estimate(generator.lognormal(0, 0.5, 60), RESAMPLES, trial)
        inside += found.low <= true <= found.high
    assert 0.895 <= inside / 400 <= 0.985


def test_the_standard_error_is_over_sequences() -> None:
    values = np.array([1.0, 2.0, 3.0, 6.0])
    found = estimate(values, RESAMPLES, 0)
    assert found.mean == 3.0
    assert found.error == pytest.approx(values.std(ddof=1) / 2)
    assert found.low < 3.0 < found.high


def test_a_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(1).random(50)
    assert estimate(values, RESAMPLES, 3) == estimate(values, RESAMPLES, 3)
    assert estimate(values, RESAMPLES, 3) != estimate(values, RESAMPLES, 4)


def test_one_sequence_has_no_interval_and_none_is_refused() -> None:
    assert estimate([2.0], RESAMPLES, 0) == Estimate(2.0, None, None, None)
    assert exponential(estimate([0.0], RESAMPLES, 0)) == Estimate(1.0, None, None, None)
    with pytest.raises(ValueError, match=r"no sequence was scored. Use a longer text"):
        estimate([], RESAMPLES, 0)


def test_a_paired_difference_has_a_narrower_interval() -> None:
    """Two methods whose KL varies together from sequence to sequence, by far more than the methods differ."""
    generator = np.random.default_rng(0)
    hard = generator.lognormal(-3.5, 0.4, 100)
    a, b = hard * 1.1 + generator.normal(0, 1e-4, 100), hard
    difference = paired(a, b, RESAMPLES, 0)
    alone = [estimate(values, RESAMPLES, 0) for values in (a, b)]
    assert difference.mean == pytest.approx(alone[0].mean - alone[1].mean)
    assert difference.high - difference.low < 0.2 * min(one.high - one.low for one in alone)
    assert difference.low > 0, "which is better is certain"
    assert alone[0].low < alone[1].high, "though the two intervals overlap"


def test_other_sequences_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="paired: 3 sequences against 2"):
        paired([1, 2, 3], [1, 2], RESAMPLES, 0)


def test_a_ratio_keeps_its_interval() -> None:
    logs = estimate(np.random.default_rng(0).normal(0.02, 0.01, 50), RESAMPLES, 0)
    ratio = exponential(logs)
    assert ratio.mean == math.exp(logs.mean)
    assert (ratio.low, ratio.high) == (math.exp(logs.low), math.exp(logs.high))
    assert ratio.error == pytest.approx(ratio.mean * logs.error)


def test_quantiles_are_of_all_tokens() -> None:
    values = np.arange(1001.0).reshape(7, 143)
    assert quantiles(values) == {"median": 500.0, "p99": 990.0, "p999": 999.0, "max": 1000.0}


def test_positions_are_grouped_by_doubling() -> None:
    values = np.tile(np.arange(10.0), (3, 1))
    assert by_position(values, first=0) == [[0, 0.0], [1, 1.0], [2, 2.5], [4, 5.5], [8, 8.5]]
    assert by_position(values, first=256)[0] == [256, 0.0]
