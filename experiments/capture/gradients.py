"""Loss weights of tokens, by one backward pass for all linear modules of a decoder.

    w_t = mean_n g_{t,n}²,   g = ∂/∂y Σ_t −log p(ŷ_t),   ŷ_t drawn from the model's own p

y [tokens, out_features] is a module's output. The text's own labels are not used: the expectation over ŷ is the Fisher
matrix, which is the Hessian of KL(p ‖ p_q) at p_q = p. With row groups, each group has the mean over its own outputs.
Parameters need no gradient, because the graph begins at the embedding's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.sources.decoder import Decoder, ordinary_defaults
from experiments.sources.modules import is_fused, linear_modules

DRAW_ROWS = 128  # rows of logits that are converted to float64 at a time


def layer_name(layer: LayerConfig) -> str:
    """The name of a module's weights in a file."""
    return f"{layer.index}.{layer.module}"


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """A context in which a GPU's products of float32 matrices are in float32 or tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@ordinary_defaults()
def loss_weights(
    decoder: Decoder,
    ids: Tensor,
    draws: Tensor,
    groups: int,
    recompute: bool = False,
    listen: Callable[[str, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """layer_name → float32 weights [sequences · seq_len, groups] on the CPU, of every linear module called once, and of
    the module of all experts, whose output is that of a layer's MLP.

    decoder: the whole model, float32. ids: [sequences, seq_len]. draws: float64 [sequences, samples, seq_len] from
    [0, 1), which choose the tokens' labels. The weights are the mean over the samples. recompute: keep only the inputs
    of the decoder layers and run a layer again in the backward pass; less memory, the same bits. listen: called with
    each module's name and its gradient [tokens, out_features], once for each sample. Raises SourceError for gradients
    that are not finite, and for a module with fewer outputs than groups.
    """
    ids, draws = ids.to(decoder.device), draws.to(decoder.device)
    samples = draws.shape[1]
    outputs = _Outputs(decoder, groups, recompute, listen)
    with outputs, torch.enable_grad():
        with _same_bits(decoder.device):
            logits = decoder.model(input_ids=ids, use_cache=False).logits
        for sample in range(samples):
            labels = draw_labels(logits.detach(), draws[:, sample])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            torch.autograd.grad(loss, outputs.root, retain_graph=sample + 1 < samples)
    tokens = ids.numel()
    weights = {name: total.cpu() / samples for name, total in outputs.sums.items()}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise SourceError(
                f"{decoder.name}: the loss has a gradient at {name} that is not finite. Use hessian=output."
            )
    return {name: weight for name, weight in weights.items() if outputs.calls[name] == 1 and len(weight) == tokens}


def _same_bits(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, the attention whose backward pass adds in one order: the fused ones add in any."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext()


def draw_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels [sequences, seq_len] drawn from softmax(logits [sequences, seq_len, vocabulary]).

    A label is the first whose cumulative probability, in float64, exceeds its value in `draws` [sequences, seq_len].
    """
    labels = []
    for part, draw in zip(logits.flatten(0, 1).split(DRAW_ROWS), draws.flatten().split(DRAW_ROWS), strict=True):
        cumulative = part.softmax(-1, dtype=torch.float64).cumsum(-1)
        found = torch.searchsorted(cumulative, draw.unsqueeze(1) * cumulative[:, -1:], right=True)
        labels.append(found.squeeze(1).clamp_(max=logits.shape[-1] - 1))
    return torch.cat(labels).view(draws.shape)


class _Outputs:
    """A context with hooks on a decoder's linear modules that sum squared gradients at their outputs.

    root: the embedding's output in the pass that runs inside. sums: layer_name → [tokens, groups]. calls: layer_name →
    number of calls in the pass.
    """

    root: Tensor

    def __init__(
        self, decoder: Decoder, groups: int, recompute: bool, listen: Callable[[str, Tensor], None] | None = None
    ) -> None:
        self.decoder, self.groups, self.recompute, self.listen = decoder, groups, recompute, listen
        self.again = False  # a layer runs for the second time
        self.sums: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.handles: list[Any] = []

    def __enter__(self) -> None:
        embedding = self.decoder.model.get_input_embeddings()
        self.handles.append(embedding.register_forward_hook(self._begin))
        for index, layer in enumerate(self.decoder.stack):
            if self.recompute:
                layer.forward = partial(self._run_twice, layer.forward)
            experts = [(path, module) for path, module in layer.named_modules() if is_fused(module)]
            for path, module in [*((path, target.module) for path, target in linear_modules(layer)), *experts]:
                hook = self._after(layer_name(LayerConfig(index, path)))
                self.handles.append(module.register_forward_hook(hook))

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        for layer in self.decoder.stack if self.recompute else ():
            del layer.__dict__["forward"]

    def _run_twice(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A layer's forward that keeps its inputs alone for the backward pass."""
        from torch.utils.checkpoint import checkpoint

        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), _SecondRun(self)),
            **kwargs,
        )

    def _begin(self, module: Any, args: Any, output: Tensor) -> None:
        self.root = output.requires_grad_()

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            if self.again or not isinstance(output, Tensor):
                return
            self.calls[name] = self.calls.get(name, 0) + 1
            if output.shape[-1] < self.groups:
                raise SourceError(f"hessian.groups={self.groups}: {name} has {output.shape[-1]} outputs. Use fewer.")
            if output.requires_grad:
                output.register_hook(lambda gradient: self._add(name, gradient))

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])
        if self.listen is not None:
            self.listen(name, rows)
        squares = mean_squares(rows, self.groups)
        self.sums[name] = self.sums[name] + squares if name in self.sums else squares


class _SecondRun:
    """A context in which a layer runs for the second time; it can be entered again, for the next sample."""

    def __init__(self, outputs: _Outputs) -> None:
        self.outputs = outputs

    def __enter__(self) -> None:
        self.outputs.again = True
        self.attention = _same_bits(self.outputs.decoder.device)
        self.attention.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.attention.__exit__(*error)
        self.outputs.again = False


def mean_squares(gradient: Tensor, groups: int) -> Tensor:
    """[tokens, out_features] → float32 [tokens, groups], means of squares over groups of neighbouring outputs."""
    parts = gradient.float().square().tensor_split(groups, dim=1)
    return torch.stack([part.mean(1) for part in parts], dim=1)
