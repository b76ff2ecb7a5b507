"""Calibration on fewer tokens than were captured."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from experiments.capture.inputs import LayerInputs, LossWeights
from experiments.capture.tokens import shuffled
from experiments.files import SourceError
from quantkit.calibration import GramAccumulator

log = logging.getLogger(__name__)


def limit_calibration(inputs: LayerInputs, tokens: int, seq_len: int, seed: int) -> LayerInputs:
    """The same layer with the Gram matrices of `tokens` calibration tokens, or of all if there are fewer.

    A seeded shuffle chooses whole sequences, and the first tokens of the last one. A larger number includes the tokens
    of a smaller one. The held-out tokens stay the same. Reads the activations. Raises SourceError if they were not
    kept.
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
    width = inputs.gram_calibration.shape[0]
    gram = GramAccumulator(width)
    weights = None if inputs.loss is None else inputs.loss.weights
    weighted = None if weights is None else GramAccumulator(width, groups=weights.shape[1])
    kept = []
    first = 0
    for batch in inputs.batches("calibration"):
        sequences = batch.split(seq_len)
        numbers = [i for i in range(first, first + len(sequences)) if i in rows]
        if numbers:
            x = torch.cat([sequences[i - first][: rows[i]] for i in numbers])
            gram.update(x)
            if weights is not None and weighted is not None:
                kept.append(torch.cat([weights[i * seq_len : i * seq_len + rows[i]] for i in numbers]))
                weighted.update(x, kept[-1])
        first += len(sequences)
    loss = None if weighted is None else LossWeights(torch.cat(kept), weighted.gram)
    return replace(inputs, gram_calibration=gram.gram, tokens_calibration=tokens, loss=loss)
