"""An independent implementation of docs/theory.md in numpy: exhaustive, in float64, without the library's arithmetic.

Only two steps are float32, as the formats require: the effective scale ``scale · global_scale`` and the division
``x / S``.
"""

from __future__ import annotations

import numpy as np

from quantkit.formats import FORMATS, BlockFormat, ElementGrid, ScaleGrid

# Written by hand from the specifications; test_formats.py compares values_of with them.
MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
E4M3_VALUES = np.array(
    [n * 2.0**-9 for n in range(8)] + [(1 + n % 8 / 8) * 2.0 ** (n // 8 - 7) for n in range(8, 127)], dtype=np.float64
)
UE8M0_VALUES = np.array([2.0 ** (n - 127) for n in range(255)], dtype=np.float64)


def values_of(grid: ElementGrid | ScaleGrid) -> np.ndarray:
    """Float64 values of the codes 0 … max_code, from the grid's description alone."""
    code = np.arange(grid.max_code + 1)
    exponent, fraction = np.divmod(code, 2**grid.mantissa_bits)
    if getattr(grid, "subnormals", True):
        leading = exponent > 0
        exponent = np.maximum(exponent, 1)
    else:
        leading = np.ones_like(code)
    return np.ldexp(leading + fraction / 2**grid.mantissa_bits, exponent - grid.bias)


def described(format: str | BlockFormat) -> BlockFormat:
    return FORMATS[format] if isinstance(format, str) else format


def scale_codes(format: str | BlockFormat) -> np.ndarray:
    """All codes that a scale may have, ascending."""
    grid = described(format).scale
    return np.arange(grid.min_code, grid.max_code + 1)


def nearest_code(y: np.ndarray, magnitudes: np.ndarray = MAGNITUDES) -> np.ndarray:
    """Magnitude codes of y ≥ 0: nearest, ties to the even code, saturated."""
    distance = np.abs(np.minimum(y, magnitudes[-1])[..., None] - magnitudes)
    best = distance.min(-1, keepdims=True)
    tied = distance == best
    even = tied & (np.arange(len(magnitudes)) % 2 == 0)
    return np.where(even.any(-1), even.argmax(-1), tied.argmax(-1))


def effective_scales(format: str | BlockFormat, global_scale: float) -> np.ndarray:
    """Float32 effective scale of every code, in the order of scale_codes."""
    return values_of(described(format).scale)[scale_codes(format)].astype(np.float32) * np.float32(global_scale)


def residuals(blocks: np.ndarray, scales: np.ndarray, magnitudes: np.ndarray = MAGNITUDES) -> np.ndarray:
    """Signed float64 residuals x − S·Q(x/S) of float32 ``blocks [n, b]`` at float32 ``scales [n]``."""
    scales = np.asarray(scales, dtype=np.float32)[..., None]
    with np.errstate(over="ignore", under="ignore"):
        y = np.abs(blocks) / scales  # float32 division
    q = magnitudes[nearest_code(y.astype(np.float64), magnitudes)]
    return np.sign(blocks).astype(np.float64) * (np.abs(blocks).astype(np.float64) - scales.astype(np.float64) * q)


def error_table(
    blocks: np.ndarray, format: str | BlockFormat, global_scale: float, hessians: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(error, squared residual) of every scale, [codes, n]; ``blocks [n, b]`` float32, ``hessians [n, b, b]``."""
    tables = []
    norms = []
    magnitudes = values_of(described(format).element)
    for scale in effective_scales(format, global_scale):
        r = residuals(blocks, np.broadcast_to(scale, blocks.shape[:1]), magnitudes)
        norm = (r * r).sum(-1)
        norms.append(norm)
        tables.append(norm if hessians is None else np.einsum("ni,nij,nj->n", r, hessians, r))
    return np.stack(tables), np.stack(norms)


def contract_violations(
    codes: np.ndarray,
    blocks: np.ndarray,
    format: str | BlockFormat,
    global_scale: float,
    hessians: np.ndarray | None = None,
) -> np.ndarray:
    """Indices of the blocks whose scale in ``codes [n]`` breaks the contract of docs/theory.md."""
    error, norm = error_table(blocks, format, global_scale, hessians)
    rows = codes.astype(np.int64) - scale_codes(format)[0]
    chosen = error[rows, np.arange(len(codes))]
    slack = np.zeros_like(error)
    if hessians is not None:
        larger = np.maximum(norm, norm[rows, np.arange(len(codes))])
        slack = 1e-7 * np.linalg.eigvalsh(hessians)[:, -1] * larger
    return np.flatnonzero((chosen > error * (1 + 1e-6) + slack).any(0))
