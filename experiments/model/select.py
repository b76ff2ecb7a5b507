"""Which weights of a model are quantized: by default every linear layer of the decoder except routers.

Patterns are shell-style (fnmatch) on the full name, such as model.layers.0.mlp.down_proj. model.include replaces the
default; model.exclude takes away from either.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from experiments.config import ModelConfig
from experiments.files import SourceError
from experiments.sources.decoder import Decoder
from experiments.sources.modules import Target, fused_experts, linear_modules

ROUTERS = ("*.gate", "*.router", "*.router.*", "*.shared_expert_gate", "*.gate.*")


@dataclass(frozen=True)
class Matrix:
    """A weight to quantize: of a linear module, or the same matrix of all experts.

    name: in its decoder layer. full_name: in the model. stored: name of its parameter in the model.
    """

    name: str
    full_name: str
    stored: str
    target: Target
    experts: bool = False

    @property
    def weights(self) -> int:
        """Their number, in all experts."""
        parameter: Tensor = getattr(self.target.module, self.target.parameter)
        return parameter.numel()


@dataclass(frozen=True)
class Selection:
    """layers: the matrices of each decoder layer. left_out: full name → why it is not quantized."""

    layers: tuple[tuple[Matrix, ...], ...]
    left_out: dict[str, str]

    @property
    def names(self) -> list[str]:
        return [matrix.full_name for layer in self.layers for matrix in layer]


def select(decoder: Decoder, model: ModelConfig, block_size: int) -> Selection:
    """Raises SourceError for patterns that leave nothing to quantize, or match nothing."""
    left_out: dict[str, str] = {}
    layers = [_of_layer(decoder, index, model, block_size, left_out) for index in range(len(decoder.stack))]
    left_out |= dict.fromkeys(_outside(decoder), "outside the decoder layers")
    found = [matrix.full_name for layer in layers for matrix in layer]
    _check_patterns(model, [*found, *left_out])
    if not found:
        reasons = "; ".join(f"{count} × {why}" for why, count in Counter(left_out.values()).items())
        settings = [("model.include", model.include), ("model.exclude", model.exclude), ("block_size", block_size)]
        told = " ".join(f"{name}={value}" for name, value in settings if value is not None)
        raise SourceError(f"{told}: no linear layer is left to quantize ({reasons}). Change or leave out the patterns.")
    return Selection(tuple(layers), left_out)


def check_fused(fused: Sequence[Sequence[str]] | None, selection: Selection) -> None:
    """Raises SourceError for names in `fused` that no layer has, or that no other layer of its module joins."""
    modules: dict[str, set[str]] = {}  # module → last parts of the names of its matrices
    for name in (*selection.names, *selection.left_out):
        parent, _, last = name.rpartition(".")
        modules.setdefault(parent, set()).add(last)
    known = set().union(*modules.values())
    for group in fused or ():
        for name in group:
            if name not in known:
                raise SourceError(f"fused: no layer is named {name}. Names are {', '.join(sorted(known))}.")
        for name in group if len(group) > 1 else ():
            if not any(name in own and len(own & set(group)) > 1 for own in modules.values()):
                others = ", ".join(other for other in group if other != name)
                raise SourceError(f"fused: {name} is in another module than {others}. List layers of one module.")


def _of_layer(
    decoder: Decoder, index: int, model: ModelConfig, block_size: int, left_out: dict[str, str]
) -> tuple[Matrix, ...]:
    chosen = []
    for matrix in _matrices(decoder, index):
        reason = _why_not(matrix, model, block_size)
        if reason is None:
            chosen.append(matrix)
        else:
            left_out[matrix.full_name] = reason
    left_out |= _other_weights(decoder, index)
    return tuple(chosen)


def _other_weights(decoder: Decoder, index: int) -> dict[str, str]:
    """Modules of a layer with weights of two or more dimensions that are no linear module, such as some routers."""
    known = {(id(m.target.module), m.target.parameter) for m in _matrices(decoder, index)}
    found: dict[str, str] = {}
    for path, module in decoder.stack[index].named_modules():
        for name, parameter in module._parameters.items():
            is_weight = parameter is not None and parameter.dim() > 1 and not name.endswith("bias")
            if is_weight and (id(module), name) not in known:
                full = f"{decoder.path}.{index}.{path}"
                found[full] = "a router" if _matches(full, ROUTERS) else "no linear module"
    return found


def _matrices(decoder: Decoder, index: int) -> list[Matrix]:
    layer, prefix = decoder.stack[index], f"{decoder.path}.{index}"
    linear = [
        Matrix(name, f"{prefix}.{name}", f"{prefix}.{name}.weight", target) for name, target in linear_modules(layer)
    ]
    experts = [
        Matrix(name, f"{prefix}.{name}", f"{prefix}.{name}", target, experts=True)
        for name, target in fused_experts(layer)
    ]
    return [*linear, *experts]


def _why_not(matrix: Matrix, model: ModelConfig, block_size: int) -> str | None:
    name = matrix.full_name
    if model.include is not None and not _matches(name, model.include):
        return "not in model.include"
    if model.exclude is not None and _matches(name, model.exclude):
        return "in model.exclude"
    if model.include is None and _matches(name, ROUTERS):
        return "a router"
    if matrix.target.in_features % block_size:
        return f"{matrix.target.in_features} input features, which block_size={block_size} does not divide"
    return None


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _outside(decoder: Decoder) -> list[str]:
    """Names of embeddings and linear modules outside the decoder layers, lm_head for example."""
    from torch import nn

    kinds = (nn.Linear, nn.Embedding)
    named: list[tuple[str, Any]] = list(decoder.model.named_modules())
    return [name for name, module in named if isinstance(module, kinds) and not name.startswith(f"{decoder.path}.")]


def _check_patterns(model: ModelConfig, names: Sequence[str]) -> None:
    for setting in ("include", "exclude"):
        for pattern in getattr(model, setting) or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SourceError(
                    f"model.{setting}: {pattern} matches no linear layer. Names are like {names[0]}; * stands for any "
                    "part of one."
                )
