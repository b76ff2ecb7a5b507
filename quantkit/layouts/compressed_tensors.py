"""The layout of compressed-tensors: ``nvfp4-pack-quantized`` and ``mxfp4-pack-quantized``, weights only (W4A16).

    P.weight_packed        uint8 [N, K/2], even column in the low nibble, sign in bit 3
    P.weight_scale         float8_e4m3fn [N, K/16]            (MXFP4: uint8 [N, K/32], 2^(byte - 127))
    P.weight_global_scale  float32 [1], the divisor           (MXFP4: absent)

    w = value(code) · (value(scale) / divisor)

The bracket is rounded to float32, as quantkit's product ``value(scale) · global_scale`` is. The two are the same
numbers for all 126 scales only if the divisor inverts the global scale exactly, which one float32 in five allows.
:func:`exact_global_scale` gives the next such one; a weight that is quantized with it is decoded to the same bits. Any
other global scale is stored if both decode to the same bfloat16 and float16 numbers for every code and scale, because
loaders round to these; else it is refused.

Source: compressed-tensors 0.20.0. It tells the formats apart by the block size, so there are no other block sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.formats import E2M1, E4M3, MXFP4, NVFP4, BlockFormat
from quantkit.layouts.common import Layout, assembled, expert_matrices, part
from quantkit.tensor import QuantizedTensor

__all__ = ["COMPRESSED_TENSORS", "divisor", "exact_global_scale"]

PACKED, SCALE, GLOBAL = ".weight_packed", ".weight_scale", ".weight_global_scale"
CHUNK = 256  # global scales tried at once
CHUNKS = 32  # at most 3,328 neighbours in a row have no exact divisor
LOADED = (torch.bfloat16, torch.float16)
REMEDY = "quantize with global_scale=layouts.exact_global_scale(global_scale)"


def exact_global_scale(global_scale: Tensor) -> Tensor:
    """The smallest float32 number ≥ ``global_scale``, float32 scalar, that a divisor inverts exactly.

    It is larger by 4e-4 of its value at most, mostly by less than 1e-6. Raises ValueError near the ends of float32.
    """
    first = global_scale.detach().reshape(()).cpu()
    for start in range(0, CHUNK * CHUNKS, CHUNK):
        steps = torch.arange(start, start + CHUNK, dtype=torch.int32, device="cpu")
        scales = (first.view(torch.int32) + steps).view(torch.float32)
        exact = _exact(scales, _divisors(scales)).any(-1)
        if bool(exact.any()):
            return scales[int(exact.int().argmax())].to(global_scale.device)
    raise ValueError(f"no divisor inverts a global scale near {float(first)!r}; scale the weight to the normal range")


def divisor(global_scale: Tensor) -> Tensor:
    """Float32 ``[1]``: what compressed-tensors divides scales by.

    Raises ValueError where decoded weights would not be those of ``global_scale``.
    """
    scale = global_scale.detach().reshape(1).cpu()
    candidates = _divisors(scale)[0]
    exact = _exact(scale, candidates[None])[0]
    if not bool(exact.any()):
        exact = _same_when_loaded(scale, candidates)
    if not bool(exact.any()):
        raise ValueError(f"no divisor stands for the global scale {float(scale)!r} in bfloat16 and float16; {REMEDY}")
    return candidates[int(exact.int().argmax())].reshape(1).to(global_scale.device)


def _divisors(scales: Tensor) -> Tensor:
    """float32 ``[n, 3]``: the reciprocals of ``scales [n]`` and their neighbours, the nearest first."""
    nearest = (1 / scales.double()).float()
    steps = torch.tensor([0, -1, 1], dtype=torch.int32, device=scales.device)
    return (nearest.view(torch.int32)[:, None] + steps).view(torch.float32)


def _codes() -> Tensor:
    return torch.arange(1, E4M3.max_code + 1, dtype=torch.int32, device="cpu")


def _exact(scales: Tensor, divisors: Tensor) -> Tensor:
    """bool ``[n, d]``: each block scale divided by ``divisors [n, d]`` is its product with ``scales [n]``."""
    blocks = E4M3.decode(_codes())
    quotients, products = blocks / divisors[..., None], blocks * scales[:, None, None]
    return ((quotients == products) & products.isfinite() & (products > 0)).all(-1)


def _same_when_loaded(scale: Tensor, divisors: Tensor) -> Tensor:
    """bool ``[d]``: every code at every block scale is the same number in the dtypes that loaders decode to."""
    blocks = E4M3.decode(_codes())
    elements = torch.tensor(E2M1.magnitudes, dtype=torch.float32, device="cpu")[:, None]
    stored, meant = elements * (blocks / divisors[:, None, None]), elements * (blocks * scale)
    same = [(stored.to(dtype) == meant.to(dtype)).flatten(1).all(-1) for dtype in LOADED]
    return same[0] & same[1] & divisors.isfinite()


def _pack(name: str, quantized: QuantizedTensor) -> dict[str, Tensor]:
    tensors = {}
    divisors: dict[float, Tensor] = {}  # experts may share one
    for matrix, q in expert_matrices(name, quantized):
        tensors[matrix + PACKED] = q.codes.contiguous()
        scales = q.scales.contiguous()
        if not q.format.two_level:
            tensors[matrix + SCALE] = scales
            continue
        tensors[matrix + SCALE] = scales.view(torch.float8_e4m3fn)
        key = float(q.global_scale)
        if key not in divisors:
            divisors[key] = divisor(q.global_scale)
        tensors[matrix + GLOBAL] = divisors[key].clone()
    return tensors


def _unpack(name: str, tensors: Mapping[str, Tensor]) -> QuantizedTensor:
    codes = part(name, PACKED, tensors, (torch.uint8,))
    scales = part(name, SCALE, tensors, (torch.float8_e4m3fn, torch.uint8))
    if scales.dtype == torch.uint8:
        one = torch.ones((), dtype=torch.float32, device=codes.device)
        return assembled(name, codes, scales, one, MXFP4, 32)
    stored = part(name, GLOBAL, tensors, (torch.float32,))
    return assembled(name, codes, scales.view(torch.uint8), (1 / stored.double()).float().reshape(()), NVFP4, 16)


def _entries(fmt: BlockFormat, left_out: Sequence[str]) -> dict[str, dict[str, Any]]:
    two_level = fmt.two_level
    weights = {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "strategy": "tensor_group" if two_level else "group",
        "group_size": 16 if two_level else 32,
        "dynamic": False,
        "scale_dtype": "torch.float8_e4m3fn" if two_level else "torch.uint8",
    }
    kind = f"{fmt.name}-pack-quantized"
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": kind,
    }
    entry = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(left_out),
        "kv_cache_scheme": None,
    }
    return {"config.json": {"quantization_config": entry}}


COMPRESSED_TENSORS = Layout(
    name="compressed_tensors",
    holds=(("nvfp4", 16), ("mxfp4", 32)),
    instead="No engine reads another block size; choose one of these, or keep quantkit's own folder (export=null).",
    quant_method="compressed-tensors",
    parts=(PACKED, SCALE, GLOBAL),
    shared_scales=True,
    pack=_pack,
    unpack=_unpack,
    entries=_entries,
)
