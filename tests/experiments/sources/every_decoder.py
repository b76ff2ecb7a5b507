"""Checks which causal decoders of transformers can be captured, on tiny models, and writes the page of results.

`python -m tests.experiments.sources.every_decoder` writes docs/decoders.md; test_every_decoder.py judges the models and
compares the page.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.capture.tap import InputTap
from experiments.config import LayerConfig, ModelConfig, ModelSource
from experiments.files import SourceError
from experiments.sources.checkpoints import Checkpoint, open_checkpoint
from experiments.sources.decoder import Decoder, build_decoder
from experiments.sources.modules import expert_modules, linear_modules
from tests.experiments.sources.tiny_decoders import NOT_TINY, VOCABULARY, kinds, tiny_config

PAGE = Path(__file__).parents[3] / "docs" / "decoders.md"
IDS = torch.randint(5, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
TOLERANCE = 1e-5  # relative to the largest input; two orders of summation differ by less
EXPERT = 1

Key = tuple[int, str]


@dataclass(frozen=True)
class Row:
    """One line of the page. note: the refused modules, or the reason why the model is refused."""

    kind: str
    verdict: str
    experts: str
    note: str

    def __str__(self) -> str:
        return f"| {self.kind} | {self.verdict} | {self.experts} | {self.note} |"


def judge(kind: str, folder: Path) -> Row:
    """Compare the captured inputs of the first, middle and last layer with those that hooks on the whole model see.

    Raises AssertionError for inputs that differ, and for a refusal of more than one line.
    """
    if kind in NOT_TINY:
        return Row(kind, "not tried", "–", NOT_TINY[kind])
    model = tiny_model(kind)
    folder = folder / kind
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(ModelConfig(kind, ModelSource.hub, path=str(folder), dtype="float32"), folder)
    try:
        path, depth = _stack(checkpoint)
        refused: dict[str, str] = {}
        seen_experts = False
        for index in sorted({0, depth // 2, depth - 1}):
            layer = model.get_submodule(f"{path}.{index}")
            wanted = [LayerConfig(index, name) for name, _ in linear_modules(layer)]
            experts = [LayerConfig(index, name) for name in expert_modules(layer, EXPERT)]
            seen_experts = seen_experts or bool(experts)
            refused |= _compare(checkpoint, model, path, wanted + experts)
            del layer
    except SourceError as error:
        return Row(kind, "refused", "–", _line(error, kind))
    note = f"except {', '.join(f'`{name}`' for name in sorted(refused))}" if refused else ""
    return Row(kind, "captured", "yes" if seen_experts else "–", note)


def tiny_model(kind: str, **changes: Any) -> Any:
    """A model with random weights, large enough to show errors, and stored buffers that differ from their defaults.

    changes: values of its configuration.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(kind)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in parameters:
                tensor.add_(torch.randn(tensor.shape, dtype=torch.float32, device="cpu"), alpha=0.2)
            elif tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, dtype=torch.float32, device="cpu"), alpha=0.2)
    return model


def _stack(checkpoint: Checkpoint) -> tuple[str, int]:
    decoder = Decoder(checkpoint, [], torch.float32)
    return decoder.path, len(decoder.stack)


def _compare(checkpoint: Checkpoint, model: Any, path: str, layers: list[LayerConfig]) -> dict[str, str]:
    """Returns the refused modules with the reasons. Raises SourceError if all are refused."""
    want = {(x.index, x.module): oracle(model, path, x) for x in layers}
    refused: dict[str, str] = {}
    try:
        _check(checkpoint, model, path, layers, want)
        return refused
    except SourceError:
        pass
    for layer in layers:
        try:
            _check(checkpoint, model, path, [layer], want)
        except SourceError as error:
            refused[layer.module] = str(error)
            reason = error
    if len(refused) == len(layers):
        raise reason
    return refused


def _check(checkpoint: Checkpoint, model: Any, path: str, layers: list[LayerConfig], want: dict[Key, Tensor]) -> None:
    decoder = build_decoder(checkpoint, layers, "float32")
    tap = InputTap(decoder, layers)
    got: dict[int, Tensor] = {}
    tap.run(IDS, lambda group, x: got.__setitem__(group, x.clone()))
    assert sorted(got) == list(range(len(tap.groups)))
    for group, members in enumerate(tap.groups):
        for layer in members:
            expected = want[layer.index, layer.module]
            assert got[group].shape == expected.shape, layer
            largest = expected.abs().max().item() if len(expected) else 0.0
            torch.testing.assert_close(got[group], expected, rtol=0, atol=TOLERANCE * largest, msg=str(layer))
            assert decoder.weight(layer).shape[1] == expected.shape[1]


def oracle(model: Any, path: str, layer: LayerConfig) -> Tensor:
    """[tokens, in_features]: the inputs of the whole model's module in all calls, or of the expert, by plain loops."""
    block = model.get_submodule(f"{path}.{layer.index}")
    expert = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", layer.module)
    if expert and layer.module not in dict(block.named_modules()):
        module = block.get_submodule(expert[1])
        with hooked(module) as calls:
            model(input_ids=IDS, use_cache=False)
        rows = [_looped(module, call, int(expert[2]), expert[3]) for call in calls]
        return torch.cat(rows)
    with hooked(block.get_submodule(layer.module)) as calls:
        model(input_ids=IDS, use_cache=False)
    inputs = [x.reshape(-1, x.shape[-1]) for x, *_ in calls]
    return torch.cat(inputs) if inputs else torch.empty(0, 1, dtype=torch.float32, device="cpu")


def _looped(module: Any, call: list[Tensor], expert: int, matrix: str) -> Tensor:
    """One expert's rows, token by token and choice by choice. call: hidden states, chosen experts, their weights."""
    hidden, chosen = call[0].reshape(-1, call[0].shape[-1]), call[1]
    rows = []
    for choice in range(chosen.shape[1]):
        for token in range(len(hidden)):
            if int(chosen[token, choice]) == expert:
                x = hidden[token]
                rows.append(x if matrix != "down_proj" else _activated(module, x, expert))
    width = module.down_proj.shape[1 if module.is_transposed else 2] if matrix == "down_proj" else hidden.shape[1]
    return torch.stack(rows) if rows else torch.empty(0, width, dtype=torch.float32, device="cpu")


def _activated(module: Any, x: Tensor, expert: int) -> Tensor:
    name = "gate_up_proj" if module.has_gate else "up_proj"
    weight = getattr(module, name)[expert]
    product = x @ weight if module.is_transposed else weight @ x
    if module.has_bias:
        product = product + getattr(module, f"{name}_bias")[expert]
    return module._apply_gate(product) if module.has_gate else module.act_fn(product)


@contextmanager
def hooked(module: Any) -> Iterator[list[list[Tensor]]]:
    """The tensors of each call of a module."""
    calls: list[list[Tensor]] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append([x.detach().clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            yield calls
    finally:
        handle.remove()


def _line(error: SourceError, kind: str) -> str:
    text = str(error)
    assert "\n" not in text and kind in text, text
    return text.replace(f"{kind} (local) ({kind})", "it").replace(f"{kind} (local)", "it").removeprefix("it: ")


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Decoders

The pipeline runs only a part of a model to capture a layer's inputs. The part must compute the same values as the whole
model. Tests check this for every causal decoder of transformers {version}. They make the model tiny, save it, and read
it back as a run does. Then they compare the inputs of its first, middle and last layer with those that hooks on the
whole model see. A model is captured, or refused in one line.

{captured} of {total} are captured, {experts} of them with their experts (`layer.module=mlp.experts.3.down_proj`). Where
single modules are refused, the others are captured. "Not tried" marks a model that cannot be made tiny or is not a
text-only decoder. A run checks it like any other model.

`python -m tests.experiments.sources.every_decoder` writes this page, and the tests compare it.

| model_type | verdict | experts | |
|---|---|---|---|
"""


def page(rows: list[Row]) -> str:
    from transformers import __version__

    captured = [row for row in rows if row.verdict == "captured"]
    experts = sum(row.experts == "yes" for row in captured)
    head = HEAD.format(version=__version__, captured=len(captured), total=len(rows), experts=experts)
    return head + "".join(f"{row}\n" for row in rows)


def listed() -> dict[str, Row]:
    """The rows of the page."""
    rows = re.findall(r"^\| (\S+) \| (captured|refused|not tried) \| (\S+) \| (.*?) ?\|$", PAGE.read_text(), re.M)
    return {kind: Row(kind, *rest) for kind, *rest in rows}


def main() -> None:
    import transformers
    from tqdm import tqdm

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for kind in tqdm(kinds()):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(judge(kind, Path(folder)))
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
