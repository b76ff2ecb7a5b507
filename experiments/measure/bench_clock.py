"""The benchmark's clocks: GPU time and call time of a case.

`gpu_us` is the GPU's time between two events around a CUDA graph of the whole call, without a check for NaN. `call_us`
is the host's time from the Python call until the GPU has finished. On a CPU there is only call_us. Before each
measurement, a buffer larger than the L2 cache is overwritten.

Three calls on a few rows of the weight precede a timed call, to warm the host's caches. After calls on the whole weight
the host would wait for the GPU, up to a millisecond for a long kernel, and its caches would be cold again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from experiments.measure.bench_cases import Case, copy_case

FLUSH_BYTES = 256 << 20  # larger than any L2
LARGE_COPY_BYTES = 1 << 29  # read and written, far beyond the caches. In a graph, a copy of 1 GiB is a third slower
SETTLING = 5  # untimed calls at the beginning of a round
WARM_CALLS = 3  # before a timed call that has a graph and therefore takes less than SLOW_S
SLOW_S = 0.2  # a call that takes longer is timed SLOW_ROUNDS times
SLOW_ROUNDS = 3
SLOWEST_S = 2.0  # a call that takes longer is timed once, without another call before it


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def prepare(self, case: Case) -> object:
        """Compile, warm up, and capture the call in a CUDA graph if that is possible. Returns the call's result."""
        case.call()
        if case.warm_up is not None:
            case.warm_up()
        start = time.perf_counter()
        found = case.call()
        self.wait()
        seconds = time.perf_counter() - start
        if seconds > SLOW_S:
            case.limit = 1 if seconds > SLOWEST_S else SLOW_ROUNDS
        elif self.cuda and case.in_graph:
            case.graph = self.capture(case.call)
        return found

    def capture(self, call: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # a call that synchronizes cannot be captured
            torch.cuda.synchronize()
            return None
        graph.replay()
        self.wait()
        return graph

    def settle(self, case: Case) -> None:
        """Run a case a few times without keeping its times."""
        for _ in range(SETTLING):
            self.time_gpu(replace(case, gpu_us=[]))

    def time_gpu(self, case: Case) -> None:
        if not self.cuda or len(case.gpu_us) >= case.limit:
            return
        work = case.graph.replay if case.graph is not None else case.call
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        case.gpu_us.append(1e3 * begin.elapsed_time(end))

    def time_call(self, case: Case) -> None:
        if len(case.call_us) >= case.limit:
            return
        if self.cuda and case.limit > 1:
            for _ in range(1 if case.graph is None else WARM_CALLS):
                (case.warm_up or case.call)()
            self.flush.zero_()
        self.wait()
        start = time.perf_counter()
        case.call()
        self.wait()
        case.call_us.append(1e6 * (time.perf_counter() - start))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def bandwidth(self) -> float | None:
        """Bytes per second, read plus written, of a copy far larger than the caches; None on a CPU."""
        if not self.cuda:
            return None
        source = torch.ones(LARGE_COPY_BYTES // 2, dtype=torch.int8, device="cuda")
        case = copy_case(source)
        self.prepare(case)
        for _ in range(10):
            self.time_gpu(case)
        return LARGE_COPY_BYTES / (1e-6 * statistics.median(case.gpu_us))


def quantiles(times: list[float]) -> tuple[float | None, float | None, float | None]:
    """(median, 20 %, 80 %)."""
    if not times:
        return None, None, None
    values = torch.tensor(times, dtype=torch.float64, device="cpu").quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64, device="cpu")
    )
    return tuple(round(float(v), 3) for v in values)  # type: ignore[return-value]
