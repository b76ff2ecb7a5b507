"""The arguments and options of kernel launches, and Triton's order of them. On a GPU, kernel tests cover this, too."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import triton

from quantkit import METHODS, NVFP4, quantize, search
from quantkit.kernels import launch
from tests.inputs import BLOCK_METHODS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAM, FUNCTION, METADATA = 7, 8, 9


class Recorder:
    """A stand-in for a jit function and its binary, which records the arguments of both."""

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
    active = SimpleNamespace(get_current_stream=lambda index: STREAM + index)
    runtime = SimpleNamespace(driver=SimpleNamespace(active=active))
    fake = SimpleNamespace(runtime=runtime, knobs=SimpleNamespace(runtime=hooks))
    monkeypatch.setattr(launch, "triton", fake)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    return Recorder()


def test_what_was_compiled_is_started(recorder: Recorder) -> None:
    kernel = launch.Kernel(recorder, (5, 1), BLOCK=32, num_warps=1)
    x = torch.zeros(64)
    kernel(STREAM, x, 64)
    assert recorder.compiled == [((5, 1), (x, 64), {"BLOCK": 32, "num_warps": 1})] and not recorder.started
    kernel(STREAM, x, 64)
    assert recorder.started == [(5, 1, 1, STREAM, FUNCTION, METADATA, None, None, None, x, 64, 32)]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_profiler_hears_of_every_launch(hook: str, recorder: Recorder) -> None:
    kernel, device = launch.Kernel(recorder, (5, 1), BLOCK=32), torch.device("cuda", 3)
    assert launch._stream(device) == STREAM + 3
    setattr(launch.triton.knobs.runtime, hook, SimpleNamespace(calls=[print]))
    for _ in range(2):
        kernel(launch._stream(device), torch.zeros(64), 64)
    assert len(recorder.compiled) == 2 and not recorder.started


def test_a_kernel_starts_on_its_tensor_s_device(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is not the current one becomes current during the call."""
    current = [0]

    @contextlib.contextmanager
    def switch(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index
        yield
        current[0] = before

    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", switch)
    call = launch._on_its_device(lambda tensor: current[0])
    assert [call(SimpleNamespace(device=torch.device("cuda", index))) for index in (0, 3)] == [0, 3]  # type: ignore[arg-type]
    assert current == [0]


class Kernels:
    """Records of the kernels made and launched. Nothing runs."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.started: list[str] = []
        self.constants: dict[str, Any] = {}  # of the last one made

    def make(self, kernel: Any, grid: tuple[int, int], **constants: Any) -> Callable[..., None]:
        name = kernel.__name__.removesuffix("_kernel") + ("_after" if constants.get("PDL_WAIT") else "")
        self.made.append(name)
        self.constants = constants
        return lambda stream, *arguments: self.started.append(name)

    def __call__(self, call: Callable[[], object]) -> tuple[list[str], list[str]]:
        """(kernels made, kernels launched) by a call. A second call must make none and launch the same."""
        self.made, self.started = [], []
        call()
        made, started = self.made, self.started
        self.made, self.started = [], []
        call()
        assert (self.made, self.started) == ([], started)
        return made, started


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    kernels = Kernels()
    monkeypatch.setattr(launch, "Kernel", kernels.make)
    monkeypatch.setattr(launch, "_pdl", lambda device: {"PDL": True})
    for name in ("_naive", "_sse", "_hessian", "_factorize", "_amax", "_dequantize", "_block_hessians"):
        monkeypatch.setattr(launch, name, functools.cache(getattr(launch, name).__wrapped__))
    return kernels


def unaligned(tensor: Tensor) -> Tensor:
    """The same tensor at an address that is not aligned for wide loads."""
    moved = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:].view(tensor.shape)
    return moved.copy_(tensor)


def test_a_kernel_is_for_arguments_alike(kernels: Kernels) -> None:
    w, hessian = torch.randn(8, 32, device=DEVICE), torch.eye(16, device=DEVICE).repeat(2, 1, 1)

    def run(weight: Tensor, hessian: Tensor = hessian, scale: float | None = None) -> Callable[[], object]:
        return lambda: quantize(
            weight, method="hessian", hessian=hessian, global_scale=scale, backend="triton", check_finite=False
        )

    all_of_them = ["factorize", "amax_after", "hessian"]
    assert kernels(run(w)) == (all_of_them, all_of_them)
    assert kernels(run(w, hessian.half())) == ([], all_of_them)  # made float32 before
    assert kernels(run(w, hessian.double())) == (["factorize"], all_of_them)
    assert kernels(run(w, unaligned(hessian))) == (["factorize"], all_of_them)
    for weight in (w.half(), unaligned(w), torch.randn(9, 32, device=DEVICE)):
        assert kernels(run(weight)) == (["amax_after", "hessian"], all_of_them)
    assert kernels(run(w, scale=1.0)) == (["hessian"], ["factorize", "hessian"])


def test_a_search_with_factors_is_one_launch_that_waits_for_what_came_before(kernels: Kernels) -> None:
    """The first kernel of a call must not start early, because the kernel that writes its input may still run."""
    w, scale = torch.randn(8, 64, device=DEVICE), torch.ones((), device=DEVICE)
    hessians = torch.eye(16, device=DEVICE).repeat(4, 1, 1)
    factors = search.factorize(hessians, "triton")

    def run(index: int, scale: Tensor | None = scale) -> Callable[[], object]:
        columns = w[:, 16 * index : 16 * index + 16]
        return lambda: search.quantize_matrix(columns, NVFP4, 16, "hessian", factors=factors[index], global_scale=scale)

    assert kernels(run(0)) == (["hessian"], ["hessian"])
    assert kernels.constants["PDL"] is False
    for index in range(1, 4):
        assert kernels(run(index)) == ([], ["hessian"])
    assert kernels(run(0, None)) == (["amax", "hessian"], ["amax", "hessian"])
    assert kernels.constants["PDL"] is True


@pytest.mark.parametrize("method", ["naive", "sse"])
def test_so_are_those_of_the_other_methods(method: str, kernels: Kernels) -> None:
    def run(weight: Tensor) -> Callable[[], object]:
        return lambda: quantize(weight, method=method, backend="triton", check_finite=False)

    w = torch.randn(8, 32, device=DEVICE)
    for weight in (w, w.bfloat16(), torch.randn(8, 48, device=DEVICE), unaligned(w)):
        assert kernels(run(weight)) == (["amax", method], ["amax", method])


def test_so_are_those_without_a_method(kernels: Kernels) -> None:
    q = quantize(torch.randn(8, 32, device=DEVICE), backend="reference")
    codes, scales, one = q.codes, q.scales, q.global_scale

    def values(codes: Tensor, scales: Tensor, global_scale: Tensor, dtype: torch.dtype) -> Callable[[], object]:
        return lambda: launch.dequantize(codes, scales, global_scale, q.format, 16, dtype)

    for call in (
        values(codes, scales, one, torch.float32),
        values(codes, scales, one, torch.float16),
        values(unaligned(codes), scales, one, torch.float32),
        values(codes, unaligned(scales), one, torch.float32),
        values(codes, scales, one.double(), torch.float32),
        values(codes.repeat(2, 1), scales.repeat(2, 1), one, torch.float32),
    ):
        assert kernels(call) == (["dequantize"], ["dequantize"])
    x = torch.randn(9, 32, device=DEVICE)
    for call in (
        lambda: launch.block_hessians(x, 16),
        lambda: launch.block_hessians(unaligned(x), 16),
        lambda: launch.block_hessians(x.half(), 16),
        lambda: launch.block_hessians(x[:8], 16),
        lambda: launch.block_hessians(x, 32),
    ):
        assert kernels(call) == (["block_hessians"], ["block_hessians"])
    for weight in (x, unaligned(x), x.half()):
        assert kernels(functools.partial(launch.amax_parts, weight)) == (["amax"], ["amax"])
    hessian, flags = torch.eye(16, device=DEVICE).repeat(2, 1, 1), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    for given in (hessian, unaligned(hessian), hessian.double(), hessian[:1]):
        assert kernels(functools.partial(launch.factorize, given, flags)) == (["factorize"], ["factorize"])


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
@pytest.mark.parametrize("method", BLOCK_METHODS)
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
