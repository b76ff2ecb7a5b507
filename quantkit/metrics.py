"""Relative errors of a quantized weight, all as fractions.

    weight error   ‖W_q − W‖ / ‖W‖                                   (Frobenius)
    output error   ‖X W_qᵀ − X Wᵀ‖ / ‖X Wᵀ‖  =  √( tr(Δ G Δᵀ) / tr(W G Wᵀ) ),   Δ = W_q − W,  G = XᵀX

The second form needs only the Gram matrix. Products are float32 or better, sums float64. Where the denominator is zero
the error is 0 if the numerator is zero too, else NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from quantkit.calibration import as_tokens, check_float

__all__ = ["compute_metrics", "output_error", "output_error_from_gram", "weight_error"]

CHUNK_ROWS = 4096
# Sums of products between these, the first times their number, lost nothing by underflow or overflow in float32.
IN_FLOAT32 = (2.0**-100, 2.0**127)


@torch.no_grad()
def weight_error(weight: Tensor, quantized: Tensor) -> float:
    """``‖W_q − W‖ / ‖W‖`` of two tensors of one shape."""
    weight, quantized = _matrices(weight, quantized)
    error = norm = 0.0
    for w, q in zip(weight.split(CHUNK_ROWS), quantized.split(CHUNK_ROWS), strict=True):
        error += float((q.double() - w.double()).square().sum())
        norm += float(w.double().square().sum())
    return _ratio(error, norm)


@torch.no_grad()
def output_error(activations: Tensor | Iterable[Tensor], weight: Tensor, quantized: Tensor) -> float:
    """``‖X W_qᵀ − X Wᵀ‖ / ‖X Wᵀ‖`` of weights ``[..., K]``; activations: ``[..., K]`` with at least one token, or an
    iterable of such batches."""
    weight, quantized = _matrices(weight, quantized)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    reference = weight.to(dtype)
    difference = quantized.to(dtype) - reference
    batches = (activations,) if isinstance(activations, Tensor) else activations
    error = norm = 0.0
    tokens = 0
    for batch in batches:
        check_float(batch, "activations")
        batch = as_tokens(batch)
        if batch.ndim != 2 or batch.shape[1] != weight.shape[-1]:
            raise ValueError(
                f"activations of shape {list(batch.shape)} do not fit a weight with {weight.shape[-1]} columns; "
                "expected [tokens, in_features]"
            )
        tokens += len(batch)
        for chunk in batch.split(CHUNK_ROWS):
            x = chunk.to(device=weight.device, dtype=dtype)
            error += _product_energy(x, difference)
            norm += _product_energy(x, reference)
    if not tokens:
        raise ValueError(
            "activations hold no token; a generator gives its batches only once: make a new one, or a list"
        )
    return _ratio(error, norm)


@torch.no_grad()
def output_error_from_gram(weight: Tensor, quantized: Tensor, gram: Tensor) -> float:
    """The output error of weights ``[..., in_features]`` on the tokens whose Gram matrix is ``gram``."""
    weight, quantized = _matrices(weight, quantized)
    if gram.shape != (weight.shape[-1], weight.shape[-1]):
        raise ValueError(f"gram of shape {list(gram.shape)} does not fit a weight with {weight.shape[-1]} columns")
    dtype = torch.promote_types(gram.dtype, torch.float32)
    error = norm = 0.0
    for w, q in zip(weight.split(CHUNK_ROWS), quantized.split(CHUNK_ROWS), strict=True):
        w, q = w.to(gram.device, dtype), q.to(gram.device, dtype)
        error += _energy(q - w, gram)
        norm += _energy(w, gram)
    return _ratio(error, norm)


def compute_metrics(weight: Tensor, quantized: Tensor, activations: Tensor | None = None) -> dict[str, float]:
    """``{"weight_error": …, "output_error": …}`` as fractions; the second only with ``activations [tokens, K]``."""
    metrics = {"weight_error": weight_error(weight, quantized)}
    if activations is not None:
        metrics["output_error"] = output_error(activations, weight, quantized)
    return metrics


def _product_energy(x: Tensor, weight: Tensor) -> float:
    """``‖x Wᵀ‖²``, summed in float64; in float64 altogether where float32 does not hold the squares."""
    product = x @ weight.T
    total = float(product.square_().sum(dtype=torch.float64))
    if IN_FLOAT32[0] * product.numel() <= total < IN_FLOAT32[1]:
        return total
    return float((x.double() @ weight.double().T).square_().sum())


def _energy(rows: Tensor, gram: Tensor) -> float:
    """Σ r G rᵀ over ``rows [n, K]``, at least 0 or NaN; in float64 where float32 does not hold the products."""
    total = float(((rows @ gram) * rows).sum(dtype=torch.float64))
    if not IN_FLOAT32[0] * rows.numel() <= total < IN_FLOAT32[1]:
        rows = rows.double()
        total = float(((rows @ gram.double()) * rows).sum())
    return 0.0 if total < 0 else total  # max(0.0, nan) would be 0


def _ratio(error: float, norm: float) -> float:
    if norm == 0.0:
        return 0.0 if error == 0.0 else math.nan
    return math.sqrt(error / norm)


def _matrices(weight: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """Both as ``[rows, K]``, of one shape."""
    for name, value in (("weight", weight), ("quantized", quantized)):
        if not isinstance(value, Tensor):
            remedy = "pass its .dequantize()" if hasattr(value, "dequantize") else "pass a tensor"
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}; {remedy}")
        check_float(value, name)
    if weight.shape != quantized.shape:
        raise ValueError(f"weight {list(weight.shape)} and its quantized form {list(quantized.shape)} differ in shape")
    rows = math.prod(weight.shape[:-1])
    return weight.reshape(rows, weight.shape[-1]), quantized.reshape(rows, weight.shape[-1])
