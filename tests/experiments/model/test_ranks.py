"""Several processes share the work: each has its part, and the model has the bytes of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.model.job import Listener, quantize_model
from experiments.model.ranks import SEGMENTS, Ranks, segment_of
from experiments.model_record import ModelRecord
from experiments.record import read_record_of
from tests.experiments.model import several_processes
from tests.experiments.model.test_experts import moe  # noqa: F401  a fixture
from tests.experiments.model.test_walk import SEQ_LEN, hashes, overrides_for, run_for, small_batches  # noqa: F401
from tests.experiments.test_tracking import offline_files

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_segment_has_one_process_and_no_process_is_idle(size: int) -> None:
    owners = [Ranks(0, size).source(segment, SEGMENTS) for segment in range(SEGMENTS)]
    assert owners == sorted(owners) and set(owners) == set(range(size))


@pytest.mark.parametrize("batches", [1, 3, 8, 9, 100])
def test_segments_are_ranges_that_do_not_depend_on_the_processes(batches: int) -> None:
    segments = [segment_of(batch, batches) for batch in range(batches)]
    assert segments == sorted(segments) and set(segments) == set(range(min(SEGMENTS, batches)))


def test_the_dearest_work_comes_first() -> None:
    assert Ranks(0, 2).shares([1, 5, 3, 1]) == [1, 0, 1, 1]
    assert Ranks(0, 1).shares([1, 5]) == [0, 0]
    assert Ranks(2, 4).shares([4, 4, 4, 4]) == [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("tiny", ("hessian=loss",)),
        ("moe", ("hessian=loss",)),
        ("tiny", ("calibrate=parallel", "hessian=output")),
        ("tiny", ("method=gptq", "hessian=kronecker", "method.rows=8")),
    ],
)
def test_two_processes_write_the_bytes_of_one(
    kind: str, overrides: tuple[str, ...], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: SimpleNamespace = request.getfixturevalue(kind)
    run = run_for(model, tmp_path / "one", *overrides)
    quantize_model(run, Listener())
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *(
            several_processes.__file__,
            str(5 * SEQ_LEN),
            *overrides_for(model, tmp_path / "two", *overrides),
            "tracking=wandb",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    both = tmp_path / "two" / run.run_id
    assert hashes(both / "model") == hashes(run.folder)
    assert read_record_of(ModelRecord, both / "record.json").processes == 2
    assert done.stdout.count("layer   0 of") == 1
    assert len(offline_files(tmp_path / "two")) == 1
