"""Whole tiny models, quantized layer by layer: targets, shared scales, choice of layers, interruptions, records."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from experiments import quantize_model as entry
from experiments.capture.losses import load_loss_weights
from experiments.capture.tokens import token_sequences
from experiments.config import CONF_DIR, LayerConfig
from experiments.files import SourceError
from experiments.model import job, solve, walk
from experiments.model.checkpoint import CheckpointWriter, load_dequantized, open_quantized
from experiments.model.job import Listener, ModelRun, quantize_model, resolve_model
from experiments.model.settings import QuantizeConfig
from experiments.model_record import ModelRecord
from experiments.record import read_record_of
from experiments.sources.checkpoints import open_checkpoint
from quantkit import quantize
from quantkit.layouts import exact_global_scale
from tests.experiments.tiny_models import NUM_LAYERS, SEVEN

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN, SEQUENCES = 32, 12
TOKENS = SEQ_LEN * SEQUENCES


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 sequences a batch, so the last one is smaller."""
    monkeypatch.setattr(walk, "BATCH_TOKENS", {"cpu": 5 * SEQ_LEN})


def overrides_for(tiny: SimpleNamespace, output: Path, *overrides: str) -> list[str]:
    return [
        f"model.path={tiny.folder}", "model.dtype=float32", f"data.path={tiny.texts}", f"data.seq_len={SEQ_LEN}",
        f"data.samples={SEQUENCES}", f"cache.dir={tiny.cache}", f"output_dir={output}", "method=hessian", "device=cpu",
        "tracking=none", *overrides,
    ]  # fmt: skip


def composed(tiny: SimpleNamespace, output: Path, *overrides: str) -> Any:
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        return compose("quantize_model", overrides=overrides_for(tiny, output, *overrides))


def run_for(tiny: SimpleNamespace, output: Path, *overrides: str) -> ModelRun:
    from experiments.config import plain_config

    return resolve_model(plain_config(composed(tiny, output, *overrides), QuantizeConfig))


def hashes(folder: Path) -> dict[str, str]:
    """File → sha256, without the layers' times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != "layers.jsonl"
    }


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[solve.Work, Tensor]]]:
    """Name → a matrix as it came to the solver, and its target."""
    seen: dict[str, tuple[solve.Work, Tensor]] = {}
    real = solve.Solver._target

    def target(self: solve.Solver, work: solve.Work) -> Tensor:
        seen[work.matrix.full_name] = work, real(self, work)
        return seen[work.matrix.full_name][1]

    with monkeypatch.context() as patch:
        patch.setattr(solve.Solver, "_target", target)
        yield seen


def ids_of(run: ModelRun) -> Tensor:
    config = run.resolved.config
    checkpoint = open_checkpoint(config.model, config.cache.folder)
    return token_sequences(config, checkpoint.tokenizer()).ids["calibration"]


def inputs_of(model: Any, paths: list[str], ids: Tensor) -> dict[str, Tensor]:
    """Path → input [tokens, features], float64, of modules of a whole model."""
    seen: dict[str, Tensor] = {}

    def hook(path: str) -> Any:
        return lambda module, args, kwargs: seen.__setitem__(path, args[0].flatten(0, 1).double())

    handles = [model.get_submodule(p).register_forward_pre_hook(hook(p), with_kwargs=True) for p in paths]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def close(got: Tensor, want: Tensor) -> None:
    """Float32 passes and sums against float64 ones, relative to the largest element."""
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-4 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("hessian", "exponent", "damping"), [("output", 1, None), ("loss", 1, None), ("loss", 0.7, 0.05)]
)
def test_targets_are_those_of_the_quantized_models_own_inputs(
    tiny: SimpleNamespace,
    tmp_path: Path,
    hessian: str,
    exponent: float,
    damping: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The finished model has, at each matrix, the inputs that the matrix was quantized for."""
    options = [f"calibrate.weight_exponent={exponent}", f"calibrate.damping={'null' if damping is None else damping}"]
    run = run_for(tiny, tmp_path, f"hessian={hessian}", *options)
    with watched(monkeypatch) as seen:
        quantize_model(run, Listener())
    model = load_dequantized(run.folder, torch.float32)
    layer = "model.layers.2"
    norms = {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"}
    paths = [f"{layer}.{name}" for name in (*SEVEN, *norms.values())]
    x_q, x = (inputs_of(m, paths, ids_of(run)) for m in (model, tiny.model))
    for name in SEVEN:
        path = f"{layer}.{name}"
        work, target = seen[path]
        w = torch.ones(TOKENS, dtype=torch.float64)
        if hessian == "loss":
            w = load_loss_weights(run.resolved, LayerConfig(2, name))[:, 0].double() ** exponent
            w /= w.mean()
        h = (w[:, None] * x_q[path]).T @ x_q[path]
        assert work.sums is not None
        close(work.sums.of_group(0)[0], h)
        weight = tiny.model.get_submodule(path).weight.detach().double()
        delta = (damping or 0.01) * h.diagonal().mean()
        inverse = torch.linalg.inv(h + delta * torch.eye(len(h), dtype=torch.float64))
        want = weight + 0.5 * weight @ ((w[:, None] * (x[path] - x_q[path])).T @ x_q[path]) @ inverse
        if name in norms:
            norm = f"{layer}.{norms[name]}"
            want += 0.5 * (w[:, None] * (x[norm] - x_q[norm])).T @ x_q[path] @ inverse
        close(target, want)
        assert float((want - weight).norm()) > 0.001 * float(weight.norm())


def test_parallel_quantizes_the_weights_on_the_original_models_inputs(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tiny, tmp_path, "calibrate=parallel", "hessian=output")
    with watched(monkeypatch) as seen:
        quantize_model(run, Listener())
    paths = [f"model.layers.{index}.{name}" for index in range(NUM_LAYERS) for name in SEVEN]
    assert sorted(seen) == sorted(paths)
    x = inputs_of(tiny.model, paths, ids_of(run))
    for path, (work, target) in seen.items():
        assert torch.equal(target, tiny.model.get_submodule(path).weight.detach())
        assert work.sums is not None
        close(work.sums.of_group(0)[0], x[path].T @ x[path])


@pytest.mark.parametrize("method", ["naive", "sse", "hessian", "joint", "gptq", "descent"])
def test_the_folder_holds_what_the_library_makes_of_the_targets(
    tiny: SimpleNamespace, tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [f"method={method}", "model.include=['*.1.self_attn.q_proj','*.2.mlp.down_proj']"]
    run = run_for(tiny, tmp_path, *overrides, *(["method.sweeps=1"] if method == "descent" else []))
    with watched(monkeypatch) as seen:
        fields = quantize_model(run, Listener())
    written = open_quantized(run.folder)
    assert sorted(seen) == sorted(["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj"])
    for path, (work, target) in seen.items():
        given: dict[str, Tensor] = {}
        if work.sums is not None:
            given = {"gram" if method in ("gptq", "descent") else "hessian": work.sums.of_group(0)[0]}
            given = {k: v if k == "gram" else solve.block_hessians(v, 16) for k, v in given.items()}
        given["global_scale"] = exact_global_scale(quantize(target, "nvfp4", 16, "naive").global_scale)
        want = quantize(target, "nvfp4", 16, method, **given, **run.config.method.settings)
        got = written.quantized(path)
        assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
        assert torch.equal(got.global_scale, want.global_scale)
    assert (fields["output_error"] is None) == (method in ("naive", "sse"))
    if method in ("naive", "sse"):
        assert all(torch.equal(target, work.weight) for work, target in seen.values())


def test_fused_layers_share_a_global_scale_of_all_their_targets(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tiny, tmp_path, "hessian=output")
    with watched(monkeypatch) as seen:
        quantize_model(run, Listener())
    written = open_quantized(run.folder)
    for layer in range(NUM_LAYERS):
        for group in (SEVEN[:3], SEVEN[3:4], SEVEN[4:6], SEVEN[6:]):
            names = [f"model.layers.{layer}.{name}" for name in group]
            amax = max(float(seen[name][1].abs().max()) for name in names)
            want = exact_global_scale(torch.tensor(amax, dtype=torch.float32) / (6 * 448))
            assert all(torch.equal(written.quantized(name).global_scale, want) for name in names)


def test_row_groups_are_quantized_by_their_own_hessians(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_for(tiny, tmp_path, "hessian=loss", "hessian.groups=3", "model.include=['*.1.mlp.gate_proj']")
    with watched(monkeypatch) as seen:
        quantize_model(run, Listener())
    ((path, (work, target)),) = seen.items()
    got = open_quantized(run.folder).quantized(path)
    assert work.sums is not None and work.sums.num_groups == 3
    rows = torch.arange(len(target)).tensor_split(3)
    for group, own in enumerate(rows):
        hessian = solve.block_hessians(work.sums.of_group(group)[0], 16)
        want = quantize(target[own], "nvfp4", 16, "hessian", hessian=hessian, global_scale=got.global_scale)
        assert torch.equal(got.codes[own], want.codes) and torch.equal(got.scales[own], want.scales)


# --- which layers -----------------------------------------------------------------------------------------------------


def test_everything_left_out_is_listed(tiny: SimpleNamespace, tmp_path: Path) -> None:
    run = run_for(tiny, tmp_path, "method=naive", "model.exclude=['*.0.*','*.v_proj']", "block_size=32")
    fields = quantize_model(run, Listener())
    excluded = {f"model.layers.0.{name}": "in model.exclude" for name in SEVEN}
    excluded |= {f"model.layers.{i}.self_attn.v_proj": "in model.exclude" for i in range(NUM_LAYERS)}
    outside = dict.fromkeys(["model.embed_tokens", "lm_head"], "outside the decoder layers")
    assert fields["left_out"] == excluded | outside
    assert fields["matrices"] == 3 * 6 and fields["layers"] == NUM_LAYERS
    written = open_quantized(run.folder)
    assert written.about["left_out"] == fields["left_out"]
    model = load_dequantized(run.folder, torch.float32)
    for name, parameter in tiny.model.named_parameters():
        path = name.removesuffix(".weight")
        same = torch.equal(model.get_parameter(name), parameter)
        assert same == (path in fields["left_out"] or "norm" in path), name


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.include=['*.nothing']"], r"model\.include: \*\.nothing matches no linear layer\. Names are like"),
        (["model.exclude=['*']"], "no linear layer is left to quantize"),
        (["hessian=loss", "hessian.groups=40"], r"hessian\.groups=40: .* has 32 outputs\. Use fewer"),
    ],
)
def test_wrong_choices_are_refused(tiny: SimpleNamespace, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        quantize_model(run_for(tiny, tmp_path, *overrides), Listener())
    assert "\n" not in str(caught.value)


def test_loss_weights_that_do_not_fit_are_left_out_with_a_warning(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job, "memory_of", lambda device: 1 << 16)
    run = run_for(tiny, tmp_path, "hessian=loss", f"cache.dir={tmp_path}/cache")
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.fullmatch(r"hessian=loss: the backward pass of tiny \(local\) would take about \d+ GiB, .*", warning)
    output = run_for(tiny, tmp_path, "hessian=output", f"cache.dir={tmp_path}/cache")
    assert run.config.hessian.weighting == "output" and (run.run_id, run.identity) == (output.run_id, output.identity)


def test_settings_that_contradict_each_other_are_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"calibrate\.alpha=0\.5: calibrate=parallel knows no quantized inputs"):
        run_for(tiny, tmp_path, "calibrate=parallel", "calibrate.alpha=0.5")
    with pytest.raises(ValueError, match="has no block size 64"):
        run_for(tiny, tmp_path, "block_size=64")


# --- interruptions ----------------------------------------------------------------------------------------------------


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize(
    "overrides",
    [
        ["hessian=loss"],
        ["calibrate=parallel", "hessian=output"],
        ["method=sse"],
        ["method=gptq", "hessian=kronecker", "method.rows=8"],
    ],
)
def test_a_continued_model_has_the_bytes_of_an_undisturbed_one(
    tiny: SimpleNamespace, tmp_path: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, run = run_for(tiny, tmp_path / "whole", *overrides), run_for(tiny, tmp_path / "parts", *overrides)
    quantize_model(whole, Listener())
    real = CheckpointWriter.write_layer
    solved: list[int] = []

    def interrupted(self: CheckpointWriter, index: int, *args: Any) -> None:
        solved.append(index)
        real(self, index, *args)
        if len(solved) in (1, 3):
            raise Interrupt

    monkeypatch.setattr(CheckpointWriter, "write_layer", interrupted)
    for _ in range(2):
        with pytest.raises(Interrupt):
            quantize_model(run, Listener())
        assert not run.folder.exists()
    fields = quantize_model(run, Listener())
    assert solved == [0, 1, 2, 3] and fields["resumed_layers"] == 3
    assert hashes(run.folder) == hashes(whole.folder)


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_run_leaves_a_record_and_is_skipped_when_finished(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = entry.ModelConsole()
    values = composed(tiny, tmp_path, "hessian=output")
    entry.run(values, console)
    said = capsys.readouterr().out
    assert "left out: model.embed_tokens, lm_head (outside the decoder layers)" in said
    for index in range(NUM_LAYERS):
        assert f"layer {index:>3} of {NUM_LAYERS}   output error" in said
    (path,) = tmp_path.glob("nvfp4-*/record.json")
    record = read_record_of(ModelRecord, path)
    assert record.status == "ok" and record.tokens == TOKENS and record.matrices == 7 * NUM_LAYERS
    assert record.output_error is not None and record.naive_output_error is not None and record.hidden_error
    assert record.output_error < record.naive_output_error
    assert {"read", "forward", "sums", "solve"} <= record.seconds.keys()
    lines = [json.loads(line) for line in (path.parent / "model" / "layers.jsonl").read_text().splitlines()]
    layers = [line["record"] for line in lines if line.get("record")]
    assert [layer["index"] for layer in layers] == list(range(NUM_LAYERS))
    assert {matrix["name"] for matrix in layers[1]["matrices"]} == {f"model.layers.1.{name}" for name in SEVEN}

    assert (tmp_path / "latest").resolve() == path.parent
    (tmp_path / "latest").unlink()
    before = path.read_bytes()
    entry.run(values, console)
    assert (tmp_path / "latest" / "model" / "quantkit.json").is_file()
    assert path.read_bytes() == before and "finished before" in capsys.readouterr().out
    assert console.counts == {"done": 1, "skipped": 1, "unsupported": 0, "failed": 0} and console.close() == 0


def test_a_failure_is_recorded_and_tried_again(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> Any:
        raise SourceError("no memory left; take fewer tokens")

    values, console = composed(tiny, tmp_path, "method=naive"), entry.ModelConsole()
    with monkeypatch.context() as patch:
        patch.setattr(walk.Walk, "_solve", fail)
        entry.run(values, console)
    (path,) = tmp_path.glob("nvfp4-*/record.json")
    record = read_record_of(ModelRecord, path)
    assert record.status == "failed" and record.reason == "no memory left; take fewer tokens"
    assert "failed: no memory left" in capsys.readouterr().err and console.close() == 1
    assert "Traceback" in (path.parent / "run.log").read_text()
    entry.run(values, console)
    assert read_record_of(ModelRecord, path).status == "ok"


def test_layers_without_a_model_are_refused(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        values = compose("quantize_model", overrides=["model=synthetic", "data=synthetic", f"output_dir={tmp_path}"])
    entry.run(values, entry.ModelConsole())
    assert "error: model=synthetic: it is a single layer" in capsys.readouterr().err
