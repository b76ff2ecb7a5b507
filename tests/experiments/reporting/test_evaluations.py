"""Evaluations of whole models: their rows and tables, figures' data, collection and the generated blocks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import report
from experiments.evaluation_record import PEER_LABELS, EvaluationRecord
from experiments.reporting import figures
from experiments.reporting.evaluations import (
    evaluation_summary,
    evaluation_tables,
    kl_layers,
    label_of,
    make_rows,
    peer_table,
)
from experiments.reporting.figure_data import Sources

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = {
    "method_settings": {}, "calibrate": "sequential", "alpha": 0.5, "residual_alpha": 0.5, "hessian_weighting": "loss",
    "hessian_groups": 1, "sequences": 128, "seq_len": 512, "seed": 0,
}  # fmt: skip


def make(method: str | None = "gptq", kl: float = 0.03, **changes: Any) -> EvaluationRecord:
    record = EvaluationRecord(
        run_id="", sweep="s", status="ok", reason=None, model=f"nvfp4-b16-{method}", reference="tiny",
        reference_revision="r", reference_origin="From a 4-bit release.", format="nvfp4", block_size=16,
        method=method, settings=SETTINGS, bits_per_weight=4.5, quantize_s=30.0, quantize_device="Some GPU",
        data="text", data_hash="d", data_split="test", calibrated_on=0, seq_len=512, sequences=128, tokens=65408,
        protocol="all", seed=0, resamples=10000, dtype="float32", tf32=False, device="cuda", device_name="Some GPU",
        kl_mean=kl, kl_error=kl / 60, kl_low=0.97 * kl, kl_high=1.03 * kl, kl_median=kl / 2, kl_p99=8 * kl,
        kl_p999=20 * kl, kl_max=100 * kl, same_top=0.9, reference_ppl=26.53, ppl=27.0, ppl_ratio=1.0177,
        ppl_ratio_low=1.016, ppl_ratio_high=1.019, kl_by_position=[[0, 2 * kl], [1, kl], [2, kl / 2]],
        commit="0123456789abcdef", started_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    record = replace(record, **changes)
    return replace(record, run_id=record.run_id or f"{record.model}-{abs(hash(record.to_json())):x}")


def several() -> list[EvaluationRecord]:
    other = make(None, 0.05, model="theirs", settings=None, bits_per_weight=None, quantize_s=None)
    return [
        make("naive", 0.2),
        make("gptq", 0.03),
        other,
        make("gptq", 0.07, format="mxfp4", block_size=32, bits_per_weight=4.25, model="mxfp4-b32-gptq"),
    ]


def test_one_line_of_a_table() -> None:
    (table,) = evaluation_tables([make("gptq", 0.0272)])
    assert table.title == "tiny on text"
    assert table.frame.to_dict("records") == [
        {
            "Format": "NVFP4 16",
            "Method": "GPTQ, loss-weighted, 128 × 512 tokens",
            "Bits": "4.50",
            "KL, mean": "0.0272 [0.0264, 0.0280]",
            "Median": "0.0136",
            "99 %": "0.218",
            "99.9 %": "0.54",
            "Largest": "2.7",
            "Same top token": "90.0 %",
            "Perplexity": "27.00",
            "Ratio": "1.0177 [1.0160, 1.0190]",
            "Time, s": "30",
        }
    ]
    notes = " ".join(table.notes)
    for said in ("From a 4-bit release.", "128 × 512 tokens, 65,408 scored", "26.53", "TF32 off", "0123456789"):
        assert said in notes


def test_methods_without_calibration_are_named_alone() -> None:
    assert label_of(make("naive")) == "Naive"
    assert label_of(make("gptq", settings=SETTINGS | {"calibrate": "parallel", "hessian_weighting": "output"})) == (
        "GPTQ, parallel, 128 × 512 tokens"
    )
    assert label_of(make("descent", settings=SETTINGS | {"method_settings": {"sweeps": 2}})).endswith(
        "2 sweeps, 128 × 512 tokens"
    )
    assert label_of(make(None, model="theirs")) == "theirs"
    assert label_of(make("gptq", label="mine")) == "mine"


def test_seeds_are_one_row_with_their_spread() -> None:
    runs = [
        make("gptq", kl, model=f"seed-{kl}", settings=SETTINGS | {"seed": i}) for i, kl in enumerate((0.026, 0.028))
    ]
    (table,) = evaluation_tables(runs)
    assert table.frame["KL, mean"].tolist() == ["0.0270 (2 seeds, 0.0260 to 0.0280)"]


def test_runs_of_one_seed_that_are_not_named_apart_are_no_spread() -> None:
    (table,) = evaluation_tables([make(kl=0.026, model="a-111"), make(kl=0.028, model="a-222")])
    assert table.frame["KL, mean"].str[:6].tolist() == ["0.0280", "0.0260"]
    assert table.frame["Method"].str[-5:].tolist() == ["(222)", "(111)"]


def test_settings_that_differ_are_named() -> None:
    told = {"calibrate_damping": 0.1, "weight_exponent": 0.5, "global_scale": "search", "init": "x"}
    assert label_of(make(settings=SETTINGS | told)) == (
        "GPTQ, loss-weighted, targets' damping 0.1, weights^0.5, global scale search, from another model's codes, "
        "128 × 512 tokens"
    )
    assert label_of(make(settings=SETTINGS | {"alpha": 0.75, "residual_alpha": 0})) == (
        "GPTQ, loss-weighted, α 0.75, residual α 0, 128 × 512 tokens"
    )
    two_sided = {"hessian_outputs": True, "rows": 32, "output_damping": 0.3, "hessian_matmul": "tf32"}
    assert label_of(make(settings=SETTINGS | two_sided)) == "GPTQ, two-sided in TF32, 128 × 512 tokens"
    assert label_of(make(settings=SETTINGS | two_sided | {"rows": 96, "output_damping": 0.1})) == (
        "GPTQ, two-sided in TF32, panels of 96 rows, output damping 0.1, 128 × 512 tokens"
    )
    same = {"calibrate_damping": None, "weight_exponent": 1.0, "global_scale": "amax", "init": None}
    assert label_of(make(settings=SETTINGS | same)) == label_of(make())


def test_the_newer_of_two_evaluations_counts() -> None:
    old, new = make(kl=0.5), make(kl=0.03, started_at="2026-02-01T00:00:00+00:00")
    ((row,),) = make_rows([new, old]).values()
    assert row.runs == (new,)


@pytest.mark.parametrize(
    "changes",
    [{"reference": "other"}, {"data_hash": "e"}, {"protocol": "llama_cpp"}, {"sequences": 64}, {"seq_len": 256}],
)
def test_no_table_mixes_subjects(changes: dict[str, Any]) -> None:
    assert len(evaluation_tables([make(), make(**changes)])) == 2


def test_rows_are_in_the_order_of_formats_and_of_falling_kl() -> None:
    (table,) = evaluation_tables(several())
    assert table.frame["Format"].tolist() == ["NVFP4 16", "NVFP4 16", "NVFP4 16", "MXFP4 32"]
    assert table.frame["KL, mean"].str[:6].tolist() == ["0.2000", "0.0500", "0.0300", "0.0700"]


def test_a_table_warns_of_models_that_saw_the_text() -> None:
    (table,) = evaluation_tables([make(calibrated_on=3)])
    assert any("calibrated on some of these sequences" in note for note in table.notes)


def test_the_summary_has_the_subject_with_the_most_rows() -> None:
    summary = evaluation_summary([*several(), make(reference="other", kl=0.9)])
    assert summary is not None and summary.title.startswith("tiny, all linear layers")
    assert list(summary.frame) == ["Format", "Method", "KL, nats a token", "Perplexity", "Same top token"]
    assert len(summary.frame) == 4
    worse = evaluation_summary([*several(), make("gptq", 0.04, model="w", settings=SETTINGS | {"alpha": 1.0})])
    assert worse is not None and worse.frame["KL, nats a token"].tolist() == summary.frame["KL, nats a token"].tolist()
    tools = [peer("modelopt_max", 0.3), peer("modelopt_mse", 0.2), peer("autoround", 0.1)]
    beside = evaluation_summary([*several(), *tools])
    assert beside is not None
    assert [m for m in beside.frame["Method"] if "(1.0)" in m] == [
        "ModelOpt, MSE (1.0)",
        "AutoRound, learned rounding (1.0)",
    ]
    assert evaluation_summary([]) is None


def peer(tool: str, kl: float, version: str = "1.0", **settings: Any) -> EvaluationRecord:
    label = f"{PEER_LABELS[tool]} ({version})"
    return make(None, kl, model=tool, label=label, settings={"tool": tool} | settings, quantize_s=12.3)


def test_other_tools_stand_beside_quantkit_told_apart_by_method_and_version() -> None:
    theirs = [
        peer("modelopt_max", 0.049, "0.47.0"),
        peer("modelopt_gptq", 0.04, "0.47.0", sequences=256, seq_len=512),
        peer("modelopt_max", 0.051, "0.48.0"),
    ]
    table = peer_table([*several(), *theirs, make(reference="other"), peer("autoround", 1.0), make(protocol="x")])
    assert table is not None and table.title == "tiny, NVFP4 16, other tools beside quantkit"
    assert table.frame["Method"].tolist() == [
        "AutoRound, learned rounding (1.0)",
        "quantkit: Naive",
        "ModelOpt, max (0.48.0)",
        "theirs",
        "ModelOpt, max (0.47.0)",
        "ModelOpt, GPTQ (0.47.0)",
        "quantkit: GPTQ, loss-weighted, 128 × 512 tokens",
    ]
    assert table.frame["Calibration"].tolist() == ["–", "–", "–", "–", "–", "256 × 512", "128 × 512"]
    assert table.frame["KL, nats a token"].tolist()[-2:] == ["0.0400 [0.0388, 0.0412]", "0.0300 [0.0291, 0.0309]"]
    assert table.frame["Time, s"].tolist() == ["12", "30", "12", "–", "12", "12", "30"]
    assert table.notes[-1] == (
        "Not run: llm-compressor, round to nearest; llm-compressor, GPTQ; ModelOpt, MSE; ModelOpt, Local-Hessian"
    )
    assert peer_table(several()) is None


LAYERS = [{"layer": f"model.layers.{i}.mlp.{n}_proj", "mean": 0.001 * (i + 1), "error": 1e-5}
          for i in range(2) for n in ("up", "down")]  # fmt: skip


def test_layers_are_taken_apart() -> None:
    frame = kl_layers([make(kl_by_layer=LAYERS)])
    assert frame["layer_index"].tolist() == [0, 0, 1, 1]
    assert frame["layer_module"].tolist() == ["mlp.up_proj", "mlp.down_proj"] * 2
    decoder = kl_layers([make(kl_by_layer=[{"layer": "layer 7", "mean": 0.1, "error": None}])])
    assert (decoder["layer_index"].tolist(), decoder["layer_module"].tolist()) == ([7], [""])


KL_PLOTS = [plot for plot in figures.FIGURES if plot.name.startswith("kl_")]


@pytest.mark.parametrize("plot", KL_PLOTS, ids=lambda plot: plot.name)
def test_figures_are_drawn_alike_twice(plot: figures.Plot) -> None:
    frame = plot.data(Sources({}, evaluations=[*several(), make("sse", 0.1, kl_by_layer=LAYERS)]))
    assert len(frame) and frame["kl_mean"].gt(0).all()
    assert plot.pictures(frame) == plot.pictures(frame)
    assert "From a 4-bit release." in plot.text(frame) and "Commit 0123456789." in plot.text(frame)


def test_points_leave_out_what_has_no_size_or_time() -> None:
    points = {plot.name: plot.data(Sources({}, evaluations=several())) for plot in KL_PLOTS}
    assert len(points["kl_bits"]) == len(points["kl_time"]) == 3 and points["kl_position"]["name"].nunique() == 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with one page that has both blocks, and the records of the repository's main table."""
    (tmp_path / "results" / "records").mkdir(parents=True)
    shutil.copy(ROOT / "results" / "records" / "main.jsonl", tmp_path / "results" / "records")
    blocks = [f"<!-- {word} GENERATED: {name} -->" for name in ("model_summary", "model") for word in ("BEGIN", "END")]
    (tmp_path / "README.md").write_text("\n\n".join(blocks) + "\n")
    return tmp_path


def runs(folder: Path, records: list[EvaluationRecord]) -> Path:
    for record in records:
        record.write(folder / record.run_id)
    return folder


def test_one_command_collects_and_one_rebuilds(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs(tmp_path / "runs", several())
    assert report.main(["--collect", "model", "--from", str(source)], root) == 0
    assert "model.jsonl: 4 records, 4 new, 0 replaced" in capsys.readouterr().out
    assert report.main([], root) == 0
    page = (root / "README.md").read_text()
    assert page.count("| NVFP4 16 |") == 6 and "KL to the model itself" in page
    assert (root / "results/evaluations/model.csv").read_text().startswith("run_id,sweep,status,reason,model,label,")
    assert (root / "results" / "figures" / "kl_bits.png").exists()
    assert report.main(["--check"], root) == 0
    (root / "README.md").write_text(page.replace("0.0300", "0.0200"))
    assert report.main(["--check"], root) == 1


def test_collecting_again_replaces_and_keeps_what_ended_well(root: Path, tmp_path: Path, capsys: Any) -> None:
    first = make(run_id="same", kl=0.03)
    report.main(["--collect", "model", "--from", str(runs(tmp_path / "a", [first]))], root)
    failed = replace(first, status="failed", reason="no memory", kl_mean=None)
    report.main(["--collect", "model", "--from", str(runs(tmp_path / "b", [failed]))], root)
    assert "1 without a result, left out" in capsys.readouterr().out
    report.main(["--collect", "model", "--from", str(runs(tmp_path / "c", [replace(first, kl_mean=0.02)]))], root)
    (line,) = (root / "results/records/model.jsonl").read_text().splitlines()
    assert json.loads(line)["kl_mean"] == 0.02


def test_runs_prints_the_tables_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = runs(tmp_path / "runs", several())
    assert report.main(["--runs", str(source)], tmp_path) == 0
    out = capsys.readouterr().out
    assert "tiny on text" in out and "0.0300 [0.0291, 0.0309]" in out
    assert (source / "table.csv").exists() and "| MXFP4 32 |" in (source / "table.md").read_text()


def test_without_evaluations_a_block_says_what_to_run(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([], root) == 1
    assert "run `python experiments/evaluate.py model.path=FOLDER`" in capsys.readouterr().err
    assert report.main(["--collect", "model", "--from", str(root)], root) == 1
    assert "has no evaluation that can be read" in capsys.readouterr().err


def test_figures_without_evaluations_go(root: Path, tmp_path: Path) -> None:
    report.main(["--collect", "model", "--from", str(runs(tmp_path / "runs", several()))], root)
    report.main([], root)
    (root / "README.md").write_text("")
    (root / "results/records/model.jsonl").unlink()
    assert report.main([], root) == 0
    assert not (root / "results/evaluations/model.csv").exists()
    assert not list((root / "results" / "figures").glob("kl_*"))
