"""search.py gives the results of quantize(), works on single block columns, and is enough for a full-layer method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit import FORMATS, BlockFormat, QuantizedTensor, quantize, search
from quantkit.calibration import block_hessians
from quantkit.reference.amax import global_scale_of
from quantkit.search import OBJECTIVES, Factors, Found, quantize_matrix
from tests.inputs import correlated_tokens

ROWS, COLUMNS = 48, 64


@pytest.fixture
def weight(device: str) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device) * 0.02


@pytest.fixture
def gram(device: str) -> Tensor:
    """Float64 and damped, of correlated activations."""
    x = correlated_tokens(COLUMNS, torch.Generator().manual_seed(1)).double()
    x /= x.square().mean(0).sqrt()
    return (x.T @ x + 0.01 * len(x) * torch.eye(COLUMNS, dtype=torch.float64)).to(device)


def assert_equal(found: Found, q: QuantizedTensor, columns: slice, block_size: int) -> None:
    """``columns``: the columns of the weight that were searched."""
    per_block = slice(columns.start // block_size, columns.stop // block_size)
    assert torch.equal(found.codes, q.codes[:, columns.start // 2 : columns.stop // 2])
    assert torch.equal(found.scales, q.scales[:, per_block])
    assert found.global_scale == q.global_scale
    assert (found.candidates is None) == (q.candidates is None)
    if found.candidates is not None and q.candidates is not None:
        assert torch.equal(found.candidates, q.candidates[:, per_block])


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("format", "block_size"), [(f, b) for f in FORMATS for b in FORMATS[f].block_sizes])
def test_it_is_quantize_without_the_checks(
    format: str, block_size: int, objective: str, backend: str, weight: Tensor, gram: Tensor
) -> None:
    needed = OBJECTIVES[objective].needs_factors
    hessians = block_hessians(gram.float(), block_size) if needed else None
    want = quantize(weight, format, block_size, objective, hessian=hessians, backend=backend, count_candidates=True)
    found = quantize_matrix(
        weight, FORMATS[format], block_size, objective, hessians=hessians, backend=backend, count_candidates=True
    )
    assert_equal(found, want, slice(0, COLUMNS), block_size)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("block_size", [16, 32])
def test_a_loop_over_block_columns_finds_what_one_call_finds(
    block_size: int, objective: str, backend: str, weight: Tensor, gram: Tensor
) -> None:
    """Columns are passed as views, with only the factors of their block."""
    fmt = FORMATS["nvfp4"]
    hessians = block_hessians(gram, block_size) if OBJECTIVES[objective].needs_factors else None
    want = quantize(weight, fmt, block_size, objective, hessian=hessians, backend=backend)
    factors = None if hessians is None else search.factorize(hessians, backend, objective=objective)
    for index in range(COLUMNS // block_size):
        columns = slice(index * block_size, (index + 1) * block_size)
        found = quantize_matrix(
            weight[:, columns],
            fmt,
            block_size,
            objective,
            factors=None if factors is None else factors[index],
            global_scale=want.global_scale,
            backend=backend,
        )
        assert_equal(found, want, columns, block_size)


def test_the_kernels_refuse_factors_of_another_objective(weight: Tensor, gram: Tensor) -> None:
    factors = search.factorize(block_hessians(gram, 16), "triton")
    with pytest.raises(ValueError, match=r"factors are for objective 'hessian'.*objective='joint'"):
        quantize_matrix(weight, FORMATS["nvfp4"], 16, "joint", factors=factors)


def test_factors_are_sliced_without_copies(backend: str, gram: Tensor) -> None:
    factors = search.factorize(block_hessians(gram, 16), backend)
    assert factors.backend == backend and len(factors) == COLUMNS // 16
    for which in (factors[2], factors[2:3], factors[-2]):
        assert isinstance(which, Factors) and len(which) == 1
        for part, whole in zip(which.tensors, factors.tensors, strict=True):
            assert part.data_ptr() == whole[2].data_ptr() and torch.equal(part, whole[2:3])
    assert len(factors[1:4]) == 3 and len(factors[-1]) == 1 and len(list(factors)) == len(factors)
    with pytest.raises(IndexError, match="no block column 4: there are 4"):
        factors[4]


@pytest.mark.parametrize("bad", ["nan", "indefinite"])
def test_factorize_says_what_is_no_hessian(bad: str, backend: str, gram: Tensor) -> None:
    hessians = block_hessians(gram, 16)
    if bad == "nan":
        hessians[1, 2, 3] = torch.nan
    else:
        hessians[1] *= -1
    message = {"nan": "metric holds 1 NaN or Inf value", "indefinite": "metric block 1 is not positive semi-definite"}
    with pytest.raises(ValueError, match=message[bad]):
        search.factorize(hessians, backend, "metric")


def gptq(weight: Tensor, hessian: Tensor, fmt: BlockFormat, b: int, backend: str) -> Tensor:
    """GPTQ by blocks (Frantar et al., arXiv:2210.17323). Later blocks compensate a block's error, so its Hessian is the
    Schur complement (U_bᵀ U_b)⁻¹, with H⁻¹ = Uᵀ U and U_b its diagonal block."""
    rest, parts, scale = weight.double(), [], global_scale_of(weight, fmt)
    root = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    inverses = torch.linalg.inv(block_hessians(root, b))
    factors = search.factorize(inverses @ inverses.mT, backend)
    for index, inverse in enumerate(inverses):
        here, later = slice(index * b, (index + 1) * b), slice((index + 1) * b, None)
        block = rest[:, here].float()
        found = quantize_matrix(block, fmt, b, "hessian", factors=factors[index], global_scale=scale)
        parts.append(QuantizedTensor(found.codes, found.scales, scale, fmt, b).dequantize())
        rest[:, later] -= (block - parts[-1]).double() @ inverse @ root[here, later]
    return torch.cat(parts, 1)


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_gptq_takes_fifteen_lines_and_lowers_the_output_error(
    format: str, backend: str, weight: Tensor, gram: Tensor
) -> None:
    def energy(quantized: Tensor) -> float:
        difference = quantized.double() - weight.double()
        return float(((difference @ gram) * difference).sum())

    fmt = FORMATS[format]
    block_by_block = quantize(weight, fmt, 16, "hessian", hessian=block_hessians(gram, 16), backend=backend)
    assert energy(gptq(weight, gram, fmt, 16, backend)) < 0.7 * energy(block_by_block.dequantize())
