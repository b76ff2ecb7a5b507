"""A layer's weight, inputs and Gram matrices, from any source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from experiments.config import Config
from experiments.files import SourceError

SPLITS = ("calibration", "heldout")


def check_width(config: Config, in_features: int, name: str) -> None:
    """Raises SourceError where the block size does not divide the layer's in_features: no capture would help."""
    if in_features % config.block_size:
        others = " or ".join(str(size) for size in (16, 32) if in_features % size == 0)
        remedy = f"Use block_size={others}" if others else "Choose another layer"
        raise SourceError(
            f"block_size={config.block_size}: layer {config.layer.index} {config.layer.module} of {name} has "
            f"{in_features} input features, which {config.block_size} does not divide. {remedy}."
        )


@dataclass(frozen=True)
class SourceInfo:
    """The model, tokenizer and text that were really used."""

    model: str
    model_revision: str | None
    model_origin: str | None
    tokenizer: str
    data: str
    data_hash: str
    data_split: str
    sequences: int
    dtype: str  # of the activations
    cache_key: str
    substituted: bool = False
    from_cache: bool = True


@dataclass(frozen=True)
class LossWeights:
    """weights [calibration tokens, groups]; gram: Σ w x xᵀ, [groups, in_features, in_features]; float32, on the CPU."""

    weights: Tensor
    gram: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """weight [out_features, in_features]; Gram matrices [in_features, in_features] float32; all on the CPU.

    routed: the layer is an expert. Its tokens are those that a router sends to it, a varying number per sequence.
    loss: weights of the tokens by their loss, for the method's Hessians. Output errors stay unweighted.
    """

    weight: Tensor
    gram_calibration: Tensor
    gram_heldout: Tensor | None
    tokens_calibration: int
    tokens_heldout: int
    provenance: SourceInfo
    _read: Callable[[str], Iterator[Tensor]] = field(repr=False)
    routed: bool = False
    loss: LossWeights | None = None

    @property
    def method_grams(self) -> Tensor:
        """[groups, in_features, in_features]: what a method takes for each group of the weight's rows."""
        return self.gram_calibration.unsqueeze(0) if self.loss is None else self.loss.gram

    def batches(self, split: str = "calibration") -> Iterator[Tensor]:
        """The layer's inputs [tokens, in_features], shard by shard. Raises SourceError if they were not kept."""
        if split not in SPLITS:
            raise ValueError(f"split={split}: use {' or '.join(SPLITS)}.")
        return self._read(split)

    @property
    def nbytes(self) -> int:
        grams = [g for g in (self.gram_calibration, self.gram_heldout) if g is not None]
        return sum(tensor.nbytes for tensor in (self.weight, *grams))
