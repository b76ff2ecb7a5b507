"""Independent pieces of work on a CPU's cores, one piece per core at a time.

PyTorch's threads split each operation and synchronize at its end. The searches consist of many short operations, for
which this costs more than it gains, above all when another process uses a core. Here each Python thread works on its
own pieces with one PyTorch thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import torch

__all__ = ["for_each", "one_torch_thread"]

MAX_THREADS = 16  # more would wait for Python's GIL


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
    """A context in which PyTorch computes on one core, for many small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
