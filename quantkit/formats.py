"""Block-scaled formats as data: element grids, scale grids, and named pairs of them.

A grid is a tiny floating-point format given by its exponent bits, mantissa bits, bias and largest code. The value of
code ``c`` with mantissa width ``m`` and smallest exponent ``e0 = 1 - bias`` is

    c · 2^(e0 - m)                                 for c < 2^m            (subnormal)
    (1 + (c mod 2^m) / 2^m) · 2^((c >> m) - bias)  otherwise              (normal)

Codes of one sign are ordered like their values, so a window of scales is a range of codes. Rounding, encoding, the
naive scale and the search windows are derived from this description; a new format is a new entry at the foot of this
file.

An integer grid has no exponent bits, so all its codes are subnormal.

Sources: OCP Microscaling Formats (MX) v1.0 for E2M1 and UE8M0, OCP 8-bit Floating Point v1.0 for E4M3, NVIDIA's NVFP4
for their pairing with a float32 global scale. UE5M3 scales without a global scale: Hu et al., "Elucidating the Design
Space of FP4 Training", arXiv 2509.17791. UE4M4 scales: Killian, "Scaled Outer Product", arXiv 2605.14929. No standard
fixes these two; they follow E4M3 here: bias 2^(exponent bits - 1) - 1, subnormals, no infinity, the top code is NaN.
NVINT4 and MXINT4: Chen et al., "INT v.s. FP", arXiv 2510.25602; integers from -7 to 7, the symmetric range that they
recommend. INT4 with UE5M3 or UE4M4 scales is no format of a standard or a paper: it completes the comparison of grids.
Differences from hardware: a scale never rounds to zero (the smallest positive scale is taken instead), INT4 is stored
as sign and magnitude, and block size 32 with E4M3 scales has no tensor-core support.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from types import MappingProxyType

import torch
from torch import Tensor

__all__ = [
    "E2M1",
    "E4M3",
    "FORMATS",
    "FP4_UE4M4",
    "FP4_UE5M3",
    "INT4",
    "INT4_UE4M4",
    "INT4_UE5M3",
    "MXFP4",
    "MXINT4",
    "NVFP4",
    "NVINT4",
    "UE4M4",
    "UE5M3",
    "UE8M0",
    "BlockFormat",
    "ElementGrid",
    "ScaleGrid",
    "get_format",
]

FLOAT32_MANTISSA = 23
FLOAT32_BIAS = 127
FLOAT32_EXPONENT_MASK = 0x7F800000
FLOAT32_SMALLEST_NORMAL = 2.0**-126
LARGEST_BYTE = 255  # a scale's code and a block's number of candidates are stored in one byte each
ELEMENT_BITS = 4  # a code with its sign; two share a byte
# With a bias in this range, levels stay float32 numbers at every scale of a kernel.
ELEMENT_BIASES = range(-2, 16)
FRACTIONAL_SCALES = (FLOAT32_SMALLEST_NORMAL, 2.0**126)  # twice the largest scale is a float32 number, too


@dataclass(frozen=True)
class _Grid:
    """A small floating-point format; see the module's formula. ``max_code`` is the largest of the positive codes."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_code: int

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    def value(self, code: int) -> float:
        """Value of one code."""
        steps = 1 << self.mantissa_bits
        if code < steps:
            return code * 2.0 ** (self.min_exponent - self.mantissa_bits)
        return (1 + (code % steps) / steps) * 2.0 ** (code // steps - self.bias)

    @cached_property
    def max_value(self) -> float:
        return self.value(self.max_code)

    def decode(self, codes: Tensor) -> Tensor:
        """Float32 values of integer ``codes``, any shape. A code outside the grid is the caller's mistake.

        Computed and not looked up: a table would have to be kept for each device, and made outside of any mode of
        PyTorch that the caller is in.
        """
        codes = codes.int()
        bits = (codes + ((FLOAT32_BIAS - self.bias) << self.mantissa_bits)) << (FLOAT32_MANTISSA - self.mantissa_bits)
        subnormal = codes.float() * 2.0 ** (self.min_exponent - self.mantissa_bits)
        return torch.where(codes >= 1 << self.mantissa_bits, bits.view(torch.float32), subnormal)

    def round(self, values: Tensor) -> Tensor:
        """Nearest grid value of float32 ``values``, ties to even code, saturated at ``max_value``; the sign is kept."""
        values = values.clamp(-self.max_value, self.max_value)
        binade = (values.view(torch.int32) & FLOAT32_EXPONENT_MASK).clamp_(min=self._smallest_binade)
        quantum = binade.view(torch.float32).mul_(2.0**-self.mantissa_bits)
        return values.div_(quantum).round_().mul_(quantum)

    def encode(self, values: Tensor) -> Tensor:
        """int32 codes of float32 grid values; a value between two codes gets the smaller one (truncation)."""
        shift = FLOAT32_MANTISSA - self.mantissa_bits
        normal = (values.view(torch.int32) >> shift) - ((FLOAT32_BIAS - self.bias) << self.mantissa_bits)
        subnormal = (values * 2.0 ** (self.mantissa_bits - self.min_exponent)).int()
        return torch.where(values >= 2.0**self.min_exponent, normal, subnormal)

    @property
    def _smallest_binade(self) -> int:
        """Float32 bits of the smallest normal value; below it the spacing is constant."""
        return (self.min_exponent + FLOAT32_BIAS) << FLOAT32_MANTISSA

    def __getstate__(self) -> dict[str, object]:
        """The description alone, without what was derived from it and kept."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class ElementGrid(_Grid):
    """The grid of the quantized elements; a sign bit stands above the magnitude's bits."""

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest value, ⌊log₂ max_value⌋."""
        return math.frexp(self.max_value)[1] - 1

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        return tuple(self.value(code) for code in range(self.max_code + 1))

    def round_signed(self, scaled: Tensor) -> Tensor:
        """Nearest element values, with their sign, of float32 ``scaled`` weights; see :meth:`round`."""
        return self.round(scaled.abs()).copysign(scaled)

    def encode_signed(self, scaled: Tensor) -> Tensor:
        """uint8 codes of float32 ``scaled`` weights, any shape: magnitude code and the weight's own sign bit."""
        magnitude = self.encode(self.round(scaled.abs()))
        sign = torch.signbit(scaled).int() << (self.bits - 1)
        return (magnitude | sign).to(torch.uint8)

    def decode_signed(self, codes: Tensor) -> Tensor:
        """Float32 values of uint8 ``codes`` with sign, any shape."""
        magnitude = self.decode(codes & (2 ** (self.bits - 1) - 1))
        return torch.where(codes >= 2 ** (self.bits - 1), -magnitude, magnitude)


@dataclass(frozen=True)
class ScaleGrid(_Grid):
    """The grid of the block scales: codes ``min_code … max_code``. ``subnormals=False`` makes code 0 a power of two."""

    min_code: int = 1
    subnormals: bool = True

    def value(self, code: int) -> float:
        if self.subnormals or self.mantissa_bits:
            return super().value(code)
        return 2.0 ** (code - self.bias)

    def decode(self, codes: Tensor) -> Tensor:
        if self.subnormals or self.mantissa_bits:
            return super().decode(codes)
        exponent = codes.int() + (FLOAT32_BIAS - self.bias)
        subnormal = (1 << (FLOAT32_MANTISSA - 1)) >> (-exponent).clamp(min=0)  # 2^-127 and below
        return torch.where(exponent > 0, exponent << FLOAT32_MANTISSA, subnormal).view(torch.float32)

    @property
    def min_exponent(self) -> int:
        return 1 - self.bias if self.subnormals else self.min_code - self.bias

    @property
    def is_power_of_two(self) -> bool:
        return self.mantissa_bits == 0

    @property
    def naive_rules(self) -> tuple[str, ...]:
        """The roundings of a naive scale that reference/naive.py knows on this grid."""
        return ("floor", "ceil", "even", "rceil") if self.is_power_of_two else ("nearest",)

    @cached_property
    def min_value(self) -> float:
        return self.value(self.min_code)

    @property
    def last_code_without_half(self) -> int:
        """The largest code whose half may not be representable; every scale above it can be halved within the grid."""
        return (2 << self.mantissa_bits) - 1 if self.subnormals else self.min_code

    def floor_code(self, values: Tensor) -> Tensor:
        """int32 largest code whose value is ≤ float32 ``values`` ≥ 0; ``min_code - 1`` where there is none."""
        if self.subnormals:
            codes = self.encode(values.clamp(max=self.max_value))
        else:
            # Also right for 2^-127, UE8M0's only float32 subnormal: its exponent field and its code are both 0.
            codes = values.view(torch.int32) >> FLOAT32_MANTISSA
            codes = torch.where(values < self.min_value, self.min_code - 1, codes)
        return codes.clamp(self.min_code - 1, self.max_code)

    def ceil_code(self, values: Tensor) -> Tensor:
        """int32 smallest code whose value is ≥ float32 ``values`` ≥ 0; ``max_code`` where there is none."""
        floor = self.floor_code(values)
        exact = (floor >= self.min_code) & (self.decode(floor.clamp(min=0)) == values)
        return torch.where(exact, floor, floor + 1).clamp(max=self.max_code)


def _wrong_codes(grid: _Grid) -> str | None:
    """Describes what is wrong with the grid's codes; None if they are valid."""
    if min(grid.exponent_bits, grid.mantissa_bits) < 0:
        return f"{grid.name} has a negative number of bits"
    most = 2 ** (grid.exponent_bits + grid.mantissa_bits) - 1
    if not 1 <= grid.max_code <= most:
        return (
            f"{grid.name} has max_code {grid.max_code}; with {grid.exponent_bits} exponent and {grid.mantissa_bits} "
            f"mantissa bits it is from 1 to {most}"
        )
    return None


def _wrong_element(grid: ElementGrid) -> str | None:
    """Describes why no method can work with these elements; None if they are valid."""
    if grid.bits != ELEMENT_BITS:
        return f"{grid.name} has {grid.bits} bits; codes are packed by four"
    if grid.mantissa_bits == 0:
        return f"{grid.name} has no mantissa bit, so ties cannot go to the even code; give it one"
    if grid.bias not in ELEMENT_BIASES:
        return (
            f"{grid.name} has bias {grid.bias}; give it one from {ELEMENT_BIASES[0]} to {ELEMENT_BIASES[-1]}, "
            "the scales absorb the difference"
        )
    return _wrong_codes(grid)


def _wrong_scale(grid: ScaleGrid) -> str | None:
    """Describes why no method can work with these scales; None if they are valid."""
    if grid.max_code > LARGEST_BYTE:
        return f"{grid.name} has max_code {grid.max_code}; a scale is stored in a byte, so it is {LARGEST_BYTE} at most"
    if (wrong := _wrong_codes(grid)) is not None:
        return wrong
    if not grid.subnormals and not grid.is_power_of_two:
        return f"{grid.name} has subnormals=False, which is for scales without mantissa bits; leave it out"
    smallest = 1 if grid.subnormals else 0
    if not smallest <= grid.min_code <= grid.max_code:
        zero = ", since code 0 is the value 0" if grid.min_code == 0 else ""
        return f"{grid.name} has min_code {grid.min_code}; it is from {smallest} to max_code {grid.max_code}{zero}"
    if grid.is_power_of_two:
        if grid.bias != FLOAT32_BIAS:
            return (
                f"{grid.name} has bias {grid.bias}; powers of two are read off float32's exponent, so their bias is "
                f"{FLOAT32_BIAS}"
            )
        if grid.max_code == LARGEST_BYTE:
            return f"{grid.name} has max_code {grid.max_code}, which is 2^128, beyond float32; it is 254 at most"
        return None
    least, most = FRACTIONAL_SCALES
    if grid.value(1) < least or grid.max_value > most or grid.bias < 1:
        return (
            f"{grid.name} has scales from {grid.value(1):.3g} to {grid.max_value:.3g} and bias {grid.bias}; they are "
            f"computed in float32, so give it a bias of at least 1 with scales between {least:.3g} and {most:.3g}"
        )
    return None


@dataclass(frozen=True)
class BlockFormat:
    """Elements with one scale per block. A ``two_level`` format also has a float32 global scale.

    ``scale_rules`` are the roundings of the naive scale that the format offers, the default first.
    Raises ValueError for a description that no method can work with.
    """

    name: str
    element: ElementGrid
    scale: ScaleGrid
    block_sizes: tuple[int, ...]
    scale_rules: tuple[str, ...]
    two_level: bool

    def __post_init__(self) -> None:
        for size in self.block_sizes:
            if not isinstance(size, int) or size < 2 or size % 2:
                raise ValueError(f"{self.name}: block size {size!r} is not an even number of at least 2")
        if not self.block_sizes:
            raise ValueError(f"{self.name} has no block size; give some, such as (16, 32)")
        for wrong in (_wrong_element(self.element), _wrong_scale(self.scale)):
            if wrong is not None:
                raise ValueError(f"{self.name}: {wrong}")
        known = self.scale.naive_rules
        if not self.scale_rules or not set(self.scale_rules) <= set(known):
            raise ValueError(
                f"{self.name}: scale_rules {self.scale_rules!r}; scales of {self.scale.name} have one or more of "
                f"{', '.join(known)}"
            )
        if self.two_level and self.scale.is_power_of_two:
            raise ValueError(
                f"{self.name}: {self.scale.name} scales take no global scale, because powers of two reach as far as "
                "float32; use two_level=False"
            )

    def __reduce__(self) -> tuple[Callable[..., BlockFormat], tuple[object, ...]]:
        if FORMATS.get(self.name) == self:
            return get_format, (self.name,)
        return BlockFormat, tuple(getattr(self, field.name) for field in fields(self))

    def __hash__(self) -> int:  # hashing all fields would take 0.3 µs more per call
        return hash(self.name)

    @property
    def default_global_scale(self) -> str:
        return "amax" if self.two_level else "none"

    def bits_per_weight(self, block_size: int) -> float:
        """Bits per element, with its share of the block scale and without the global scale."""
        return self.element.bits + 8 / block_size


E2M1 = ElementGrid("e2m1", exponent_bits=2, mantissa_bits=1, bias=1, max_code=7)
E4M3 = ScaleGrid("e4m3", exponent_bits=4, mantissa_bits=3, bias=7, max_code=126)
INT4 = ElementGrid("int4", exponent_bits=0, mantissa_bits=3, bias=-2, max_code=7)  # the spacing is 2^(1 - bias - 3) = 1
UE5M3 = ScaleGrid("ue5m3", exponent_bits=5, mantissa_bits=3, bias=15, max_code=254)
UE4M4 = ScaleGrid("ue4m4", exponent_bits=4, mantissa_bits=4, bias=7, max_code=254)
UE8M0 = ScaleGrid("ue8m0", exponent_bits=8, mantissa_bits=0, bias=127, max_code=254, min_code=0, subnormals=False)

NVFP4 = BlockFormat("nvfp4", E2M1, E4M3, block_sizes=(16, 32), scale_rules=("nearest",), two_level=True)
MXFP4 = BlockFormat(
    "mxfp4", E2M1, UE8M0, block_sizes=(16, 32), scale_rules=("floor", "ceil", "even", "rceil"), two_level=False
)
FP4_UE5M3 = BlockFormat("fp4_ue5m3", E2M1, UE5M3, block_sizes=(16, 32), scale_rules=("nearest",), two_level=False)
FP4_UE4M4 = BlockFormat("fp4_ue4m4", E2M1, UE4M4, block_sizes=(16, 32), scale_rules=("nearest",), two_level=False)
NVINT4 = BlockFormat("nvint4", INT4, E4M3, block_sizes=(16, 32), scale_rules=("nearest",), two_level=True)
MXINT4 = BlockFormat(
    "mxint4", INT4, UE8M0, block_sizes=(16, 32), scale_rules=("floor", "ceil", "even", "rceil"), two_level=False
)
INT4_UE5M3 = BlockFormat("int4_ue5m3", INT4, UE5M3, block_sizes=(16, 32), scale_rules=("nearest",), two_level=False)
INT4_UE4M4 = BlockFormat("int4_ue4m4", INT4, UE4M4, block_sizes=(16, 32), scale_rules=("nearest",), two_level=False)

FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            NVFP4,
            MXFP4,
            FP4_UE5M3,
            FP4_UE4M4,
            NVINT4,
            MXINT4,
            INT4_UE5M3,
            INT4_UE4M4,
        )
    }
)


def get_format(name: str | BlockFormat) -> BlockFormat:
    """The format called ``name``. Raises ValueError with the known names."""
    if isinstance(name, BlockFormat):
        return name
    if not isinstance(name, str) or name not in FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}")
    return FORMATS[name]
