"""A synthetic layer: a seeded weight and inputs of any shape, for timing and tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.capture.inputs import SPLITS, LayerInputs, SourceInfo, check_width
from experiments.config import Config
from experiments.files import SourceError
from experiments.sources.resolved import Resolved
from quantkit.calibration import GramAccumulator

SYNTHETIC_RANK = 32  # of F: directions that the channels share
HEAVY_SHARE = 1 / 128  # of the channels are heavy, as outlier channels of a language model are
HEAVY_FACTOR = 20.0


def synthetic_layer(resolved: Resolved) -> LayerInputs:
    """X = (noise + z F) · channel scale, in which channels correlate and a few are heavy. Raises SourceError."""
    config = resolved.config
    model, data = config.model, config.data
    check_width(config, model.in_features, "the synthetic model")
    dtype: torch.dtype = getattr(torch, model.dtype)
    weight = _normal(_generator(config.seed, 0), model.out_features, model.in_features)
    inputs = _SyntheticInputs.of(config, dtype)
    grams = {split: GramAccumulator(model.in_features) for split in SPLITS if inputs.sequences[split]}
    for split, accumulator in grams.items():
        for batch in inputs.read(split):
            accumulator.update(batch)
    return LayerInputs(
        weight=(weight * model.std).to(dtype),
        gram_calibration=grams["calibration"].gram,
        gram_heldout=grams["heldout"].gram if "heldout" in grams else None,
        tokens_calibration=len(inputs.sequences["calibration"]) * data.seq_len,
        tokens_heldout=len(inputs.sequences["heldout"]) * data.seq_len,
        provenance=_provenance(config, resolved.sources_hash[:16]),
        _read=inputs.read,
    )


@dataclass(frozen=True)
class _SyntheticInputs:
    """Sequences that are generated on reading. scale [in_features]; factors [SYNTHETIC_RANK, in_features]."""

    scale: Tensor
    factors: Tensor
    seed: int
    seq_len: int
    dtype: torch.dtype
    sequences: dict[str, range]  # split → their numbers

    @classmethod
    def of(cls, config: Config, dtype: torch.dtype) -> _SyntheticInputs:
        width, channels = config.model.in_features, _generator(config.seed, 1)
        scale = (_normal(channels, width) * 0.5).exp()
        heavy = torch.randperm(width, generator=channels, dtype=torch.int64, device="cpu")[
            : max(1, int(width * HEAVY_SHARE))
        ]
        scale[heavy] *= HEAVY_FACTOR
        factors = _normal(channels, SYNTHETIC_RANK, width) / SYNTHETIC_RANK**0.5
        return cls(scale, factors, config.seed, config.data.seq_len, dtype, _split(config))

    def read(self, split: str) -> Iterator[Tensor]:
        """The inputs [seq_len, in_features], sequence by sequence."""
        width = len(self.scale)
        for sequence in self.sequences[split]:
            own = _generator(self.seed, 2 + sequence)
            noise = _normal(own, self.seq_len, width)
            noise += _normal(own, self.seq_len, SYNTHETIC_RANK) @ self.factors
            yield (noise * self.scale).to(self.dtype)


def _split(config: Config) -> dict[str, range]:
    data = config.data
    share = max(1, round(data.samples * data.heldout)) if data.heldout else 0
    if share >= data.samples:
        raise SourceError(
            f"data.heldout={data.heldout:g} of data.samples={data.samples} leaves no calibration sequence."
        )
    first = data.samples - share
    return {"calibration": range(first), "heldout": range(first, data.samples)}


def _provenance(config: Config, key: str) -> SourceInfo:
    model = config.model
    return SourceInfo(
        model=f"synthetic {model.out_features}x{model.in_features}",
        model_revision=None,
        model_origin=model.origin,
        tokenizer="none",
        data="synthetic",
        data_hash=key,
        data_split="seeded",
        sequences=config.data.samples,
        dtype=model.dtype,
        cache_key=key,
        from_cache=False,
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed * 1_000_003 + stream)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
