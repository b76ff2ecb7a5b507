"""The timing protocol: ordered quantiles, no warm-up in the times, and a limit on the duration."""

from __future__ import annotations

import time

import pytest
import torch

from experiments.config import TimingConfig
from experiments.measure.timing import Timing, measure

QUICK = TimingConfig(min_run_s=0.05)


def test_cpu_quantiles() -> None:
    data = torch.rand(1 << 10)
    timing = measure(lambda: data.sort(), "cpu", "some CPU", QUICK)
    assert timing.ms_p20 is not None and timing.ms_median is not None and timing.ms_p80 is not None
    assert 0 < timing.ms_p20 <= timing.ms_median <= timing.ms_p80
    assert timing.iterations is not None and timing.iterations >= 3
    assert timing.timer == "torch.utils.benchmark"
    assert timing.device is not None and timing.device.startswith("some CPU, ") and "thread" in timing.device


def test_milliseconds_and_no_warm_up() -> None:
    calls = []

    def call() -> None:
        time.sleep(0.005 if calls else 0.3)
        calls.append(1)

    timing = measure(call, "cpu", "", QUICK)
    assert timing.ms_p20 is not None and timing.ms_p80 is not None
    assert timing.ms_p20 >= 5 and timing.ms_p80 < 100


def test_all_threads_are_used() -> None:
    seen = []
    measure(lambda: seen.append(torch.get_num_threads()), "cpu", "", TimingConfig(min_run_s=0.001))
    assert set(seen) == {torch.get_num_threads()}


def never() -> None:
    raise AssertionError("called")


def test_a_slow_call_is_not_timed(caplog: pytest.LogCaptureFixture) -> None:
    timing = measure(never, "cpu", "", TimingConfig(max_call_s=0.01), expected_s=0.02)
    assert timing.ms_median is None and timing.iterations is None and timing.timer == "torch.utils.benchmark"
    assert "timing.max_call_s=0.01" in caplog.text


def test_a_slow_call_is_made_twice_at_most() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.05)

    assert measure(call, "cpu", "", TimingConfig(min_run_s=0.01)).iterations == 1 and len(calls) == 2


def test_the_interpreter_has_no_speed() -> None:
    timing = measure(never, "cpu", "some CPU", QUICK, interpreted=True)
    assert timing == Timing(timer="interpreter", device="some CPU")
    assert measure(never, "cpu", "", TimingConfig(enabled=False)) == Timing()


@pytest.mark.gpu
def test_gpu_quantiles() -> None:
    data = torch.rand(1 << 20, device="cuda")
    timing = measure(lambda: data.sort(), "cuda", "some GPU", TimingConfig())
    assert timing.ms_p20 is not None and timing.ms_median is not None and timing.ms_p80 is not None
    assert 0 < timing.ms_p20 <= timing.ms_median <= timing.ms_p80 < 100
    assert timing.iterations is not None and timing.iterations >= 10
    assert timing.timer == "triton.testing.do_bench" and timing.device == "some GPU"
