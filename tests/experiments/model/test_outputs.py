"""Whole tiny models by hessian=kronecker: The rows of a weight make up for each other's errors."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.capture.losses import open_loss_weights
from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.model import job
from experiments.model.checkpoint import open_quantized
from experiments.model.job import Listener, ModelRun, quantize_model
from experiments.quantize_model import ModelConsole
from quantkit import quantize
from tests.experiments.model.test_experts import EXPERTS, moe  # noqa: F401  a fixture
from tests.experiments.model.test_walk import run_for, small_batches, watched  # noqa: F401
from tests.experiments.tiny_models import NUM_LAYERS, SEVEN

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_SIDED = ("hessian=kronecker", "method.rows=8")  # the tiny model's matrices have 16 to 64 rows


def gram_of(run: ModelRun, path: str) -> Tensor:
    """G of a matrix, named as in the model."""
    index, name = path.removeprefix("model.layers.").split(".", 1)
    gram = open_loss_weights(run.resolved).output_gram(LayerConfig(int(index), name))
    assert gram is not None
    return gram


def layers_of(run: ModelRun) -> list[dict[str, Any]]:
    """The layers' records."""
    lines = [json.loads(line) for line in (run.folder / "layers.jsonl").read_text().splitlines()]
    return [line["record"] for line in lines if line.get("record")]


@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_the_two_sided_error_falls(
    tiny: SimpleNamespace, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tr(G D H Dᵀ), of all matrices together. calibrate=parallel: then weights and Hessians are those of both runs."""
    same = [f"method={method}", "calibrate=parallel", "model.include=['*.1.*_proj']"]
    same += ["method.sweeps=1"] if method == "descent" else []
    both = run_for(tiny, tmp_path, *TWO_SIDED, *same)
    one = run_for(tiny, tmp_path, "hessian=loss", "hessian.samples=2", *same)
    with watched(monkeypatch) as seen:
        quantize_model(both, Listener())
    quantize_model(one, Listener())
    written = open_quantized(both.folder), open_quantized(one.folder)
    ratios = []
    for path, (work, target) in seen.items():
        assert work.sums is not None
        hessian, gram = work.sums.of_group(0)[0].double(), gram_of(both, path).double()
        errors = [(target - folder.quantized(path).dequantize()).double() for folder in written]
        mine, other = (float(((gram @ error @ hessian) * error).sum()) for error in errors)
        ratios.append(mine / other)
    assert len(ratios) == len(SEVEN)
    assert sum(ratios) / len(ratios) < 0.9


@pytest.mark.parametrize("groups", [1, 3])
def test_the_folder_holds_what_the_library_makes_of_both_gram_matrices(
    tiny: SimpleNamespace, tmp_path: Path, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("method=gptq", f"hessian.groups={groups}", "method.output_damping=0.2")
    run = run_for(tiny, tmp_path, *TWO_SIDED, *options, "model.include=['*.1.mlp.gate_proj','*.2.mlp.down_proj']")
    with watched(monkeypatch) as seen:
        quantize_model(run, Listener())
    assert len(seen) == 2
    for path, (work, target) in seen.items():
        got, gram = open_quantized(run.folder).quantized(path), gram_of(run, path)
        for group, rows in enumerate(torch.arange(len(target)).tensor_split(groups)):
            assert work.sums is not None
            want = quantize(
                target[rows], "nvfp4", 16, "gptq", gram=work.sums.of_group(group)[0], output_gram=gram[rows][:, rows],
                global_scale=got.global_scale, rows=8, output_damping=0.2,
            )  # fmt: skip
            assert torch.equal(got.codes[rows], want.codes) and torch.equal(got.scales[rows], want.scales)


def test_record_manifest_and_card_name_it(tiny: SimpleNamespace, tmp_path: Path) -> None:
    include = "model.include=['*.1.self_attn.o_proj']"
    run = run_for(tiny, tmp_path, "method=gptq", "hessian=kronecker", include, "export=compressed_tensors")
    fields = quantize_model(run, Listener())
    about = open_quantized(run.folder).about
    for told in (fields, about):
        assert (told["hessian_outputs"], told["rows"], told["output_damping"]) == (True, 32, 0.3)
    assert fields["without_outputs"] == 0 and fields["hessian_samples"] == 2
    assert [layer.get("without_outputs") for layer in layers_of(run)] == [None] * NUM_LAYERS
    card = (run.run_dir / "compressed_tensors" / "README.md").read_text()
    assert "| rows | 32 |" in card and "The rows of a weight make up for each other's errors" in card
    plain = run_for(tiny, tmp_path, "method=gptq", "hessian=loss", include)
    fields = quantize_model(plain, Listener())
    names = {"hessian_outputs", "rows", "output_damping"}
    assert not names & {*fields, *open_quantized(plain.folder).about} and fields["without_outputs"] is None
    assert plain.run_id != run.run_id
    assert all("outputs" not in matrix for layer in layers_of(plain) for matrix in layer["matrices"])


def test_the_heading_names_the_choice_that_was_typed(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for choice in ("kronecker", "loss", "output"):
        ModelConsole().heading(run_for(tiny, tmp_path, "method=gptq", f"hessian={choice}"))
        assert f"gptq · sequential · hessian {choice} · " in capsys.readouterr().out


def test_experts_are_solved_as_without(
    moe: SimpleNamespace,  # noqa: F811
    tmp_path: Path,
) -> None:
    include = "model.include=['*.1.self_attn.q_proj','*.1.mlp.experts.*']"
    options = ("method=gptq", "calibrate.min_tokens=0", "calibrate=parallel", include)
    run = run_for(moe, tmp_path, *TWO_SIDED, *options)
    fields = quantize_model(run, Listener())
    plain = run_for(moe, tmp_path, "hessian=loss", "hessian.samples=2", *options)
    quantize_model(plain, Listener())
    experts = [name for name in open_quantized(run.folder).names if "experts" in name]
    told = [name for layer in layers_of(run) for name in layer.get("without_outputs", [])]
    assert sorted(told) == sorted(experts) and fields["without_outputs"] == len(experts) > 0
    assert f"{EXPERTS}.down_proj" in experts
    for name in experts:
        one, other = (open_quantized(each.folder).quantized(name) for each in (run, plain))
        assert torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=hessian"], r"hessian\.outputs=true: method=hessian lets no row .* Use method=gptq or method=descent"),
        (["method=naive"], r"hessian\.outputs=true: method=naive lets no row .*, or hessian=loss"),
        (["method=gptq", "method.rows=0"], "rows must be a whole number from 1 on, got 0"),
        (["method=gptq", "method.output_damping=2"], r"output_damping must be above 0 and at most 1, got 2\.0"),
        (["method=descent", "init=FOLDER"], r"hessian\.outputs=true: errors could .* init=FOLDER\. Use hess"),
        (["method=gptq", "hessian.weighting=output", "hessian.samples=1"], r"hessian\.outputs=true: only loss weights"),
    ],
)
def test_what_cannot_be_two_sided_is_refused(
    tiny: SimpleNamespace, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(Exception, match=message):
        run_for(tiny, tmp_path, "hessian=kronecker", *overrides)


@pytest.mark.parametrize("setting", ["rows=8", "output_damping=0.2"])
def test_settings_of_output_gram_matrices_need_them(tiny: SimpleNamespace, tmp_path: Path, setting: str) -> None:
    with pytest.raises(ValueError, match=rf"method\.{setting}: only hessian=kronecker uses it\. Add that"):
        run_for(tiny, tmp_path, "method=gptq", "hessian=loss", f"method.{setting}")


def test_a_model_too_large_for_the_pass_needs_another_hessian(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "memory_of", lambda device: 1 << 16)
    settings = ("calibrate.weight_exponent=0.7", f"cache.dir={tmp_path}/cache")
    run = run_for(tiny, tmp_path, *TWO_SIDED, "method=gptq", *settings)
    assert not run.config.hessian.outputs
    assert run.config.calibrate.weight_exponent == 1  # of weights that are not there


def test_output_gram_matrices_too_large_beside_the_pass_are_refused_before_anything_is_loaded(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(job, "loss_bytes", lambda *args: told.append(1) or 1 << 20)
    monkeypatch.setattr(job, "memory_of", lambda device: (1 << 20) + 1)
    settings = ("method=gptq", f"cache.dir={tmp_path}/cache")
    with pytest.raises(SourceError, match=r"its outputs 0 GiB \(\d+ bytes\), and cpu has 0 GiB\. Use hessian=loss\."):
        run_for(tiny, tmp_path, *TWO_SIDED, *settings)
    assert run_for(tiny, tmp_path, "hessian=loss", *settings).config.hessian.weighting == "loss"
    assert told == [1, 1]
