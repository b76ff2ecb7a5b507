"""Every causal decoder that transformers builds tiny: its captured inputs are the whole model's, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experiments.sources.every_decoder import PAGE, judge, listed, page
from tests.experiments.sources.tiny_decoders import kinds


@pytest.fixture(autouse=True, scope="module")
def no_progress_bar(one_thread: None) -> Iterator[None]:
    import transformers

    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.enable_progress_bar()


@pytest.mark.parametrize("kind", kinds())
def test_a_part_of_the_model_sees_what_the_whole_sees(kind: str, tmp_path: Path) -> None:
    assert judge(kind, tmp_path) == listed()[kind]


def test_the_page_lists_every_decoder_of_transformers() -> None:
    rows = listed()
    assert sorted(rows) == kinds()
    assert PAGE.read_text() == page([rows[kind] for kind in kinds()])
    assert sum(row.verdict == "captured" for row in rows.values()) > 100
