"""QuantizedTensor: packed element codes, scale bytes and the global scale, and the way back.

    w ≈ value(code) · (value(scale byte) · global_scale)

with the product in the bracket rounded to float32, as it is when the codes are chosen. Two 4-bit codes share a byte,
the even column in the low nibble; this is the order of NVIDIA's and the OCP's packed FP4. Scale bytes are row-major,
not in the swizzled order that a tensor core reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from quantkit import kernels
from quantkit.formats import FORMATS, BlockFormat, get_format

__all__ = ["QuantizedTensor", "pack_codes", "unpack_codes"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FILE_FORMAT_VERSION = "1"


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes ``[..., K]`` of four bits → uint8 ``[..., K/2]``."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 ``[..., K/2]`` → uint8 codes ``[..., K]`` of four bits."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight ``[..., K]`` in a block-scaled format.

    codes: uint8 ``[..., K/2]``, even column in the low nibble, sign in bit 3 of each nibble.
    scales: uint8 ``[..., K/block_size]``, bytes of the format's scale grid.
    global_scale: float32 scalar, the decode multiplier; 1.0 for a single-level format.
    candidates: uint8 ``[..., K/block_size]``, how many scales the search evaluated for each block; only when asked for.
    method: how the scales were chosen, where that is known.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    format: BlockFormat
    block_size: int
    candidates: Tensor | None = None
    method: str | None = None

    def __repr__(self) -> str:
        known = "" if self.method is None else f", method={self.method}"
        return (
            f"QuantizedTensor({self.format.name}, block_size={self.block_size}{known}, shape={list(self.shape)}, "
            f"{self.bits_per_weight:g} bits a weight, {self.device})"
        )

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight."""
        return torch.Size((*self.codes.shape[:-1], 2 * self.codes.shape[-1]))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def bits_per_weight(self) -> float:
        """4 + 8/block_size; the one global scale is not counted."""
        return self.format.bits_per_weight(self.block_size)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and, for a two-level format, the global scale."""
        return self.codes.nbytes + self.scales.nbytes + (self.global_scale.nbytes if self.format.two_level else 0)

    def scale_values(self) -> Tensor:
        """Float32 ``[..., K/block_size]``: block scale times global scale, what an element's value is multiplied by."""
        return self.format.scale.decode(self.scales) * self.global_scale

    def values(self) -> Tensor:
        """Float32 ``[..., K]``: the elements before scaling, in the grid's unit."""
        return self.format.element.decode_signed(unpack_codes(self.codes))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, ``[..., K]`` in ``dtype``; computed in float32.

        On a GPU, with Triton installed and for bfloat16, float16 and float32, by one fused kernel.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dequantize needs a floating-point dtype, got {dtype}")
        has_kernel = dtype in KERNEL_DTYPES and self.block_size in kernels.BLOCK_SIZES
        if self.codes.is_cuda and has_kernel and kernels.available():
            return kernels.launcher().dequantize(
                self.codes, self.scales, self.global_scale, self.format, self.block_size, dtype
            )
        blocks = self.values().unflatten(-1, (self.scales.shape[-1], self.block_size))
        return (blocks * self.scale_values().unsqueeze(-1)).flatten(-2).to(dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on ``device``."""
        candidates = None if self.candidates is None else self.candidates.to(device)
        return replace(
            self,
            codes=self.codes.to(device),
            scales=self.scales.to(device),
            global_scale=self.global_scale.to(device),
            candidates=candidates,
        )

    def save(self, path: str | Path) -> None:
        """Writes codes, scales, global scale and the format's name to a safetensors file, without ``candidates``."""
        from safetensors.torch import save_file

        tensors = {"codes": self.codes, "scales": self.scales, "global_scale": self.global_scale}
        metadata = {"version": FILE_FORMAT_VERSION, "format": self.format.name, "block_size": str(self.block_size)}
        if self.method is not None:
            metadata["method"] = self.method
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"quantkit": json.dumps(metadata)}
        )

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", format: str | BlockFormat | None = None
    ) -> QuantizedTensor:
        """Reads what :meth:`save` wrote. format: for one of your own, which quantkit does not know by name.

        Raises FileNotFoundError, and ValueError where the file is damaged, not of that kind, or of another format.
        """
        from safetensors import SafetensorError, safe_open

        torch.device(device)  # an error there is not the file's
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                header = (file.metadata() or {}).get("quantkit")
                if header is None:
                    raise ValueError(
                        f"{path} is not a quantkit file: its metadata has no 'quantkit' entry; write it with save()"
                    )
                metadata = json.loads(header)
                if metadata["version"] != FILE_FORMAT_VERSION:
                    raise ValueError(
                        f"{path} has file version {metadata['version']}, this release reads {FILE_FORMAT_VERSION}"
                    )
                tensors = {name: file.get_tensor(name) for name in ("codes", "scales", "global_scale")}
            name, block_size = str(metadata["format"]), int(metadata["block_size"])
            codes, scales = tensors["codes"], tensors["scales"]
            expected = (*scales.shape[:-1], scales.shape[-1] * block_size // 2)
            if codes.shape != expected or not codes.dtype == scales.dtype == torch.uint8:
                raise KeyError(f"codes {list(codes.shape)} for scales {list(scales.shape)} of {block_size} weights")
        except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged, or not a quantkit file ({error}); write it again with save()"
            ) from error
        format = FORMATS.get(name) if format is None else get_format(format)
        if format is None:
            raise ValueError(
                f"{path} holds format {name!r}, which quantkit does not know; "
                "pass its BlockFormat: load(path, format=...)"
            )
        if format.name != name:
            raise ValueError(f"{path} holds format {name!r}, not {format.name!r}")
        return cls(
            **tensors,
            format=format,
            block_size=block_size,
            method=metadata.get("method"),
        )
