"""How far a model's predictions are from a reference's, token by token.

With the logits x [vocabulary] of the reference and y of the other model, p = softmax x and q = softmax y,

    KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)      nats, temperature 1, full vocabulary

The log-softmax is computed in float32 and the sums in float64. Rows are compared in chunks, so that memory holds a few
copies of CHUNK_BYTES beside the logits themselves. Nothing here loads a model or reads a text; intervals.py summarizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.model.evaluate_settings import PROTOCOLS

CHUNK_BYTES = 1 << 26  # of float32 logits: larger chunks are no faster


@dataclass(frozen=True)
class Comparison:
    """Of each token [tokens]: kl and the log-probabilities of its label, float64; top: that of the reference, int64."""

    kl: Tensor
    base_logprob: Tensor
    logprob: Tensor
    same_top: Tensor
    top: Tensor


def scored(seq_len: int, protocol: str) -> slice:
    """The positions whose prediction of the next token counts, of sequences of seq_len tokens.

    all: every position but the last, which has no next token. llama_cpp: those of the second half, as llama.cpp's
    `--kl-divergence` takes them (from seq_len // 2 on), so that each prediction has half a sequence of context.
    Raises ValueError for another protocol, and for sequences with no such position.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"evaluate.protocol={protocol}: use {' or '.join(PROTOCOLS)}.")
    first = 0 if protocol == "all" else seq_len // 2
    if first >= seq_len - 1:
        raise ValueError(
            f"data.seq_len={seq_len}: protocol {protocol} scores no token of so short a sequence. Use a larger one."
        )
    return slice(first, seq_len - 1)


def compare(base: Tensor, other: Tensor, labels: Tensor) -> Comparison:
    """base, other: logits [tokens, vocabulary] of any float dtype; labels [tokens], the tokens that follow.

    Raises ValueError where vocabularies differ, and where a logit is not finite.
    """
    if base.shape != other.shape:
        raise ValueError(
            f"the vocabularies differ: {base.shape[-1]} logits a token of the reference, {other.shape[-1]} of the "
            "model. Compare models with the same tokenizer and no padded embedding."
        )
    rows = max(1, CHUNK_BYTES // (4 * base.shape[-1]))
    parts = [
        _compare_rows(*chunk)
        for chunk in zip(base.split(rows), other.split(rows), labels.to(base.device).split(rows), strict=True)
    ]
    return Comparison(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _compare_rows(base: Tensor, other: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    log_p, log_q = _log_softmax(base, "reference"), _log_softmax(other, "model")
    index = labels.unsqueeze(-1)
    base_logprob, logprob = (log.gather(-1, index).squeeze(-1).double() for log in (log_p, log_q))
    top = log_p.argmax(-1)
    same_top = top == log_q.argmax(-1)
    kl = log_p.sub(log_q).mul_(log_p.exp()).sum(-1, dtype=torch.float64)
    return kl, base_logprob, logprob, same_top, top


def _log_softmax(logits: Tensor, whose: str) -> Tensor:
    result = logits.float().log_softmax(-1)
    # An infinite or NaN logit makes the whole row NaN, or a −inf in it.
    if not torch.isfinite(result).all():
        raise ValueError(
            f"the {whose}'s logits are not all finite. Load it in another dtype (evaluate.dtype=float32), or check its "
            "weights."
        )
    return result
