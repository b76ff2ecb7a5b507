"""Weights that hold every code at every scale."""

from __future__ import annotations

import torch

from quantkit.formats import BlockFormat
from quantkit.tensor import QuantizedTensor


def byte(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8, device="cpu")


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def every_code(fmt: BlockFormat, block_size: int, global_scale: float = 1.0, columns: int = 64) -> QuantizedTensor:
    """``[scales, columns]``: each row holds all 16 codes again and again, at one of the format's scales."""
    pairs = [2 * (i % 8) | (2 * (i % 8) + 1) << 4 for i in range(columns // 2)]
    scales = torch.arange(fmt.scale.min_code, fmt.scale.max_code + 1, dtype=torch.int32, device="cpu").to(torch.uint8)
    return QuantizedTensor(
        byte(*pairs).expand(len(scales), -1).contiguous(),
        scales[:, None].expand(-1, columns // block_size).contiguous(),
        scalar(global_scale),
        fmt,
        block_size,
    )


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def same(found: QuantizedTensor, wanted: QuantizedTensor) -> bool:
    """Every byte, and format and block size."""
    return (
        torch.equal(found.codes, wanted.codes)
        and torch.equal(found.scales, wanted.scales)
        and torch.equal(found.global_scale, wanted.global_scale)
        and (found.format, found.block_size) == (wanted.format, wanted.block_size)
    )
