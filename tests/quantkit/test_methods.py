"""Methods are added in METHODS, which determines their arguments of quantize() and their backends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch

from quantkit import (
    FORMATS,
    METHODS,
    BackendUnavailableError,
    BlockFormat,
    Method,
    get_method,
    quantize,
    resolve_backend,
    search,
    verify,
)
from quantkit import methods as registry
from quantkit.formats import E2M1, E4M3, ElementGrid, ScaleGrid
from quantkit.kernels import available
from quantkit.methods import Problem
from quantkit.search import OBJECTIVES, Found, Objective
from tests.inputs import WITHOUT_KERNEL

NO_TRITON = pytest.mark.skipif(not available(), reason="needs Triton")
W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


def list_objective(objective: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adds an objective and the method of its name to the tables."""
    name = objective.name
    monkeypatch.setattr(search, "OBJECTIVES", MappingProxyType({**OBJECTIVES, name: objective}))
    monkeypatch.setattr(registry, "METHODS", MappingProxyType({**METHODS, name: Method.of_objective(objective)}))


@pytest.fixture
def another(monkeypatch: pytest.MonkeyPatch) -> str:
    """A method without a kernel: the naive scale, one code down."""

    def choose_scales(blocks, fmt, global_scale, rule, factors):
        choice = OBJECTIVES["naive"].choose_scales(blocks, fmt, global_scale, rule, factors)
        return type(choice)(choice.codes - 1, choice.candidates)

    list_objective(Objective("one_down", choose_scales, has_kernel=False), monkeypatch)
    return "one_down"


def test_a_method_that_is_listed_is_one(another: str) -> None:
    naive, down = quantize(W, method="naive"), quantize(W, method=another)
    assert down.method == another and torch.equal(down.scales, naive.scales - 1)
    with pytest.raises(ValueError, match="method 'one_down' does not use gram"):
        quantize(W, method=another, gram=torch.eye(64))


def test_a_method_of_the_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the Gram matrix from either argument, and its tensor records that codes were moved."""
    seen: list[Problem] = []

    def solve(problem: Problem) -> Found:
        seen.append(problem)
        found = search.quantize_matrix(problem.matrix, problem.fmt, problem.block_size, "sse", backend=problem.backend)
        return found._replace(codes=found.codes ^ 1)

    moved = Method("moved", solve, OBJECTIVES["sse"], needs="gram", nearest_codes=False)
    monkeypatch.setattr(registry, "METHODS", MappingProxyType({**METHODS, "moved": moved}))
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    for given in ({"activations": x}, {"gram": x.T @ x}):
        q = quantize(W, method="moved", **given)  # type: ignore[arg-type]
        assert q.method == "moved" and not q.nearest_codes
        assert torch.equal(q.codes, quantize(W, method="sse").codes ^ 1)
        gram, hessians = seen[-1].gram, seen[-1].hessians
        assert gram is not None and hessians is None
        torch.testing.assert_close(gram, x.T @ x)
    with pytest.raises(ValueError, match="takes exactly one of activations and gram; got none"):
        quantize(W, method="moved")
    with pytest.raises(ValueError, match="takes exactly one of activations and gram; got hessian"):
        quantize(W, method="moved", hessian=torch.eye(16)[None])
    with pytest.raises(ValueError, match="gram holds 1 NaN or Inf value"):
        quantize(W, method="moved", gram=torch.diag(torch.tensor([torch.nan, *[1.0] * 63])))
    with pytest.raises(ValueError, match="method 'other' needs 'activations'; known needs: None, hessian, gram"):
        Method("other", solve, OBJECTIVES["sse"], needs="activations")


@NO_TRITON
def test_triton_is_refused_for_what_it_has_no_kernel_for(another: str) -> None:
    with pytest.raises(BackendUnavailableError, match="no kernel for method 'one_down': use backend='reference'"):
        quantize(W, method=another, backend="triton")
    fmt = BlockFormat("nvfp4_64", E2M1, E4M3, block_sizes=(64,), scale_rules=("nearest",), two_level=True)
    with pytest.raises(BackendUnavailableError, match="no kernel for block size 64"):
        quantize(W, fmt, 64, "sse", backend="triton")
    assert verify(quantize(W, fmt, 64, "sse"), W).ok
    e1m2 = ElementGrid("e1m2", exponent_bits=1, mantissa_bits=2, bias=1, max_code=7)
    other = BlockFormat("fp4_e1m2", e1m2, E4M3, block_sizes=(16,), scale_rules=("nearest",), two_level=True)
    assert resolve_backend("auto", "cuda", "sse", 16, other) == "reference"
    with pytest.raises(BackendUnavailableError, match="no kernel for elements e1m2 in the search of objective 'sse'"):
        quantize(W, other, 16, "sse", backend="triton")
    assert verify(quantize(W, other, 16, "sse"), W).ok
    ue7m1 = ScaleGrid("ue7m1", exponent_bits=7, mantissa_bits=1, bias=63, max_code=254)
    wide = BlockFormat("fp4_ue7m1", E2M1, ue7m1, block_sizes=(16,), scale_rules=("nearest",), two_level=True)
    assert resolve_backend("auto", "cuda", "sse", 16, wide) == "reference"
    with pytest.raises(BackendUnavailableError, match=r"no kernel for scales ue7m1, from 1\.08e-19 to "):
        quantize(W, wide, 16, "sse", backend="triton")
    assert verify(quantize(W, wide, 16, "sse"), W).ok
    for fmt in (other, wide):
        assert resolve_backend("auto", "cuda", "naive", 16, fmt) == resolve_backend("auto", "cuda", format=fmt)
        assert resolve_backend("auto", "cuda", "naive", 16, fmt) == "triton"
    assert resolve_backend("auto", "cuda", another) == resolve_backend("auto", "cuda", "sse", 64) == "reference"
    assert resolve_backend("auto", "cuda", "sse", 16) == "triton"


@NO_TRITON
def test_the_named_formats_lack_the_searches_that_the_tests_leave_out() -> None:
    lacking = set()
    for format, method in itertools.product(FORMATS, METHODS):
        if resolve_backend("auto", "cuda", method, 16, format) == "reference":
            lacking.add((format, method))
            with pytest.raises(BackendUnavailableError, match="no kernel for elements int4 in the search"):
                resolve_backend("triton", "cuda", method, 16, format)
    assert lacking == WITHOUT_KERNEL


@NO_TRITON
def test_a_method_listed_with_a_kernel_that_nobody_starts_runs_no_other(
    another: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_objective(replace(search.OBJECTIVES[another], has_kernel=True), monkeypatch)
    weight = W.cuda() if torch.cuda.is_available() else W
    with pytest.raises(NotImplementedError, match="objective 'one_down' has no kernel: list it with has_kernel=False"):
        quantize(weight, method=another, backend="triton")


def test_methods_are_known_by_name() -> None:
    assert get_method("sse") is METHODS["sse"]
    with pytest.raises(ValueError, match="unknown method 'mse'; known methods: naive, sse, hessian"):
        get_method("mse")
    with pytest.raises(ValueError, match="unknown method 'mse'"):
        resolve_backend("auto", "cpu", "mse")
