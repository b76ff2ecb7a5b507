"""How good are the codes and scales of a quantized checkpoint, of whatever tool, for the weights that they stand for?

Every block is judged by squared error against all representable scales (quantkit.verify) at the stored global scale,
and the whole weight is quantized again at that global scale:

    weight_error   ‖Ŵ − W‖ / ‖W‖        stored
    least_error    the same of the best scale and nearest codes for each block

A method that corrects for other errors (GPTQ, descent, a Hessian) does not aim at the least squared error, so blocks
that are not optimal here are no mistake of it; evaluate.py compares such models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.config import ModelConfig
from experiments.files import SourceError
from experiments.sources.checkpoints import DequantizedCheckpoint, HoldsCodes, open_checkpoint
from experiments.sources.decoder import Decoder
from quantkit import QuantizedTensor, quantize, verify
from quantkit.metrics import weight_error


@dataclass(frozen=True)
class Judged:
    """One weight. blocks: those that were judged. not_optimal: of these, those whose scale another one beats by more
    than a millionth of the error. wrong_codes: codes that are not the nearest at their scale. worst_excess: largest
    relative excess of a block's error."""

    name: str
    blocks: int
    not_optimal: int
    wrong_codes: int
    worst_excess: float
    weight_error: float
    least_error: float


def judge_model(quantized: ModelConfig, original: ModelConfig, cache: Path) -> Iterator[Judged]:
    """Every quantized weight, one after the other. Raises SourceError where the two are not the same model."""
    for name, stored, weight in pairs(quantized, original, cache):
        if stored.shape != weight.shape:
            raise SourceError(
                f"{name} is {list(stored.shape)}, and {list(weight.shape)} in the original. Give the model that it was "
                "made from."
            )
        yield judge(name, stored, weight)


def judge(name: str, stored: QuantizedTensor, weight: Tensor) -> Judged:
    """stored: ``[..., K]``. weight: the original, of the same shape, in any float dtype."""
    weight = weight.float()
    best = quantize(weight, stored.format, stored.block_size, "sse", global_scale=_global_scale(stored))
    asked = _with_empty_blocks(stored, best, weight)
    found = verify(replace(asked, nearest_codes=True, method=None), weight)
    return Judged(
        name=name,
        blocks=found.blocks,
        not_optimal=found.violations,
        wrong_codes=found.wrong_codes,
        worst_excess=found.worst_excess,
        weight_error=weight_error(weight, stored.dequantize()),
        least_error=weight_error(weight, best.dequantize()),
    )


def _global_scale(stored: QuantizedTensor) -> Tensor | None:
    return stored.global_scale if stored.format.two_level else None


def _with_empty_blocks(stored: QuantizedTensor, best: QuantizedTensor, weight: Tensor) -> QuantizedTensor:
    """`stored` with the codes and scales of `best` where all weights of a block are zero: other tools give such a block
    the scale 0, which decodes it just as well."""
    size = stored.block_size
    empty = ~weight.unflatten(-1, (-1, size)).any(-1) & ~stored.dequantize().unflatten(-1, (-1, size)).any(-1)
    codes = torch.where(empty.repeat_interleave(size // 2, dim=-1), best.codes, stored.codes)
    return replace(stored, codes=codes, scales=torch.where(empty, best.scales, stored.scales))


def pairs(quantized: ModelConfig, original: ModelConfig, cache: Path) -> Iterator[tuple[str, QuantizedTensor, Tensor]]:
    """(name, stored weight, original weight) of a folder of quantkit or in an engine's layout. Raises SourceError."""
    checkpoint, source = open_checkpoint(quantized, cache), open_checkpoint(original, cache)
    if isinstance(checkpoint, DequantizedCheckpoint):
        stored = checkpoint.stored
        decoder = Decoder(source, [], torch.float32)  # names in a folder of quantkit are the model's
        for name in stored.names:
            matrix = stored.quantized(name)
            weight = decoder.stored.tensor(f"{name}.weight" if len(matrix.shape) == 2 else name, None)
            yield name, matrix, weight.mT.contiguous() if stored.is_transposed(name) else weight
    elif isinstance(checkpoint, HoldsCodes):
        for name, own in checkpoint.matrices.items():
            if name not in source.names:
                raise SourceError(
                    f"{source.name} has no tensor {name}. Give the model that {checkpoint.name} was made from."
                )
            matrix, weight = checkpoint.quantized(own), source.read([name])[name]
            yield own, matrix, weight.mT.contiguous() if len(matrix.shape) == 3 else weight
    else:
        raise SourceError(
            f"{checkpoint.name} holds no codes that are read here: NVFP4 or MXFP4 of quantkit or an engine."
        )
