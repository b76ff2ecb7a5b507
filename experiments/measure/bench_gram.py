"""The benchmark with a Gram matrix: every method on one weight, its output error beside its time.

    output error = √( tr(Δ G Δᵀ) / tr(W G Wᵀ) ),   Δ = W_q − W,  G = XᵀX

naive and sse take only the weight, hessian and joint the diagonal blocks of G, gptq and descent all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experiments.measure.bench_cases import Case, amax_scale, copy_case
from quantkit import FORMATS, METHODS, quantize, resolve_backend
from quantkit.formats import BlockFormat
from quantkit.metrics import output_error_from_gram

TOKENS_PER_COLUMN = 2  # more tokens than columns, so that the Gram matrix has full rank
FACTORS = 8  # columns per common factor


@dataclass(frozen=True)
class GramTask:
    """weight: ``[rows, K]``. tokens: float32 activations ``[tokens, K]``. gram: float32 ``[K, K]``, tokensᵀ tokens."""

    weight: Tensor
    tokens: Tensor
    gram: Tensor

    def judge(self, dequantized: Tensor) -> float:
        """The output error of a dequantized weight, in percent. Raises ValueError for values that are not finite."""
        wrong = int((~dequantized.isfinite()).sum())
        if wrong:
            raise ValueError(f"{wrong} of {dequantized.numel()} values are not finite")
        return 100 * output_error_from_gram(self.weight, dequantized.reshape(self.weight.shape), self.gram)

    @property
    def global_scale(self) -> Tensor:
        """Float32 scalar: the decode multiplier of NVFP4 from the weight's largest magnitude."""
        return amax_scale(self.weight, FORMATS["nvfp4"])


def gram_task(weight: Tensor) -> GramTask:
    """Activations of a factor model, whose channels correlate over the whole width, and their Gram matrix.

    Half of a channel's variance comes from ``K / FACTORS`` common factors, the rest is its own. The channels' standard
    deviations span one decade.
    """
    columns, device = weight.shape[1], weight.device
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device=device)

    tokens, factors = TOKENS_PER_COLUMN * columns, max(1, columns // FACTORS)
    loadings = normal(factors, columns) / factors**0.5
    spread = torch.logspace(-0.5, 0.5, columns, dtype=torch.float32, device=device)
    order = torch.randperm(columns, generator=generator, dtype=torch.int64, device=device)
    activations = normal(tokens, columns).addmm_(normal(tokens, factors), loadings).mul_(spread[order])
    return GramTask(weight, activations, activations.T @ activations)


def gram_cases(
    task: GramTask, backends: Sequence[str], formats: Sequence[str], block_sizes: Sequence[int]
) -> Iterator[Case]:
    """The copy, and every method of quantkit with its output error; a two-level format's global scale is given."""
    yield copy_case(task.weight)
    for name in formats:
        layout = FORMATS[name]
        for block_size in (size for size in block_sizes if size in layout.block_sizes):
            for method in METHODS:
                for backend in backends:
                    if backend == "triton" and resolve_backend("auto", "cuda", method, block_size, layout) != backend:
                        continue  # no kernel
                    yield _method_case(task, layout, block_size, method, backend)


def _method_case(task: GramTask, layout: BlockFormat, block_size: int, method: str, backend: str) -> Case:
    weight, needs = task.weight, METHODS[method].needs
    statistic: dict[str, Tensor] = {}
    if needs == "hessian":
        statistic = {"hessian": _diagonal_blocks(task.gram, block_size)}
    elif needs == "gram":
        statistic = {"gram": task.gram}
    given: dict[str, Any] = statistic | ({"global_scale": amax_scale(weight, layout)} if layout.two_level else {})
    call: Callable[[], Any] = lambda: quantize(  # noqa: E731
        weight, layout, block_size, method, backend=backend, check_finite=False, **given
    )
    return Case(
        kind="kernel",
        tool="quantkit",
        operation=method,
        call=call,
        bytes=weight.nbytes
        + weight.numel() // 2
        + weight.numel() // block_size
        + sum(tensor.nbytes for tensor in statistic.values()),
        format=layout.name,
        block_size=block_size,
        backend=backend,
        global_scale="given" if layout.two_level else "none",
        in_graph=needs != "gram",
        judge=lambda found: task.judge(found.dequantize(torch.float32)),
    )


def _diagonal_blocks(gram: Tensor, block_size: int) -> Tensor:
    """``[K/block_size, block_size, block_size]``, contiguous."""
    blocks = gram.unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
