"""The peers: other tools that the benchmark times if they are installed. None returns codes and scales.

qwantize returns float32 element and scale values. Its Hessian method also builds H, here from HESSIAN_TOKENS tokens.
nvidia-modelopt returns the dequantized weight for naive, and the best amax of each block for sse and hessian.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from experiments.measure.bench_cases import Case, sample_hessian, sample_tokens

PACKAGES = ("qwantize", "nvidia-modelopt")


def peer_cases(weight: Tensor) -> list[Iterator[Case]]:
    """An iterator of each peer's cases. Its first step imports the peer."""
    return [_qwantize_cases(weight), _modelopt_cases(weight)]


def available(peers: Iterable[Iterator[Case]]) -> Iterator[Case]:
    """The cases of all peers that can be imported."""
    for peer in peers:
        try:
            yield from peer
        except Exception as error:
            print(f"{getattr(peer, '__name__', 'peer')} left out: {error!r:.200}", file=sys.stderr)


def _qwantize_cases(weight: Tensor) -> Iterator[Case]:
    if not importlib.util.find_spec("qwantize"):
        return
    import qwantize

    tokens = sample_tokens(weight)
    for block_size in (16, 32):
        blocked = weight.unflatten(1, (-1, block_size))
        for format, method, name in (
            ("nvfp4", "naive", "nvfp4_naive_triton"),
            ("nvfp4", "sse", "nvfp4_optimal_triton"),
            ("nvfp4", "hessian", "nvfp4_optimal_hessian_triton"),
            ("mxfp4", "naive", "mxfp4_naive_triton"),
            ("mxfp4", "sse", "mxfp4_optimal_triton"),
        ):
            inputs = {"X": tokens} if method == "hessian" else {}
            yield Case(
                kind="peer",
                tool="qwantize",
                operation=method,
                call=_call(getattr(qwantize, name), blocked, inputs),
                bytes=weight.nbytes + 4 * weight.numel() + 4 * weight.numel() // block_size,
                format=format,
                block_size=block_size,
                backend="triton",
                global_scale="none",
            )


def _call(function: Callable[..., object], blocked: Tensor, inputs: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: function(blocked, dim=-1, **inputs)


def _modelopt_cases(weight: Tensor) -> Iterator[Case]:
    if not importlib.util.find_spec("modelopt"):
        return
    from modelopt.torch.kernels.quantization import gemm

    block_size = 16
    amax = weight.abs().amax().float()
    hessian = sample_hessian(sample_tokens(weight), block_size)
    flat = weight.reshape(-1, block_size)
    searched = weight.nbytes + 4 * weight.numel() // block_size
    for method, call, moved in (
        ("naive", lambda: gemm.fp4_fake_quant_block(weight, amax, block_size), 2 * weight.nbytes),
        ("sse", lambda: gemm.nvfp4_fp8_scale_sweep(flat, amax, block_size), searched),
        (
            "hessian",
            lambda: gemm.nvfp4_fp8_scale_sweep_hessian(flat, amax, hessian, block_size),
            searched + hessian.nbytes,
        ),
    ):
        yield Case(
            kind="peer",
            tool="modelopt",
            operation=method,
            call=call,
            bytes=moved,
            format="nvfp4",
            block_size=block_size,
            backend="triton",
            global_scale="given",
        )
