"""The inner door: codes and scales of a matrix under one objective, by the reference or by the kernels.

    objective   naive     the scale of the block's largest magnitude; nothing is searched
                sse       the representable scale of least ‖r‖²,      r = x − s·Q(x/s)
                hessian   the representable scale of least r H rᵀ
                joint     scale and codes of least r H rᵀ together, by coordinate descent

An objective belongs to one block. A *method* (methods.py) belongs to a whole weight and is built on this module, for
example as a loop over block columns. Such a loop factorizes its Hessians once:

    factors = factorize(hessians, "auto")                       # [num_blocks, block_size, block_size]
    for j in range(len(factors)):
        found = quantize_matrix(W[:, j * b : (j + 1) * b], fmt, b, "hessian", factors=factors[j], global_scale=scale)

On a GPU each such call launches one kernel, plus a copy where the columns are a view, and does not wait for the device.

Arguments are not checked: quantize() does that. Wrong shapes, devices or dtypes, NaN and Inf give undefined results.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from quantkit import bounds, calibration, kernels, parallel
from quantkit.calibration import HessianFactors
from quantkit.formats import BlockFormat
from quantkit.reference import amax, hessian, joint, naive, sse
from quantkit.reference.common import ScaleChoice, effective_scale
from quantkit.tensor import pack_codes

__all__ = [
    "BACKENDS",
    "OBJECTIVES",
    "BackendUnavailableError",
    "Factors",
    "Found",
    "Objective",
    "choose_backend",
    "factorize",
    "quantize_matrix",
    "without_kernel",
]

BACKENDS = ("auto", "reference", "triton")
# Weights that the reference holds in float64 at a time: on a CPU, a few arrays of them fit a core's cache.
REFERENCE_CHUNK_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 24}


# ---- objectives ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """A criterion for the scale of one block.

    choose_scales: the reference. Arguments: float32 blocks ``[rows, num_blocks, block_size]``, format, global scale,
        rounding rule of the naive scale, factors of the block Hessians (None without them).
    needs_factors: the objective is defined by block Hessians.
    is_optimal: no representable scale is better, as verify judges it (docs/theory.md).
    nearest_codes: every code is round-to-nearest at the chosen scale.
    has_kernel: kernels/launch.py has a kernel for it. Without one, backend "auto" takes the reference on a GPU too.
    """

    name: str
    choose_scales: Callable[[Tensor, BlockFormat, Tensor, str, HessianFactors | None], ScaleChoice]
    needs_factors: bool = False
    is_optimal: bool = False
    has_kernel: bool = True
    nearest_codes: bool = True

    @property
    def searches(self) -> bool:
        """Whether several scales of a block are evaluated."""
        return self.is_optimal or self.needs_factors


def _naive(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    return naive.choose_scales(blocks, fmt, global_scale, rule)


def _sse(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    return sse.choose_scales(blocks, fmt, global_scale)


def _hessian(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    assert factors is not None
    return hessian.choose_scales(blocks, fmt, global_scale, factors)


def _joint(
    blocks: Tensor, fmt: BlockFormat, global_scale: Tensor, rule: str, factors: HessianFactors | None
) -> ScaleChoice:
    assert factors is not None
    return joint.choose_scales(blocks, fmt, global_scale, factors)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            Objective("naive", _naive),
            Objective("sse", _sse, is_optimal=True),
            Objective("hessian", _hessian, needs_factors=True, is_optimal=True),
            Objective("joint", _joint, needs_factors=True, nearest_codes=False),
        )
    }
)


# ---- backends --------------------------------------------------------------------------------------------------------


class BackendUnavailableError(ValueError):
    """The requested backend cannot run: wrong device, no Triton installed, or no kernel for the task."""


def without_kernel(objective: Objective | None, block_size: int | None, fmt: BlockFormat | None) -> str | None:
    """Names the first given argument that the kernels do not support; None if they support all that are given."""
    if objective is not None and not objective.has_kernel:
        return f"objective {objective.name!r}"
    if block_size is not None and block_size not in kernels.BLOCK_SIZES:
        return f"block size {block_size}"
    if fmt is None or objective is None or not objective.searches:
        return None
    if not bounds.has_windows(fmt.element):
        return f"elements {fmt.element.name} in the search of objective {objective.name!r}"
    least, most = kernels.SEARCHED_SCALES
    if not fmt.scale.is_power_of_two and not least <= fmt.scale.min_value <= fmt.scale.max_value <= most:
        reach = f"{fmt.scale.min_value:.3g} to {fmt.scale.max_value:.3g}"
        return f"scales {fmt.scale.name}, from {reach}, in the search of objective {objective.name!r}"
    return None


def choose_backend(backend: str, device_type: str, lacking: str | None) -> str:
    """ "reference" or "triton" for ``backend``, one of BACKENDS, on a device of this type.

    lacking: result of :func:`without_kernel`. Raises ValueError for an unknown backend, and BackendUnavailableError
    where triton was requested and cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; known backends: {', '.join(BACKENDS)}")
    if backend == "auto":
        return "triton" if device_type == "cuda" and kernels.available() and lacking is None else "reference"
    if backend == "triton":
        if lacking is not None:
            raise BackendUnavailableError(
                f"backend 'triton' has no kernel for {lacking}: use backend='reference', or 'auto'"
            )
        if not kernels.available():
            raise BackendUnavailableError(
                "backend 'triton' needs the package triton: pip install triton, or use backend='reference'"
            )
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            raise BackendUnavailableError(
                "backend 'triton' needs a GPU tensor, the weight is on the CPU: move it to a GPU, "
                "use backend='reference', or set TRITON_INTERPRET=1 before Python starts to interpret the kernels"
            )
    return backend


# ---- factors ---------------------------------------------------------------------------------------------------------


class Factors:
    """Factors of block Hessians, one per block column, in the layout of one backend.

    ``factors[j]`` and ``factors[j:k]`` are the factors of these block columns: views, not copies. ``len(factors)`` is
    the number of block columns.
    """

    __slots__ = ("backend", "objective", "tensors")

    def __init__(self, backend: str, tensors: tuple[Tensor, ...], objective: str = "hessian") -> None:
        self.backend, self.tensors, self.objective = backend, tensors, objective

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def __getitem__(self, which: int | slice) -> Factors:
        if isinstance(which, int):
            number = self.tensors[0].shape[0]
            if not -number <= which < number:
                raise IndexError(f"no block column {which}: there are {number}")
            which = slice(which, which + 1 or None)
        return Factors(self.backend, tuple([tensor[which] for tensor in self.tensors]), self.objective)


def factorize(hessians: Tensor, backend: str = "auto", name: str = "hessian", objective: str = "hessian") -> Factors:
    """Factors of ``hessians [num_blocks, block_size, block_size]``, float32 or float64, on their device.

    objective: the one that they are for; the kernels of "hessian" and "joint" read different forms.

    name: what errors call the Hessians. Raises ValueError for NaN, Inf or a matrix that is clearly indefinite. Waits
    for the device once, to learn whether there is one.
    """
    lacking = without_kernel(None, hessians.shape[-1], None)
    if choose_backend(backend, hessians.device.type, lacking) == "reference" or not hessians.numel():
        with parallel.one_torch_thread():
            factors = calibration.factorize(hessians, name)
        return Factors("reference", (factors.factor, factors.inverse_diagonal))
    if objective == "joint":
        return Factors(
            "triton", (kernels.joint_launcher().pack_metrics(calibration.factorize(hessians, name)),), objective
        )
    flags = torch.zeros(2, dtype=torch.int32, device=hessians.device)
    packed = kernels.launcher().factorize(hessians, flags)
    if int(flags[1]):
        calibration.factorize(hessians, name)  # raises ValueError that says why
    return Factors("triton", (packed,))


# ---- the search ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The result of :func:`quantize_matrix` for a matrix ``[rows, K]``.

    codes: uint8 ``[rows, K/2]``, two codes a byte, the even column in the low nibble.
    scales: uint8 ``[rows, K/block_size]``.
    global_scale: float32 scalar, the decode multiplier.
    candidates: uint8 ``[rows, K/block_size]``, how many scales were evaluated; None unless they were counted.
    objective: tr(D H Dᵀ) of a method that records it, see quantkit/layer.
    flags: int32 ``[2]`` from the kernels, None from the reference. Element 0 is 1 if the matrix holds NaN or Inf,
        element 1 if the Hessians do or one is clearly indefinite. Undefined without ``check_finite``.
    """

    codes: Tensor
    scales: Tensor
    global_scale: Tensor
    candidates: Tensor | None
    flags: Tensor | None
    objective: tuple[float, ...] | None = None


def quantize_matrix(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    objective: str,
    *,
    factors: Factors | None = None,
    hessians: Tensor | None = None,
    global_scale: Tensor | None = None,
    rule: str | None = None,
    backend: str = "auto",
    count_candidates: bool = False,
    check_finite: bool = False,
    name: str = "hessian",
) -> Found:
    """Codes and scales of float16, bfloat16 or float32 ``matrix [rows, K]``, which may be a view of columns.

    objective: a name in OBJECTIVES.
    factors or hessians ``[K/block_size, block_size, block_size]``: one of them for "hessian". Factors decide the
        backend. The kernels factorize hessians in the same stream, without synchronizing.
    global_scale: float32 scalar on the matrix's device; None computes it from the matrix's amax for a two-level format,
        and is 1 for a single-level one.
    rule: rounding of the naive scale, one of the format's ``scale_rules``; None is the first.
    backend: one of BACKENDS.
    check_finite: let the kernels set ``flags``.
    name: the Hessians' name in the reference's errors.
    """
    rule = rule or fmt.scale_rules[0]
    if factors is not None:
        chosen = factors.backend
    else:
        chosen = choose_backend(backend, matrix.device.type, without_kernel(OBJECTIVES.get(objective), block_size, fmt))
    if chosen == "triton" and factors is not None and factors.objective != objective:
        raise ValueError(
            f"these factors are for objective {factors.objective!r}, and the kernels read another form of them: call "
            f"factorize(hessians, objective={objective!r})"
        )
    if chosen == "triton" and matrix.numel() and objective == "joint":
        if factors is None:
            assert hessians is not None
            factors = factorize(hessians, "triton", name, objective)
        return _joint_by_kernel(matrix, fmt, block_size, factors, global_scale, count_candidates, check_finite)
    if chosen == "triton" and matrix.numel():
        packed = None if factors is None else factors.tensors[0]
        return Found(
            *kernels.launcher().quantize(
                matrix, fmt, block_size, objective, global_scale, rule, packed, hessians, count_candidates, check_finite
            )
        )
    if factors is None and hessians is not None:
        factors = factorize(hessians, "reference", name)
    if global_scale is None:
        global_scale = amax.global_scale_of(matrix, fmt)
    own = None if factors is None else HessianFactors(*factors.tensors)
    codes, scales, candidates = _by_reference(matrix, fmt, block_size, objective, global_scale, rule, own)
    return Found(codes, scales, global_scale, candidates if count_candidates else None, None)


def _joint_by_kernel(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    factors: Factors,
    global_scale: Tensor | None,
    count_candidates: bool,
    check_finite: bool,
) -> Found:
    if global_scale is None:
        global_scale = amax.global_scale_of(matrix, fmt)
    codes, scales, candidates = kernels.joint_launcher().quantize_blocks(
        matrix, fmt, block_size, global_scale, factors.tensors[0], joint.ROUNDS, count_candidates
    )
    flags = None
    if check_finite:
        flags = torch.zeros(2, dtype=torch.int32, device=matrix.device)
        # Their range is NaN or infinite if one of them is; isfinite() of the matrix would copy it.
        flags[0] = torch.stack(torch.aminmax(matrix)).isfinite().all().logical_not()
    return Found(codes, scales, global_scale, candidates, flags)


def _by_reference(
    matrix: Tensor,
    fmt: BlockFormat,
    block_size: int,
    objective: str,
    global_scale: Tensor,
    rule: str,
    factors: HessianFactors | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(packed codes, scale bytes, candidates) of a float ``[rows, K]`` matrix, a few blocks at a time."""
    rows, columns = matrix.shape
    num_blocks = columns // block_size
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(rows, num_blocks, dtype=torch.uint8, device=matrix.device)
    candidates = torch.empty_like(scales)
    packed_codes = codes.unflatten(-1, (num_blocks, block_size // 2))
    matrix = matrix.unflatten(-1, (num_blocks, block_size))
    choose_scales = OBJECTIVES[objective].choose_scales

    def quantize_chunk(part: slice, which: slice) -> None:
        blocks = matrix[part, which].float()
        own = factors
        if factors is not None:
            own = HessianFactors(factors.factor[which], factors.inverse_diagonal[which])
        choice = choose_scales(blocks, fmt, global_scale, rule, own)
        # A block with NaN may give a code outside the grid.
        chosen = choice.codes.clamp(fmt.scale.min_code, fmt.scale.max_code)
        scaled = choice.levels
        if scaled is None:
            scaled = blocks / effective_scale(chosen, fmt, global_scale).unsqueeze(-1)
        packed_codes[part, which] = pack_codes(fmt.element.encode_signed(scaled))
        scales[part, which] = chosen.to(torch.uint8)
        candidates[part, which] = choice.candidates.to(torch.uint8)

    parallel.for_each(quantize_chunk, list(_chunks(rows, num_blocks, block_size, matrix.device)), matrix.device)
    return codes, scales, candidates


def _chunks(rows: int, num_blocks: int, block_size: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """(rows, block columns) of each chunk. Chunks are tall, so that each has few Hessians with many blocks each."""
    blocks = max(1, REFERENCE_CHUNK_ELEMENTS.get(device.type, REFERENCE_CHUNK_ELEMENTS["cpu"]) // block_size)
    height = math.ceil(rows / math.ceil(rows / blocks)) if rows else 1
    width = blocks // height
    for row in range(0, rows, height):
        for column in range(0, num_blocks, width):
            yield slice(row, row + height), slice(column, column + width)
