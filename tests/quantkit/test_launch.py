"""What a launch starts, and that Triton's launcher takes it so. A GPU sees all of it in the tests of the kernels."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton

from quantkit import METHODS, quantize
from quantkit.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAM, FUNCTION, METADATA = 7, 8, 9


class Recorder:
    """Stands for a jit function and for what it compiles: keeps the arguments of both."""

    arg_names = ("x_ptr", "size", "BLOCK")
    function, packed_metadata = FUNCTION, METADATA

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.started: list[Any] = []

    def __getitem__(self, grid: tuple[int, int]) -> Any:
        def call(*arguments: object, **constants: object) -> Recorder:
            self.compiled.append((grid, arguments, constants))
            return self

        return call

    def run(self, *arguments: object) -> None:
        self.started.append(arguments)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    hooks = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=SimpleNamespace(calls=[]))
    active = SimpleNamespace(get_current_stream=lambda index: STREAM)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    fake = SimpleNamespace(runtime=runtime, knobs=SimpleNamespace(runtime=hooks))
    monkeypatch.setattr(launch, "triton", fake)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: None)
    return Recorder()


def test_what_was_compiled_is_started(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, (5, 1), BLOCK=32, num_warps=1)
    x = torch.zeros(64)
    kernel(STREAM, x, 64)
    assert recorder.compiled == [((5, 1), (x, 64), {"BLOCK": 32, "num_warps": 1})] and not recorder.started
    kernel(STREAM, x, 64)
    assert recorder.started == [(5, 1, 1, STREAM, FUNCTION, METADATA, None, None, None, x, 64, 32)]


def test_a_profiler_hears_of_every_launch(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, (5, 1), BLOCK=32)
    assert launch._stream(torch.device("cpu")) == STREAM
    launch.triton.knobs.runtime.launch_exit_hook.calls.append(print)
    assert launch._stream(torch.device("cpu")) is None
    for _ in range(2):
        kernel(launch._stream(torch.device("cpu")), torch.zeros(64), 64)
    assert len(recorder.compiled) == 2 and not recorder.started


class Started:
    """Stands for Kernel."""

    def __init__(self, kernel: Any) -> None:
        self.name, self.calls = kernel.__name__, 0

    def __call__(self, stream: int | None, *arguments: Any) -> None:
        self.calls += 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Started]:
    """The kernels that are made, none of which runs."""
    made: list[Started] = []

    def make(kernel: Any, grid: tuple[int, int], **constants: Any) -> Started:
        made.append(Started(kernel))
        return made[-1]

    monkeypatch.setattr(launch, "Kernel", make)
    for name in ("_naive", "_sse", "_hessian", "_factorize", "_amax", "_dequantize", "_block_hessians"):
        monkeypatch.setattr(launch, name, functools.cache(getattr(launch, name).__wrapped__))
    return made


def names_of(call: Callable[[], object], made: list[Started]) -> list[str]:
    """What a call makes anew; called twice, it makes nothing more, and starts all of it again."""
    before = len(made)
    call()
    new = made[before:]
    call()
    assert made[before:] == new and all(kernel.calls == 2 for kernel in new)
    return [kernel.name for kernel in new]


def test_a_kernel_is_for_arguments_alike(started: list[Started]) -> None:
    w, hessian = torch.randn(8, 32, device=DEVICE), torch.eye(16, device=DEVICE).repeat(2, 1, 1)
    unaligned = torch.randn(257, device=DEVICE)[1:].view(8, 32)

    def run(weight: Tensor, hessian: Tensor = hessian, scale: float | None = None) -> Callable[[], object]:
        return lambda: quantize(
            weight, method="hessian", hessian=hessian, global_scale=scale, backend="triton", check_finite=False
        )

    kernels = ["factorize_kernel", "amax_kernel", "hessian_kernel"]
    assert names_of(run(w), started) == kernels
    assert names_of(run(w, hessian.half()), started) == []  # made float32 before
    assert names_of(run(w, hessian.double()), started) == kernels[:1]
    assert names_of(run(w.half()), started) == kernels[1:]
    assert names_of(run(unaligned), started) == kernels[1:]
    assert names_of(run(torch.randn(9, 32, device=DEVICE)), started) == kernels[1:]
    assert names_of(run(w, scale=1.0), started) == kernels[2:]


@pytest.mark.parametrize("method", ["naive", "sse"])
def test_so_are_those_of_the_other_methods(method: str, started: list[Started]) -> None:
    def run(weight: Tensor) -> Callable[[], object]:
        return lambda: quantize(weight, method=method, backend="triton", check_finite=False)

    w, unaligned = torch.randn(8, 32, device=DEVICE), torch.randn(257, device=DEVICE)[1:].view(8, 32)
    for weight in (w, w.bfloat16(), torch.randn(8, 48, device=DEVICE), unaligned):
        assert names_of(run(weight), started) == ["amax_kernel", f"{method}_kernel"]


def test_so_are_those_without_a_method(started: list[Started]) -> None:
    q = quantize(torch.randn(8, 32, device=DEVICE), backend="reference")
    given = (q.codes, q.scales, q.global_scale, q.format, 16)
    assert names_of(lambda: launch.dequantize(*given, torch.float32), started) == ["dequantize_kernel"]
    assert names_of(lambda: launch.dequantize(*given, torch.float16), started) == ["dequantize_kernel"]
    x = torch.randn(9, 32, device=DEVICE)
    for activations in (x, x[1:], x.half()):
        assert names_of(functools.partial(launch.block_hessians, activations, 16), started) == ["block_hessians_kernel"]


@pytest.mark.parametrize(
    ("capability", "cuda", "target"),
    [((7, 5), "13.0", "plain"), ((8, 6), "13.0", "plain"), ((8, 9), "13.0", "cuda"), ((9, 0), "13.0", "cuda"),
     ((9, 4), None, "plain")],
)  # fmt: skip
def test_instructions_are_spelt_out_for_gpus_that_know_them(
    capability: tuple[int, int], cuda: str | None, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.target_of.__wrapped__(torch.device("cuda:0")) == target


def test_triton_s_launcher_takes_these_arguments() -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    names = list(inspect.signature(driver.CudaLauncher.__call__).parameters)[1:]
    order = ["gridX", "gridY", "gridZ", "stream", "function"]
    rest = ["kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"]
    assert names == [*order, "args"] or names == [*order, *rest, "args"], triton.__version__


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.has_kernel])
def test_torch_s_default_dtype_changes_nothing(method: str, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(DEVICE)
    hessian = torch.eye(16, dtype=torch.float32, device=DEVICE).repeat(2, 1, 1)
    given = {"hessian": hessian} if METHODS[method].needs_hessian else {}
    want = quantize(weight, method=method, backend="triton", **given)  # type: ignore[arg-type]
    torch.set_default_dtype(dtype)
    try:
        got = quantize(weight, method=method, backend="triton", **given)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert torch.equal(got.global_scale, want.global_scale)
