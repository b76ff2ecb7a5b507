"""The peers: other tools that the benchmark times if they are installed. None returns codes and scales.

qwantize returns float32 element and scale values. Its Hessian method also builds H, here from HESSIAN_TOKENS tokens.
nvidia-modelopt returns the dequantized weight for naive, and the best amax of each block for sse and hessian.

With a Gram matrix, the peers' GPTQ is timed, each with its tool's default damping and scales from the blocks' amax:

    modelopt       the inverse's factor and the fused update of 128 columns, in natural order
    llmcompressor  the scales of its observer and quantize_weight, columns by descending activation, its default

qwantize has no GPTQ. Its ADMM searches codes and scale of each block under the block's Hessian, as joint does.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from experiments.measure.bench_cases import Case, sample_hessian, sample_tokens
from experiments.measure.bench_gram import GramTask

PACKAGES = ("qwantize", "nvidia-modelopt", "llmcompressor", "compressed-tensors")
GPTQ_COLUMNS = 128  # columns between two updates of the rest of the weight, the peers' default
DAMPING = 0.01  # share of the Hessian's mean diagonal, the peers' default
OBSERVERS = {"gptq": "memoryless_minmax", "gptq_mse": "memoryless_mse", "gptq_expanded_mse": "nvfp4_expanded_mse"}


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


def _call(function: Callable[..., object], blocked: Tensor, inputs: dict[str, Any]) -> Callable[[], object]:
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


def gram_peer_cases(task: GramTask) -> list[Iterator[Case]]:
    """The peers' GPTQ for NVFP4, block size 16, in lines that say so where a peer is not installed or has none."""
    return [
        _or_note("modelopt", "gptq", lambda: _modelopt_gptq(task)),
        _or_note("llmcompressor", "gptq", lambda: _llmcompressor_gptq(task)),
        _or_note("qwantize", "gptq", _qwantize_gptq),
        _or_note("qwantize", "admm", lambda: _qwantize_admm(task)),
    ]


def _or_note(tool: str, operation: str, cases: Callable[[], Iterator[Case]]) -> Iterator[Case]:
    """The cases, or one whose note says why there are none."""
    if not importlib.util.find_spec(tool):
        yield _noted(tool, operation, "not installed")
        return
    try:
        yield from cases()
    except Exception as error:
        yield _noted(tool, operation, note_of(error))


def note_of(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _noted(tool: str, operation: str, note: str) -> Case:
    return Case(
        kind="peer",
        tool=tool,
        operation=operation,
        call=lambda: None,
        bytes=0,
        format="nvfp4",
        block_size=16,
        note=note,
    )


def _gptq_case(task: GramTask, tool: str, operation: str, call: Callable[[], Tensor]) -> Case:
    """A case whose call returns the dequantized weight."""
    return Case(
        kind="peer",
        tool=tool,
        operation=operation,
        call=call,
        bytes=task.weight.nbytes + task.gram.nbytes + 4 * task.weight.numel(),
        format="nvfp4",
        block_size=16,
        backend="triton" if task.weight.is_cuda else "reference",
        global_scale="given",
        in_graph=False,
        judge=task.judge,
    )


def _modelopt_gptq(task: GramTask) -> Iterator[Case]:
    if not task.weight.is_cuda:
        raise RuntimeError("its NVFP4 kernels need a GPU")
    from modelopt.torch.quantization.utils import calib_utils

    scale = task.global_scale.item()

    def call() -> Tensor:
        weight = task.weight.float()
        amax = weight.unflatten(1, (-1, 16)).abs().amax(dim=-1)
        inverse = calib_utils.compute_hessian_inverse(task.gram, weight, DAMPING)
        calib_utils.gptq_blockwise_update_fused_scalar(weight, amax, scale, inverse, GPTQ_COLUMNS, 16)
        return weight

    yield _gptq_case(task, "modelopt", "gptq", call)


def _llmcompressor_gptq(task: GramTask) -> Iterator[Case]:
    from compressed_tensors.quantization import ActivationOrdering, preset_name_to_scheme
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    def calls(name: str) -> Callable[[], Tensor]:
        arguments = preset_name_to_scheme("NVFP4A16", ["Linear"]).weights
        arguments.actorder = ActivationOrdering.STATIC

        def call() -> Tensor:
            observer = Observer.load_from_registry(name, base_name="weight", args=arguments)
            observer(task.weight)
            found = observer.get_qparams()
            scale, zero, global_scale = (found[key][None] for key in ("scale", "zero_point", "global_scale"))
            # quantize_weight overwrites the weight and the Hessian that it is given.
            weight, hessian = task.weight.float()[None].clone(), task.gram[None].clone()
            return quantize_weight(
                weight, hessian, scale.float(), zero, global_scale.reshape(-1), arguments, GPTQ_COLUMNS, DAMPING
            )[0][0]

        return call

    for operation, name in OBSERVERS.items():
        yield _gptq_case(task, "llmcompressor", operation, calls(name))


def _qwantize_gptq() -> Iterator[Case]:
    import qwantize

    known = [name for name in dir(qwantize) if "gptq" in name.lower()]
    yield _noted("qwantize", "gptq", f"has {', '.join(known)}, not called here" if known else "has no GPTQ")


def _qwantize_admm(task: GramTask) -> Iterator[Case]:
    import qwantize

    # Its format has no global scale: the weight in units of a global scale makes it two-level. Twice the one from amax
    # leaves room above the largest block's scale, which ADMM may raise beyond 448: NaN with torch before 2.13.
    scale = 2 * task.global_scale
    blocked = (task.weight.float() / scale).unflatten(1, (-1, 16))
    call = _call(qwantize.nvfp4_admm, blocked, {"X": task.tokens, "return_dequant": True})
    case = _gptq_case(task, "qwantize", "admm", lambda: call()[2] * scale)  # type: ignore[index]
    case.backend = "reference"
    yield case
