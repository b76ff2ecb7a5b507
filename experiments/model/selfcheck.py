"""Reads an exported folder back by other routes than the one that wrote it, and compares every weight bit for bit.

    compressed_tensors   the package's own decompression, and the model as transformers loads it
    gpt_oss              a reader of this file, and the model as transformers loads it
    modelopt             ModelOpt's own unpacker if it is installed, else a reader of this file
    gguf                 the gguf package's own dequantizer (gguf_file.py)

Beside that it looks for what engines read wrongly without an error: scales that are NaN, negative or zero, a global
scale that is inverted, unequal global scales of layers that engines join, layers missing from the list of those that
are not quantized, and missing or surplus tensors. What transformers itself is known to load wrongly is a warning.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.files import one_line
from experiments.model import gguf_file
from experiments.model.stored_names import skeleton, stored_matrices
from experiments.sources.decoder import ordinary_defaults, without_bars
from experiments.sources.quantized import QuantizedCheckpoint
from quantkit import QuantizedTensor
from quantkit.layouts import Layout, fused_groups

WHOLE_BYTES = 4 << 30  # a larger folder is not loaded whole by transformers
LISTED = 3  # names in a message
EXPERTS_DEFECT = (
    "transformers {version} loads the nvfp4 weights of experts without their global scale (huggingface/transformers "
    "issue 48371), so its outputs are wrong; the folder is right, and vLLM and SGLang read it"
)
WITHOUT_PACKAGE = "compressed-tensors is not installed, so its own decompression was not tried"
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


@dataclass(frozen=True)
class Verdict:
    """What the check of an export found.

    identity: of the model that was exported. routes: what read it. weights: number of stored matrices that were
    compared; equal: of these, those whose every bit is that of the quantized model. problems: reasons why the folder is
    wrong. warnings: what a user of it must know.
    """

    layout: str
    identity: str
    routes: list[str]
    weights: int
    equal: int
    problems: list[str]
    warnings: list[str]

    @property
    def ok(self) -> bool:
        return not self.problems and self.equal == self.weights > 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Kind:
    """A layout as this file knows it: ends of the names of codes, scales and global scale, and what the last means."""

    codes: str
    scales: str
    global_scale: str | None
    is_divisor: bool
    dtype: torch.dtype  # in which loaders hold decoded weights


KINDS = {
    "compressed_tensors": Kind(".weight_packed", ".weight_scale", ".weight_global_scale", True, torch.bfloat16),
    "modelopt": Kind(".weight", ".weight_scale", ".weight_scale_2", False, torch.float32),
    "gpt_oss": Kind("_blocks", "_scales", None, False, torch.float32),
}


class Folder:
    """The stored tensors of a folder, by their names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        index = json.loads((path / "model.safetensors.index.json").read_text(encoding="utf-8"))
        self.shard_of: dict[str, str] = index["weight_map"]
        self.names = set(self.shard_of)

    def read(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path / self.shard_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    @cached_property
    def nbytes(self) -> int:
        return sum((self.path / shard).stat().st_size for shard in set(self.shard_of.values()))


@ordinary_defaults()
def check_export(path: Path, layout: Layout, source: QuantizedCheckpoint) -> Verdict:
    """Compares the export at `path` with the quantized model. Raises no error for a folder that is wrong."""
    if layout.name == "gguf":
        routes, weights, equal, problems, warnings = gguf_file.check(source, path)
        return Verdict(layout.name, source.identity, routes, weights, equal, problems, warnings)
    return _Check(path, layout, source).run()


class _Check:
    def __init__(self, path: Path, layout: Layout, source: QuantizedCheckpoint) -> None:
        self.path, self.layout, self.source = path, layout, source
        self.kind = KINDS[layout.name]
        self.routes: list[str] = []
        self.problems: list[str] = []
        self.warnings: list[str] = []
        self.weights = self.equal = 0
        self.zero = self.subnormal = self.blocks = 0
        self.global_scales: dict[str, float] = {}

    def run(self) -> Verdict:
        try:
            self.folder = Folder(self.path)
            self.model = skeleton(self.path)
            self._weights()
            self._names()
            self._fused()
            self._ignored()
            self._as_loaded()
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.problems.append(f"the folder cannot be read: {one_line(error) or type(error).__name__}")
        problems = list(dict.fromkeys(self.problems))
        return Verdict(
            self.layout.name, self.source.identity, self.routes, self.weights, self.equal, problems, self.warnings
        )

    # --- each weight --------------------------------------------------------------------------------------------------

    def _weights(self) -> None:
        decode = self._decoder()
        self.stored: set[str] = set()
        for name, wanted in self._wanted():
            self.weights += 1
            parts = {end: name + end for end in self._ends(wanted)}
            self.stored |= set(parts.values())
            missing = [part for part in parts.values() if part not in self.folder.names]
            if missing:
                self.problems.append(f"{missing[0]} is missing")
                continue
            tensors = {end: self._read(part) for end, part in parts.items()}
            if any(tensor is None for tensor in tensors.values()):
                continue
            found = {end: tensor for end, tensor in tensors.items() if tensor is not None}
            if self._scales(name, found, wanted) and self._global_scale(name, found, wanted):
                self._compare(name, decode(found), wanted)
        if self.subnormal:
            self.warnings.append(
                f"{self.subnormal} of {self.blocks} block scales are subnormal; each engine's kernel must keep them"
            )

    def _wanted(self) -> Iterator[tuple[str, QuantizedTensor]]:
        for name in self.source.names:
            quantized = self.source.quantized(name)
            if self.layout.name == "gpt_oss":
                yield name, quantized
            else:
                yield from stored_matrices(self.model, name, quantized)

    def _ends(self, wanted: QuantizedTensor) -> list[str]:
        own = self.kind.global_scale if wanted.format.two_level else None
        return [self.kind.codes, self.kind.scales, *([] if own is None else [own])]

    def _read(self, name: str) -> Tensor | None:
        from safetensors import SafetensorError

        try:
            return self.folder.read(name)
        except (SafetensorError, OSError, KeyError) as error:
            self.problems.append(f"{self.folder.shard_of[name]}: {name} cannot be read: {one_line(error)}")
            return None

    def _scales(self, name: str, tensors: Mapping[str, Tensor], wanted: QuantizedTensor) -> bool:
        """Whether the block scales are numbers that a decoder can use."""
        stored = tensors[self.kind.scales]
        data = stored.view(torch.uint8)
        if wanted.format.two_level:
            nan, negative, zero = (data & 0x7F) == 0x7F, data >= 0x80, data == 0
            subnormal = (data > 0) & (data < 8)
        else:
            nan, negative, zero = data == 0xFF, data < 0, data < 0
            subnormal = data == 0
        codes = tensors[self.kind.codes]
        if codes.numel() * 2 != data.numel() * wanted.block_size:
            self.problems.append(f"{name}: {codes.numel()} bytes of codes do not fit {data.numel()} scales")
            return False
        used = ((codes.reshape(data.numel(), -1) & 0x77) != 0).any(-1).reshape(data.shape)  # a code that is not zero
        for what, where in (
            ("NaN", nan),
            ("negative", negative & ~nan),
            ("zero, with codes that are not,", zero & used),
        ):
            if count := int(where.sum()):
                self.problems.append(f"{name}: {count} of {data.numel()} scales are {what.rstrip(',')}")
        self.blocks += data.numel()
        self.subnormal += int((subnormal & used).sum())
        return not bool((nan | negative).any())

    def _global_scale(self, name: str, tensors: Mapping[str, Tensor], wanted: QuantizedTensor) -> bool:
        """Whether the stored global scale is the quantized model's, in the layout's sense."""
        if self.kind.global_scale is None or self.kind.global_scale not in tensors:
            return True
        end, value = self.kind.global_scale, float(tensors[self.kind.global_scale])
        self.global_scales[name] = value
        meant = float(wanted.global_scale)
        right, inverse = (1 / meant, meant) if self.kind.is_divisor else (meant, 1 / meant)
        if abs(value - right) <= 2.0**-22 * right:
            return True
        if abs(value - inverse) <= 2.0**-22 * inverse:
            said = ("multiplier", "divisor") if self.kind.is_divisor else ("divisor", "multiplier")
            self.problems.append(
                f"{name}{end} is inverted: it holds the {said[0]} {value:g}, and loaders read a {said[1]}"
            )
        else:
            self.problems.append(f"{name}{end} is {value:g} instead of {right:g}")
        return False

    def _compare(self, name: str, found: Tensor, wanted: QuantizedTensor) -> None:
        meant = wanted.dequantize(self.kind.dtype)
        if torch.equal(found.reshape(meant.shape), meant):
            self.equal += 1
            return
        count = int((found.reshape(meant.shape) != meant).sum())
        self.problems.append(f"{name}: {count} of {meant.numel()} decoded weights differ from the quantized model's")

    def _decoder(self) -> Callable[[dict[str, Tensor]], Tensor]:
        """The layout's own package if it is installed, else a reader of this file."""
        makers = {"compressed_tensors": self._by_compressed_tensors, "modelopt": self._by_modelopt}
        if self.layout.name in makers:
            try:
                return makers[self.layout.name]()
            except ImportError:
                self.warnings += [] if self.layout.name == "modelopt" else [WITHOUT_PACKAGE]
        self.routes.append("an own reader of the documented layout")
        return self._plain

    def _by_compressed_tensors(self) -> Callable[[dict[str, Tensor]], Tensor]:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationConfig

        config = QuantizationConfig.model_validate(self.folder.config["quantization_config"])
        compressor = BaseCompressor.get_value_from_registry(config.format)
        scheme = config.config_groups["group_0"]
        self.routes.append(f"compressed-tensors {version('compressed-tensors')}")

        def decompress(tensors: dict[str, Tensor]) -> Tensor:
            local = {end.removeprefix("."): tensor for end, tensor in tensors.items()}
            weight: Tensor = compressor.decompress(local, scheme)["weight"]
            return weight

        return decompress

    def _by_modelopt(self) -> Callable[[dict[str, Tensor]], Tensor]:
        from modelopt import __version__
        from modelopt.torch.quantization.qtensor import NVFP4QTensor

        self.routes.append(f"ModelOpt {__version__}")

        def dequantize(tensors: dict[str, Tensor]) -> Tensor:
            codes, scales = tensors[self.kind.codes], tensors[self.kind.scales]
            shape = torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))
            stored = NVFP4QTensor(shape, self.kind.dtype, codes)
            double_scale = tensors[str(self.kind.global_scale)]
            weight: Tensor = stored.dequantize(
                dtype=self.kind.dtype, scale=scales, double_scale=double_scale, block_sizes={-1: 16}
            )
            return weight

        return dequantize

    def _plain(self, tensors: dict[str, Tensor]) -> Tensor:
        """Decoded weights, in the loaders' dtype, from a table of values and NumPy alone."""
        codes = tensors[self.kind.codes].numpy()
        scales = tensors[self.kind.scales]
        if scales.dtype == torch.uint8:
            factors = np.ldexp(np.float32(1), scales.numpy().astype(np.int32) - 127)
        else:
            factors = scales.float().numpy()
            stored = np.float32(float(tensors[str(self.kind.global_scale)]))
            factors = factors / stored if self.kind.is_divisor else factors * stored
        codes = codes.reshape(*factors.shape, -1)
        pairs = np.stack((VALUES[codes & 15], VALUES[codes >> 4]), axis=-1)
        values = pairs.reshape(*factors.shape, -1) * factors[..., None].astype(np.float32)
        return torch.from_numpy(values).to(self.kind.dtype)

    # --- the folder ---------------------------------------------------------------------------------------------------

    def _names(self) -> None:
        """Missing, surplus and changed tensors beside the quantized ones."""
        kept = set(self.source.kept)
        surplus = self.folder.names - self.stored - kept
        if surplus:
            self.problems.append(f"{_listed(surplus)} belong to no weight of the model")
        for name in sorted(kept):
            if name not in self.folder.names:
                self.problems.append(f"{name} is missing")
                continue
            found, meant = self._read(name), self.source.tensor(name)
            if found is not None and not (found.dtype == meant.dtype and torch.equal(found, meant)):
                self.problems.append(f"{name}, which is not quantized, has changed")

    def _fused(self) -> None:
        for members in fused_groups(self.global_scales):
            values = [self.global_scales[name] for name in members]
            if len(set(values)) > 1:
                listed = ", ".join(f"{name} {value:g}" for name, value in zip(members, values, strict=True))
                self.problems.append(f"engines join these layers and read one global scale, but they have: {listed}")

    def _ignored(self) -> None:
        """Layers that an engine would take for quantized ones."""
        ignored = self._patterns()
        quantized = set(self.source.names)
        missing = [
            name
            for name, module in self.model.named_modules()
            if name not in quantized
            and (isinstance(module, nn.Linear) or _is_stored_matrix(module))
            and not any(_matches(name, pattern) for pattern in ignored)
        ]
        if missing:
            self.problems.append(f"{_listed(missing)} are not quantized and not in the list of layers to ignore")

    def _patterns(self) -> list[str]:
        entry = self.folder.config["quantization_config"]
        patterns = list(entry.get("ignore", entry.get("modules_to_not_convert", [])))
        other = self.path / "hf_quant_config.json"
        if self.layout.name == "modelopt":
            excluded = json.loads(other.read_text(encoding="utf-8"))["quantization"]["exclude_modules"]
            if sorted(excluded) != sorted(patterns):
                self.problems.append("config.json and hf_quant_config.json list other layers to ignore")
            return [pattern for pattern in patterns if pattern in excluded]
        return patterns

    # --- the model as transformers loads it ---------------------------------------------------------------------------

    def _as_loaded(self) -> None:
        if self.layout.name == "modelopt":
            return  # transformers does not read it
        if self.folder.nbytes > WHOLE_BYTES:
            self.warnings.append(
                "the folder is too large to be loaded by transformers here; its weights were read one by one"
            )
            return
        try:
            model = load_in_transformers(self.path, self.layout.name)
        except ImportError as error:
            self.warnings.append(f"transformers did not load the folder: {one_line(error)}")
            return
        except Exception as error:  # a damaged folder may raise any error
            self.problems.append(f"transformers does not load the folder: {one_line(error)}")
            return
        self.routes.append(f"transformers {version('transformers')}")
        wrong: list[str] = []
        without_scale: list[str] = []
        for name in self.source.names:
            quantized = self.source.quantized(name)
            found = loaded_weight(model, name, len(quantized.shape) == 2).to(torch.bfloat16)
            if not self._is(found, name, quantized):
                unscaled = replace(quantized, global_scale=torch.ones_like(quantized.global_scale))
                (without_scale if self._is(found, name, unscaled) else wrong).append(name)
        if without_scale:
            self.warnings.append(EXPERTS_DEFECT.format(version=version("transformers")))
        if wrong:
            self.problems.append(f"transformers {version('transformers')} loads other weights of {_listed(wrong)}")

    def _is(self, found: Tensor, name: str, quantized: QuantizedTensor) -> bool:
        """Whether a loaded weight is the dequantized one, or its transpose where the model stores that."""
        meant = quantized.dequantize(torch.bfloat16)
        meant = meant.mT if self.source.is_transposed(name) else meant
        return found.shape == meant.shape and torch.equal(found, meant)


@ordinary_defaults()
@without_bars()
def load_in_transformers(folder: Path, layout: str) -> Any:
    """The model of an exported folder, bfloat16, on the CPU."""
    from transformers import AutoModelForCausalLM, Mxfp4Config

    extra = {"quantization_config": Mxfp4Config(dequantize=True)} if layout == "gpt_oss" else {}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map="cpu", local_files_only=True, trust_remote_code=False, **extra
    )
    return model.eval()


@ordinary_defaults()
@torch.no_grad()
def loaded_weight(model: Any, name: str, matrix: bool) -> Tensor:
    """A weight of a model that transformers loaded: of fused experts, or of a linear layer (matrix), decompressed by
    compressed-tensors if it must be."""
    if not matrix:
        parameter: Tensor = model.get_parameter(name)
        return parameter
    module = model.get_submodule(name)
    if getattr(module, "weight_packed", None) is None:
        weight: Tensor = module.weight
        return weight
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.utils import get_direct_state_dict

    compressor = BaseCompressor.get_value_from_registry(module.quantization_scheme.format.value)
    result: Tensor = compressor.decompress(get_direct_state_dict(module), module.quantization_scheme)["weight"]
    return result


def _is_stored_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return name == pattern or fnmatchcase(name, pattern)


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
