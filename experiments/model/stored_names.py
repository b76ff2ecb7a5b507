"""What a checkpoint calls a model's weights: one name, and one matrix, for each that transformers joins when it loads.

The rules are transformers' own. They are applied to the numbers of a weight's rows, so that the codes, scales and
global scale of those rows can be stored under the names that come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.files import SourceError, one_line
from experiments.sources.decoder import ordinary_defaults
from quantkit import QuantizedTensor


@ordinary_defaults()
def skeleton(folder: Path) -> Any:
    """The causal language model of a folder's config.json, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a model's constructor may raise any error
        raise SourceError(f"{folder}: the model of config.json cannot be built: {one_line(error)}") from None


def linear_layers(model: Any) -> list[str]:
    """Names of all linear modules."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def left_out(model: Any, quantized: Iterable[str]) -> list[str]:
    """Modules with a weight matrix that is not quantized: linear layers, routers, lm_head. Embeddings are none.

    quantized: names of modules, and of the fused parameters of experts.
    """
    known = set(quantized)
    return [
        name
        for name, module in model.named_modules()
        if name not in known and not isinstance(module, nn.Embedding) and _has_matrix(module)
    ]


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2


def stored_matrices(model: Any, name: str, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """(name in a checkpoint, matrix [N, K]) of a quantized weight [N, K] or of fused experts [E, N, K].

    Raises SourceError for experts that the checkpoint does not keep apart as matrices [N, K].
    """
    for stored, rows in stored_rows(model, name, quantized.shape[:-1]).items():
        if len(quantized.shape) == 2:
            yield stored, _rows(quantized, rows)
            continue
        experts, own = rows // quantized.shape[1], rows % quantized.shape[1]
        yield stored, _rows(quantized[int(experts[0])], own)


def stored_rows(model: Any, name: str, shape: torch.Size) -> dict[str, Tensor]:
    """Name in a checkpoint → numbers of the rows that are stored there, int64 ``[n]``.

    shape: ``[N]`` of a matrix, ``[E, N]`` of experts. Raises SourceError for experts that are stored in one tensor.
    """
    from transformers.core_model_loading import revert_weight_conversion

    key = f"{name}.weight" if len(shape) == 1 else name
    numbers = torch.arange(shape.numel(), dtype=torch.int64, device="cpu").reshape(*shape, 1)
    found = revert_weight_conversion(model, {key: numbers})
    if any(tensor.ndim != 2 or tensor.shape[1] != 1 for tensor in found.values()):
        raise SourceError(
            f"{name}: this model's checkpoints keep the experts in one tensor. Export gpt-oss with mxfp4 "
            "(export=gpt_oss); for another model leave the experts out (model.exclude)."
        )
    return {stored.removesuffix(".weight"): tensor.flatten() for stored, tensor in found.items()}


def _rows(quantized: QuantizedTensor, rows: Tensor) -> QuantizedTensor:
    if torch.equal(rows, torch.arange(quantized.shape[0], dtype=torch.int64, device="cpu")):
        return quantized
    return replace(
        quantized, codes=quantized.codes[rows], scales=quantized.scales[rows], candidates=None, objective=None
    )
