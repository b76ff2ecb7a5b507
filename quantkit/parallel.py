"""Independent pieces of work on a CPU's cores, a piece a core.

PyTorch's own threads share every single operation and wait for each other at its end. The searches consist of many
short operations, where that costs more than it gains, and very much more when another process wants a core. Here each
thread of Python works through pieces of its own, with one thread of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["for_each", "one_torch_thread"]

MAX_THREADS = 16  # beyond, they wait for Python's lock


def for_each(work: Callable[..., None], pieces: Sequence[tuple[object, ...]], device: torch.device) -> None:
    """Calls ``work(*piece)`` for every piece: on a CPU in as many threads as PyTorch is set to use, else in order.

    The pieces must not depend on each other. The first exception is raised again.
    """
    workers = min(torch.get_num_threads(), MAX_THREADS, len(pieces)) if device.type == "cpu" else 1
    if workers <= 1:
        with one_torch_thread() if device.type == "cpu" else nullcontext():
            for piece in pieces:
                work(*piece)
        return
    with one_torch_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in [pool.submit(work, *piece) for piece in pieces]:
            done.result()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """PyTorch computes on one core within: for many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
