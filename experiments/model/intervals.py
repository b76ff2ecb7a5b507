"""Statistics over sequences: means with bootstrap intervals, paired differences, quantiles, means by position.

Tokens of a sequence are not independent, so sequences are resampled, not tokens: an interval is that of the percentile
bootstrap (Efron 1979), with a seeded generator. It needs about 20 sequences or more to cover what it says. With one
sequence there is no interval. Uses NumPy alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

LEVEL = 0.95
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}
BLOCK = 1 << 22  # resampled values at a time


@dataclass(frozen=True)
class Estimate:
    """A mean over sequences, its standard error and its interval of LEVEL; None for a single sequence."""

    mean: float
    error: float | None
    low: float | None
    high: float | None


def estimate(per_sequence: Any, resamples: int, seed: int) -> Estimate:
    """per_sequence: [sequences], one mean each over equally many tokens. Raises ValueError where there is none."""
    values = np.asarray(per_sequence, dtype=np.float64)
    if values.size == 0:
        raise ValueError("no sequence was scored. Use a longer text, or a smaller data.seq_len.")
    mean = float(values.mean())
    if values.size == 1:
        return Estimate(mean, None, None, None)
    error = float(values.std(ddof=1) / np.sqrt(values.size))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(_means(values, resamples, seed), (tail, 1 - tail))
    return Estimate(mean, error, float(low), float(high))


def _means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """[resamples]: the means of samples with replacement, as large as `values`."""
    generator = np.random.default_rng(seed)
    rows = max(1, BLOCK // values.size)
    return np.concatenate(
        [
            values[generator.integers(0, values.size, size=(min(rows, resamples - done), values.size))].mean(1)
            for done in range(0, resamples, rows)
        ]
    )


def exponential(of: Estimate) -> Estimate:
    """exp of a mean log: a perplexity or a ratio of two. The interval is transformed; the error by the first order."""
    mean = float(np.exp(of.mean))
    if of.error is None or of.low is None or of.high is None:
        return Estimate(mean, None, None, None)
    return Estimate(mean, mean * of.error, float(np.exp(of.low)), float(np.exp(of.high)))


def paired(per_sequence: Any, other: Any, resamples: int, seed: int) -> Estimate:
    """The mean difference `per_sequence − other` over the same sequences. Raises ValueError for other sequences.

    What makes a sequence hard for both cancels, so its interval is narrower than those of the two means.
    """
    a, b = np.asarray(per_sequence, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired: {a.size} sequences against {b.size}. Evaluate both on the same text and settings.")
    return estimate(a - b, resamples, seed)


def quantiles(values: Any) -> dict[str, float]:
    """Name → quantile of all tokens' values, and their largest."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    return {name: float(np.quantile(flat, share)) for name, share in QUANTILES.items()} | {"max": float(flat.max())}


def by_position(values: Any, first: int, bins: int = 16) -> list[list[float]]:
    """[first position, mean] of each group of neighbouring positions. values: [sequences, tokens], from position first.

    The groups have 1, 1, 2, 4, 8 … positions, since most changes among the first tokens; at most bins + 1 groups.
    """
    means = np.asarray(values, dtype=np.float64).mean(0)
    edges = [0, *(2**k for k in range(bins) if 2**k < means.size), means.size]
    return [[first + start, float(means[start:stop].mean())] for start, stop in pairwise(edges)]
