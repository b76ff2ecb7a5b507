"""Calibration on fewer tokens than were captured."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from experiments.capture.inputs import LayerInputs
from experiments.capture.tokens import shuffled
from experiments.files import SourceError
from quantkit.calibration import GramAccumulator

log = logging.getLogger(__name__)


def limit_calibration(inputs: LayerInputs, tokens: int, seq_len: int, seed: int) -> LayerInputs:
    """The same layer with the Gram matrix of `tokens` calibration tokens, or of all where there are no more.

    A seeded shuffle chooses whole sequences, and of the last one its first tokens. A larger number includes the tokens
    of a smaller one. The held-out tokens stay. Reads the activations: raises SourceError when they were not kept.
    """
    if tokens >= inputs.tokens_calibration:
        log.info("data.calibration_tokens=%d: there are %d, taking all", tokens, inputs.tokens_calibration)
        return inputs
    if inputs.routed:
        raise SourceError(
            f"data.calibration_tokens={tokens}: a router sends this expert {inputs.tokens_calibration} tokens, uneven "
            "over the sequences. Set data.samples instead."
        )
    order = shuffled(inputs.tokens_calibration // seq_len, seed)[: -(-tokens // seq_len)]
    rows = {sequence: seq_len for sequence in order}
    rows[order[-1]] = tokens - (len(order) - 1) * seq_len
    gram = GramAccumulator(inputs.gram_calibration.shape[0])
    first = 0
    for batch in inputs.batches("calibration"):
        sequences = batch.split(seq_len)
        chosen = [x[: rows[i]] for i, x in enumerate(sequences, start=first) if i in rows]
        if chosen:
            gram.update(torch.cat(chosen))
        first += len(sequences)
    return replace(inputs, gram_calibration=gram.gram, tokens_calibration=tokens)
