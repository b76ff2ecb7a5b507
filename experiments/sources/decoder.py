"""The part of a decoder that computes the inputs of some layers, with the arithmetic of the whole model.

The whole model is built at its full depth on the meta device. Then the layers 0 … index are loaded. Other modules are
loaded when a trial run first reaches them. Modules that it never reaches (the layers above, the final norm, lm_head)
are not read, and raise an error if a later run reaches them. transformers renames, merges and casts the stored tensors,
as from_pretrained does.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import LayerConfig
from experiments.files import SourceError, one_line
from experiments.sources.checkpoints import Checkpoint, check_values
from experiments.sources.modules import Target, find_target, linear_modules, shared_with

TRIAL_TOKENS = 2


@contextmanager
def ordinary_defaults() -> Iterator[None]:
    """Within, tensors of transformers are made in float32 and on the CPU where it does not say otherwise, whatever the
    caller's defaults are."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def check_layers(checkpoint: Checkpoint, layers: Sequence[LayerConfig]) -> None:
    """Raises SourceError for an index that the model does not have. Reads nothing."""
    depth = _depth(checkpoint)
    for layer in layers:
        if layer.index >= depth:
            raise SourceError(f"layer.index={layer.index}: {checkpoint.name} has {depth} layers, 0 to {depth - 1}.")


def _depth(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    if getattr(config, "is_encoder_decoder", False):
        raise SourceError(f"{checkpoint.name} ({config.model_type}) is an encoder with a decoder, no decoder alone.")
    text = config.get_text_config(decoder=True)
    depth = getattr(text, "decoder_layers", None) or getattr(text, "num_hidden_layers", None)
    if not isinstance(depth, int):
        raise SourceError(f"{checkpoint.name} ({config.model_type}): config.json has no num_hidden_layers.")
    return depth


def build_decoder(checkpoint: Checkpoint, layers: Sequence[LayerConfig], dtype: str, device: str = "cpu") -> Decoder:
    """The decoder with all modules that the inputs of `layers` depend on.

    Raises SourceError for a module that does not exist, with the list of modules and before any tensor is read. Raises
    SourceError for a model whose part may compute other values than the whole.
    """
    check_layers(checkpoint, layers)
    decoder = Decoder(checkpoint, layers, getattr(torch, dtype), device)
    decoder.load()
    return decoder


def build_whole(checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> Decoder:
    """The decoder with all layers, the final norm and lm_head. Raises SourceError for a missing tensor."""
    decoder = Decoder(checkpoint, [], getattr(torch, dtype), device)
    decoder.load_whole()
    return decoder


def build_front(checkpoint: Checkpoint, dtype: str, device: str = "cpu") -> Decoder:
    """The decoder with layer 0 and what runs before it. Further layers are read and dropped one by one."""
    decoder = Decoder(checkpoint, [], getattr(torch, dtype), device)
    decoder.last = 0
    decoder.load()
    return decoder


class Decoder:
    """model: transformers' causal language model, on the meta device except for the loaded modules.

    stack: its decoder layers, named `path` in the model. last: index of the highest loaded layer.
    calls: target → number of calls of its module in a pass.
    """

    @ordinary_defaults()
    def __init__(
        self, checkpoint: Checkpoint, layers: Sequence[LayerConfig], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.name = checkpoint.name
        self.kind = str(checkpoint.config.model_type)
        self.model = self._skeleton()
        self.path, self.stack = self._find_stack()
        self.targets = {_key(layer): find_target(self.stack[layer.index], layer, self.name) for layer in layers}
        self.last = max((layer.index for layer in layers), default=-1)
        self.stored = _Stored(checkpoint, self.model)
        self.loaded: set[str] = set()
        self.calls: dict[tuple[int, str], int] = {}

    def target(self, layer: LayerConfig) -> Target:
        return self.targets[_key(layer)]

    def calls_of(self, layer: LayerConfig) -> int:
        """Number of calls of the module in a pass."""
        return self.calls[_key(layer)]

    def _skeleton(self) -> Any:
        """The whole model on the meta device. Buffers that are computed instead of stored are real tensors."""
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        config = copy.deepcopy(self.checkpoint.config)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise SourceError(f"{self.name} ({self.kind}): transformers has no causal decoder of this model_type.")
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=self.dtype, experts_implementation="eager", trust_remote_code=False
                )
            model._move_missing_keys_from_meta_to_device(set(), {"": "cpu"}, None, None)
            with torch.device("cpu"):
                model._initialize_missing_keys(False)
        except Exception as error:  # a model's constructor may raise any error
            raise SourceError(f"{self.name} ({self.kind}) cannot be built: {one_line(error)}") from None
        for path, buffer in model.named_non_persistent_buffers():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, buffer.to(self.device))
        return model.eval().requires_grad_(False)

    def _find_stack(self) -> tuple[str, nn.ModuleList]:
        depth = _depth(self.checkpoint)
        decoder = self.model.get_decoder() or self.model
        found = _lists(self.model, decoder, depth) or _lists(self.model, self.model, depth)
        # The layers of vision towers are nested deeper.
        outermost = [path for path in found if path.count(".") == min(other.count(".") for other in found)]
        if len(outermost) != 1:
            names = " and ".join(outermost) or "none"
            raise SourceError(f"{self.name} ({self.kind}): expected one list of {depth} decoder layers, found {names}.")
        return outermost[0], found[outermost[0]]

    # --- loading ------------------------------------------------------------------------------------------------------

    @ordinary_defaults()
    def load(self) -> None:
        """Read the layers up to `last`, and the other modules that a trial run reaches."""
        self._refuse_shared()
        below = [f"{self.path}.{index}." for index in range(self.last + 1)]
        for path in below:
            self._refuse_unexpected(path)
        self.stored.keys_for([name for name in self.stored.wanted if name.startswith(tuple(below))])
        for path in below:
            self._load_below(path.removesuffix("."))
        self._trial()
        for path, module in self._unloaded():
            module.forward = self._left_out(path)

    @ordinary_defaults()
    def load_whole(self) -> None:
        """Read every tensor of the model, a layer at a time, so that memory holds the stored tensors of one."""
        self._refuse_unexpected(f"{self.path}.")
        _, ties = self.stored.keys_for(self.stored.wanted)
        below = [f"{self.path}.{index}." for index in range(len(self.stack))]
        for path in below:
            self._load_below(path.removesuffix("."))
        self._load([name for name in self.stored.wanted if not name.startswith(tuple(below))])
        self._tie(ties)
        self.last = len(self.stack) - 1
        self.loaded = {path for path, _ in self.model.named_modules()}

    @ordinary_defaults()
    def load_layer(self, index: int) -> None:
        """Read the tensors of a decoder layer. Raises SourceError for one that is missing or that nothing uses."""
        path = f"{self.path}.{index}"
        if path not in self.loaded:
            self._refuse_unexpected(f"{path}.")
            self._load_below(path)

    def drop_layer(self, index: int) -> None:
        """Forget the tensors of a decoder layer. They can be read again."""
        path = f"{self.path}.{index}"
        for module in self.stack[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
            for name in module._buffers.keys() - module._non_persistent_buffers_set:
                buffer = module._buffers[name]
                module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="meta")
        self.loaded = {name for name in self.loaded if name != path and not name.startswith(f"{path}.")}

    def _refuse_shared(self) -> None:
        ties = getattr(self.model, "all_tied_weights_keys", {})
        for (index, module), target in self.targets.items():
            parameter = f"{self.path}.{index}.{target.path}".removesuffix(".")
            other = shared_with(self.stack, index, target.module, parameter, self.path, ties)
            if other is not None:
                raise SourceError(
                    f"{self.name} ({self.kind}): layer.module={module} of layer {index} is shared with {other}, whose "
                    "inputs count too. Choose a module of one layer alone."
                )

    def _load_below(self, path: str) -> None:
        """Read the tensors of the module at `path` and of its submodules."""
        module = self.model.get_submodule(path)
        own = {path, *(f"{path}.{inner}" for inner, _ in module.named_modules() if inner)}
        self._load([name for name in self.stored.wanted if name.rpartition(".")[0] in own])
        self.loaded |= own

    def _load_one(self, path: str) -> None:
        """Read the tensors of the module at `path`, without its submodules'."""
        own = [name for name in self.stored.wanted if name.rpartition(".")[0] == path]
        if path:
            children = {name for name, _ in self.model.get_submodule(path).named_children()}
            self._refuse_unexpected(f"{path}.", children)
        self._load(own)
        self.loaded.add(path)

    def _load(self, names: list[str]) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        keys, ties = self.stored.keys_for(names)
        state = self.checkpoint.read(keys)
        for key, tensor in state.items():
            if key not in self.stored.buffer_keys:
                check_values(self.name, key, tensor)
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=self.stored.mapping,
        )
        with without_bars():
            info, _ = convert_and_load_state_dict_in_model(self.model, state, settings)
        self._check(info)
        self._tie(ties)
        for name in names:
            tensor = _get(self.model, name)
            if tensor.is_meta:
                raise SourceError(f"{self.name} has no tensor {name}: the checkpoint and its config.json do not match.")
            tensor.requires_grad_(False)

    def _tie(self, ties: dict[str, str]) -> None:
        """ties: name → the tied tensor that stands for it."""
        for name, source in ties.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, _get(self.model, source))

    def _check(self, info: Any) -> None:
        for key in info.mismatched_keys:
            name, stored, expected = key
            raise SourceError(
                f"{self.name}: {name} is {list(stored)} in the checkpoint and {list(expected)} by config.json. "
                "Give the config.json of this checkpoint."
            )
        for name, error in info.conversion_errors.items():
            raise SourceError(f"{self.name}: {name} cannot be converted: {one_line(error)}")

    def _refuse_unexpected(self, prefix: str, children: Collection[str] = ()) -> None:
        """Raises SourceError for a stored tensor under `prefix`, outside `children`, that the model does not use."""
        for key, name in self.stored.unexpected.items():
            if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[0] not in children:
                raise SourceError(
                    f"{self.name}: the checkpoint has {key}, which {self.kind} in transformers does not use; the layer "
                    "would be computed without it."
                )

    def weight(self, layer: LayerConfig) -> Tensor:
        """[out_features, in_features], in the checkpoint's dtype."""
        target = self.target(layer)
        path = ".".join(part for part in (self.path, str(layer.index), target.path, target.parameter) if part)
        tensor = self.stored.tensor(path, target.expert)
        return target.as_matrix(tensor).contiguous()

    # --- the trial run ------------------------------------------------------------------------------------------------

    def _unloaded(self) -> Iterator[tuple[str, nn.Module]]:
        """(path, module) of modules whose own tensors were not read, and of the layers above."""
        above = [f"{self.path}.{index}" for index in range(self.last + 1, len(self.stack))]
        for path, module in self.model.named_modules():
            holds = any(t is not None for t in module._parameters.values()) or bool(stored_buffers(module))
            inside = any(path.startswith(f"{layer}.") for layer in above)
            if path in above or (holds and not inside and path not in self.loaded):
                yield path, module

    def _left_out(self, path: str) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise SourceError(f"{self.name} ({self.kind}): {path} was reached, which was not loaded.")

        return forward

    def _trial(self) -> None:
        """Run a few tokens through the whole model, with placeholders for the modules that are not loaded.

        Loads every module that is reached before layer `last` ends. Counts the calls of each target. Raises SourceError
        for a model that returns to a captured layer later, because a capture would miss the inputs of those calls.
        """
        trial = _Trial(self)
        with trial:
            ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device=self.device)
            try:
                with torch.no_grad():
                    self.model(input_ids=ids, use_cache=False)
            except SourceError:
                raise
            except Exception as error:  # a partly loaded model may raise any error
                trial.failed = one_line(error) or type(error).__name__
        for (index, module), calls in trial.calls.items():
            if not calls:
                reason = f": {trial.failed}" if trial.failed else ""
                raise SourceError(
                    f"layer.module={module}: {self.name} ({self.kind}) does not call it in layer {index}{reason}."
                )
        if trial.again is not None:
            raise SourceError(
                f"{self.name} ({self.kind}) runs {trial.again} again after later layers, so a capture would miss some "
                "of its inputs. Such models are not supported."
            )
        if trial.failed:
            raise SourceError(f"{self.name} ({self.kind}) cannot be run in part: {trial.failed}")
        self.calls = trial.calls


class _Trial:
    """A context with the hooks and placeholders of a trial run."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.calls = dict.fromkeys(decoder.targets, 0)
        self.again: str | None = None
        self.failed: str | None = None
        self.beyond = False  # the last loaded layer has run
        self.undo: list[Callable[[], None]] = []
        self.output: Any = None

    def __enter__(self) -> None:
        decoder = self.decoder
        for index, layer in enumerate(decoder.stack):
            if index > decoder.last:
                self._replace(layer, self._above(index))
        last = decoder.stack[decoder.last]
        self._hook(decoder.stack[0].register_forward_pre_hook(self._enter_first))
        self._hook(last.register_forward_hook(self._leave_last))
        for key, target in decoder.targets.items():
            self._hook(target.module.register_forward_pre_hook(self._count(key)))
        above = {id(layer) for layer in decoder.stack[decoder.last + 1 :]}
        for path, module in decoder._unloaded():
            if id(module) not in above:
                self._replace(module, self._around(path, module, module.forward))

    def __exit__(self, *_: Any) -> None:
        for undo in self.undo:
            undo()

    def _hook(self, handle: Any) -> None:
        self.undo.append(handle.remove)

    def _replace(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        module.forward = forward
        self.undo.append(lambda: module.__dict__.pop("forward", None))

    def _count(self, key: tuple[int, str]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.calls[key] += 1
            if self.beyond and self.again is None:
                self.again = f"layer {key[0]}"

        return hook

    def _enter_first(self, *_: Any) -> None:
        if self.beyond and self.again is None:
            self.again = "layer 0"

    def _leave_last(self, module: nn.Module, args: Any, output: Any) -> None:
        self.output = output
        self.beyond = True

    def _above(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self.beyond:
                path = f"{self.decoder.path}.{index}"
                raise SourceError(
                    f"{self.decoder.name} ({self.decoder.kind}): {path} runs before layer {self.decoder.last} ends."
                )
            return self.output

        return forward

    def _around(self, path: str, module: nn.Module, real: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that loads the module before layer `last` ends. After that it returns its input as its output."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if path not in self.decoder.loaded:
                if self.beyond:
                    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
                    return tensors[0] if tensors else None
                self.decoder._load_one(path)
            return real(*args, **kwargs)

        return forward


class _Stored:
    """The mapping from stored tensors to the model's, by transformers' rules.

    wanted: names of the model's parameters and stored buffers. unexpected: stored name → its name by the rules, which
    the model lacks.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        self.checkpoint, self.model = checkpoint, model
        self.mapping = get_model_conversion_mapping(model)
        state = model.state_dict()
        self.wanted = list(state)
        renamings = [entry for entry in self.mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self.mapping if isinstance(entry, WeightConverter)]
        self.converter = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        self.sources: dict[str, list[tuple[str, str | None]]] = {}
        self.first: dict[str, str] = {}
        self.unexpected: dict[str, str] = {}
        prefix = model.base_model_prefix
        for key in checkpoint.names:
            name, pattern = rename_source_key(key, renamings, converters, prefix, state)
            if name not in state and key in state:
                name, pattern = rename_source_key(key, [], [], prefix, state)
            if name not in state:
                self.unexpected[key] = name
                continue
            for made in self._made(name, pattern, state):
                self.sources.setdefault(made, []).append((key, pattern))
                self.first[made] = name
        self._forgive()
        buffers = self.sources.keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self.buffer_keys = {key for name in buffers for key, _ in self.sources[name]}
        self.ties = dict(getattr(model, "all_tied_weights_keys", {}))

    def _made(self, name: str, pattern: str | None, state: dict[str, Tensor]) -> list[str]:
        """All results of the conversion whose first result is `name`."""
        if pattern is None:
            return [name]
        targets = self.converter[pattern].target_patterns
        names = [name, *(name.replace(targets[0], other) for other in targets[1:])]
        return [made for made in dict.fromkeys(names) if made in state]

    def _forgive(self) -> None:
        """Drop the names that transformers itself ignores: buffers that old checkpoints store and models compute."""
        patterns = {r"rotary_emb\.inv_freq", r"position_ids$", r"\.attn\.(masked_)?bias$"}
        patterns |= set(self.model._keys_to_ignore_on_load_unexpected or ())
        self.unexpected = {
            key: name for key, name in self.unexpected.items() if not any(re.search(p, name) for p in patterns)
        }

    def keys_for(self, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """(stored tensors from which `names` are made, name → the tied tensor used for one that is not stored)."""
        keys: dict[str, None] = {}
        ties = {}
        for name in names:
            source = name
            if name not in self.sources:
                source = next((other for other in self._tied(name) if other in self.sources), name)
                if source not in self.sources:
                    raise SourceError(
                        f"{self.checkpoint.name} has no tensor {name}: the checkpoint and its config.json do not match."
                    )
                ties[name] = source
            keys |= dict.fromkeys(key for key, _ in self.sources[source])
        return list(keys), ties

    def _tied(self, name: str) -> list[str]:
        group = {name}
        for one, other in self.ties.items():
            if one in group or other in group:
                group |= {one, other}
        return sorted(group - {name})

    def tensor(self, name: str, expert: int | None) -> Tensor:
        """The model's tensor `name` in its stored dtype, or the part of `expert`. Raises SourceError."""
        from transformers.core_model_loading import dot_natural_key

        keys, ties = self.keys_for([name])
        name = ties.get(name, name)
        entries = sorted(self.sources[name], key=lambda entry: dot_natural_key(entry[0]))
        pattern = entries[0][1]
        if pattern is None:
            tensor = self.checkpoint.read(keys)[keys[0]]
            return tensor if expert is None else tensor[expert]
        picked = expert
        if expert is not None:
            apart = [entry for entry in entries if re.search(rf"\.{expert}\.", _after_experts(entry[0]))]
            if apart and len(apart) < len(entries):
                entries, picked = apart, 0
        conversion = copy.deepcopy(self.converter[pattern])
        stored = self.checkpoint.read([key for key, _ in entries])
        for key, own in entries:
            check_values(self.checkpoint.name, key, stored[key])
            conversion.add_tensor(self.first[name], key, own, stored[key])
        made = conversion.convert(self.first[name], model=self.model, config=self.model.config)[name]
        tensor = made[0] if isinstance(made, list) else made
        return tensor if picked is None else tensor[picked]


def _lists(model: nn.Module, part: nn.Module, depth: int) -> dict[str, nn.ModuleList]:
    """path in `model` → module list in `part` with `depth` entries that contain linear modules."""
    prefix = next(path for path, module in model.named_modules() if module is part)
    found: dict[str, nn.ModuleList] = {}
    for inner, module in part.named_modules():
        path = f"{prefix}.{inner}" if prefix else inner
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == depth and not inside:
            found[path] = module
    return {path: stack for path, stack in found.items() if any(True for _ in linear_modules(stack[0]))}


def stored_buffers(module: nn.Module) -> list[Tensor]:
    """The module's own buffers that are stored in a checkpoint."""
    computed = module._non_persistent_buffers_set
    return [tensor for name, tensor in module._buffers.items() if tensor is not None and name not in computed]


def _after_experts(key: str) -> str:
    """The part of a stored name from the expert's number on, such as `.3.down_proj.weight`."""
    return key[key.rindex("experts") + len("experts") :] if "experts" in key else ""


def _key(layer: LayerConfig) -> tuple[int, str]:
    return layer.index, layer.module


def _get(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(parent), leaf)
    return tensor


@contextmanager
def without_bars() -> Iterator[None]:
    """A context in which transformers, and the packages that it loads with, show no progress bars."""
    from tqdm import tqdm
    from transformers.utils import logging

    def hidden(bar: Any, *args: Any, **options: Any) -> None:
        shown_init(bar, *args, **options | {"disable": True})

    shown, shown_init = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    tqdm.__init__ = hidden
    try:
        yield
    finally:
        tqdm.__init__ = shown_init
        if shown:
            logging.enable_progress_bar()
