"""method=descent init=FOLDER: another quantized model's codes, improved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.files import SourceError
from experiments.model import walk
from experiments.model.checkpoint import open_quantized
from experiments.model.given import GivenCodes
from experiments.model.job import Listener, quantize_model
from experiments.sources.decoder import build_whole
from quantkit.formats import MXFP4, NVFP4
from tests.experiments.model.folders import open_source, write
from tests.experiments.model.test_walk import SEQ_LEN, hashes, run_for
from tests.experiments.sources.every_decoder import tiny_model
from tests.experiments.sources.test_layouts import write_layout
from tests.experiments.tiny_models import train_tokenizer, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "BATCH_TOKENS", {"cpu": 5 * SEQ_LEN})


@pytest.fixture(scope="module")
def rounded(tiny: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The tiny model by naive rounding, in quantkit's folder and in the layout of ModelOpt."""
    folder = tmp_path_factory.mktemp("rounded")
    write(folder / "own", open_source(tiny.folder), global_scale=2.0**-9)
    return SimpleNamespace(own=folder / "own", modelopt=write_layout(folder / "own", folder / "other", "modelopt"))


def objectives(folder: Path) -> Iterator[list[float]]:
    for line in (folder / "layers.jsonl").read_text().splitlines():
        for matrix in json.loads(line).get("record", {}).get("matrices", []):
            yield matrix["objective"]


def improve(tiny: SimpleNamespace, output: Path, init: Path, *overrides: str) -> Path:
    run = run_for(
        tiny, output, "method=descent", "method.sweeps=2", "hessian=output", f"init={init}", *overrides
    )  # fmt: skip
    quantize_model(run, Listener())
    return run.folder


def test_the_codes_of_another_tool_are_improved(
    tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path
) -> None:
    """Parallel calibration has the original weights as targets, so each matrix begins with the error of its codes."""
    parallel = ("calibrate=parallel", "calibrate.alpha=0", "calibrate.residual_alpha=0")
    own = improve(tiny, tmp_path / "a", rounded.own, *parallel)
    other = improve(tiny, tmp_path / "b", rounded.modelopt, *parallel)
    before, after = open_quantized(rounded.own), open_quantized(own)
    assert after.names == before.names
    for name in after.names:
        assert float(after.quantized(name).global_scale) == 2.0**-9
        assert not torch.equal(after.quantized(name).codes, before.quantized(name).codes)
    assert all(history[-1] < history[0] and len(history) == 3 for history in objectives(own))
    same = {name: digest for name, digest in hashes(own).items() if name.endswith(".safetensors")}
    assert same == {name: digest for name, digest in hashes(other).items() if name.endswith(".safetensors")}


def test_sequential_calibration_and_row_groups_take_codes_too(
    tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path
) -> None:
    folder = improve(tiny, tmp_path, rounded.own, "hessian=loss", "hessian.groups=2")
    assert len(open_quantized(folder).names) == len(open_quantized(rounded.own).names)


def test_experts_that_are_stored_apart_are_joined(tmp_path: Path) -> None:
    tiny_model("qwen3_moe", vocab_size=300).save_pretrained(tmp_path / "source")
    train_tokenizer(tmp_path / "source")
    write_text(tmp_path / "texts")
    tiny = SimpleNamespace(folder=tmp_path / "source", texts=tmp_path / "texts", cache=tmp_path / "cache")
    write(tmp_path / "own", open_source(tiny.folder), global_scale=2.0**-9)
    other = write_layout(tmp_path / "own", tmp_path / "other", "modelopt")
    own, given = open_quantized(tmp_path / "own"), GivenCodes(str(other), tmp_path / "cache", NVFP4, 16)
    decoder = build_whole(open_source(tiny.folder), "float32")
    from experiments.model.select import select
    from tests.experiments.model.folders import source

    selection = select(decoder, source(tiny.folder), 16)
    experts = [matrix for layer in selection.layers for matrix in layer if matrix.experts]
    assert experts
    for matrix in experts:
        want = own.quantized(matrix.full_name)
        got = given.matrix(decoder.model, matrix, want.shape)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
        assert got.global_scale.flatten().tolist() == [2.0**-9] * len(want.codes)
    folder = improve(tiny, tmp_path / "out", other, "model.exclude=[*.down_proj]")
    assert [name for name in open_quantized(folder).names if "experts" in name]


def test_where_the_codes_lie_does_not_matter_and_what_they_are_does(
    tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path
) -> None:
    shutil.copytree(rounded.own, tmp_path / "copy")
    overrides = ("method=descent", "hessian=output")
    here, there, none, other = (
        run_for(tiny, tmp_path, *overrides, *extra)
        for extra in ([f"init={rounded.own}"], [f"init={tmp_path / 'copy'}"], [], [f"init={rounded.modelopt}"])
    )
    assert here.identity == there.identity and here.run_id == there.run_id
    assert len({here.identity, none.identity, other.identity}) == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=gptq"], "method=gptq takes no codes to begin with. Use method=descent."),
        (["method=descent", "format.global_scale=0.5"], "the codes of init have their own. Leave it out."),
    ],
)
def test_settings_that_leave_the_codes_unused_are_refused(
    tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=r"init|global_scale") as raised:
        run_for(tiny, tmp_path, *overrides, f"init={rounded.own}")
    assert message in str(raised.value)


def test_other_folders_are_refused_before_anything_is_computed(
    tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"no NVFP4 or MXFP4 codes there\. Leave init out"):
        GivenCodes(str(tiny.folder), tmp_path, NVFP4, 16)
    with pytest.raises(SourceError, match=r"holds nvfp4 with block size 16, not mxfp4 with 32\. Ask for format=nvfp4"):
        GivenCodes(str(rounded.own), tmp_path, MXFP4, 32)
    with pytest.raises(SourceError, match=r"init=.*: no such folder|model\.path=.*: no such folder"):
        run_for(tiny, tmp_path, "method=descent", f"init={tmp_path / 'nowhere'}")


def test_a_matrix_without_codes_is_named(tiny: SimpleNamespace, rounded: SimpleNamespace, tmp_path: Path) -> None:
    from experiments.model.select import select
    from tests.experiments.model.folders import source

    given = GivenCodes(str(rounded.modelopt), tmp_path, NVFP4, 16)
    decoder = build_whole(open_source(tiny.folder), "float32")
    matrix = select(decoder, source(tiny.folder), 16).layers[0][0]
    given.names.remove(matrix.full_name)
    with pytest.raises(SourceError, match=r"has no codes of model\.layers\.0\.self_attn\.q_proj\. Leave it out"):
        given.matrix(decoder.model, matrix, torch.Size((32, 32)))
