"""Layout, the description of one way to store quantized weights, and what the layouts share.

``name`` is a weight's name without its last part: ``model.layers.0.self_attn.q_proj`` for ``….q_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import MXFP4, NVFP4, BlockFormat
from quantkit.tensor import QuantizedTensor

__all__ = ["Layout", "check_fused", "expert_matrices", "fused_groups"]

# Layers that engines join to one; such layers have one global scale.
FUSED = (("q_proj", "k_proj", "v_proj"), ("q_a_proj", "kv_a_proj_with_mqa"), ("gate_proj", "up_proj"), ("w1", "w3"))
KNOWN = {"nvfp4": NVFP4, "mxfp4": MXFP4}


@dataclass(frozen=True)
class Layout:
    """One way to store quantized weights.

    name: as in ``export=name``.
    holds: (format, block size) that it can express.
    instead: the end of a refusal, which names the alternative.
    quant_method: what ``quantization_config`` in config.json calls it; "" where there is no such entry.
    parts: ends of the names of a weight's tensors. Only a quantized weight has the first.
    shared_scales: engines need one global scale for the layers of FUSED.
    """

    name: str
    holds: tuple[tuple[str, int], ...]
    instead: str
    quant_method: str
    parts: tuple[str, ...]
    shared_scales: bool
    pack: Callable[[str, QuantizedTensor], dict[str, Tensor]]
    unpack: Callable[[str, Mapping[str, Tensor]], QuantizedTensor]
    entries: Callable[[BlockFormat, Sequence[str]], dict[str, dict[str, Any]]]

    def check(self, fmt: BlockFormat, block_size: int) -> None:
        """Raises ValueError for a format or a block size that the layout cannot express, and names the alternative."""
        if any(size == block_size and KNOWN[name] == fmt for name, size in self.holds):
            return
        held = " and ".join(f"{name} with block size {size}" for name, size in self.holds)
        raise ValueError(
            f"{self.name} cannot hold {fmt.name} with block size {block_size}; it holds {held}. {self.instead}"
        )

    def to_tensors(self, name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
        """The weight's tensors by their names. ``quantized``: ``[N, K]``, or the experts of one layer ``[E, N, K]``.

        Raises ValueError for what the layout cannot express.
        """
        self.check(quantized.format, quantized.block_size)
        if len(quantized.shape) not in (2, 3):
            raise ValueError(
                f"{name} is {list(quantized.shape)}; a layer's weight is [N, K], its experts' are [E, N, K]"
            )
        return self.pack(name, quantized)

    def from_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
        """The weight of which ``tensors`` holds the parts, and perhaps others. Raises ValueError for damaged ones."""
        return self.unpack(name, tensors)

    def names(self, stored: Iterable[str]) -> list[str]:
        """Names of the quantized weights among the names of a checkpoint's tensors, in their order."""
        marker = self.parts[0]
        return [name.removesuffix(marker) for name in stored if name.endswith(marker)]

    def config(self, fmt: BlockFormat, block_size: int, left_out: Sequence[str]) -> dict[str, dict[str, Any]]:
        """File name → entries of that JSON file, which engines read.

        left_out: every linear layer that is not quantized, by its name in the checkpoint.
        """
        self.check(fmt, block_size)
        return self.entries(fmt, left_out)


def part(name: str, end: str, tensors: Mapping[str, Tensor], dtypes: Sequence[torch.dtype]) -> Tensor:
    """One tensor of a weight. Raises ValueError where it is missing or of another dtype."""
    if name + end not in tensors:
        raise ValueError(f"{name} has no {end.lstrip('._')}: {name + end} is missing; give a complete checkpoint")
    tensor = tensors[name + end]
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name + end} is {str(tensor.dtype).removeprefix('torch.')}, not {wanted}: not FP4 codes of this layout"
        )
    return tensor


def assembled(
    name: str, codes: Tensor, scales: Tensor, global_scale: Tensor, fmt: BlockFormat, block_size: int
) -> QuantizedTensor:
    """A QuantizedTensor of stored bytes. Raises ValueError for shapes that do not fit and for scales off the grid."""
    if codes.shape != (*scales.shape[:-1], scales.shape[-1] * block_size // 2):
        raise ValueError(
            f"{name}: codes {list(codes.shape)} do not fit scales {list(scales.shape)} of blocks of {block_size}"
        )
    if scales.numel() and int(scales.max()) > fmt.scale.max_code:
        count = int((scales > fmt.scale.max_code).sum())
        raise ValueError(f"{name}: {count} of its {scales.numel()} scales are NaN or negative; export the weight again")
    if not bool(global_scale.isfinite().all()) or not bool((global_scale > 0).all()):
        raise ValueError(f"{name}: its global scale is {global_scale.flatten().tolist()}, not positive and finite")
    # Of a stored weight nobody knows whether each code is the nearest.
    return QuantizedTensor(codes, scales, global_scale, fmt, block_size, nearest_codes=False)


def rows(quantized: QuantizedTensor, first: int, last: int) -> QuantizedTensor:
    """Rows ``first … last - 1`` of a matrix ``[N, K]``; views of its codes and scales."""
    return replace(
        quantized,
        codes=quantized.codes[first:last],
        scales=quantized.scales[first:last],
        candidates=None,
        objective=None,
    )


def expert_matrices(name: str, quantized: QuantizedTensor) -> Iterator[tuple[str, QuantizedTensor]]:
    """(name, matrix ``[N, K]``) as checkpoints store them: a matrix as it is, experts ``[E, N, K]`` apart.

    ``….experts.gate_up_proj`` becomes ``….experts.0.gate_proj``, the first half of the rows, and
    ``….experts.0.up_proj``.
    """
    if len(quantized.shape) == 2:
        yield name, quantized
        return
    parent, _, projection = name.rpartition(".")
    for expert in range(quantized.shape[0]):
        one = quantized[expert]
        if projection != "gate_up_proj":
            yield f"{parent}.{expert}.{projection}", one
            continue
        half = one.shape[0] // 2
        yield f"{parent}.{expert}.gate_proj", rows(one, 0, half)
        yield f"{parent}.{expert}.up_proj", rows(one, half, 2 * half)


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The groups of at least two of ``names`` that engines join to one layer."""
    known = list(names)
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in known:
        parent, _, projection = name.rpartition(".")
        for group in FUSED:
            if projection in group:
                groups.setdefault((parent, group), []).append(name)
    return [members for members in groups.values() if len(members) > 1]


def check_fused(quantized: Mapping[str, QuantizedTensor]) -> None:
    """Raises ValueError where layers that engines join have unequal global scales, which engines would ignore."""
    for members in fused_groups(quantized):
        scales = [quantized[name].global_scale for name in members]
        if any(not torch.equal(scale, scales[0]) for scale in scales):
            listed = ", ".join(
                f"{name} {scale.flatten().tolist()}" for name, scale in zip(members, scales, strict=True)
            )
            raise ValueError(
                f"engines join these layers, which needs one global scale: {listed}; quantize them with the same "
                "global_scale, or export gguf, which keeps one for each"
            )
