"""Second-order statistics of a layer's inputs, accumulated from streamed batches.

    Gram     G   = XᵀX            [in_features, in_features]
    Hessian  H_j = X_jᵀX_j        [block_size, block_size], the j-th diagonal block of G

H_j is, up to a factor, the Hessian of the layer's squared output error with respect to one block of a weight row; it
is the same for every row. One pass over the activations gives G. G contains the Hessians of every block size. Products
are float32 or better.

Tokens may have weights: G = Σ_t w_t x_t x_tᵀ, where w_t is, for example, the mean squared gradient of the loss at the
layer's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "GramAccumulator",
    "HessianFactors",
    "block_hessians",
    "factorize",
    "gram_matrix",
    "hessians_from_activations",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK_ELEMENTS = 1 << 26  # of activations converted to float32 at a time (256 MiB)
RELATIVE_DAMPING = 1e-12  # of each H_ii; far below float32's resolution of r H rᵀ, enough for a float64 Cholesky
DEAD_CHANNEL = 1e-24  # of the mean diagonal, replaces H_ii = 0; so small that it outweighs no error that H measures
RANGE_ELEMENTS = 1 << 24  # of a tensor whose range is taken at a time; a view's are copied
SMALL = 2.0**-50  # a channel of such activations has squares near float32's smallest normal number, 2^-126
MAX_RELATIVE_NEGATIVE = 1e-4  # of the largest eigenvalue; a more negative eigenvalue is no rounding error


_CODES = (
    "integers and 8-bit floats are codes, which are no values without their scales: dequantize them with the tool that "
    "made them"
)


def check_given(method: str, needs: str | None, **given: object) -> None:
    """Raises ValueError unless exactly one argument that serves the method's need is given, or none without a need.

    needs: "hessian" (served by activations, gram or hessian), "gram" (by activations or gram) or None. given: each
    argument by its name, None where it was left out.
    """
    names = [name for name, value in given.items() if value is not None]
    if needs is None:
        if names:
            raise ValueError(
                f"method {method!r} does not use {' and '.join(names)}; leave it out or use method='hessian'"
            )
        return
    serving = {"hessian": ("activations", "gram", "hessian"), "gram": ("activations", "gram")}[needs]
    if len(names) != 1 or names[0] not in serving:
        listed = ", ".join(serving[:-1]) + " and " + serving[-1]
        raise ValueError(f"method {method!r} takes exactly one of {listed}; got {' and '.join(names) or 'none'}")


def check_tensor(value: object, name: str) -> None:
    """Raises TypeError unless ``value`` is a tensor, and ValueError unless it is dense with a float dtype."""
    if not isinstance(value, Tensor):
        if isinstance(value, GramAccumulator):
            remedy = "pass gram=accumulator.gram in its place"
        else:
            remedy = "pass one tensor, torch.from_numpy(array) of an array"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {remedy}")
    check_float(value, name)


def check_float(tensor: Tensor, name: str) -> None:
    """Raises ValueError unless ``tensor`` is dense, of one of FLOAT_DTYPES, and has values."""
    if tensor.dtype in FLOAT_DTYPES and tensor.layout == torch.strided and not tensor.is_meta:
        return
    if tensor.dtype not in FLOAT_DTYPES:
        remedy = f"pass {name}.real" if tensor.is_complex() else _CODES
    elif tensor.layout != torch.strided:
        remedy = f"convert with {name}.to_dense()"
    else:
        remedy = "a tensor on the meta device has no values, so load them first"
    sparse = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    meta = " on meta" if tensor.is_meta else ""
    raise ValueError(
        f"{name} must be dense float16, bfloat16, float32 or float64, got "
        f"{str(tensor.dtype).removeprefix('torch.')}{sparse}{meta}; {remedy}"
    )


def check_tokens(activations: Tensor, in_features: int, method: str) -> None:
    """Raises ValueError for activations ``[0, in_features]``."""
    if activations.shape[:1] == (0,) and in_features > 0:
        raise ValueError(f"activations {list(activations.shape)} have no token; method {method!r} needs some")


def check_gram(gram: Tensor, in_features: int) -> None:
    """Raises ValueError unless ``gram`` is ``[in_features, in_features]``."""
    if gram.shape != (in_features, in_features):
        raise ValueError(
            f"gram has shape {list(gram.shape)}, "
            f"a weight with {in_features} columns needs [{in_features}, {in_features}]"
        )


def check_hessian(hessian: Tensor, in_features: int, block_size: int) -> None:
    """Raises ValueError unless ``hessian`` is ``[in_features/block_size, block_size, block_size]``."""
    expected = (in_features // block_size, block_size, block_size)
    if hessian.shape != expected:
        raise ValueError(
            f"hessian has shape {list(hessian.shape)}, this weight at block size {block_size} needs {list(expected)}"
        )


def check_squares(products: Tensor) -> None:
    """Raises ValueError where the Hessians or the Gram matrix of finite activations are not finite."""
    if not bool(products.isfinite().all()):
        limit = str(products.dtype).removeprefix("torch.")
        raise ValueError(f"activations are too large: their squares exceed {limit}; scale them down")


def as_tokens(activations: Tensor) -> Tensor:
    """``[..., in_features]``, such as ``[batch, seq, in_features]`` of a hook, as a view ``[tokens, in_features]``."""
    if activations.ndim > 2:
        return activations.reshape(math.prod(activations.shape[:-1]), activations.shape[-1])
    return activations


def check_activations(activations: Tensor, in_features: int | None = None) -> None:
    """Raises ValueError unless ``activations`` are finite, floating-point and ``[tokens, in_features]``."""
    check_float(activations, "activations")
    if activations.ndim != 2:
        raise ValueError(
            "activations must be [tokens, in_features], or [batch, tokens, in_features] as a hook gives them, got "
            f"{_describe(activations)}"
        )
    if in_features is not None and activations.shape[1] != in_features:
        raise ValueError(
            f"activations have {activations.shape[1]} features, the layer has {in_features} (columns of its weight); "
            "pass the inputs of this very layer"
        )
    check_finite(activations, "activations")


def check_weights(weights: object, tokens: int, groups: int | None = None) -> None:
    """Raises TypeError unless ``weights`` is a tensor, and ValueError unless it is float32 or float64, finite, not
    negative, and ``[tokens]``, or ``[tokens, groups]`` if ``groups`` is given."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a torch.Tensor, got {type(weights).__name__}; pass one weight per token")
    expected = [tokens] if groups is None else [tokens, groups]
    if weights.dtype not in (torch.float32, torch.float64) or list(weights.shape) != expected:
        meaning = "one weight per token" if groups is None else "one weight per token and group"
        raise ValueError(f"weights must be float32 or float64 {expected}, {meaning}, got {_describe(weights)}")
    check_finite(weights, "weights")
    negative = weights < 0
    if bool(negative.any()):
        first = tuple(int(i) for i in negative.nonzero()[0])
        raise ValueError(
            f"weights hold {int(negative.sum())} negative values, the first, {float(weights[first]):g}, at index "
            f"{first}; a weight is a mean of squares, so take the square or clamp it at 0"
        )


def check_finite(tensor: Tensor, name: str) -> None:
    """Raises ValueError with the count of NaN and Inf in ``tensor`` and the index of the first."""
    if _all_finite(tensor.detach()):
        return
    finite = tensor.isfinite()
    if bool(finite.all()):
        return
    count = int((~finite).sum())
    first = tuple(int(i) for i in (~finite).nonzero()[0])
    raise ValueError(f"{name} holds {count} NaN or Inf value{'s' * (count > 1)}, the first at index {first}")


def _all_finite(tensor: Tensor) -> bool:
    """In one pass without a temporary; False also where the terms are finite and their sum is not."""
    if tensor.device.type != "cpu" or tensor.element_size() > 2 or not tensor.ndim or not tensor.numel():
        return bool(tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32)).isfinite())
    # A CPU would sum 16-bit elements in a float32 copy. NaN is the least and the largest of a part that holds it.
    rows = max(1, RANGE_ELEMENTS * len(tensor) // tensor.numel())
    return all(bool(torch.stack(torch.aminmax(part)).isfinite().all()) for part in tensor.split(rows))


class GramAccumulator:
    """Sums ``XᵀX`` over batches, or ``Σ_t w_t x_t x_tᵀ`` if tokens have weights.

    in_features: width of every batch.
    device, dtype: of the sum; dtype is float32 or float64. A float32 sum becomes float64 at the first batch in which a
        channel's squares are too small for float32.
    groups: number of weights per token. The sum is then ``[groups, in_features, in_features]``, one Gram matrix per
        group. Without groups, it is ``[in_features, in_features]``.
    """

    def __init__(
        self,
        in_features: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        groups: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a Gram matrix is accumulated in float32 or float64, not {dtype}")
        if groups is not None and groups < 1:
            raise ValueError(f"groups must be 1 or more, got {groups}; leave it out for one weight per token")
        self.groups = groups
        shape = (in_features, in_features) if groups is None else (groups, in_features, in_features)
        self._sum = torch.zeros(shape, device=device, dtype=dtype)
        self.tokens = 0

    @property
    def gram(self) -> Tensor:
        """The sum, not a copy. Raises ValueError where no token was seen."""
        if not self.tokens:
            raise ValueError(
                "the accumulator has seen no token: call update(activations) with the layer's inputs, and if a hook "
                "does, run the model first"
            )
        return self._sum

    def update(self, activations: Tensor, weights: Tensor | None = None) -> None:
        """Adds a batch ``[..., in_features]``, any float dtype; leading dimensions are those of tokens.

        weights: float32 or float64 ``[tokens]``, not negative; ``[tokens, groups]`` if there are groups. Without
        weights, every token has weight 1. Raises ValueError for another shape, NaN or Inf, or a negative weight.
        """
        activations = as_tokens(activations)
        check_activations(activations, self._sum.shape[-1])
        if weights is None and self.groups is not None:
            raise ValueError(f"a Gram matrix per group needs weights [tokens, {self.groups}]; pass them to update()")
        if weights is None:
            exact = self._sum.is_cuda and self._sum.dtype == torch.float32 and activations.dtype == torch.bfloat16
            # On a GPU, products of bfloat16 are exact in float32, in which the tensor cores add them.
            for batch in _float_chunks(activations, self._sum.device, torch.bfloat16 if exact else None):
                self._add(batch)
        else:
            check_weights(weights, activations.shape[0], self.groups)
            dtype = torch.promote_types(weights.dtype, self._sum.dtype)
            roots = weights.detach().to(dtype).sqrt().reshape(activations.shape[0], self.groups or 1)
            for group, root in enumerate(roots.unbind(1)):
                for batch in weighted_batches(activations, root, self._sum.device, self._sum.dtype):
                    self._add(batch, group)
        self.tokens += activations.shape[0]

    def add(self, gram: Tensor, tokens: int) -> None:
        """Adds the sum over ``tokens`` other tokens that another accumulator made, of this one's shape."""
        if gram.shape != self._sum.shape:
            raise ValueError(f"gram must be {list(self._sum.shape)} like this sum, got {_describe(gram)}")
        if gram.dtype == torch.float64:
            self._sum = self._sum.double()
        self._sum += gram.to(self._sum.device)
        self.tokens += tokens

    def hessians(self, block_size: int) -> Tensor:
        """Block Hessians ``[in_features/block_size, block_size, block_size]`` of all batches so far."""
        return block_hessians(self.gram, block_size)

    def _add(self, batch: Tensor, group: int = 0) -> None:
        """``batch [tokens, in_features]`` to the sum of a group; bfloat16 products are added in float32."""
        total = self._sum if self.groups is None else self._sum[group]
        if total.dtype == torch.float32 and loses_squares(batch, total.diagonal()):
            self._sum = self._sum.double()
            total = self._sum if self.groups is None else self._sum[group]
        if batch.dtype == torch.bfloat16 and total.dtype == torch.float32:
            torch.addmm(total, batch.T, batch, out_dtype=torch.float32, out=total)
        else:
            batch = batch.to(total.dtype)
            total.addmm_(batch.T, batch)


def weighted_batches(activations: Tensor, roots: Tensor, device: torch.device, dtype: torch.dtype) -> Iterator[Tensor]:
    """``y = √w x`` of activations ``[tokens, K]`` and the ``roots [tokens]`` √w, CHUNK_ELEMENTS or fewer at a time.

    Both factors of yᵀy contain √w, so a sum of them is positive semi-definite for any rounding of y. y has the sum's
    ``dtype``, except for bfloat16 activations on a GPU. Those stay bfloat16 for the tensor cores: y is rounded once
    more (relative 2⁻⁸), and products are exact. docs/methods.md has the error.
    """
    for batch, root in _weighted_chunks(activations, roots):
        batch = batch.to(device)
        if device.type == "cuda" and dtype == torch.float32 and batch.dtype == torch.bfloat16:
            yield torch.mul(batch, root.to(device, torch.float32), out=torch.empty_like(batch))
        else:
            yield batch.to(dtype) * root.to(device=device, dtype=dtype)


def loses_squares(batch: Tensor, squares: Tensor) -> bool:
    """Whether float32 sums of squares lose a channel of ``batch [tokens, in_features]``: all its elements are so small
    that the rounding of their squares to subnormal numbers shows. squares ``[in_features]``: the sums before the batch,
    which such a channel does not change where they are larger."""
    if not batch.numel():
        return False
    largest = torch.maximum(batch.amax(0), batch.amin(0).neg_())  # on a CPU four times faster than aminmax
    return bool(((largest > 0) & (largest < SMALL) & (squares < SMALL**2)).any())


def gram_matrix(activations: Tensor, weights: Tensor | None = None) -> Tensor:
    """``XᵀX`` of activations ``[..., in_features]``, float32; float64 for float64 input, and where float32 is too small
    for the squares.

    weights: one per token, ``[tokens]``, for ``Σ_t w_t x_t x_tᵀ``; with ``[tokens, groups]`` the result is
    ``[groups, in_features, in_features]``. See :class:`GramAccumulator`.
    """
    check_float(activations, "activations")
    dtype = torch.promote_types(activations.dtype, torch.float32)
    groups = weights.shape[1] if isinstance(weights, Tensor) and weights.ndim == 2 else None
    accumulator = GramAccumulator(activations.shape[-1], activations.device, dtype, groups)
    accumulator.update(activations, weights)
    return accumulator._sum  # also of no token


def block_hessians(gram: Tensor, block_size: int) -> Tensor:
    """Diagonal blocks of a Gram matrix ``[K, K]`` → ``[K/block_size, block_size, block_size]``, a contiguous copy."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square [in_features, in_features] matrix, got {_describe(gram)}")
    if gram.shape[0] % block_size:
        raise ValueError(f"gram has {gram.shape[0]} columns, which block size {block_size} does not divide")
    blocks = gram.detach().unflatten(0, (-1, block_size)).unflatten(2, (-1, block_size))
    return blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def hessians_from_activations(activations: Tensor, block_size: int) -> Tensor:
    """Block Hessians ``[K/block_size, block_size, block_size]`` of ``activations [..., K]``, without the Gram matrix;
    of its dtype."""
    activations = as_tokens(activations)
    check_activations(activations)
    if activations.shape[1] % block_size:
        raise ValueError(
            f"activations have {activations.shape[1]} features, which block size {block_size} does not divide"
        )
    dtype = torch.promote_types(activations.dtype, torch.float32)
    num_blocks = activations.shape[1] // block_size
    hessians = torch.zeros(num_blocks, block_size, block_size, device=activations.device, dtype=dtype)
    for batch in _float_chunks(activations, activations.device):
        if hessians.dtype == torch.float32 and loses_squares(batch, hessians.diagonal(dim1=1, dim2=2).flatten()):
            hessians = hessians.double()
        blocks = batch.to(hessians.dtype).unflatten(1, (num_blocks, block_size)).transpose(0, 1)
        hessians.baddbmm_(blocks.transpose(1, 2), blocks)
    return hessians


@dataclass(frozen=True)
class HessianFactors:
    """Factors of block Hessians for the searches: A with ``H = A Aᵀ``, so r H rᵀ = ‖r A‖², and (H⁻¹)_ii for the bounds.

    Each H is first divided by its mean diagonal. This changes no choice of a scale, and every factor then fits float32.

    factor: float64 A ``[num_blocks, block_size, block_size]``, lower triangular unless H was singular.
    inverse_diagonal: float64 ``[num_blocks, block_size]``.
    """

    factor: Tensor
    inverse_diagonal: Tensor


def factorize(hessians: Tensor, name: str = "hessian") -> HessianFactors:
    """Factors of positive semi-definite ``hessians`` ``[num_blocks, block_size, block_size]``.

    Each H_ii is raised by RELATIVE_DAMPING of itself. A zero H_ii is set to DEAD_CHANNEL times the mean diagonal (1 for
    an all-zero Hessian). So squared error decides between errors that H does not distinguish. If the Cholesky
    factorization of a block still fails, because rounding made it indefinite, its eigenvalues are clipped to positive
    ones. Raises ValueError for NaN, Inf, or a matrix that is clearly indefinite. name: the Hessians' name in errors.
    """
    check_finite(hessians, name)
    hessians = hessians.detach().double()
    diagonal = hessians.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(-1, keepdim=True)
    relative = torch.where(mean > 0, diagonal / mean, 1.0)
    root = torch.where(relative > 0, relative, DEAD_CHANNEL).sqrt().unsqueeze(-1)
    # Equilibrated: unit diagonal, so damping and rounding are relative to each channel.
    scale = root * root.mT * torch.where(mean > 0, mean, 1.0).unsqueeze(-1)
    equilibrated = (hessians + hessians.mT) / (2 * scale)
    equilibrated.diagonal(dim1=1, dim2=2).masked_fill_(diagonal == 0, 1.0)
    damping = RELATIVE_DAMPING * torch.eye(hessians.shape[-1], dtype=torch.float64, device=hessians.device)
    factor, failed = torch.linalg.cholesky_ex(equilibrated + damping)
    if bool(failed.any()):
        which = failed.nonzero().flatten()
        eigenvalues, vectors = torch.linalg.eigh(equilibrated[which])
        bad = eigenvalues[:, 0] < -MAX_RELATIVE_NEGATIVE * eigenvalues[:, -1].abs()
        if bool(bad.any()):
            block = int(which[bad.nonzero()[0]])
            raise ValueError(
                f"{name} block {block} is not positive semi-definite: its eigenvalues, relative to its diagonal, "
                f"run from {eigenvalues[bad][0, 0]:.3g} to {eigenvalues[bad][0, -1]:.3g}; "
                "accumulate it as XᵀX in float32 or better"
            )
        factor[which] = vectors * eigenvalues.clamp(min=RELATIVE_DAMPING).sqrt().unsqueeze(1)
    inverse = torch.linalg.inv(factor) / root.mT
    return HessianFactors((factor * root).contiguous(), inverse.square().sum(1))


def _float_chunks(activations: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Iterator[Tensor]:
    """Rows of ``activations`` on ``device``, CHUNK_ELEMENTS or fewer at a time; in float32, or float64 as they are,
    unless another ``dtype`` is given."""
    dtype = dtype or torch.promote_types(activations.dtype, torch.float32)
    rows = max(1, CHUNK_ELEMENTS // max(1, activations.shape[1]))
    for batch in activations.detach().split(rows):
        yield batch.to(device=device, dtype=dtype)


def _weighted_chunks(activations: Tensor, roots: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of ``activations``, unconverted, and their ``roots`` as a column; at most CHUNK_ELEMENTS at a time."""
    rows = max(1, CHUNK_ELEMENTS // max(1, activations.shape[1]))
    yield from zip(activations.detach().split(rows), roots.unsqueeze(1).split(rows), strict=True)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
