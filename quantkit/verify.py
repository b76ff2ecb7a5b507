"""verify(): is every scale of a quantized weight optimal? An exhaustive check in float64.

It evaluates every representable scale of each block, without a window or a theorem, and compares the error with that of
the stored scale:

    excess = max over all scales s of (E(stored) − slack − E(s)) / E(s), or 0,   contract: excess ≤ 1e-6

slack is 0 for squared error. With a Hessian it is 1e-7·λ_max(H)·‖r‖², float32's resolution of r H rᵀ. There r is the
larger residual of the two scales, because rounding of H affects both errors. The objective uses the given H, not the
factors of the searches. The stored codes must be round-to-nearest at the stored scale.

A scale is skipped only where its error follows from another scale's:

- From s = 4·amax on (for E2M1) every element rounds to zero, and the error is constant.
- While s times the largest level is below the smallest nonzero magnitude, every nonzero element is clipped, and the
  squared error falls as s grows.

The values of a grid are computed here from its description (exponent bits, mantissa bits, bias, largest code). Nothing
of formats.py's arithmetic is used, so a mistake there shows. A weight is taken to be ``value · scale · global_scale``
without a limit of range: an element that dequantize() saturates in its dtype is judged by its unsaturated value. A
scale byte outside the grid is a violation of infinite excess.

The contract is defined for nearest codes. A method that moves codes away from nearest (``nearest_codes`` is False) has
another target, which the tensor does not hold. Then verify judges no block, and the result says so. With Hessians and
``gap``, it compares a sample of such blocks with the least error over all scales and codes (closest_vector.py).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import parallel
from quantkit.calibration import check_finite, check_float
from quantkit.closest_vector import least_error, lower_factor
from quantkit.formats import BlockFormat, ElementGrid, ScaleGrid
from quantkit.tensor import QuantizedTensor

__all__ = ["CONTRACT", "HESSIAN_SLACK", "Verification", "verify"]

CONTRACT = 1e-6
MAX_GAP = 1e-3
GAP_BUDGET = 1 << 20  # partial assignments of a block; a block that needs more is left out
HESSIAN_SLACK = 1e-7
CHUNK_ELEMENTS = 1 << 18
LISTED = 10
BINADE = 0x7F800000  # float32's exponent bits


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    blocks: number of blocks judged.
    violations: number of blocks that break the contract.
    worst_excess: largest relative excess of any block.
    where: (row, block) of the first violations, with rows counted over all leading dimensions.
    wrong_codes: number of elements whose code is not round-to-nearest at the stored scale.
    judged: False if the tensor's codes are not meant to be nearest; all counts are then zero.
    gap: of the sampled blocks of such a tensor, Σ E(stored) / Σ E(best) − 1, best over all scales and codes.
    ok: the blocks were judged, no scale and no code is wrong, and the gap is at most MAX_GAP.
    """

    blocks: int
    violations: int
    worst_excess: float
    where: tuple[tuple[int, int], ...]
    wrong_codes: int
    judged: bool = True
    gap: float | None = None

    @property
    def ok(self) -> bool:
        close = self.gap is None or self.gap <= MAX_GAP
        return self.judged and close and self.violations == 0 and self.wrong_codes == 0


def verify(q: QuantizedTensor, weight: Tensor, hessian: Tensor | None = None, gap: int = 0) -> Verification:
    """Judges the scales and codes of ``q`` for ``weight [..., K]``; with ``hessian [K/b, b, b]`` by r H rᵀ, else by
    squared error. ``hessian [E, K/b, b, b]``: one for each expert of a weight ``[E, N, K]``.

    gap: for codes that are not nearest, such as those of method "joint": how many blocks to compare with the least
    error of all scales and codes, drawn with a fixed seed. Needs ``hessian``. The comparison is exact. Blocks whose
    optimum takes too long to find are left out of ``blocks``. It judges each block by itself, so that methods that make
    up for other blocks' errors ("gptq", "descent") do not pass.

    Works on the weight's device in chunks of rows, so that memory does not grow with the weight. Raises ValueError
    where shapes do not fit or the weight holds NaN or Inf. Warns where the method of ``q`` is "hessian" and no Hessians
    are given, since its scales do not minimise squared error. Warns where its codes are not nearest, since no block is
    judged then.
    """
    if not isinstance(q, QuantizedTensor) or not isinstance(weight, Tensor):
        raise TypeError(
            f"verify takes a QuantizedTensor and its weight, got {type(q).__name__} and {type(weight).__name__}"
        )
    if q.shape != weight.shape:
        raise ValueError(f"the quantized tensor has shape {list(q.shape)}, the weight {list(weight.shape)}")
    check_float(weight, "weight")
    block_size, num_blocks = q.block_size, q.scales.shape[-1]
    if q.method == "hessian" and hessian is None:
        warnings.warn(
            "these scales were chosen by Hessians and are judged by squared error; to judge them by the same Hessians "
            f"pass hessian=, such as block_hessians(gram_matrix(activations), {block_size}) of quantkit.calibration",
            stacklevel=2,
        )
    if hessian is not None:
        experts = tuple(weight.shape[:1]) if weight.ndim == 3 and hessian.ndim == 4 else ()
        if hessian.shape != (expected := (*experts, num_blocks, block_size, block_size)):
            raise ValueError(f"hessian has shape {list(hessian.shape)}, this tensor needs {list(expected)}")
    check_finite(weight, "weight")
    if not q.nearest_codes and gap and hessian is not None:
        return _judge_gap(q, weight, hessian, gap)
    if not q.nearest_codes:
        made_by = "" if q.method is None else f" of method {q.method!r}"
        warnings.warn(
            f"the codes{made_by} are not nearest at their scales, so no block is judged; "
            "pass hessian= and gap=32 to judge a sample, or compare errors with "
            "compute_metrics(weight, q.dequantize(), activations)",
            stacklevel=2,
        )
        return Verification(0, 0, 0.0, (), 0, judged=False)
    q = q.to(weight.device)
    if q.global_scale.ndim == 0 and (hessian is None or hessian.ndim == 3):
        return _verify_rows(q, weight, hessian)
    hessians = [hessian] * len(weight) if hessian is None or hessian.ndim == 3 else list(hessian)
    each = zip(weight, hessians, strict=True)
    return _joined([_verify_rows(q[expert], w, h) for expert, (w, h) in enumerate(each)], rows=weight.shape[1])


def _joined(found: list[Verification], rows: int) -> Verification:
    """Of all experts, each with so many rows."""
    where = [(expert * rows + row, block) for expert, one in enumerate(found) for row, block in one.where]
    return Verification(
        sum(one.blocks for one in found),
        sum(one.violations for one in found),
        max((one.worst_excess for one in found), default=0.0),
        tuple(where[:LISTED]),
        sum(one.wrong_codes for one in found),
    )


def _verify_rows(q: QuantizedTensor, weight: Tensor, hessian: Tensor | None) -> Verification:
    """Judges all rows of ``weight [..., K]`` under one global scale and ``hessian [K/b, b, b]``."""
    block_size, num_blocks = q.block_size, q.scales.shape[-1]
    rows = weight.numel() // max(1, weight.shape[-1])
    matrix = weight.detach().reshape(rows, weight.shape[-1])
    scales, packed = q.scales.reshape(rows, num_blocks), q.codes.reshape(rows, q.codes.shape[-1])
    judge = _Judge(q.format, q.global_scale, hessian, weight.device)

    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[-1]))
    starts = range(0, rows if num_blocks else 0, step)
    # First row of a chunk → (number of wrong codes, (row, block) of violations, worst excess).
    found: dict[int, tuple[int, Tensor, float]] = {}

    def judge_rows(start: int) -> None:
        part = slice(start, start + step)
        # [num_blocks, rows, block_size]: one matrix product per block column and its H
        blocks = matrix[part].float().unflatten(-1, (num_blocks, block_size)).transpose(0, 1).contiguous()
        codes = scales[part].T.long()
        wrong = int((judge.stored_levels(packed[part]) != judge.levels(blocks, codes).transpose(0, 1).flatten(1)).sum())
        excess = judge.excess(blocks, codes).T
        found[start] = wrong, (excess > CONTRACT).nonzero(), float(excess.max())

    parallel.for_each(judge_rows, [(start,) for start in starts], weight.device)
    wrong_codes = sum(found[start][0] for start in starts)
    violations = sum(len(found[start][1]) for start in starts)
    worst = max((found[start][2] for start in starts), default=0.0)
    where: list[tuple[int, int]] = []
    for start in starts:
        where += [(start + int(row), int(block)) for row, block in found[start][1][: LISTED - len(where)]]
    return Verification(rows * num_blocks, violations, worst, tuple(where), wrong_codes)


def _judge_gap(q: QuantizedTensor, weight: Tensor, hessian: Tensor, sample: int) -> Verification:
    """The gap of a sample of blocks, on the CPU in float64."""
    if weight.ndim == 3 and (hessian.ndim == 4 or q.global_scale.ndim):
        raise ValueError("gap judges one weight: pass one expert's tensor, weight and Hessians")
    q, num_blocks = q.to("cpu"), q.scales.shape[-1]
    judge = _Judge(q.format, q.global_scale, hessian.cpu(), torch.device("cpu"))
    assert judge.hessian is not None
    exact = weight.detach().cpu().float().double().reshape(-1, num_blocks, q.block_size)
    values = judge.stored_levels(q.codes.reshape(-1, q.codes.shape[-1])).double().view_as(exact)
    stored = values * judge.scale(q.scales.long()).double().reshape(-1, num_blocks, 1)
    levels = judge.elements.double()
    levels = levels[levels.isfinite()].unique()
    steps = judge.scale(judge.codes).double().unsqueeze(1).expand(-1, q.block_size)
    generator = torch.Generator("cpu").manual_seed(0)
    number = exact.shape[0] * num_blocks
    chosen = torch.randperm(number, generator=generator, dtype=torch.int64, device="cpu")[:sample]
    found = least = worst = 0.0
    judged = 0
    for place in chosen.tolist():
        row, block = divmod(place, num_blocks)
        factor = lower_factor(judge.hessian[block])
        error = float(((exact[row, block] - stored[row, block]) @ factor).square().sum())
        best = least_error(exact[row, block], factor, steps, levels, error, GAP_BUDGET)
        if best is None:
            continue
        judged += 1
        found, least = found + error, least + best
        worst = max(worst, (error - best) / best if best else 0.0)
    share = (found - least) / least if least else 0.0
    return Verification(judged, 0, worst, (), 0, judged=judged > 0, gap=share)


def _value(grid: ElementGrid | ScaleGrid, code: int) -> float:
    """Value of a positive code: its exponent and mantissa fields under the grid's bias."""
    exponent, mantissa = divmod(code, 2**grid.mantissa_bits)
    if grid.mantissa_bits == 0 and isinstance(grid, ScaleGrid) and not grid.subnormals:
        return 2.0 ** (exponent - grid.bias)
    leading = 1 if exponent else 0
    return (leading + mantissa / 2**grid.mantissa_bits) * 2.0 ** (max(exponent, 1) - grid.bias)


def _table(values: list[float], length: int, device: torch.device) -> Tensor:
    """Float32 ``[length]``: the values, which float32 holds exactly, and NaN for bytes that are no code."""
    return torch.tensor(values + [math.nan] * (length - len(values)), dtype=torch.float32, device=device)


class _Judge:
    """The objective over the whole scale grid, for chunks ``[num_blocks, rows, block_size]``."""

    def __init__(self, fmt: BlockFormat, global_scale: Tensor, hessian: Tensor | None, device: torch.device) -> None:
        scale, element = fmt.scale, fmt.element
        self.fmt = fmt
        self.codes = torch.arange(scale.min_code, scale.max_code + 1, dtype=torch.int64, device=device)
        self.scales = _table([_value(scale, code) for code in range(scale.max_code + 1)], 256, device)
        magnitudes = [_value(element, code) for code in range(element.max_code + 1)]
        half = 2 ** (element.bits - 1)
        self.elements = torch.cat(
            [_table(magnitudes, half, device), _table([-magnitude for magnitude in magnitudes], half, device)]
        )
        self.lowest, self.largest = magnitudes[1], magnitudes[-1]
        self.global_scale = global_scale.detach()
        self.hessian = None if hessian is None else hessian.detach().to(device, torch.float64)
        if self.hessian is not None:
            check_finite(self.hessian, "hessian")
            self.resolution = HESSIAN_SLACK * torch.linalg.eigvalsh(self.hessian)[:, -1:]

    def scale(self, codes: Tensor) -> Tensor:
        """Float32 effective scale of int64 codes; NaN for a byte that is no code."""
        return self.scales[codes] * self.global_scale

    def stored_levels(self, packed: Tensor) -> Tensor:
        """Float32 signed element values ``[rows, K]`` of packed codes ``[rows, K/2]``."""
        packed = packed.long()
        return self.elements[torch.stack((packed % 16, packed // 16), dim=-1).flatten(-2)]

    def levels(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """Float32 signed element values of round-to-nearest at int64 ``codes [num_blocks, rows]``; ties to even.

        Beside ``1.5 · 2^(23 − m)`` times its binade, float32 has m bits for a value: adding rounds, and subtracting
        gives what is left.
        """
        magnitude = (blocks / self.scale(codes).unsqueeze(-1)).abs_().clamp_(max=self.largest)
        beside = (
            (magnitude.view(torch.int32) & BINADE).view(torch.float32).clamp_(min=2.0 ** (1 - self.fmt.element.bias))
        )
        beside.mul_(1.5 * 2.0 ** (23 - self.fmt.element.mantissa_bits))
        return magnitude.add_(beside).sub_(beside).copysign_(blocks)

    def error(self, blocks: Tensor, exact: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 (objective, squared residual) at int64 ``codes``, broadcast to ``[num_blocks, rows]``."""
        scale = self.scale(codes).double().unsqueeze(-1)
        r = torch.addcmul(exact, self.levels(blocks, codes).double(), scale, value=-1)
        norm = r.square().sum(-1)
        return norm if self.hessian is None else (torch.matmul(r, self.hessian) * r).sum(-1), norm

    def excess(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """Float64 relative excess over the slack, ``[num_blocks, rows]``."""
        exact = blocks.double()
        chosen, norm = self.error(blocks, exact, codes)
        worst = torch.zeros_like(chosen)
        for code in self._codes_that_differ(blocks):
            error, other = self.error(blocks, exact, code.expand(1, 1))
            if self.hessian is None:
                above = chosen - error
            else:
                error.clamp_(min=0)  # rounding may make a semi-definite form negative
                above = torch.maximum(norm, other).mul_(-self.resolution).add_(chosen).sub_(error)
            torch.fmax(worst, above.div_(error), out=worst)  # 0 / 0 is no excess
        no_code = (codes < self.fmt.scale.min_code) | (codes > self.fmt.scale.max_code)
        return worst.masked_fill_(no_code, torch.inf)

    def _codes_that_differ(self, blocks: Tensor) -> Tensor:
        """The codes to evaluate: those whose error does not follow from another's, see the module's docstring."""
        magnitudes = blocks.abs()
        nonzero = magnitudes[magnitudes > 0]
        if not len(nonzero):
            return self.codes[:1]
        scales = self.scale(self.codes).double()
        all_zero = scales * (self.lowest / 2) >= nonzero.max().double()
        all_clipped = scales * self.largest <= nonzero.min().double()
        if self.hessian is not None:
            all_clipped[:] = False  # r H rᵀ need not fall as every residual shrinks
        keep = ~all_zero & ~all_clipped
        keep[1:] |= all_zero[1:] & ~all_zero[:-1]
        keep[:-1] |= all_clipped[:-1] & ~all_clipped[1:]
        keep[0] |= all_zero[0]
        keep[-1] |= all_clipped[-1]
        return self.codes[keep]
