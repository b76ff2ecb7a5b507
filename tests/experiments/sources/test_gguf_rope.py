"""Rotary embeddings that a GGUF file scales, as llama.cpp reads its keys."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from experiments.files import SourceError
from experiments.sources.gguf_names import architecture_named
from experiments.sources.gguf_rope import LLAMA3, PARAMETERS, frequency_factors, read_scaling, rope_type

LLAMA = architecture_named("llama", "file")
THETA, WIDTH = 500000.0, 64


def factors(*values: float) -> torch.Tensor:
    """The formula of Llama 3.1, in Python's float64, as llama.cpp's converter computes it."""
    factor, low, high, length = values
    found = []
    for index in range(0, WIDTH, 2):
        wave = 2 * math.pi * THETA ** (index / WIDTH)
        smooth = (length / wave - low) / (high - low)
        found.append(1 / ((1 - min(max(smooth, 0.0), 1.0)) / factor + min(max(smooth, 0.0), 1.0)))
    return torch.tensor(found, dtype=torch.float32, device="cpu")


def read(header: dict[str, Any], given: torch.Tensor | None = None) -> dict[str, Any] | None:
    return read_scaling("file", LLAMA, header, given, THETA, WIDTH)


@pytest.mark.parametrize("values", [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (3.0, 1.5, 7.0, 1024)])
def test_the_factors_are_those_of_the_formula(values: tuple[float, ...]) -> None:
    made = frequency_factors(dict(zip(LLAMA3, values, strict=True)), THETA, WIDTH)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, factors(*values), rtol=1e-5, atol=0.0)  # transformers computes in float32
    assert made[0] == 1.0 and made[-1] == values[0] and ((made > 1) & (made < values[0])).any()


def test_published_parameters_are_found_from_their_factors() -> None:
    for values in ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192)):
        found = read({}, factors(*values))
        assert found == {"rope_type": "llama3", "rope_theta": THETA, **dict(zip(LLAMA3, values, strict=True))}


def test_other_factors_need_their_parameters() -> None:
    given = dict(zip(LLAMA3, (3.0, 1.5, 7.0, 1024), strict=True))
    made = frequency_factors(given, THETA, WIDTH)
    with pytest.raises(SourceError, match=r"not of Llama 3, and does not say how. Give the original"):
        read({}, made)
    assert read({PARAMETERS: json.dumps(given)}, made) == {"rope_type": "llama3", "rope_theta": THETA} | given
    for wrong in (json.dumps(given | {"factor": 4.0}), "[]", "{", json.dumps(given | {"factor": 0}), json.dumps({})):
        with pytest.raises(SourceError, match=r"quantkit.rope_parameters does not give its rope_freqs.weight"):
            read({PARAMETERS: wrong}, made)
    with pytest.raises(SourceError, match="not of Llama 3"):
        read({}, made[:-1])


@pytest.mark.parametrize(
    ("header", "factor"),
    [
        ({}, None),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, None),
        ({"llama.rope.scaling.type": "linear"}, 1.0),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 2.0}, 2.0),
        ({"llama.rope.scaling.factor": 0.0}, None),
    ],
)
def test_linear_scaling_is_read_as_llama_cpp_reads_it(header: dict[str, Any], factor: float | None) -> None:
    expected = None if factor is None else {"rope_type": "linear", "rope_theta": THETA, "factor": factor}
    assert read(header) == expected


def test_other_ways_of_scaling_are_refused() -> None:
    yarn = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    with pytest.raises(SourceError, match=r"not read from GGUF files \(yarn\). Give the original checkpoint"):
        read(yarn)
    with pytest.raises(SourceError, match=r"not read from GGUF files \(linear\)"):
        read({"llama.rope.scaling.factor": 4.0}, factors(8.0, 1.0, 4.0, 8192))
    with pytest.raises(SourceError, match=r"not read from GGUF files"):
        read_scaling("file", architecture_named("qwen3", "file"), {}, factors(8.0, 1.0, 4.0, 8192), THETA, WIDTH)


def test_the_type_of_older_configurations() -> None:
    assert rope_type({"rope_scaling": {"type": "linear"}}) == "linear"
    assert rope_type({"rope_parameters": None}) == "default"
