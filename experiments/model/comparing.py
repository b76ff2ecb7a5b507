"""Runs two models over the same sequences, batch by batch, and compares their predictions token by token.

No logits are stored: both models give them for a few rows at a time (predictions.py), which divergence.py compares at
once. Memory holds the two models, the hidden states of a piece, and 2 × ROW_BYTES of logits.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.capture.progress import BAR, ticking
from experiments.files import one_line
from experiments.model.divergence import Comparison, compare, scored
from experiments.model.predictions import Predictor
from experiments.model.reference import StatesCache, in_batches, pieces

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
ROW_BYTES = {"cpu": 1 << 27, "cuda": 1 << 29}  # of one model's float32 logits


@dataclass(frozen=True)
class TokenValues:
    """[sequences, scored tokens] each: kl and log-probabilities of the labels in nats, float64; same_top, bool."""

    kl: np.ndarray
    reference_logprob: np.ndarray
    logprob: np.ndarray
    same_top: np.ndarray


@dataclass(frozen=True)
class Comparer:
    """Compares `model` with `reference` on ids [sequences, seq_len].

    states: the cache of the reference's states, or None. kept: these states themselves, where they are known.
    """

    reference: Predictor
    model: Predictor
    ids: Tensor
    protocol: str
    batch_tokens: int | None = None
    states: StatesCache | None = None
    kept: Tensor | None = None

    @property
    def batch(self) -> int:
        """Sequences per batch."""
        kind = self.model.device.partition(":")[0]
        return max(1, (self.batch_tokens or BATCH_TOKENS[kind]) // self.ids.shape[1])

    def run(self, what: str, quiet: bool = False) -> TokenValues:
        """what: the title of the progress bar. Raises ValueError, see divergence.py, and for a GPU without memory."""
        from tqdm import tqdm

        if not (quiet or sys.stderr.isatty()):  # then tqdm shows no bar
            print(f"{what}: {len(self.ids)} sequences of {self.ids.shape[1]} tokens", flush=True)
        for predictor in (self.reference, self.model):
            self._try(predictor)
        bar = tqdm(total=len(self.ids), desc=what, bar_format=BAR, disable=True if quiet else None)
        try:
            with ticking(bar):
                parts = list(self._parts(bar))
        except torch.OutOfMemoryError:
            raise ValueError(
                f"{self.model.device} has no memory left for batches of {self.batch} sequences. Use a smaller "
                "evaluate.batch_tokens, evaluate.dtype=bfloat16, or device=cpu."
            ) from None
        fields = ("kl", "base_logprob", "logprob", "same_top")
        return TokenValues(*(np.concatenate([getattr(part, name).cpu().numpy() for part in parts]) for name in fields))

    def _try(self, predictor: Predictor) -> None:
        try:
            predictor.divide(self.ids)
        except RuntimeError as error:
            if "dtype" not in str(error):
                raise
            dtype = str(predictor.network.dtype).removeprefix("torch.")
            raise ValueError(
                f"a model does not compute in {dtype} ({one_line(error)[:120]}). Use evaluate.dtype=bfloat16, or "
                "evaluate.reader=quantkit."
            ) from None

    def _parts(self, bar: Any) -> Iterator[Comparison]:
        """The comparison of each batch, [sequences, scored tokens]."""
        for number, chosen in pieces(len(self.ids), self.batch, self._bytes_per_sequence()):
            ids = self.ids[chosen]
            states = self._reference_states(number, ids) if self.kept is None else self.kept[chosen]
            bar.update(len(ids) / 2)
            for part, final in zip(ids.split(self.batch), states.split(self.batch), strict=True):
                yield self._batch(part, final)
                bar.update(len(part) / 2)

    def _bytes_per_sequence(self) -> int:
        config = self.reference.network.config.get_text_config(decoder=True)
        width = config.hidden_size if self.reference.divided else config.vocab_size
        return 4 * self.ids.shape[1] * int(width)

    def _reference_states(self, number: int, ids: Tensor) -> Tensor:
        def compute() -> Tensor:
            return in_batches(ids, self.batch, self.reference.final)

        if self.states is None or not self.reference.divided:  # logits are not stored
            return compute()
        return self.states.piece(number, compute)

    def _batch(self, ids: Tensor, reference_final: Tensor) -> Comparison:
        positions = scored(ids.shape[1], self.protocol)
        labels = ids[:, positions.start + 1 : positions.stop + 1]
        final = self.model.final(ids)[:, positions].flatten(0, 1)
        base = reference_final[:, positions].flatten(0, 1)
        rows = self._rows()
        parts = [
            compare(self.reference.logits(x), self.model.logits(y), label)
            for x, y, label in zip(base.split(rows), final.split(rows), labels.flatten().split(rows), strict=True)
        ]
        names = Comparison.__dataclass_fields__
        return Comparison(
            **{name: torch.cat([getattr(part, name) for part in parts]).view(labels.shape) for name in names}
        )

    def _rows(self) -> int:
        kind = self.model.device.partition(":")[0]
        vocabulary = int(self.model.network.config.get_text_config(decoder=True).vocab_size)
        return max(1, ROW_BYTES[kind] // (4 * vocabulary))
