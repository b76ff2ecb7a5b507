"""KL and its companions against direct formulas in float64."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.model import divergence
from experiments.model.divergence import compare, scored


def logits(rows: int = 7, vocabulary: int = 300, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return scale * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float32, device="cpu")


def test_a_case_by_hand() -> None:
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 − 1/4 ln 2."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = compare(p.log() + 3, q.log() - 5, torch.tensor([1]))  # a constant changes no softmax
    assert float(found.kl) == pytest.approx(0.25 * math.log(2), rel=1e-6)
    assert float(found.base_logprob) == pytest.approx(math.log(0.25), rel=1e-6)
    assert float(found.logprob) == pytest.approx(math.log(0.5), rel=1e-6)
    assert found.top.tolist() == [0] and found.same_top.tolist() == [False]


def test_against_the_formula_in_float64() -> None:
    x = logits()
    y = x + 0.1 * logits(seed=1)
    p, q = x.double().log_softmax(-1), y.double().log_softmax(-1)
    labels = torch.arange(7)
    found = compare(x, y, labels)
    # float32's log-softmax is wrong by some 1e-7 of logits up to 20.
    torch.testing.assert_close(found.kl, (p.exp() * (p - q)).sum(-1), rtol=0, atol=5e-6)
    torch.testing.assert_close(found.base_logprob, p[labels, labels], rtol=0, atol=5e-6)
    torch.testing.assert_close(found.logprob, q[labels, labels], rtol=0, atol=5e-6)
    assert torch.equal(found.top, x.argmax(-1))
    assert torch.equal(found.same_top, x.argmax(-1) == y.argmax(-1))
    assert found.kl.dtype == found.logprob.dtype == torch.float64


def test_equal_logits_have_no_divergence() -> None:
    found = compare(logits(), logits(), torch.zeros(7, dtype=torch.long))
    assert torch.equal(found.kl, torch.zeros(7, dtype=torch.float64))
    assert found.same_top.all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, labels = logits(), logits(seed=1), torch.arange(7)
    whole = compare(x, y, labels)
    monkeypatch.setattr(divergence, "CHUNK_BYTES", 1)
    rows = compare(x, y, labels)
    assert torch.equal(whole.kl, rows.kl) and torch.equal(whole.logprob, rows.logprob)


def test_half_precision_is_compared_in_float32() -> None:
    x, y, labels = logits().bfloat16(), logits(seed=1).bfloat16(), torch.arange(7)
    assert torch.equal(compare(x, y, labels).kl, compare(x.float(), y.float(), labels).kl)


def test_other_vocabularies_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabularies differ: 300 .* 301 .*same tokenizer"):
        compare(logits(), logits(vocabulary=301), torch.zeros(7, dtype=torch.long))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("whose", ["reference", "model"])
def test_logits_that_are_not_finite_are_refused(bad: float, whose: str) -> None:
    x, y = logits(), logits(seed=1)
    (x if whose == "reference" else y)[3, 5] = bad
    with pytest.raises(ValueError, match=f"the {whose}'s logits are not all finite.*evaluate.dtype=float32"):
        compare(x, y, torch.zeros(7, dtype=torch.long))


def test_all_scores_every_token_that_has_a_successor() -> None:
    assert scored(512, "all") == slice(0, 511)


def test_llama_cpp_scores_the_second_half() -> None:
    """llama.cpp: first = n_ctx / 2; positions first … n_ctx − 2, with the tokens after them as labels."""
    positions = range(512)[scored(512, "llama_cpp")]
    assert (positions[0], positions[-1], len(positions)) == (256, 510, 255)


def test_protocols_without_a_token_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data.seq_len=1:"):
        scored(1, "all")
    with pytest.raises(ValueError, match=r"data.seq_len=2: protocol llama_cpp"):
        scored(2, "llama_cpp")
    with pytest.raises(ValueError, match=r"evaluate.protocol=half: use all or llama_cpp"):
        scored(512, "half")
