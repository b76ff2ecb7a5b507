"""Finds what `layer.module` names in a decoder layer: a linear module, or one expert's matrix in a fused parameter."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from experiments.config import LayerConfig
from experiments.files import SourceError

EXPERT = re.compile(r"(?P<experts>.*experts)\.(?P<number>\d+)\.(?P<matrix>\w+)")
# Checkpoints of Mixtral's kind number an expert's matrices.
MATRICES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}


@dataclass(frozen=True)
class Target:
    """module: the linear module, or for an expert the module of all experts. path: its name in the layer.

    parameter: name of the module's parameter. expert: the expert's number. rows: slice of the [out, in] matrix.
    """

    module: nn.Module
    path: str
    parameter: str = "weight"
    expert: int | None = None
    transposed: bool = False  # stored as [in, out]
    rows: tuple[int | None, int | None, int] = (None, None, 1)  # start, stop, step

    @property
    def in_features(self) -> int:
        shape = getattr(self.module, self.parameter).shape[-2:]
        return int(shape[0] if self.transposed else shape[1])

    def takes(self, weight: Tensor) -> bool:
        """Whether a product with `weight` is a product with this expert's matrix."""
        parameter: Tensor = getattr(self.module, self.parameter)
        assert self.expert is not None
        return (
            weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
            and weight.storage_offset() == parameter[self.expert].storage_offset()
        )

    def as_matrix(self, tensor: Tensor) -> Tensor:
        """The module's parameter, or one expert's part of it → [out_features, in_features]; a leading dimension of
        experts remains."""
        return (tensor.mT if self.transposed else tensor)[..., slice(*self.rows), :]

    def as_parameter(self, matrix: Tensor) -> Tensor:
        """The reverse of as_matrix, for all rows."""
        return matrix.mT.contiguous() if self.transposed else matrix


def linear_modules(layer: nn.Module) -> Iterator[tuple[str, Target]]:
    """(name, Target) of all linear modules of a decoder layer."""
    from transformers.pytorch_utils import Conv1D

    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            yield path, Target(module, path)
        elif isinstance(module, Conv1D):
            yield path, Target(module, path, transposed=True)


def expert_modules(layer: nn.Module, number: int) -> list[str]:
    """The names of one expert's matrices, for each module of experts in a decoder layer."""
    fused = ((path, module) for path, module in layer.named_modules() if is_fused(module))
    return [f"{path}.{number}.{matrix}" for path, module in fused for matrix in _matrices(module)]


def fused_experts(layer: nn.Module) -> Iterator[tuple[str, Target]]:
    """(name, Target of all experts) of each parameter that holds one matrix of every expert: gate_up_proj (up_proj
    without a gate), then down_proj."""
    for path, module in layer.named_modules():
        if is_fused(module):
            for parameter in ("gate_up_proj" if module.has_gate else "up_proj", "down_proj"):
                yield f"{path}.{parameter}", Target(module, path, parameter, transposed=bool(module.is_transposed))


def find_target(layer: nn.Module, wanted: LayerConfig, name: str) -> Target:
    """The target that `wanted` names. Raises SourceError, with the list of modules, if there is none."""
    linear = dict(linear_modules(layer))
    if wanted.module in linear:
        return linear[wanted.module]
    fused = {path: module for path, module in layer.named_modules() if is_fused(module)}
    match = EXPERT.fullmatch(wanted.module)
    if match and len(fused) == 1:
        path, module = next(iter(fused.items()))
        return _expert(module, path, int(match["number"]), match["matrix"], wanted, name)
    experts = expert_modules(layer, 0)
    count = [f"(experts 0 to {_count(module) - 1})" for module in fused.values()]
    raise SourceError(
        f"layer.module={wanted.module}: no such linear module in layer {wanted.index} of {name}. "
        f"It has {', '.join([*linear, *experts])}{' ' if count else ''}{' '.join(count)}."
        f"{' The experts of this model are computed together and cannot be told apart.' if match and not fused else ''}"
    )


def is_fused(module: nn.Module) -> bool:
    """Whether one parameter holds all experts' matrices, in a module whose layout transformers declares."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.dim() == 3 and hasattr(module, "is_transposed")


def _count(module: Any) -> int:
    return int(module.down_proj.shape[0])


def _matrices(module: Any) -> list[str]:
    return ["gate_proj", "up_proj", "down_proj"] if module.has_gate else ["up_proj", "down_proj"]


def _expert(module: Any, path: str, number: int, matrix: str, wanted: LayerConfig, name: str) -> Target:
    kind = MATRICES.get(matrix)
    if kind is None or f"{kind}_proj" not in _matrices(module):
        raise SourceError(
            f"layer.module={wanted.module}: an expert of layer {wanted.index} of {name} has "
            f"{', '.join(_matrices(module))}."
        )
    if number >= _count(module):
        raise SourceError(
            f"layer.module={wanted.module}: layer {wanted.index} of {name} has {_count(module)} experts, 0 to "
            f"{_count(module) - 1}."
        )
    if kind == "down" or not module.has_gate:
        return Target(module, path, f"{kind}_proj", number, module.is_transposed)
    rows: int = module.gate_up_proj.shape[-1 if module.is_transposed else -2]
    if module.is_concatenated:
        half = (0, rows // 2, 1) if kind == "gate" else (rows // 2, rows, 1)
    else:
        half = (0 if kind == "gate" else 1, rows, 2)
    return Target(module, path, "gate_up_proj", number, module.is_transposed, half)


def shared_with(
    stack: nn.ModuleList, index: int, module: nn.Module, path: str, stack_path: str, ties: dict[str, str]
) -> str | None:
    """Name of another layer that holds the same module or, by `ties` (name → name), the same weight; else None."""
    for other, layer in enumerate(stack):
        if other != index and any(inner is module for inner in layer.modules()):
            return f"layer {other}"
    for one, same in ties.items():
        for here, there in ((one, same), (same, one)):
            if here.startswith(f"{path}.") and not there.startswith(f"{stack_path}.{index}."):
                return there
    return None
