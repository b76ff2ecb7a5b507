"""Runs of a sweep that Hydra's launchers start in other processes: joblib on this machine, submitit here or by Slurm.

    python experiments/run.py -m hydra/launcher=processes method=naive,sse,hessian

conf/hydra/launcher/ has the presets; the packages are the extra `launchers`. Such a run must know more than a run of a
serial sweep: which GPU is free, and whether its time would be that of a shared device. It tells the command that
started the sweep how it ended. Imports no torch without a GPU.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from experiments import provenance
from experiments.config import REPO_ROOT

SERIAL = "BasicLauncher"  # Hydra's own: one run after the other, in this process
OF_THIS_MACHINE = ("JoblibLauncher", "LocalLauncher")  # their runs share its devices
PRESETS = {"processes": "joblib", "jobs": "submitit", "slurm": "submitit"}  # of conf/hydra/launcher → their package
OUTCOMES_NAME = "outcomes.jsonl"
VISIBLE = "CUDA_VISIBLE_DEVICES"
KEPT = f"QUANTKIT_{VISIBLE}"  # that of the command which started the sweep
WAIT_SECONDS = 0.2


def launcher() -> str:
    """The class of the launcher that started this run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return SERIAL
    return str(HydraConfig.get().launcher.get("_target_", "")).rpartition(".")[2]


def is_elsewhere() -> bool:
    """Whether this run's process is not that of the command."""
    return launcher() != SERIAL


def shares_device(device: str) -> bool:
    """Whether other runs may use the run's device at the same time, so that its time would mean nothing.

    A GPU is a run's own, by `own_device` or by Slurm. The processors of a machine are not.
    """
    return is_elsewhere() and not device.startswith("cuda")


def prepare() -> None:
    """In the command, before its runs' processes start: they import this package, too."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(REPO_ROOT), os.environ.get("PYTHONPATH"))))
    keep_visible_gpus()


def keep_visible_gpus() -> None:
    """In the command, for `see_gpus` in its runs' processes."""
    os.environ.pop(KEPT, None)
    if VISIBLE in os.environ:
        os.environ[KEPT] = os.environ[VISIBLE]


def see_gpus() -> None:
    """The GPUs that the command sees. submitit hides all of them from a job that asks for no number of GPUs."""
    if launcher() == "LocalLauncher" and os.environ.get(VISIBLE) == "":
        del os.environ[VISIBLE]
        if KEPT in os.environ:
            os.environ[VISIBLE] = os.environ[KEPT]


@contextmanager
def own_device(asked: str) -> Iterator[str]:
    """The device of a run. For `auto` on a machine whose GPUs are shared by the sweep's runs: one that is free.

    Waits for a free one. The first that is tried is the one of the run's number, so that runs spread over all.
    """
    see_gpus()
    gpus = count_gpus() if asked == "auto" and launcher() in OF_THIS_MACHINE else 0
    if not gpus:
        yield asked
        return
    with free_gpu(gpus, int(HydraConfig.get().job.num)) as number:
        yield f"cuda:{number}"


def count_gpus() -> int:
    if provenance.resolve_device("auto") != "cuda":
        return 0
    import torch

    return torch.cuda.device_count()


@contextmanager
def free_gpu(count: int, first: int) -> Iterator[int]:
    """The number of a GPU, 0 … count − 1, that no other process of this user holds; `first` modulo count if it is free.

    The system ends the hold of a process that is killed.
    """
    from filelock import FileLock, Timeout

    folder = Path(tempfile.gettempdir()) / f"quantkit-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    names = _gpu_names(count)
    while True:
        for number in ((first + step) % count for step in range(count)):
            lock = FileLock(folder / f"{names[number]}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            try:
                yield number
            finally:
                lock.release()
            return
        time.sleep(WAIT_SECONDS)


def _gpu_names(count: int) -> list[str]:
    """The machine's names of the visible GPUs, whose numbers depend on CUDA_VISIBLE_DEVICES."""
    visible = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return visible if len(visible) == count else [str(number) for number in range(count)]


def tell_outcome(counts: dict[str, int]) -> None:
    """Add a run's counts to those that the command reads when the sweep ends."""
    folder = Path(HydraConfig.get().sweep.dir)
    with (folder / OUTCOMES_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps(counts) + "\n")


def read_outcomes(folder: Path) -> dict[str, int]:
    """How often the runs of a sweep ended in each way."""
    total: Counter[str] = Counter()
    try:
        lines = (folder / OUTCOMES_NAME).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        total.update(json.loads(line))
    return dict(total)
