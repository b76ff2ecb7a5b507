"""What a launch starts, and that Triton's launcher takes it so. A GPU sees all of it in the tests of the kernels."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton

from quantkit import METHODS, quantize
from quantkit.kernels import launch

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


def test_what_was_compiled_for_the_like_is_started(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, torch.device("cpu"), BLOCK=32, num_warps=1)
    x = torch.zeros(64)
    kernel((5, 1), x, 64)
    assert recorder.compiled == [((5, 1), (x, 64), {"BLOCK": 32, "num_warps": 1})] and not recorder.started
    kernel((6, 1), x, 64)
    assert recorder.started == [(6, 1, 1, STREAM, FUNCTION, METADATA, None, None, None, x, 64, 32)]
    for other in ((x, 63), (x[1:], 64), (x.half(), 64)):
        kernel((5, 1), *other)
    assert len(recorder.compiled) == 4 and len(recorder.started) == 1
    kernel((5, 1), x[3:], 64)  # aligned no better than the one before
    assert len(recorder.compiled) == 4 and len(recorder.started) == 2


def test_tensors_made_for_the_launch_are_not_looked_at(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, torch.device("cpu"), ("x_ptr",), BLOCK=32)
    x = torch.zeros(64)
    for tensor in (x, x[1:], x.half()):
        kernel((5, 1), tensor, 64)
    assert len(recorder.compiled) == 1 and len(recorder.started) == 2


def test_a_profiler_hears_of_every_launch(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, torch.device("cpu"), BLOCK=32)
    launch.triton.knobs.runtime.launch_exit_hook.calls.append(print)
    for _ in range(2):
        kernel((5, 1), torch.zeros(64), 64)
    assert len(recorder.compiled) == 2 and not recorder.started


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(device)
    hessian = torch.eye(16, dtype=torch.float32, device=device).repeat(2, 1, 1)
    given = {"hessian": hessian} if METHODS[method].needs_hessian else {}
    want = quantize(weight, method=method, backend="triton", **given)  # type: ignore[arg-type]
    torch.set_default_dtype(dtype)
    try:
        got = quantize(weight, method=method, backend="triton", **given)  # type: ignore[arg-type]
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert torch.equal(got.global_scale, want.global_scale)
