"""One checkpoint writer for several processes: the first one writes, the others know what it knows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor

from experiments.model.checkpoint import CheckpointWriter
from experiments.model.ranks import Ranks
from quantkit import QuantizedTensor


class SharedWriter:
    """A context. is_complete and finished are those of CheckpointWriter when it began, for all processes."""

    def __init__(self, ranks: Ranks, make: Callable[[], CheckpointWriter]) -> None:
        self.ranks = ranks
        self.writer = make() if ranks.is_first else None
        known = None if self.writer is None else (self.writer.is_complete, dict(self.writer.finished))
        self.is_complete, self.finished = ranks.share(known)

    def __enter__(self) -> SharedWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.writer is not None:
            self.writer.close()

    def quantized(self, index: int) -> dict[str, QuantizedTensor]:
        """The matrices of a finished layer, on the CPU, for all processes."""
        return self.ranks.share(None if self.writer is None else self.writer.quantized(index))

    def write_layer(
        self,
        index: int,
        quantized: Mapping[str, QuantizedTensor],
        kept: Mapping[str, Tensor],
        record: dict[str, Any],
        transposed: Collection[str] = (),
    ) -> None:
        """See CheckpointWriter; only in the first process."""
        assert self.writer is not None
        self.writer.write_layer(index, quantized, kept, record, transposed)
