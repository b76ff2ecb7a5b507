"""Independent pieces of work on a CPU's cores, a piece a core.

PyTorch's own threads share every single operation and wait for each other at its end. The searches consist of many
short operations, where that costs more than it gains, and very much more when another process wants a core. Here each
thread of Python works through pieces of its own, with one thread of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

__all__ = ["for_each"]

MAX_THREADS = 16  # beyond, they wait for Python's lock


def for_each(work: Callable[..., None], pieces: Sequence[tuple[object, ...]], device: torch.device) -> None:
    """Calls ``work(*piece)`` for every piece: on a CPU in as many threads as PyTorch is set to use, else in order.

    The pieces must not depend on each other. The first exception is raised again.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MAX_THREADS, len(pieces)) if device.type == "cpu" else 1
    if workers <= 1:
        for piece in pieces:
            work(*piece)
        return
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done in [pool.submit(work, *piece) for piece in pieces]:
                done.result()
    finally:
        torch.set_num_threads(threads)
