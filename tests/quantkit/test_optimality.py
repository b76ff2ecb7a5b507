"""The optimality contract against an exhaustive float64 search, on adversarial input, for both backends."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from quantkit import FORMATS, QuantizedTensor, quantize
from tests.inputs import (
    HESSIAN_FAMILIES,
    SEARCHED_BY_KERNELS,
    WEIGHT_FAMILIES,
    all_families,
    hessian_family,
    weight_family,
)
from tests.oracle import contract_violations

LEVELS = [("nvfp4", "none"), ("nvfp4", "amax"), ("mxfp4", "none")]
# A global scale depends on all blocks of a tensor, so each family is then a separate tensor. Without one, the families
# share a tensor.
CASES = [
    *((format, "none", "all") for format in FORMATS),
    *(("nvfp4", "amax", family) for family in WEIGHT_FAMILIES),
]
BLOCK_SIZES = [16, 32]
CUDA = torch.cuda.is_available()


def check(
    blocks: np.ndarray,
    format: str,
    global_scale: str,
    backend: str,
    device: str,
    hessians: np.ndarray | None,
    dtype: torch.dtype = torch.float32,
) -> QuantizedTensor:
    """Checks every scale that is chosen for float32 ``blocks [n, b]``, converted to dtype, each with each of
    ``hessians [h, b, b]``. Returns the quantized tensor."""
    block_size = blocks.shape[-1]
    if hessians is None:
        q = quantize(
            torch.tensor(blocks, device=device), format, block_size, "sse", backend=backend, global_scale=global_scale
        )
        each = None
    else:
        weight = np.repeat(blocks[:, None], len(hessians), axis=1)
        q = quantize(
            torch.tensor(weight.reshape(len(blocks), -1), device=device, dtype=dtype),
            format,
            block_size,
            "hessian",
            hessian=torch.tensor(hessians, device=device),
            backend=backend,
            global_scale=global_scale,
        )
        blocks = weight.reshape(-1, block_size)
        each = np.tile(hessians.astype(np.float64), (len(weight), 1, 1))
    codes = q.scales.cpu().numpy().reshape(-1)
    assert codes.min() >= FORMATS[format].scale.min_code and codes.max() <= FORMATS[format].scale.max_code
    assert torch.isfinite(q.dequantize()).all()
    violations = contract_violations(codes, blocks, format, float(q.global_scale), each)
    assert not len(violations), (
        f"{len(violations)} blocks break the contract, first {violations[0]}: {blocks[violations[0]]}"
    )
    return q


def interpreted(backend: str) -> bool:
    """Whether Triton interprets. The interpreter is slow on the Hessian kernel's (block, scale) pairs, so it gets fewer
    blocks than the reference and a GPU."""
    return backend == "triton" and not CUDA


def blocks_of(family: str, block_size: int, rng: np.random.Generator) -> np.ndarray:
    return all_families(block_size, rng) if family == "all" else weight_family(family, block_size, rng)


@pytest.mark.parametrize(("format", "global_scale", "family"), CASES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_sse_scale_is_optimal(
    family: str, block_size: int, format: str, global_scale: str, backend: str, device: str
) -> None:
    check(blocks_of(family, block_size, np.random.default_rng(1)), format, global_scale, backend, device, None)


@pytest.mark.parametrize(("format", "global_scale", "family"), CASES)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hessian_scale_is_optimal(
    family: str, block_size: int, format: str, global_scale: str, backend: str, device: str
) -> None:
    rng = np.random.default_rng(2)
    hessians = np.stack([hessian_family(name, block_size, rng) for name in HESSIAN_FAMILIES])
    blocks = blocks_of(family, block_size, rng)[::3]
    if interpreted(backend):
        blocks = blocks[::2]
        if family != "all":  # three Hessians, others for the next family; "all" meets every one
            start = WEIGHT_FAMILIES.index(family)
            hessians = np.roll(hessians, -start, axis=0)[:3]
    check(blocks, format, global_scale, backend, device, hessians)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hessian_scale_is_optimal_where_rounding_made_the_hessian_indefinite(
    block_size: int, format: str, backend: str, device: str
) -> None:
    """Hessians of rank one plus noise near float32's resolution, which makes the form of large residuals negative."""
    rng = np.random.default_rng(9)
    factors = [
        np.outer(np.ones(block_size), rng.standard_normal(block_size))
        + noise * rng.standard_normal((block_size, block_size))
        for noise in (1e-2, 1e-3, 1e-4, 1e-5)
    ]
    hessians = np.stack([a @ a.T for a in factors]).astype(np.float32)
    assert (np.linalg.eigvalsh(hessians.astype(np.float64))[:, 0] < 0).any()
    shape = (12 if interpreted(backend) else 64, block_size)
    blocks = (rng.standard_normal(shape) * 10 ** rng.uniform(-8, 0, shape)).astype(np.float32)
    check(blocks, format, "none", backend, device, hessians)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", SEARCHED_BY_KERNELS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_hessian_scale_of_16_bit_weights_is_optimal(block_size: int, format: str, dtype: torch.dtype) -> None:
    """They use other instructions than float32 weights, as do elements far below their block's largest."""
    rng = np.random.default_rng(8)
    hessians = np.stack([hessian_family(name, block_size, rng) for name in HESSIAN_FAMILIES])
    blocks = all_families(block_size, rng)[::2]
    wide = rng.standard_normal((48, block_size)) * 2.0 ** rng.uniform(-20, 0, (48, block_size))
    blocks = torch.tensor(np.concatenate([blocks, wide]), dtype=torch.float32).to(dtype).float()
    blocks = blocks[blocks.isfinite().all(1)].numpy()
    check(blocks, format, "none", "triton", "cuda", hessians, dtype)


finite_blocks = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.sampled_from(BLOCK_SIZES)),
    elements=st.one_of(
        st.floats(-8, 8, width=32),
        st.floats(-(2.0**100), 2.0**100, width=32),
        st.sampled_from([0.0, -0.0, 0.25, 0.5, 5.0, 6.0, 2688.0, 0.001953125]),
    ),
)


@settings(max_examples=25, deadline=None)
@given(blocks=finite_blocks, level=st.sampled_from(LEVELS))
def test_any_block_is_sse_optimal(blocks: np.ndarray, level: tuple[str, str]) -> None:
    check(blocks, *level, "reference", "cpu", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(blocks, *level, "triton", device, None)


def test_any_block_is_hessian_optimal(backend: str, device: str) -> None:
    @settings(max_examples=8 if interpreted(backend) else 25, deadline=None)
    @given(
        blocks=finite_blocks,
        level=st.sampled_from(LEVELS),
        seed=st.integers(0, 99),
        kind=st.sampled_from(HESSIAN_FAMILIES),
    )
    def is_optimal(blocks: np.ndarray, level: tuple[str, str], seed: int, kind: str) -> None:
        hessians = hessian_family(kind, blocks.shape[1], np.random.default_rng(seed))[None]
        # docs/theory.md, "Where the guarantee ends": smaller weights beside a dead channel's may count as zero.
        blocks = np.where(np.abs(blocks) < 2.0**-36 * np.abs(blocks).max(1, keepdims=True), np.float32(0), blocks)
        check(blocks, *level, backend, device, hessians)

    is_optimal()


@pytest.mark.parametrize("format", FORMATS)
def test_dead_channel_does_not_drown_the_others(format: str, backend: str, device: str) -> None:
    """The largest weight, in a channel that H ignores, is 2^30 times the others: they decide the scale."""
    rows = 8 if interpreted(backend) else 64
    blocks = np.random.default_rng(5).standard_normal((rows, 16)).astype(np.float32)
    blocks[:, 3] = 2.0**30
    x = np.random.default_rng(6).standard_normal((100, 16))
    x[:, 3] = 0
    hessians = (x.T @ x).astype(np.float32)[None]
    q = check(blocks, format, "none", backend, device, hessians)
    assert (q.scale_values() <= 2).all()


def test_sse_window_would_miss_the_hessian_optimum(backend: str, device: str) -> None:
    """The counterexample of docs/theory.md: SSE pruning stops at s = 1 (error .600), s = .40625 gives .0128."""
    x = torch.full((1, 16), 0.2, device=device)
    x[0, 0] = 6
    h = torch.diag(torch.tensor([1e-3] + [1.0] * 15, device=device))[None]
    q = quantize(x, "nvfp4", 16, "hessian", hessian=h, backend=backend, global_scale="none")
    assert float(q.scale_values()) == 0.40625
    r = (x - q.dequantize()).double()
    assert float(r @ h[0].double() @ r.T) == pytest.approx(0.0128, abs=1e-4)


def test_contract_check_can_fail() -> None:
    """A test of the check itself: it reports a wrong scale, and only that one."""
    blocks = weight_family("gaussian_1", 16, np.random.default_rng(0))
    q = quantize(torch.tensor(blocks), "nvfp4", 16, "sse", global_scale="none")
    codes = q.scales.numpy().reshape(-1).copy()
    codes[7] += 4
    assert contract_violations(codes, blocks, "nvfp4", 1.0).tolist() == [7]
