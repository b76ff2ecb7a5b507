"""The progress bars of a capture, which move steadily on a terminal. Elsewhere nothing is shown."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TICK_SECONDS = 1.0
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} sequences [{elapsed}<{remaining}]"
WAIT = "{desc} [{elapsed}]"


@contextmanager
def ticking(bar: Any) -> Iterator[Any]:
    """A context in which the bar's clock advances even while the bar is not updated."""
    ended = threading.Event()

    def tick() -> None:
        while not ended.wait(TICK_SECONDS):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    if not bar.disable:
        thread.start()
    try:
        with bar:
            yield bar
    finally:
        ended.set()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context that shows `what` with a clock, and removes it at its end."""
    from tqdm import tqdm

    with ticking(tqdm(desc=what, bar_format=WAIT, leave=False, disable=None)):
        yield


class Progress:
    """Updates a progress bar of sequences also within a batch, when modules of the loaded layers finish."""

    def __init__(self, decoder: Any, bar: Any) -> None:
        self.bar = bar
        layers = decoder.stack[: decoder.last + 1]
        self.parts = [part for layer in layers for part in layer.modules() if not list(part.children())]
        self.expected = max(1, len(self.parts))  # calls in a pass; after the first pass, its number of calls

    @contextmanager
    def of(self, sequences: int) -> Iterator[None]:
        """A context for one batch of this many sequences."""
        start, calls = self.bar.n, 0

        def move(*_: Any) -> None:
            nonlocal calls
            calls += 1
            here = start + sequences * min(1.0, calls / self.expected)
            self.bar.update(max(0.0, here - self.bar.n))

        handles = [] if self.bar.disable else [part.register_forward_hook(move) for part in self.parts]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.expected = calls or self.expected
        self.bar.update(start + sequences - self.bar.n)
