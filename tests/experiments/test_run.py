"""A run from its configuration to its record, and sweeps of many runs."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import run as entry
from experiments import sweep
from experiments.config import CONF_DIR, REPO_ROOT, LayerConfig
from experiments.console import Console, _milliseconds
from experiments.measure import stages
from experiments.record import BLOCKS_NAME, WEIGHTS_NAME, RunRecord, read_record, read_records
from experiments.sources.resolved import Resolved
from experiments.sources.twins import Choice
from quantkit import QuantizedTensor, quantize
from quantkit.metrics import output_error, weight_error
from tests.experiments import tiny_models

SMALL = ("model=synthetic", "model.out_features=32", "model.in_features=64", "data=synthetic", "data.samples=4",
         "data.seq_len=16", "tracking=none", "timing=none")  # fmt: skip


def layer_inputs(resolved: Resolved, ahead: Sequence[LayerConfig] = ()) -> SimpleNamespace:
    """A layer of the configured shape, three quarters of its tokens for calibration."""
    config = resolved.config
    generator = torch.Generator().manual_seed(config.seed)
    width = config.model.in_features
    tokens = torch.randn(64, width, generator=generator) * torch.linspace(0.1, 2, width)
    weight = torch.randn(config.model.out_features, width, generator=generator).bfloat16() * config.model.std
    calibration, heldout = tokens[:48], tokens[48:]
    return SimpleNamespace(
        weight=weight,
        gram_calibration=calibration.T @ calibration,
        method_grams=(calibration.T @ calibration)[None],
        gram_heldout=heldout.T @ heldout if config.data.heldout else None,
        tokens_calibration=48,
        tokens_heldout=16 if config.data.heldout else 0,
        calibration=calibration,
        heldout=heldout,
        provenance=SimpleNamespace(
            model="synthetic",
            model_revision="1",
            model_origin=None,
            tokenizer="none",
            data="synthetic",
            data_hash="0",
            data_split="train",
            sequences=4,
            substituted=False,
        ),
    )


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the runs. Sources and inputs are fakes, because these tests are about the code around them."""
    monkeypatch.setattr("experiments.sources.resolved.choose_sources", Choice)
    monkeypatch.setattr("experiments.sources.resolved.source_identity", lambda *_: {"text": "0"})
    monkeypatch.setattr(stages, "load_layer_inputs", layer_inputs)
    return tmp_path / "runs"


def run(output: Path, *overrides: str, console: Console | None = None) -> list[RunRecord]:
    """The records in `output` after one more run."""
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        composed = compose("config", overrides=[*SMALL, f"output_dir={output}", *overrides])
    entry.run(composed, console or Console())
    return read_records(output)


def fail_with(error: BaseException) -> Callable[..., object]:
    def load(*_: object) -> object:
        raise error

    return load


@pytest.mark.parametrize("method", ["naive", "sse", "hessian"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_a_record_holds_what_the_library_gives(output: Path, format: str, method: str) -> None:
    (record,) = run(
        output, f"format={format}", f"method={method}", "model.std=1", "timing=default", "timing.min_run_s=0.001"
    )

    config = SimpleNamespace(
        seed=0,
        model=SimpleNamespace(in_features=64, out_features=32, std=1.0),
        data=SimpleNamespace(heldout=0.125),
    )
    inputs = layer_inputs(SimpleNamespace(config=config))  # type: ignore[arg-type]
    hessian = {"activations": inputs.calibration} if method == "hessian" else {}
    want = quantize(inputs.weight, format, 16, method, backend="reference", count_candidates=True, **hessian)
    naive = quantize(inputs.weight, format, 16, "naive", backend="reference")
    values = want.dequantize()
    assert record.status == "ok" and record.reason is None
    assert record.weight_error == pytest.approx(weight_error(inputs.weight, values))
    assert record.output_error == pytest.approx(output_error(inputs.calibration, inputs.weight, values), rel=1e-5)
    assert record.output_error_heldout == pytest.approx(output_error(inputs.heldout, inputs.weight, values), rel=1e-5)
    assert record.bits_per_weight == 4.5
    assert record.scales_moved == pytest.approx((want.scales != naive.scales).float().mean().item())
    assert (record.scales_moved == 0) == (method == "naive")
    assert want.candidates is not None
    assert record.candidates_mean == pytest.approx(want.candidates.float().mean().item())
    assert record.candidates_max == want.candidates.max()
    assert (record.tokens_calibration, record.tokens_heldout, record.sequences) == (48, 16, 4)
    assert (record.out_features, record.in_features, record.weight_dtype) == (32, 64, "bfloat16")
    assert record.global_scale == ("amax" if format == "nvfp4" else "none") and record.scale_rule is not None
    assert record.time_ms_median is not None and record.time_iterations is not None and record.time_ms_median > 0
    assert record.time_timer == "torch.utils.benchmark" and record.device == "cpu"
    assert (record.backend, record.requested_backend) == ("reference", "auto")
    assert record.versions["torch"] == importlib.metadata.version("torch") and record.commit and record.started_at
    assert record.config_hash and (output / record.run_id / "record.json").exists()


def test_the_published_protocol_holds_nothing_out(output: Path) -> None:
    (record,) = run(output, "data.heldout=0")
    assert record.output_error is not None and record.output_error_heldout is None and record.tokens_heldout == 0


def test_a_number_as_global_scale(output: Path) -> None:
    (record,) = run(output, "format.global_scale=0.5")
    assert record.global_scale == 0.5 and record.time_timer is None


@pytest.mark.parametrize("method", ["sse", "gptq"])
def test_a_searched_global_scale(output: Path, method: str) -> None:
    run(output, f"method={method}")
    both = {r.global_scale: r for r in run(output, f"method={method}", "format.global_scale=search")}
    amax, record = both["amax"], both["search"]
    assert record.status == "ok" and record.global_scale == "search" and record.run_id != amax.run_id
    assert record.weight_error is not None and amax.weight_error is not None
    assert method != "sse" or record.weight_error <= amax.weight_error


def test_a_global_scale_with_headroom(output: Path) -> None:
    (record,) = run(output, "format.global_scale=headroom")
    assert record.status == "ok" and record.global_scale == "headroom"


@pytest.mark.parametrize("method", ["naive", "sse", "hessian"])
def test_verify_counts_the_blocks_that_are_not_optimal(
    output: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (record,) = run(output, f"method={method}", "verify=true", "model.std=1")
    assert record.verified_blocks == 32 * 64 // 16
    assert record.verified_violations is not None and record.verified_worst_excess is not None
    assert (record.verified_violations == 0) == (method != "naive") and record.verified_wrong_codes == 0
    shown = capsys.readouterr().out
    assert f"verified: {record.verified_violations} of 128 blocks have a better scale" in shown


@pytest.mark.parametrize("method", ["gptq", "descent"])
def test_verify_compares_a_whole_layer_method_with_hessian(
    output: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(output, "method=hessian")
    both = {r.method: r for r in run(output, f"method={method}", "verify=true")}
    record, hessian = both[method], both["hessian"]
    assert record.verified_blocks is None and record.output_error is not None and hessian.output_error is not None
    assert record.verified_to_hessian == pytest.approx((record.output_error / hessian.output_error) ** 2, rel=1e-4)
    assert record.verified_to_hessian < 1
    assert f"calibration tokens {record.verified_to_hessian:.3f} × that of hessian" in capsys.readouterr().out


def test_a_finished_run_is_skipped_unless_forced(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = run(output)
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(AssertionError("loaded again")))
    console = Console()
    assert run(output, console=console) == [first]
    assert console.counts["skipped"] == 1 and console.close() == 0

    monkeypatch.setattr(stages, "load_layer_inputs", layer_inputs)
    (again,) = run(output, "force=true")
    assert again.run_id == first.run_id and again.sweep != first.sweep


def test_a_run_whose_sources_changed_is_not_finished(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first,) = run(output)
    monkeypatch.setattr("experiments.sources.resolved.source_identity", lambda *_: {"text": "1"})
    (second,) = run(output)
    assert second.run_id == first.run_id and second.config_hash != first.config_hash
    assert run(output) == [second]


def test_a_failed_run_leaves_its_traceback_and_is_tried_again(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(ValueError("data.path=/none:\n  no such folder")))
    console = Console()
    (record,) = run(output, console=console)
    assert (record.status, record.reason) == ("failed", "data.path=/none: no such folder")
    assert record.weight_error is None and record.commit and record.duration_s is not None
    log = (output / record.run_id / "run.log").read_text()
    assert "Traceback" in log and "no such folder" in log and "out_features: 32" in log
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert "no such folder" in line and "run.log" in line and "Traceback" not in out + err

    monkeypatch.setattr(stages, "load_layer_inputs", layer_inputs)
    (record,) = run(output, console=console)
    assert record.status == "ok"
    assert console.close() == 1  # one of the two failed


def test_a_bug_says_its_type_and_may_show_itself(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(KeyError("x")))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    (record,) = run(output)
    assert record.reason == "KeyError: 'x'"
    assert "Traceback" in capsys.readouterr().err


def test_triton_without_a_gpu_is_unsupported(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(AssertionError("loaded for nothing")))
    console = Console()
    (record,) = run(output, "backend=triton", "device=cpu", console=console)
    assert record.status == "unsupported" and record.reason is not None and "TRITON_INTERPRET=1" in record.reason
    assert console.close() == 0


@pytest.mark.parametrize(
    ("override", "known"),
    [
        ("block_size=48", "16, 32"),
        ("method.name=magic", "naive, sse, hessian"),
        ("format.name=fp3", "nvfp4"),
        ("backend.name=cuda", "reference"),
        ("format.scale_rule=floor", "scale rule"),
    ],
)
@pytest.mark.parametrize("method", ["naive", "hessian"])
def test_what_the_library_lacks_is_refused_before_loading(
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    override: str,
    known: str,
) -> None:
    """Without a record, which would stay among the runs for ever."""
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(AssertionError("loaded for nothing")))
    console = Console()
    assert run(output, f"method={method}", override, console=console) == [] and not output.exists()
    error = capsys.readouterr().err
    assert f" {method if 'method' not in override else 'magic'} " in error
    assert " error: " in error and known in error and error.count("\n") == 1
    assert console.close() == 1


def test_one_reason_is_told_once(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(ValueError("no hub: take the twins")))
    console = Console()
    for method in ("naive", "sse"):
        run(output, f"method={method}", console=console)
    first, second = capsys.readouterr().err.splitlines()
    assert "naive" in first and "failed: no hub: take the twins (traceback: " in first
    assert "sse" in second and "failed: as above (traceback: " in second


def test_a_failure_leaves_the_record_of_a_run_that_ended_well(
    output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its log and blocks stay, too, and W&B gets nothing."""
    (finished,) = run(output, "record.blocks=true")
    (folder,) = output.iterdir()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    tracked: list[RunRecord] = []
    monkeypatch.setattr(entry.tracking, "track", lambda record, *_: tracked.append(record))
    measure_time = stages.measure_time

    def gone(*_: object) -> None:
        raise ValueError("the device is gone")

    monkeypatch.setattr(stages, "measure_time", gone)
    console = Console()
    assert run(output, "force=true", "record.blocks=true", console=console) == [finished]
    shown = capsys.readouterr()
    assert "failed: the device is gone (traceback: " in shown.err and "again.log" in shown.err
    assert "earlier run that ended well is kept" in shown.out and tracked == []
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after.keys() - before.keys() == {"again.log"} and all(after[name] == before[name] for name in before)
    assert console.close() == 1

    monkeypatch.setattr(stages, "measure_time", measure_time)
    (again,) = run(output, "force=true", "record.blocks=true")
    assert again != finished and tracked == [again] and not (folder / "again.log").exists()


def test_the_record_of_other_sources_is_no_result_to_keep(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(output)
    monkeypatch.setattr("experiments.sources.resolved.source_identity", lambda *_: {"text": "1"})
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(ValueError("the model is gone")))
    (record,) = run(output)
    assert record.status == "failed"


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("")
    console = Console()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        composed = compose("config", overrides=[*SMALL, f"output_dir={tmp_path / 'runs'}"])
    entry.run(composed, console)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and str(tmp_path / "runs") in error and error.count("\n") == 1
    assert console.close() == 1


def test_sources_that_cannot_be_had(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run fails and has a failed record. A finished record stays."""
    monkeypatch.setattr("experiments.sources.resolved.choose_sources", fail_with(ValueError("no hub: take the twins")))
    (record,) = run(output)
    assert (record.status, record.reason) == ("failed", "no hub: take the twins")

    monkeypatch.setattr("experiments.sources.resolved.choose_sources", Choice)
    (finished,) = run(output)
    monkeypatch.setattr("experiments.sources.resolved.choose_sources", fail_with(ValueError("no hub: take the twins")))
    assert run(output) == [finished]


@pytest.mark.parametrize("override", ["block_size=0", "device=gpu"])
def test_a_refused_configuration_is_one_line(output: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    console = Console()
    assert run(output, override, console=console) == []
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert console.close() == 1


def test_an_interrupt_ends_the_run_without_a_record(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(output)
    assert read_records(output) == []


def test_a_damaged_record_counts_for_nothing(output: Path) -> None:
    (record,) = run(output)
    path = output / record.run_id / "record.json"
    for text in ("", "{}", json.dumps(record.to_dict() | {"schema_version": 0})):
        path.write_text(text)
        (again,) = run(output)
        assert again.status == "ok"


def test_wandb_is_offered_histograms_of_every_block(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[Any] = []
    monkeypatch.setattr(entry.tracking, "track", lambda *arguments: offered.append(arguments))
    run(output, "method=sse", "model.std=1", "tracking=wandb")
    monkeypatch.setattr(stages, "load_layer_inputs", fail_with(ValueError("no such layer")))
    run(output, "method=naive", "tracking=wandb")

    (record, config, _, folder, histograms), (failed, *_, nothing) = offered
    assert record.status == "ok" and config["block_size"] == 16 and folder == output
    made = histograms()
    assert made.keys() == {"scale_shift", "candidates", "relative_error"}
    assert all(sum(counts) == 32 * 64 // 16 for counts, _ in made.values())
    counts, edges = made["candidates"]
    assert record.candidates_max == edges[-1] - 0.5
    assert sum(c * (e + 0.5) for c, e in zip(counts, edges, strict=False)) / sum(counts) == record.candidates_mean
    assert failed.status == "failed" and nothing is None


def test_wandb_may_fail(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    (record,) = run(output, "tracking=wandb")
    assert record.status == "ok"
    assert "W&B did not log" in (output / record.run_id / "run.log").read_text()


# The command itself, on real synthetic sources


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPO_ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("sweep", [(), ("-m", "method=naive,sse")])
def test_a_command_that_could_write_nothing_says_so_in_one_line(sweep: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    done = command("experiments/run.py", *sweep, *SMALL, f"output_dir={tmp_path / 'runs'}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: output_dir={tmp_path / 'runs'} cannot be written")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failure_and_is_resumed(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    sweep = ["-m", "format=nvfp4,mxfp4", "method=naive,hessian", "model.in_features=64,40", *SMALL]
    sweep += [f"output_dir={output}"]
    sweep.remove("model.in_features=64")
    done = command("experiments/run.py", *sweep)
    assert done.returncode == 1, done.stderr
    assert (
        "8 runs" in done.stdout
        and "4 done, 4 failed" in done.stdout
        and f"experiments/report.py --runs {output}" in done.stdout
    )
    records = read_records(output)
    assert sorted(r.status for r in records) == ["failed"] * 4 + ["ok"] * 4
    assert len({r.sweep for r in records}) == 1
    errors = [line for line in done.stderr.splitlines() if "failed" in line and "(traceback: " in line]
    assert len(errors) == 4 and "Traceback" not in done.stderr
    text = "".join(path.read_text() for path in output.rglob("record.json"))
    assert socket.gethostname() not in text and str(REPO_ROOT) not in text

    # The second sweep has nothing to do, and imports no heavy package.
    sweep[3] = "model.in_features=64"
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['experiments/run.py', *{sweep!r}]\n"
        "try:\n"
        "    runpy.run_path('experiments/run.py', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    assert exit.code == 0, exit.code\n"
        "found = {'torch', 'wandb', 'transformers', 'datasets', 'quantkit'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    again = command("-c", code)
    assert again.returncode == 0, again.stderr
    assert "4 runs" in again.stdout and "4 skipped" in again.stdout
    assert [read_record(output / r.run_id / "record.json") for r in records] == records


def test_an_experiment_without_m_says_that_it_is_one_run(tmp_path: Path) -> None:
    done = command("experiments/run.py", "experiment=main", *SMALL, f"output_dir={tmp_path}")
    assert "Without -m this is one run only: the experiment's values of format, block_size, method" in done.stdout
    assert "1 run in" in done.stdout
    assert "Without -m" not in command("experiments/run.py", *SMALL, f"output_dir={tmp_path}").stdout


def test_help_is_quick_and_names_the_choices() -> None:
    shown = command("experiments/run.py", "--help")
    assert shown.returncode == 0
    assert "mxfp4, mxint4, nvfp4" in shown.stdout and "python experiments/report.py" in shown.stdout


def test_a_typo_is_hydras_own_message() -> None:
    shown = command("experiments/run.py", "-m", "formt=nvfp4,mxfp4")
    assert shown.returncode == 1 and "formt" in shown.stderr and "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.0123, "0.012 ms"), (1.234, "1.23 ms"), (12.34, "12.3 ms"), (123.4, "123 ms"), (1234.0, "1.23 s")],
)
def test_times_are_legible(milliseconds: float, text: str) -> None:
    assert _milliseconds(milliseconds) == text


@pytest.mark.parametrize("method", ["naive", "sse", "hessian"])
def test_blocks_are_kept_beside_the_record(output: Path, method: str) -> None:
    (record,) = run(output, f"method={method}", "model.std=1")
    assert record.scale_shifts is None and not (output / record.run_id / BLOCKS_NAME).exists()
    (record,) = run(output, f"method={method}", "model.std=1", "record.blocks=true")  # the same run, not finished yet
    blocks = pd.read_parquet(output / record.run_id / BLOCKS_NAME)

    assert len(blocks) == 32 * 64 // 16 and blocks["block"].max() == 3 and blocks["row"].max() == 31
    assert record.weight_error == pytest.approx((blocks.squared_error.sum() / blocks.squared_norm.sum()) ** 0.5)
    assert record.scales_moved == pytest.approx((blocks["shift"] != 0).mean())
    assert record.scale_shifts == {str(k): n for k, n in blocks["shift"].value_counts().sort_index().items()}
    assert ("candidates" in blocks) == (record.candidate_counts is not None)
    if record.candidate_counts is not None:
        assert record.candidates_mean == pytest.approx(blocks["candidates"].mean())
        assert sum(record.candidate_counts.values()) == len(blocks)
    assert (blocks["squared_output_error"] >= 0).all()

    console = Console()
    run(output, f"method={method}", "model.std=1", "record.blocks=true", console=console)
    run(output, f"method={method}", "model.std=1", console=console)
    assert console.counts["skipped"] == 2


@pytest.mark.parametrize(
    ("method", "format", "scale"),
    [("naive", "mxfp4", "none"), ("hessian", "nvfp4", "amax"), ("descent", "nvfp4", "0.01")],
)
def test_the_quantized_weight_is_kept_beside_the_record(output: Path, method: str, format: str, scale: str) -> None:
    overrides = [f"method={method}", f"format={format}", "model.std=1", f"format.global_scale={scale}"]
    (record,) = run(output, *overrides)
    path = output / record.run_id / WEIGHTS_NAME
    assert not path.exists()
    console = Console()
    run(output, *overrides, "record.weights=true", console=console)  # the same run, not finished yet
    assert console.counts["done"] == 1

    config = SimpleNamespace(
        seed=0,
        model=SimpleNamespace(in_features=64, out_features=32, std=1.0),
        data=SimpleNamespace(heldout=0.125),
    )
    inputs = layer_inputs(SimpleNamespace(config=config))  # type: ignore[arg-type]
    given = {} if method == "naive" else {"gram": inputs.gram_calibration}
    number = scale if scale in ("none", "amax") else float(scale)
    want = quantize(inputs.weight, format, 16, method, backend="reference", global_scale=number, **given)
    got = QuantizedTensor.load(path)
    for name in ("codes", "scales", "global_scale"):
        assert torch.equal(getattr(got, name), getattr(want, name))
    assert (got.format, got.block_size, got.method) == (want.format, want.block_size, want.method)
    assert got.nearest_codes == want.nearest_codes == (method != "descent")

    written = path.read_bytes()
    run(output, *overrides, "record.weights=true", console=console)
    run(output, *overrides, console=console)
    assert console.counts["skipped"] == 2
    run(output, *overrides, "record.weights=true", "force=true")
    assert path.read_bytes() == written


# The command itself: which layers one capture takes


@pytest.mark.slow
def test_a_sweep_captures_its_layers_in_one_pass(tmp_path: Path) -> None:
    tiny_models.qwen3(tmp_path / "model")
    tiny_models.write_text(tmp_path / "text")
    # Counted in the process: a pass over the text is one call of _one_pass.
    code = (
        "import runpy, sys\n"
        "from experiments.capture import forward\n"
        "passes, one = [], forward._Capture._one_pass\n"
        "forward._Capture._one_pass = lambda self, layers: (passes.append(len(layers)), one(self, layers))[1]\n"
        "sys.argv = ['experiments/run.py', *sys.argv[1:]]\n"
        "try:\n"
        "    runpy.run_path('experiments/run.py', run_name='__main__')\n"
        "except SystemExit as exit:\n"
        "    print('passes', passes, 'status', exit.code)\n"
    )
    common = ["-m", "experiment=layers", f"model.path={tmp_path / 'model'}", f"data.path={tmp_path / 'text'}",
              "model.dtype=float32", "data.seq_len=32", "data.samples=16", "format=nvfp4", "method=naive",
              f"output_dir={tmp_path / 'runs'}"]  # fmt: skip

    def passes(*more: str) -> str:
        done = command("-c", code, *common, *more, QUANTKIT_CACHE=str(tmp_path / "cache"))
        return done.stdout.splitlines()[-1] + done.stderr[-2000:] * (not done.stdout)

    modules = "layer.module=self_attn.q_proj,self_attn.k_proj,mlp.down_proj"
    assert passes(modules, "layer.index=0") == "passes [3] status 0"
    # Every layer of the model; what is cached is not captured again.
    assert passes(modules) == "passes [9] status 0"
    assert len(read_records(tmp_path / "runs")) == 12
    assert passes(modules, "method=sse", "block_size=16,32") == "passes [] status 0"
    # Another seed is another choice of sequences.
    assert passes(modules, "layer.index=0,1", "seed=1,2") == "passes [6, 6] status 0"
    # A layer that does not exist fails alone.
    assert passes("layer.module=mlp.up_proj", "layer.index=0,99") == "passes [1] status 1"


def test_a_full_disk_is_one_line(output: Path) -> None:
    """With a limit on file sizes, run.log and record.json fail half-way, and logging prints no traceback."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    console = Console()
    run(output, "seed=7")  # whatever is imported is, now
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
        try:
            records = run(output, console=console)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert len(records) == 1 and console.is_lost and console.close() == 1
    (line,) = error.getvalue().splitlines()
    assert line.startswith(f"error: output_dir={output} cannot be written: ") and "free some space" in line


def test_a_full_disk_is_found_before_the_first_run(tmp_path: Path) -> None:
    """The disk still accepts empty files."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limit[1]))
    try:
        with pytest.raises(
            SystemExit, match=r"error: output_dir=.* cannot be written: .*; free some space or choose another"
        ):
            sweep._check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.slow
def test_a_sweep_whose_disk_is_full_ends(tmp_path: Path) -> None:
    """The sweep ends at its first run. The second one does not start."""
    code = (
        "import resource, runpy, sys\n"
        "from experiments.console import Console\n"
        "real = Console.heading\n"
        "def heading(self, config):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"
        "    real(self, config)\n"
        "Console.heading = heading\n"
        f"sys.argv = ['experiments/run.py', '-m', 'method=naive,sse', *{list(SMALL)!r}, 'output_dir={tmp_path}']\n"
        "runpy.run_path('experiments/run.py', run_name='__main__')\n"
    )
    full = command("-B", "-c", code)
    assert full.returncode == 1 and "1 run in" in full.stdout and "1 failed" in full.stdout
    (line,) = full.stderr.splitlines()
    assert line.startswith(f"error: output_dir={tmp_path} cannot be written: File too large")
