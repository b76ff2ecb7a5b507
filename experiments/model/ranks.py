"""Several processes, one a GPU: `torchrun --nproc-per-node N experiments/quantize_model.py …`.

The batches of the text are divided into SEGMENTS ranges of neighbours, for any number of processes. A process runs the
segments that it owns, and sums each on its own. All processes add the segments' sums in the same order, so a sum has
the same bits as in one process. The matrices of a step are divided, too, and their codes exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

SEGMENTS = 8
WAIT = timedelta(hours=6)  # for another process, which may compute loss weights first

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's number, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """This process's own GPU, where there are several processes and GPUs."""
        if self.size > 1 and torch.cuda.is_available():
            return f"cuda:{torch.cuda.current_device()}"
        return wanted

    def source(self, segment: int, segments: int) -> int:
        """The process that owns a segment."""
        return segment * self.size // segments

    def shares(self, costs: Sequence[int]) -> list[int]:
        """The process for each of several pieces of work: the dearest first, to the one with the least so far."""
        load, owner = [0] * self.size, [0] * len(costs)
        for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
            owner[number] = load.index(min(load))
            load[owner[number]] += costs[number]
        return owner

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The source's values, written into `tensor` of every other process."""
        if self.size > 1:
            torch.distributed.broadcast(tensor, source)
        return tensor

    def share(self, value: T | None, source: int = 0) -> T:
        """The source's value, plain or with tensors on the CPU."""
        values: list[Any] = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values, source)
        return values[0]

    def share_tensors(
        self, own: tuple[T, Sequence[Tensor]] | None, source: int, device: torch.device
    ) -> tuple[T, list[Tensor]]:
        """The source's plain value and its tensors, on `device`."""
        header = None if own is None else (own[0], [(x.shape, x.dtype) for x in own[1]])
        value, kinds = self.share(header, source)
        if own is None:
            tensors = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in kinds]
        else:
            tensors = [x.contiguous().to(device) for x in own[1]]
        return value, [self.broadcast(x, source) for x in tensors]

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise largest values of all processes."""
        if self.size > 1:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return values

    def total(self, values: Tensor) -> Tensor:
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            torch.distributed.barrier()


def started() -> Ranks:
    """The processes that torchrun has started; one if it has not. Joins them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT)
    return Ranks(torch.distributed.get_rank(), size)


def segment_of(batch: int, batches: int) -> int:
    return batch * min(SEGMENTS, batches) // batches
