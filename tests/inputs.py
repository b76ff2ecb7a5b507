"""Weights and Hessians on which implementations of the formats often fail, and activations, as float32 arrays."""

from __future__ import annotations

import numpy as np
import torch

from quantkit.formats import FORMATS, INT4, BlockFormat
from tests.oracle import E4M3_VALUES, MAGNITUDES, values_of

# (format, method): searches that the reference has alone; test_methods.py shows that these are all, and are refused.
WITHOUT_KERNEL = {
    (name, method)
    for name in FORMATS
    if FORMATS[name].element == INT4
    for method in ("sse", "hessian", "joint", "gptq", "descent")
}
# Those that take a block by itself and leave its codes nearest; the others have tests of their own in layer/.
BLOCK_METHODS = ("naive", "sse", "hessian")
SEARCHED_BY_KERNELS = [name for name in FORMATS if (name, "hessian") not in WITHOUT_KERNEL]


def weight_family(name: str, block_size: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 blocks ``[n, block_size]``, n about 48."""
    shape = (48, block_size)
    signs = rng.choice([-1.0, 1.0], size=shape)
    if name.startswith("gaussian"):
        blocks = rng.standard_normal(shape) * float(name.split("_")[1])
    elif name.startswith("student"):
        blocks = rng.standard_t(2.5, shape) * float(name.split("_")[1])
    elif name == "constant":  # single-level scales are subnormal here
        blocks = np.linspace(0.0005, 0.01, shape[0])[:, None] * signs
    elif name == "small_range":  # every amax near the subnormal scales
        blocks = rng.standard_normal(shape) * np.geomspace(0.0003, 0.1, shape[0])[:, None]
    elif name == "lattice":  # a hair off the points of one scale
        scales = rng.choice(E4M3_VALUES[1:], size=(shape[0], 1))
        blocks = scales * rng.choice(MAGNITUDES, size=shape) * signs * (1 + rng.uniform(-2e-6, 2e-6, shape))
    elif name == "midpoints":  # a hair off the ties
        scales = rng.choice(E4M3_VALUES[1:], size=(shape[0], 1))
        ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
        blocks = scales * rng.choice(ties, size=shape) * signs * (1 + rng.choice([0.0, 6e-8, -6e-8], shape))
    elif name == "quarter":  # the MXFP4 optimum is one step below OCP's
        blocks = np.full(shape, 0.25) * np.geomspace(0.01, 100, shape[0])[:, None]
        blocks[:, 0] *= 16
    elif name == "spike":
        blocks = rng.standard_normal(shape) * 1e-3
        blocks[np.arange(shape[0]), rng.integers(0, block_size, shape[0])] = rng.uniform(0.01, 50, shape[0])
    elif name == "one_nonzero":
        blocks = np.zeros(shape)
        blocks[np.arange(shape[0]), rng.integers(0, block_size, shape[0])] = np.geomspace(1e-6, 1e4, shape[0])
    elif name == "saturated":  # at 448·6 and beyond
        blocks = rng.uniform(-1, 1, shape)
        blocks[:, 0] = 1
        blocks *= np.geomspace(1000, 1e6, shape[0])[:, None]
        blocks[0, 0] = 448 * 6
        blocks[1, 0] = np.nextafter(np.float32(448 * 6), np.float32(np.inf))
    elif name == "float32_subnormal":
        blocks = rng.standard_normal(shape) * 1e-40
    elif name == "float32_extremes":
        blocks = rng.standard_normal(shape) * np.geomspace(1e-37, 1e37, shape[0])[:, None]
    elif name == "zeros":
        blocks = np.zeros(shape)
        blocks[1] = -0.0
        blocks[2:] = rng.standard_normal((shape[0] - 2, block_size)) * (rng.random((shape[0] - 2, 1)) < 0.5)
    else:
        raise ValueError(name)
    return blocks.astype(np.float32)


WEIGHT_FAMILIES = (
    *(f"gaussian_{std}" for std in ("1e-6", "0.0005", "0.02", "1", "1000")),
    *(f"student_{std}" for std in ("1e-4", "0.02", "10")),
    "constant",
    "small_range",
    "lattice",
    "midpoints",
    "quarter",
    "spike",
    "one_nonzero",
    "saturated",
    "float32_subnormal",
    "float32_extremes",
    "zeros",
)


def all_families(block_size: int, rng: np.random.Generator) -> np.ndarray:
    """All families in one array ``[n, block_size]``, for single-level scales, with which blocks are independent."""
    return np.concatenate([weight_family(name, block_size, rng) for name in WEIGHT_FAMILIES])


def inputs_of(fmt: BlockFormat, block_size: int, rng: np.random.Generator) -> np.ndarray:
    """Float32 blocks ``[n, block_size]``, n about 190, at the ends, subnormals and ties of one format's grids."""
    scales, levels = values_of(fmt.scale)[fmt.scale.min_code :], values_of(fmt.element)
    ties = (levels[1:] + levels[:-1]) / 2
    first, last, shape = scales[0], scales[-1], (24, block_size)
    signs = rng.choice([-1.0, 1.0], size=shape)
    some = rng.choice(scales, size=(24, 1))
    low = np.linspace(0.3, 1.5 * fmt.scale.last_code_without_half, 24)[:, None] * first
    one = np.zeros(shape)
    one[np.arange(24), rng.integers(0, block_size, 24)] = np.geomspace(first / 100, last * levels[-1] * 100, 24)
    blocks = [
        rng.standard_normal(shape) * np.geomspace(first, last, 24)[:, None],
        some
        * rng.choice(levels, size=shape)
        * signs
        * (1 + rng.uniform(-2e-6, 2e-6, shape)),  # near one scale's points
        some * rng.choice(ties, size=shape) * signs * (1 + rng.choice([0.0, 6e-8, -6e-8], shape)),
        low * signs,  # constant, where scales have no half
        low * rng.standard_normal(shape),
        last * levels[-1] * rng.uniform(-1, 1, shape) * np.geomspace(0.2, 1e4, 24)[:, None],  # to beyond the largest
        one,
        np.zeros((1, block_size)),
        first * rng.standard_normal(shape) * np.geomspace(1e-4, 1, 24)[:, None],
    ]
    result = np.concatenate(blocks).astype(np.float32)
    return result[np.isfinite(result).all(1)]


def hessian_family(name: str, block_size: int, rng: np.random.Generator) -> np.ndarray:
    """One float32 positive semi-definite Hessian ``[block_size, block_size]``."""
    if name == "activations":
        x = rng.standard_normal((200, block_size)) * rng.lognormal(0, 1.5, block_size)
        h = x.T @ x
    elif name == "ill_conditioned":
        q, _ = np.linalg.qr(rng.standard_normal((block_size, block_size)))
        h = q * np.geomspace(1, 1e6, block_size) @ q.T
    elif name == "diagonal":
        h = np.diag(rng.permutation(np.geomspace(1e-3, 1e3, block_size)))
    elif name == "rank_deficient":
        x = rng.standard_normal((block_size // 4, block_size)).astype(np.float32)
        h = x.T @ x
    elif name == "dead_channels":
        x = rng.standard_normal((100, block_size)) * (rng.random(block_size) < 0.5)
        h = x.T @ x
    elif name == "one_weak":  # numerics' counterexample: the SSE window misses the optimum
        h = np.diag([1e-3] + [1.0] * (block_size - 1))
    elif name == "zero":
        h = np.zeros((block_size, block_size))
    else:
        raise ValueError(name)
    return h.astype(np.float32)


HESSIAN_FAMILIES = ("activations", "ill_conditioned", "diagonal", "rank_deficient", "dead_channels", "one_weak", "zero")


def correlated_tokens(columns: int, generator: torch.Generator) -> torch.Tensor:
    """Float32 activations ``[512, columns]``, each column twice the one before and noise."""
    tokens = torch.randn(512, columns, generator=generator)
    for column in range(1, columns):
        tokens[:, column] += 2 * tokens[:, column - 1]
    return tokens
