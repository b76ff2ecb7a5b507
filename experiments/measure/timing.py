"""One timing protocol for both backends: quantiles of repeated calls, warm-up excluded, on one device.

A time is that of the whole call `quantize(W, …, check_finite=False)` with given block Hessians. It includes their
factorization, but not their accumulation over the activations. On a GPU `triton.testing.do_bench` measures it and
clears the L2 cache before each call. On a CPU `torch.utils.benchmark` measures it with all of torch's threads. Times
are milliseconds.

The speed of Triton's interpreter means nothing: such a run has the timer `interpreter` and no time. So has a run beside
others on one device, by a launcher: its timer is `not measured (shared device)`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from experiments.config import TimingConfig

log = logging.getLogger(__name__)

SHARED = "not measured (shared device)"
QUANTILES = (0.5, 0.2, 0.8)


@dataclass(frozen=True)
class Timing:
    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    iterations: int | None = None
    timer: str | None = None
    device: str | None = None


def measure(
    call: Callable[[], object],
    device: str,
    device_name: str,
    config: TimingConfig,
    *,
    interpreted: bool = False,
    shared: bool = False,
    expected_s: float = 0.0,
) -> Timing:
    """Time `call`, which works on `device`.

    A call slower than max_call_s is not timed: the result has only the timer's name and the device. expected_s:
    duration of an earlier call, on a CPU. On a GPU the second call tells, because the first one compiles.
    """
    if not config.enabled:
        return Timing()
    if interpreted:
        return Timing(timer="interpreter", device=device_name)
    if shared:
        return Timing(timer=SHARED, device=device_name)
    if device.startswith("cuda"):
        return _measure_gpu(call, device, device_name, config)
    return _measure_cpu(call, device_name, config, expected_s)


def _measure_cpu(call: Callable[[], object], device_name: str, config: TimingConfig, expected_s: float) -> Timing:
    threads = torch.get_num_threads()
    where = f"{device_name}, {threads} thread{'s' * (threads > 1)}"
    name = "torch.utils.benchmark"
    if _too_slow(expected_s, config):
        return Timing(timer=name, device=where)
    # blocked_autorange first finds the number of calls per measurement, which is the warm-up.
    timer = Timer("call()", globals={"call": call}, num_threads=threads)
    measured = timer.blocked_autorange(min_run_time=config.min_run_s)
    return _summary([1e3 * t for t in measured.times], measured.number_per_run, name, where)


def _measure_gpu(call: Callable[[], object], device: str, device_name: str, config: TimingConfig) -> Timing:
    from triton.testing import do_bench

    name = "triton.testing.do_bench"
    with torch.cuda.device(device):
        call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        warm = time.perf_counter() - start
        if _too_slow(warm, config):
            return Timing(timer=name, device=device_name)
        # return_mode "all" gives the single times, because their number is recorded, too.
        times = do_bench(call, warmup=config.warmup_ms, rep=config.rep_ms, return_mode="all")
    return _summary(times, 1, name, device_name)


def _too_slow(seconds: float, config: TimingConfig) -> bool:
    if seconds > config.max_call_s:
        log.warning("Not timed: a call takes %.1f s, more than timing.max_call_s=%g.", seconds, config.max_call_s)
    return seconds > config.max_call_s


def _summary(times_ms: list[float], calls_per_time: int, timer: str, device: str) -> Timing:
    median, p20, p80 = torch.tensor(times_ms, dtype=torch.float64, device="cpu").quantile(
        torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
    )
    return Timing(float(median), float(p20), float(p80), len(times_ms) * calls_per_time, timer, device)
