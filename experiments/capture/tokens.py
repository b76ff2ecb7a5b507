"""The token sequences of a run: cut from the text, shuffled by the seed, and split into calibration and held-out."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.config import Config
from experiments.files import SourceError, sha256_json
from experiments.sources.chats import render_chats
from experiments.sources.texts import Text, load_text

log = logging.getLogger(__name__)

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Sequences:
    """ids: split → token ids [sequences, seq_len]. data, data_hash, data_split: the record's fields about the text."""

    ids: dict[str, Tensor]
    data: str
    data_hash: str
    data_split: str

    @property
    def count(self) -> int:
        return sum(len(ids) for ids in self.ids.values())


def token_sequences(config: Config, tokenize: Tokenize) -> Sequences:
    """The sequences of the configured text, `data.samples` of them.

    A seeded shuffle chooses them. The last ones, a share of data.heldout, are held out. With data.heldout_split, the
    held-out sequences come from that split instead. Raises SourceError for a text that is too short.
    """
    data = config.data
    text = load_text(data, config.cache.folder)
    available = _cut(tokenize(_plain(text, config)), config, text.split)
    order = shuffled(len(available), config.seed)
    if data.heldout and data.heldout_split:
        chosen = _held_out_elsewhere(config, tokenize, text, available, order)
    else:
        order = order[: data.samples]
        share = max(1, round(len(order) * data.heldout)) if data.heldout else 0
        if share >= len(order):
            raise SourceError(
                f"data.heldout={data.heldout:g} leaves no calibration sequence of {len(order)}. Use more text, a "
                "smaller data.seq_len, or data.heldout=0."
            )
        split = len(order) - share
        ids = {"calibration": available[sorted(order[:split])]}
        if share:
            ids["heldout"] = available[sorted(order[split:])]
        chosen = Sequences(ids, text.name, text.sha256, text.split)
    if chosen.count < data.samples:
        log.info("%s has %d sequences of %d tokens, fewer than data.samples=%d; taking all", text.name, chosen.count,
                 data.seq_len, data.samples)  # fmt: skip
    return chosen


def evaluated_sequences(
    config: Config, text: Text, tokenize: Tokenize, order: str = "shuffled"
) -> tuple[Tensor, list[int], int]:
    """(ids [sequences, seq_len], their numbers in the text, the number of sequences there): data.samples of them.

    They are the last ones of the seeded shuffle, because calibration takes the first ones; or, order="first", those at
    the beginning of the text. Raises SourceError for a text that is too short.
    """
    available = _cut(tokenize(_plain(text, config)), config, text.split)
    count = len(available)
    chosen = list(range(count)) if order == "first" else shuffled(count, config.seed)[::-1]
    chosen = sorted(chosen[: config.data.samples])
    return available[chosen], chosen, len(available)


def _held_out_elsewhere(
    config: Config, tokenize: Tokenize, text: Text, available: Tensor, order: list[int]
) -> Sequences:
    """Calibration sequences from `available`, chosen by `order`, and held-out ones from data.heldout_split."""
    data = config.data
    other = load_text(data, config.cache.folder, data.heldout_split)
    if other.sha256 == text.sha256:
        raise SourceError(
            f"data.heldout_split={data.heldout_split}: this is the calibration text ({text.name}, "
            f"split {text.split}). Name another split, or leave it out to hold out sequences of this one."
        )
    elsewhere = _cut(tokenize(_plain(other, config)), config, other.split)
    share = max(1, round(data.samples * data.heldout))
    held = shuffled(len(elsewhere), config.seed)[:share]
    kept = order[: max(1, data.samples - share)]
    return Sequences(
        ids={"calibration": available[sorted(kept)], "heldout": elsewhere[sorted(held)]},
        data=text.name,
        data_hash=sha256_json([text.sha256, other.sha256]),
        data_split=f"{text.split}, held out: {other.split}",
    )


def _plain(text: Text, config: Config) -> str:
    return render_chats(text.read(), config.model, config.cache.folder) if text.chat else text.read()


def _cut(ids: list[int], config: Config, split: str) -> Tensor:
    """[sequences, seq_len], without an incomplete last one. Raises SourceError for a text shorter than one sequence."""
    seq_len = config.data.seq_len
    count = len(ids) // seq_len
    if count == 0:
        text = f"data={config.data.name}" if config.data.path is None else f"data.path={config.data.path}"
        raise SourceError(
            f"{text}: split {split} has {len(ids)} tokens, fewer than one sequence of "
            f"data.seq_len={seq_len}. Use a longer text or a smaller data.seq_len."
        )
    return torch.tensor(ids[: count * seq_len], dtype=torch.long, device="cpu").view(count, seq_len)


def shuffled(count: int, seed: int) -> list[int]:
    """0 … count − 1, shuffled by the seed."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
