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

The contract is defined for nearest codes. A method that moves codes away from nearest (``nearest_codes`` is False) has
another target, which the tensor does not hold. Then verify judges no block, and the result says so.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit import parallel
from quantkit.calibration import check_finite
from quantkit.formats import BlockFormat
from quantkit.tensor import QuantizedTensor

__all__ = ["CONTRACT", "HESSIAN_SLACK", "Verification", "verify"]

CONTRACT = 1e-6
HESSIAN_SLACK = 1e-7
CHUNK_ELEMENTS = 1 << 18
LISTED = 10


@dataclass(frozen=True)
class Verification:
    """The result of verify().

    blocks: number of blocks judged.
    violations: number of blocks that break the contract.
    worst_excess: largest relative excess of any block.
    where: (row, block) of the first violations, with rows counted over all leading dimensions.
    wrong_codes: number of elements whose code is not round-to-nearest at the stored scale.
    judged: False if the tensor's codes are not meant to be nearest; all counts are then zero.
    ok: the blocks were judged, and no scale and no code is wrong.
    """

    blocks: int
    violations: int
    worst_excess: float
    where: tuple[tuple[int, int], ...]
    wrong_codes: int
    judged: bool = True

    @property
    def ok(self) -> bool:
        return self.judged and self.violations == 0 and self.wrong_codes == 0


def verify(q: QuantizedTensor, weight: Tensor, hessian: Tensor | None = None) -> Verification:
    """Judges the scales and codes of ``q`` for ``weight [..., K]``; with ``hessian [K/b, b, b]`` by r H rᵀ, else by
    squared error.

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
    block_size, num_blocks = q.block_size, q.scales.shape[-1]
    if q.method == "hessian" and hessian is None:
        warnings.warn(
            "these scales were chosen by Hessians and are judged by squared error; to judge them by the same Hessians "
            f"pass hessian=, such as block_hessians(gram_matrix(activations), {block_size}) of quantkit.calibration",
            stacklevel=2,
        )
    if hessian is not None and hessian.shape != (num_blocks, block_size, block_size):
        expected = [num_blocks, block_size, block_size]
        raise ValueError(f"hessian has shape {list(hessian.shape)}, this tensor needs {expected}")
    check_finite(weight, "weight")
    if not q.nearest_codes:
        made_by = "" if q.method is None else f" of method {q.method!r}"
        warnings.warn(
            f"the codes{made_by} are not nearest at their scales, so no block is judged; "
            "compare errors with compute_metrics(weight, q.dequantize(), activations)",
            stacklevel=2,
        )
        return Verification(0, 0, 0.0, (), 0, judged=False)
    q = q.to(weight.device)
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
        codes = scales[part].T.int()
        stored = QuantizedTensor(packed[part], scales[part], q.global_scale, q.format, block_size)
        wrong = int((stored.values() != judge.levels(blocks, codes).transpose(0, 1).flatten(1)).sum())
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


class _Judge:
    """The objective over the whole scale grid, for chunks ``[num_blocks, rows, block_size]``."""

    def __init__(self, fmt: BlockFormat, global_scale: Tensor, hessian: Tensor | None, device: torch.device) -> None:
        self.fmt = fmt
        self.codes = torch.arange(fmt.scale.min_code, fmt.scale.max_code + 1, device=device)
        self.global_scale = global_scale.detach()
        self.hessian = None if hessian is None else hessian.detach().to(device, torch.float64)
        if self.hessian is not None:
            check_finite(self.hessian, "hessian")
            self.resolution = HESSIAN_SLACK * torch.linalg.eigvalsh(self.hessian)[:, -1:]

    def scale(self, codes: Tensor) -> Tensor:
        return self.fmt.scale.decode(codes) * self.global_scale

    def levels(self, blocks: Tensor, codes: Tensor) -> Tensor:
        """Float32 signed element values of round-to-nearest at int ``codes [num_blocks, rows]``."""
        scaled = blocks / self.scale(codes).unsqueeze(-1)
        return self.fmt.element.round(scaled.abs()).copysign(blocks)

    def error(self, blocks: Tensor, exact: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Float64 (objective, squared residual) at int ``codes``, broadcast to ``[num_blocks, rows]``."""
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
        return worst

    def _codes_that_differ(self, blocks: Tensor) -> Tensor:
        """The codes to evaluate: those whose error does not follow from another's, see the module's docstring."""
        magnitudes = blocks.abs()
        nonzero = magnitudes[magnitudes > 0]
        if not len(nonzero):
            return self.codes[:1]
        scales = self.scale(self.codes).double()
        all_zero = scales * (self.fmt.element.value(1) / 2) >= nonzero.max().double()
        all_clipped = scales * self.fmt.element.max_value <= nonzero.min().double()
        if self.hessian is not None:
            all_clipped[:] = False  # r H rᵀ need not fall as every residual shrinks
        keep = ~all_zero & ~all_clipped
        keep[1:] |= all_zero[1:] & ~all_zero[:-1]
        keep[:-1] |= all_clipped[:-1] & ~all_clipped[1:]
        keep[0] |= all_zero[0]
        keep[-1] |= all_clipped[-1]
        return self.codes[keep]
