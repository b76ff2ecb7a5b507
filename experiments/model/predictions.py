"""A causal language model in two halves: the final hidden states of its decoder, and the logits that follow from them.

Logits are large (vocabulary × tokens), hidden states are not. So a batch goes through the decoder at once, and lm_head
with whatever the model does beside it (scaling, soft caps) is applied to a few rows at a time: the model's own forward
runs with a decoder that returns the given states. The halves are compared with the whole model on the first tokens; a
model that cannot be divided so is run as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

TRIAL_TOKENS = 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # of the largest logit


class Predictor:
    """divided: whether `final` gives hidden states [batch, seq_len, hidden]; else it gives the logits themselves."""

    def __init__(self, network: Any, device: str) -> None:
        self.network, self.device = network, device
        self.decoder: nn.Module | None = network.get_decoder()
        self.divided = False

    def final(self, ids: Tensor) -> Tensor:
        """ids [batch, seq_len] → final hidden states, or logits of an undivided model; on the device."""
        ids = ids.to(self.device)
        if not self.divided:
            return self._whole(ids)
        assert self.decoder is not None
        states: Tensor = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
        return states

    def logits(self, final: Tensor) -> Tensor:
        """Rows [tokens, hidden] of `final` → logits [tokens, vocabulary]."""
        final = final.to(self.device)
        return self._head(final) if self.divided else final

    def divide(self, ids: Tensor) -> None:
        """Divide the model if its two halves give what it gives as a whole. ids: some text, [sequences, seq_len]."""
        trial = ids[:1, :TRIAL_TOKENS].to(self.device)
        want = self._whole(trial)[0]
        try:
            self.divided = True
            got = self._head(self.final(trial)[0])
            limit = TOLERANCE[want.dtype] * float(want.abs().max())
            self.divided = got.shape == want.shape and bool((got - want).abs().max() <= limit)
        except (AttributeError, TypeError, ValueError, RuntimeError, KeyError, IndexError):
            self.divided = False

    def _whole(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.network(input_ids=ids, use_cache=False).logits
        return logits

    def _head(self, final: Tensor) -> Tensor:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        assert self.decoder is not None
        ids = torch.zeros((1, len(final)), dtype=torch.long, device=self.device)
        with _replaced(self.decoder, lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=final.unsqueeze(0))):
            return self._whole(ids)[0]


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def exact(device: str) -> Iterator[None]:
    """A context without gradients and without TF32, which would round a GPU's float32 products to 10 bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
