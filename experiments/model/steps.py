"""The steps in which a decoder layer's matrices are quantized: those with one input together, in the order of calls.

For most decoders these are q, k, v · o · gate, up · down. A short trial run of the layer finds them, by identity of the
input tensors. It also finds the residual stream: the other term of the sum that takes a matrix's output, if that tensor
is the input of a module that ran before, such as a norm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experiments.files import SourceError
from experiments.model.fused import fused_groups
from experiments.model.layer import LayerRunner, first_tensor
from experiments.model.select import Matrix
from experiments.sources.decoder import TRIAL_TOKENS

SUMS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__}


@dataclass(frozen=True)
class Step:
    """matrices: quantized together. tap: module whose input they share. residual: module whose input is the residual
    stream that their output is added to; None if there is no such module. child: part of the layer whose output is that
    of the one matrix, such as self_attn of o_proj. With the matrix's input at hand, it need not run again."""

    matrices: tuple[Matrix, ...]
    tap: str
    residual: str | None = None
    child: Child | None = None


@dataclass(frozen=True)
class Child:
    """A part of a decoder layer. outputs: None for an output that is one tensor; else the length of a tuple of one
    tensor and Nones."""

    path: str
    outputs: int | None = None

    def output(self, x: Tensor) -> Any:
        return x if self.outputs is None else (x, *[None] * (self.outputs - 1))


def find_steps(runner: LayerRunner, index: int, matrices: Sequence[Matrix]) -> list[Step]:
    """The steps of a decoder layer that is loaded. Raises SourceError for a matrix that is called twice or never."""
    decoder = runner.decoder
    layer = decoder.stack[index]
    ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device=decoder.device)
    trial = _Trial(layer, matrices)
    with trial:
        runner.run(index, ids, runner.embed(ids))
    return trial.steps(f"layer {index} of {decoder.name} ({decoder.kind})")


def check_fused_steps(fused: Sequence[Sequence[str]] | None, steps: Sequence[Step]) -> None:
    """Raises SourceError for layers that share a global scale, but are quantized one after the other."""
    number = {matrix.name: n for n, step in enumerate(steps) for matrix in step.matrices}
    for group in fused_groups(number, fused) if fused else ():
        if len({number[name] for name in group}) > 1:
            raise SourceError(
                f"fused: {', '.join(group)} have different inputs, so calibrate=sequential quantizes them one after "
                "the other. Use calibrate=parallel, or take them apart."
            )


class _Trial(TorchFunctionMode):
    """A context that notes inputs and outputs of a layer's modules, and sums that take outputs of its matrices."""

    def __init__(self, layer: nn.Module, matrices: Sequence[Matrix]) -> None:
        super().__init__()
        self.layer, self.matrices = layer, matrices
        self.paths = {matrix.target.path for matrix in matrices}
        self.inputs: dict[str, Tensor] = {}  # of all modules
        self.calls: dict[str, int] = {}
        self.outputs: dict[int, str] = {}  # id of the output of a matrix's module → path
        self.alive: list[Any] = []  # keeps ids unique
        self.residuals: dict[str, str] = {}
        self.children: dict[str, Child] = {}  # path of a matrix's module → child with its output
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for path, module in self.layer.named_modules():
            if path:
                self.handles.append(module.register_forward_pre_hook(self._before(path), with_kwargs=True))
        for path in self.paths:
            self.handles.append(self.layer.get_submodule(path).register_forward_hook(self._after(path)))
        for path, child in self.layer.named_children():
            self.handles.append(child.register_forward_hook(self._after_child(path)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.calls[path] = self.calls.get(path, 0) + 1
            if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
                self.inputs.setdefault(path, first_tensor(args, kwargs))

        return hook

    def _after(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs[id(output)] = path
            self.alive.append(output)

        return hook

    def _after_child(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            own = self.outputs.get(id(parts[0]))
            if own is not None and own.startswith(f"{path}.") and all(part is None for part in parts[1:]):
                self.children[own] = Child(path, len(parts) if isinstance(output, tuple) else None)

        return hook

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in SUMS and len(args) == 2:
            for own, other in (args, reversed(args)):
                path = self.outputs.get(id(own))
                if path is not None:
                    same = (name for name, x in self.inputs.items() if x is other and self.calls[name] == 1)
                    found = next(same, None)
                    if found is not None:
                        self.residuals[path] = found
        return func(*args, **(kwargs or {}))

    def steps(self, where: str) -> list[Step]:
        for matrix in self.matrices:
            calls = self.calls.get(matrix.target.path, 0)
            if calls != 1:
                raise SourceError(
                    f"{matrix.full_name}: {where} calls it {calls} times in a pass; one call is supported. Leave it "
                    f"out: model.exclude=['*.{matrix.name}']."
                )
        order = list(self.calls)
        steps = [self._step(group) for group in self._groups()]
        return sorted(steps, key=lambda step: order.index(step.tap))

    def _groups(self) -> list[list[Matrix]]:
        """Linear matrices by their input tensor, and each matrix of the experts alone."""
        groups: list[list[Matrix]] = []
        for matrix in sorted(self.matrices, key=lambda matrix: list(self.calls).index(matrix.target.path)):
            x = self.inputs[matrix.target.path]
            same = (group for group in groups if not matrix.experts and self._input(group) is x)
            group = next(same, None)
            if group is None:
                groups.append([matrix])
            else:
                group.append(matrix)
        return groups

    def _input(self, group: list[Matrix]) -> Tensor | None:
        return None if group[0].experts else self.inputs[group[0].target.path]

    def _step(self, group: list[Matrix]) -> Step:
        path = group[0].target.path
        if len(group) > 1 or group[0].experts:
            return Step(tuple(group), path)
        return Step(tuple(group), path, self.residuals.get(path), self.children.get(path))
