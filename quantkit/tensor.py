"""QuantizedTensor: packed element codes, scale bytes and the global scale, and their dequantization.

    w ≈ value(code) · (value(scale byte) · global_scale)

The product in the bracket is rounded to float32, here and when the codes are chosen. Two 4-bit codes share a byte,
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
from quantkit.formats import FORMATS, BlockFormat, ElementGrid, ScaleGrid, get_format

__all__ = ["QuantizedTensor", "pack_codes", "unpack_codes"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FILE_FORMAT_VERSION = "1"


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes ``[..., K]`` of four bits → uint8 ``[..., K/2]``."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """uint8 ``[..., K/2]`` → uint8 codes ``[..., K]`` of four bits."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 ``values`` in ``dtype``; what exceeds its range or float32's is its largest finite number. In place."""
    largest = min(torch.finfo(dtype).max, torch.finfo(values.dtype).max)
    return values.clamp_(-largest, largest).to(dtype)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedTensor:
    """A weight ``[..., K]`` in a block-scaled format.

    codes: uint8 ``[..., K/2]``, even column in the low nibble, sign in bit 3 of each nibble.
    scales: uint8 ``[..., K/block_size]``, bytes of the format's scale grid.
    global_scale: float32 scalar, the decode multiplier; 1.0 for a single-level format. ``[E, 1, 1]`` where each expert
        of a weight ``[E, N, K]`` has its own.
    candidates: uint8 ``[..., K/block_size]``, number of scales evaluated for each block; None unless requested.
    method: name of the method that made it; None where it is unknown.
    nearest_codes: every code is round-to-nearest at the scale of its block. False for a method that moves codes away
        from nearest, to make up for errors elsewhere.
    objective: tr(D H Dᵀ) with the damped Hessian, after GPTQ and after each sweep of descent; not saved.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    format: BlockFormat
    block_size: int
    candidates: Tensor | None = None
    method: str | None = None
    nearest_codes: bool = True
    objective: tuple[float, ...] | None = None

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
        """Float32 ``[..., K/block_size]``: block scale times global scale, the factor of each element's value."""
        return self.format.scale.decode(self.scales) * self.global_scale

    def values(self) -> Tensor:
        """Float32 ``[..., K]``: the elements before scaling, as values of the element grid."""
        return self.format.element.decode_signed(unpack_codes(self.codes))

    def __getitem__(self, index: int) -> QuantizedTensor:
        """One matrix of a weight ``[E, N, K]``, such as that of an expert: views of its codes and scales."""
        candidates = None if self.candidates is None else self.candidates[index]
        scale = self.global_scale
        return replace(
            self,
            codes=self.codes[index],
            scales=self.scales[index],
            global_scale=scale[index].reshape(()) if scale.ndim else scale,
            candidates=candidates,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded weight, ``[..., K]`` in ``dtype``; computed in float32.

        An element beyond the range of ``dtype``, or of float32, is the largest finite number, with its sign. One fused
        kernel does it on a GPU, if Triton is installed and ``dtype`` is bfloat16, float16 or float32.
        """
        if not dtype.is_floating_point:
            raise ValueError(f"dequantize needs a floating-point dtype, got {dtype}")
        has_kernel = dtype in KERNEL_DTYPES and self.block_size in kernels.BLOCK_SIZES
        if self.codes.is_cuda and has_kernel and kernels.available():
            if self.global_scale.ndim:
                return torch.stack([self[expert].dequantize(dtype) for expert in range(len(self.codes))])
            return kernels.launcher().dequantize(
                self.codes, self.scales, self.global_scale, self.format, self.block_size, dtype
            )
        blocks = self.values().unflatten(-1, (self.scales.shape[-1], self.block_size))
        return saturated((blocks * self.scale_values().unsqueeze(-1)).flatten(-2), dtype)

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
        """Writes all fields but ``candidates`` to a safetensors file. Format and method are stored by name.

        Raises FileNotFoundError where the folder does not exist.
        """
        from safetensors.torch import save_file

        folder = Path(path).parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder to save {Path(path).name} in; make it first")

        tensors = {"codes": self.codes, "scales": self.scales, "global_scale": self.global_scale}
        metadata: dict[str, str | bool] = {
            "version": FILE_FORMAT_VERSION,
            "format": self.format.name,
            "block_size": str(self.block_size),
            "nearest_codes": self.nearest_codes,
        }
        if self.method is not None:
            metadata["method"] = self.method
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"quantkit": json.dumps(metadata)}
        )

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", format: str | BlockFormat | None = None
    ) -> QuantizedTensor:
        """Reads a file of :meth:`save`. format: the file's BlockFormat, if it is not one of FORMATS.

        Raises FileNotFoundError, and ValueError where the file is damaged, not a quantkit file, or of another format.
        """
        from safetensors import SafetensorError, safe_open

        torch.device(device)  # a wrong device raises here, not as an error of the file
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
            scale = tensors["global_scale"]
            if scale.dtype != torch.float32 or scale.shape not in ((), (codes.shape[0], 1, 1)):
                raise KeyError(f"global scale {scale.dtype} {list(scale.shape)} for codes {list(codes.shape)}")
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
            nearest_codes=metadata.get("nearest_codes", True),  # files written before this key existed have such codes
        )


# What a pickle of a QuantizedTensor names, for torch.load(..., weights_only=True).
torch.serialization.add_safe_globals([QuantizedTensor, BlockFormat, ElementGrid, ScaleGrid, get_format])
