"""A tap on a decoder: it takes the inputs of chosen modules in the forward pass that computes them.

A hook takes a linear module's input at each of its calls in a pass, in order. An expert's input is taken at the product
with its matrix, inside the module of all experts. Its rows are the tokens that the router sends to it, possibly none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.sources.decoder import TRIAL_TOKENS, Decoder, ordinary_defaults

Key = tuple[int, str]
Take = Callable[[Key, Tensor], None]

PRODUCTS = {
    torch.nn.functional.linear,
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
}


class _AllSeen(Exception):
    """Ends a forward pass early."""


class InputTap:
    """Runs a decoder and passes on the inputs of chosen linear modules.

    groups: sets of layers that share one input tensor (q, k and v; gate and up), found by a short trial run. Each
    group's input is passed on once, inside the forward pass, so that memory holds one at a time.
    widths: in_features of each group. routed: whether a group is an expert, whose rows a router chose.
    """

    def __init__(self, decoder: Decoder, layers: Sequence[LayerConfig]) -> None:
        self.decoder, self.name = decoder, decoder.name
        seen: dict[Key, Tensor] = {}
        trial = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device=decoder.device)
        self._run(trial, [(x.index, x.module) for x in layers], seen.__setitem__)
        self.groups: list[list[LayerConfig]] = []
        inputs: list[Tensor] = []
        for layer in layers:
            x = seen[layer.index, layer.module]
            same = next((i for i, other in enumerate(inputs) if self._share(x, layer, other, i)), None)
            if same is None:
                inputs.append(x)
                self.groups.append([layer])
            else:
                self.groups[same].append(layer)
        targets = [decoder.target(group[0]) for group in self.groups]
        self.widths = [target.in_features for target in targets]
        self.routed = [target.expert is not None for target in targets]
        self.dtype = inputs[0].dtype

    def _share(self, x: Tensor, layer: LayerConfig, other: Tensor, group: int) -> bool:
        """Whether `layer` has the input of `group`, by identity of the tensors. The router may send an expert none of
        the trial's tokens, so its gate and up are recognized by their common parameter."""
        if x is other:
            return True
        one, two = self.decoder.target(layer), self.decoder.target(self.groups[group][0])
        return one.expert is not None and (one.module, one.parameter, one.expert) == (
            two.module,
            two.parameter,
            two.expert,
        )

    def run(self, token_ids: Tensor, consume: Callable[[int, Tensor], None]) -> None:
        """Run token_ids [sequences, seq_len], and call consume(group, input [tokens, in_features]) once per group.

        tokens: sequences · seq_len times the module's calls in a pass; for an expert, the tokens sent to it.
        """
        keys = [(group[0].index, group[0].module) for group in self.groups]

        def take(key: Key, x: Tensor) -> None:
            x = _rows(x)
            rows = token_ids.numel() * self.decoder.calls[key]
            if not self.routed[keys.index(key)] and x.shape[0] != rows:
                model = f"{self.name} ({self.decoder.kind})"
                raise SourceError(f"layer.module={key[1]} of {model} sees {x.shape[0]} rows for {rows} tokens.")
            consume(keys.index(key), x)

        self._run(token_ids.to(self.decoder.device), keys, take)

    def _run(self, ids: Tensor, keys: list[Key], take: Take) -> None:
        waiting = set(keys)

        def done(key: Key, x: Tensor) -> None:
            if x.is_meta:
                raise SourceError(f"layer.module={key[1]}: {self.name} computes its input from what was not loaded.")
            take(key, x)
            waiting.discard(key)
            if not waiting:
                raise _AllSeen

        decoder = self.decoder
        experts = [key for key in keys if decoder.targets[key].expert is not None]
        routed = _Routed(decoder, experts, done) if experts else nullcontext()
        calls = [_Calls(decoder, key, done) for key in keys if key not in experts]
        try:
            with ordinary_defaults(), torch.no_grad(), routed:
                decoder.model(input_ids=ids, use_cache=False)
        except _AllSeen:
            pass
        finally:
            for tap in calls:
                tap.handle.remove()


class _Calls:
    """Takes the inputs of all calls of a module in a pass, as one tensor."""

    def __init__(self, decoder: Decoder, key: Key, done: Take) -> None:
        self.key, self.calls, self.done = key, decoder.calls[key], done
        self.inputs: list[Tensor] = []
        self.handle = decoder.targets[key].module.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        self.inputs.append(args[0] if args else next(iter(kwargs.values())))
        if len(self.inputs) == self.calls:
            inputs, self.inputs = self.inputs, []
            # A single call's tensor is passed on itself: its identity shows which modules share their input.
            self.done(self.key, inputs[0] if self.calls == 1 else torch.cat([_rows(x) for x in inputs]))


class _Routed(TorchFunctionMode):
    """Takes the rows that are sent to experts, in all calls of their modules in a pass."""

    def __init__(self, decoder: Decoder, keys: Sequence[Key], done: Take) -> None:
        super().__init__()
        self.decoder, self.done = decoder, done
        self.inputs: dict[Key, list[Tensor]] = {key: [] for key in keys}
        self.left = {key: decoder.calls[key] for key in keys}
        self.handles: list[Any] = []

    def __enter__(self) -> Any:
        for key in self.left:
            self.handles.append(self.decoder.targets[key].module.register_forward_hook(self._after(key)))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            for key, inputs in self.inputs.items():
                if self.decoder.targets[key].takes(args[1]):
                    inputs.append(_rows(args[0]))
        return func(*args, **(kwargs or {}))

    def _after(self, key: Key) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.left[key] -= 1
            if self.left[key] == 0:
                decoder = self.decoder
                width = decoder.targets[key].in_features
                none = torch.empty(0, width, dtype=decoder.dtype, device=decoder.device)
                self.done(key, torch.cat([none, *self.inputs[key]]))

        return hook


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
