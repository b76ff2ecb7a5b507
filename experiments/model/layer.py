"""One decoder layer of a model at a time: its forward pass on given hidden states, and the inputs of its matrices.

The whole model's forward runs, so that masks, positions and other arguments are the model's own. The decoder layers
below the wanted one pass their input on, the wanted one gets the given hidden states, and then the pass ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.files import SourceError
from experiments.sources.decoder import Decoder, ordinary_defaults


class _Ended(Exception):
    """Ends a forward pass early."""


@dataclass
class Call:
    """The arguments of a module's call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def input(self) -> Tensor:
        return first_tensor(self.args, self.kwargs)

    def with_input(self, x: Tensor) -> Call:
        """The same call with another first tensor."""
        old = self.input
        return Call(
            tuple(x if value is old else value for value in self.args),
            {name: x if value is old else value for name, value in self.kwargs.items()},
        )


@dataclass
class Taps:
    """paths: modules in the layer whose calls are kept. last: the module before whose call the pass ends."""

    paths: Sequence[str]
    last: str | None = None
    calls: dict[str, Call] = field(default_factory=dict)


class LayerRunner:
    """Runs decoder layers by their index. From then on, the decoder's model runs no other way."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.index = 0
        self.hidden: Tensor | None = None
        self.result: Any = None
        self.tuples = False  # whether the layers return tuples
        for index, layer in enumerate(decoder.stack):
            layer.forward = partial(self._forward, index, partial(type(layer).forward, layer))

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter layer 0, of token ids [sequences, seq_len]."""
        result = self._run(0, ids, None)
        assert isinstance(result, Tensor)
        return result

    def run(self, index: int, ids: Tensor, hidden: Tensor, taps: Taps | None = None) -> Tensor | None:
        """The hidden states [sequences, seq_len, features] after layer `index`; None if the pass ended before.

        taps: keeps the last call of each of its modules. Raises SourceError for a module that is called again.
        """
        layer = self.decoder.stack[index]
        with _tapped(layer, taps or Taps([])):
            return self._run(index, ids, hidden)

    @ordinary_defaults()
    @torch.no_grad()
    def _run(self, index: int, ids: Tensor, hidden: Tensor | None) -> Tensor | None:
        self.index, self.hidden, self.result = index, hidden, None
        with suppress(_Ended):
            self.decoder.model(input_ids=ids.to(self.decoder.device), use_cache=False)
        result, self.hidden, self.result = self.result, None, None
        return result

    def _forward(self, index: int, real: Any, *args: Any, **kwargs: Any) -> Any:
        if index < self.index:
            passed = first_tensor(args, kwargs)
            return (passed,) if self.tuples else passed
        if self.hidden is None:
            self.result = first_tensor(args, kwargs)
            raise _Ended
        if args:
            args = (self.hidden, *args[1:])
        else:
            kwargs["hidden_states"] = self.hidden
        output = real(*args, **kwargs)
        self.tuples = isinstance(output, tuple)
        self.result = output[0] if self.tuples else output
        raise _Ended


def first_tensor(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Tensor:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    raise SourceError("a module of the decoder is called without a tensor; such models are not supported.")


@contextmanager
def _tapped(layer: nn.Module, taps: Taps) -> Iterator[None]:
    """A context in which the layer's calls are kept in `taps`."""
    taps.calls.clear()

    def hook(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path in taps.paths:
            taps.calls[path] = Call(args, kwargs)
        if path == taps.last:
            raise _Ended

    paths = dict.fromkeys([*taps.paths, *([] if taps.last is None else [taps.last])])
    handles = [
        layer.get_submodule(path).register_forward_pre_hook(partial(hook, path), with_kwargs=True) for path in paths
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """A context in which modules compute something else. forwards: module → its forward."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.__dict__["forward"]


@contextmanager
def swapped(parameters: Mapping[tuple[nn.Module, str], Tensor]) -> Iterator[None]:
    """A context in which modules have other parameters. parameters: (module, name) → value."""
    before = {(module, name): module._parameters[name] for module, name in parameters}
    for (module, name), value in parameters.items():
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for (module, name), parameter in before.items():
            module._parameters[name] = parameter
