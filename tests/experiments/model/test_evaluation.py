"""Whole evaluations of tiny models: against transformers itself, streamed, cached, paired, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from experiments import evaluate as door
from experiments import quantize_model
from experiments.config import CONF_DIR, REPO_ROOT, TrackingConfig, compose_as
from experiments.evaluate import evaluate
from experiments.evaluation_record import EvaluationRecord
from experiments.model import comparing, reference
from experiments.model.evaluate_settings import EvaluationConfig
from experiments.model.export import export
from experiments.model.job import resolve_model
from experiments.model.settings import QuantizeConfig
from experiments.record import read_record_of
from tests.experiments.model.conftest import evaluation, write_quantized
from tests.experiments.model.exported import quantized

SAME = ("kl_mean", "kl_low", "kl_high", "kl_median", "kl_p99", "kl_p999", "kl_max", "same_top", "ppl", "ppl_ratio")


def sequences(pair: SimpleNamespace, count: int = 12) -> torch.Tensor:
    """The evaluated sequences, made anew: the last ones of the seeded shuffle, in the text's order."""
    import random

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.folder)
    ids = tokenizer((pair.texts / "train.txt").read_text(), add_special_tokens=False)["input_ids"]
    available = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    order = list(range(len(available)))
    random.Random(0).shuffle(order)
    return available[sorted(order[-count:])]


def test_against_transformers_in_float64(pair: SimpleNamespace, tmp_path: Path) -> None:
    record = evaluate(evaluation(pair, tmp_path))
    ids = sequences(pair)
    with torch.no_grad():
        p, q = (model.double()(ids).logits[:, :-1].log_softmax(-1) for model in (pair.model, pair.other))
    pair.model.float(), pair.other.float()
    kl = (p.exp() * (p - q)).sum(-1)
    labels = ids[:, 1:].unsqueeze(-1)
    base, own = (-log.gather(-1, labels).mean() for log in (p, q))
    close = {"rel": 1e-4}  # the models run in float32
    assert record.kl_mean == pytest.approx(float(kl.mean()), **close) and record.kl_mean > 0.01
    assert record.kl_error == pytest.approx(float(kl.mean(1).std() / 12**0.5), **close)
    assert record.kl_median == pytest.approx(float(kl.median()), rel=1e-2)  # torch takes the lower of two
    assert record.kl_max == pytest.approx(float(kl.max()), **close)
    assert record.kl_low < record.kl_mean < record.kl_high
    assert record.same_top == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert record.reference_ppl == pytest.approx(float(base.exp()), **close)
    assert record.ppl == pytest.approx(float(own.exp()), **close)
    assert record.ppl_ratio == pytest.approx(float((own - base).exp()), **close)
    assert record.kl_by_position[0] == [0, pytest.approx(float(kl[:, 0].mean()), rel=1e-3)]
    assert (record.tokens, record.sequences, record.dtype, record.tf32) == (12 * 31, 12, "float32", False)


def test_the_record_is_kept_with_every_tokens_values(pair: SimpleNamespace, tmp_path: Path) -> None:
    record = evaluate(evaluation(pair, tmp_path))
    run = tmp_path / "runs" / record.run_id
    assert read_record_of(EvaluationRecord, run / "record.json") == record
    with np.load(run / "tokens.npz") as kept:
        assert kept["kl"].shape == (12, 31)
        assert kept["kl"].mean() == pytest.approx(record.kl_mean, rel=1e-5)
        assert kept["same_top"].mean() == pytest.approx(record.same_top)


def test_a_finished_evaluation_is_shown_again(pair: SimpleNamespace, tmp_path: Path, monkeypatch, capsys) -> None:
    config = evaluation(pair, tmp_path)
    first = evaluate(config)
    monkeypatch.setattr(door, "execute", lambda resolved: pytest.fail("evaluated again"))
    assert evaluate(config) == first
    assert "finished before; force=true evaluates again" in capsys.readouterr().out
    with pytest.raises(pytest.fail.Exception):
        evaluate(dataclasses.replace(config, seed=1))


def test_llama_cpp_scores_the_second_half(pair: SimpleNamespace, tmp_path: Path) -> None:
    """The same tokens' values, for the positions seq_len // 2 … seq_len − 2 alone."""
    everything = evaluate(evaluation(pair, tmp_path))
    half = evaluate(evaluation(pair, tmp_path, evaluate__protocol="llama_cpp"))
    with np.load(tmp_path / "runs" / everything.run_id / "tokens.npz") as kept:
        want = kept["kl"][:, 16:31]
    assert half.tokens == 12 * 15
    assert half.kl_mean == pytest.approx(want.mean(), rel=1e-5)
    assert half.kl_by_position[0][0] == 16


@pytest.mark.parametrize("rows", [1, 1 << 20])
def test_streaming_equals_one_batch(pair: SimpleNamespace, tmp_path: Path, monkeypatch, rows: int) -> None:
    """Batches, pieces and rows of logits change the order of float32 sums, by some 1e-6 of the logits."""
    whole = evaluate(evaluation(pair, tmp_path / "whole", evaluate__batch_tokens=12 * 32))
    monkeypatch.setitem(comparing.ROW_BYTES, "cpu", rows)
    monkeypatch.setattr(reference, "PIECE_BYTES", 1)
    streamed = evaluate(evaluation(pair, tmp_path / "streamed", evaluate__batch_tokens=32))
    assert len(list((tmp_path / "streamed/cache/states").rglob("*.safetensors"))) == 12
    for name in SAME:
        assert getattr(streamed, name) == pytest.approx(getattr(whole, name), rel=1e-4), name


def test_a_cached_reference_gives_the_same_bits(pair: SimpleNamespace, tmp_path: Path, monkeypatch) -> None:
    config = evaluation(pair, tmp_path)
    plain = evaluate(evaluation(pair, tmp_path / "none", cache__activations=False))
    assert not (tmp_path / "none/cache/states").exists()
    first = evaluate(config)
    monkeypatch.setattr(comparing, "in_batches", lambda *_: pytest.fail("the reference ran again"))
    again = evaluate(dataclasses.replace(config, force=True))
    for name in SAME:
        assert getattr(again, name) == getattr(first, name) == getattr(plain, name), name


@pytest.mark.parametrize("damage", ["bytes", "cut", "entry"])
def test_a_damaged_cache_is_found_and_made_again(pair: SimpleNamespace, tmp_path: Path, caplog, damage: str) -> None:
    config = evaluation(pair, tmp_path)
    first = evaluate(config)
    (piece,) = (tmp_path / "cache/states").rglob("*.safetensors")
    good = piece.read_bytes()
    if damage == "entry":
        piece.with_suffix(".json").write_text("{")
    else:
        piece.write_bytes(good[:-1] + b"\x55" if damage == "bytes" else good[:-9])
    with caplog.at_level(logging.WARNING):
        again = evaluate(dataclasses.replace(config, force=True))
    assert ("is missing or damaged; computing it again" in caplog.text) == (damage != "entry")
    assert piece.read_bytes() == good
    assert again.kl_mean == first.kl_mean


def test_other_text_or_reference_is_another_cache_entry(pair: SimpleNamespace, tmp_path: Path) -> None:
    evaluate(evaluation(pair, tmp_path))
    evaluate(evaluation(pair, tmp_path, data__samples=8))
    evaluate(evaluation(pair, tmp_path, reference=str(pair.quantized)))
    assert len(list((tmp_path / "cache/states").glob("*-*"))) == 3


def test_a_model_against_itself_lost_nothing(pair: SimpleNamespace, tmp_path: Path) -> None:
    record = evaluate(evaluation(pair, tmp_path, reference=str(pair.quantized)))
    assert (record.kl_mean, record.kl_max, record.same_top, record.ppl_ratio) == (0, 0, 1, 1)


def test_a_paired_difference(pair: SimpleNamespace, tmp_path: Path) -> None:
    """Two models that differ in one layer's method: the difference of the means, with a far narrower interval."""
    naive = evaluate(evaluation(pair, tmp_path))
    write_quantized(pair, tmp_path / "mixed", lambda name: "sse" if "layers.3.mlp.up_proj" in name else "naive")
    run = tmp_path / "runs" / naive.run_id
    mixed = evaluate(evaluation(pair, tmp_path, model__path=str(tmp_path / "mixed"), paired=str(run)))
    assert mixed.paired_with == naive.run_id
    assert mixed.paired_mean == pytest.approx(mixed.kl_mean - naive.kl_mean, rel=1e-4)
    assert mixed.paired_low < mixed.paired_mean < mixed.paired_high
    assert mixed.paired_high - mixed.paired_low < 0.5 * (naive.kl_high - naive.kl_low)


def test_only_the_same_sequences_can_be_paired(pair: SimpleNamespace, tmp_path: Path) -> None:
    run = tmp_path / "runs" / evaluate(evaluation(pair, tmp_path)).run_id
    with pytest.raises(ValueError, match="it was evaluated on other sequences, another reference or another protocol"):
        evaluate(evaluation(pair, tmp_path, paired=str(run), data__samples=8))
    with pytest.raises(ValueError, match=r"paired=.*: no finished evaluation there .* such as one of results/runs"):
        evaluate(evaluation(pair, tmp_path, paired=str(tmp_path)))


def test_one_layer_at_a_time(pair: SimpleNamespace, tmp_path: Path) -> None:
    layers = evaluate(evaluation(pair, tmp_path, evaluate__layers=True, evaluate__layers_samples=4)).kl_by_layer
    assert [row["layer"] for row in layers[:2]] == [f"model.layers.0.self_attn.{n}_proj" for n in "qk"]
    assert len(layers) == 4 * 7 and all(row["mean"] > 0 for row in layers)
    by = {"evaluate__layers": True, "evaluate__layers_by": "decoder", "evaluate__layers_samples": 4}
    decoder = evaluate(evaluation(pair, tmp_path, **by)).kl_by_layer
    assert [row["layer"] for row in decoder] == [f"layer {n}" for n in range(4)]
    model = pair.model
    with torch.no_grad():
        ids = sequences(pair)[:4]
        p = model(ids).logits[:, :-1].log_softmax(-1)
        before = model.model.layers[2]
        model.model.layers[2] = pair.other.model.layers[2]
        q = model(ids).logits[:, :-1].log_softmax(-1)
        model.model.layers[2] = before
    assert decoder[2]["mean"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_a_folder_may_say_what_it_was_made_from(pair: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(pair.quantized, folder)
    asked = evaluation(pair, tmp_path, model__path=str(folder), reference=None)
    with pytest.raises(ValueError, match=r"copy does not say what it was made from.*reference=FOLDER"):
        evaluate(asked)
    (folder / "README.md").write_text("---\nbase_model:\n- some/model\n---\n")
    with pytest.raises(ValueError, match=r"some/model"):  # which no hub gives here
        evaluate(asked)
    (folder / "quantkit.json").write_text(json.dumps({"about": {"model": "tiny (local)"}}))
    with pytest.raises(ValueError, match=r"was made from tiny \(local\): name its folder, reference=FOLDER"):
        evaluate(asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "qwen4"}, r"reference=qwen4: no such folder, and no model of conf/model \(bundle, "),
        ({"model__path": None}, r"model.path is not set. Name the folder to evaluate"),
        ({"model__path": "nowhere"}, r"model.path=nowhere: no such folder"),
        ({"data__seq_len": 9000}, r"fewer than one sequence of data.seq_len=9000. Use a longer text"),
        ({"evaluate__dtype": "int4"}, r"evaluate.dtype=int4: use bfloat16, float16 or float32"),
        ({"evaluate__protocol": "half"}, r"evaluate.protocol=half: use all or llama_cpp"),
    ],
)
def test_what_is_refused(pair: SimpleNamespace, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(evaluation(pair, tmp_path, **changes))


def test_an_empty_text_is_refused(pair: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "test.txt").write_text("")
    with pytest.raises(ValueError, match=r"has 0 tokens, fewer than one sequence.*Use a longer text"):
        evaluate(evaluation(pair, tmp_path, data__path=str(tmp_path / "test.txt")))


def test_another_vocabulary_is_refused(pair: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path / "wide"
    config = Qwen3Config.from_pretrained(pair.folder)
    config.vocab_size = 320
    Qwen3ForCausalLM(config).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"vocabularies differ: 300 logits a token of the reference, 320 of the model"):
        evaluate(evaluation(pair, tmp_path, model__path=str(folder)))
    shutil.copytree(pair.quantized, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"different vocabularies: their tokenizers make other tokens of the text"):
        evaluate(evaluation(pair, tmp_path, model__path=str(tmp_path / "other")))


def test_a_model_without_finite_logits_is_refused(pair: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(pair.quantized, tmp_path / "nan")
    path = tmp_path / "nan" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the model's logits are not all finite.*evaluate.dtype=float32"):
        evaluate(evaluation(pair, tmp_path, model__path=str(tmp_path / "nan")))


def test_missing_tensors_are_not_made_up(pair: SimpleNamespace, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(pair.quantized, tmp_path / "less")
    path = tmp_path / "less" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors \(model.layers.1.mlp.up_proj.weight …\), so its weights"):
        evaluate(evaluation(pair, tmp_path, model__path=str(tmp_path / "less")))


def test_the_composed_configuration() -> None:
    config = compose_as("evaluate", EvaluationConfig, ["model.path=x", "reference=y", "evaluate.layers=true"])
    assert (config.data.split, config.data.samples, config.data.seq_len) == ("test", 128, 512)
    assert config.evaluate.resamples >= 2000 and config.evaluate.dtype == "float32"


def test_a_failed_evaluation_leaves_a_record_and_a_log(pair: SimpleNamespace, tmp_path: Path) -> None:
    config = evaluation(pair, tmp_path, data__seq_len=9000)
    with pytest.raises(ValueError, match="Use a longer text"):
        evaluate(config)
    (path,) = (tmp_path / "runs").glob("*/record.json")
    record = read_record_of(EvaluationRecord, path)
    assert record.status == "failed" and "Use a longer text" in str(record.reason) and record.kl_mean is None
    assert "Traceback" in path.with_name("run.log").read_text()


def test_a_forced_evaluation_that_fails_keeps_the_earlier_record(
    pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluation(pair, tmp_path)
    first = evaluate(config)
    monkeypatch.setattr(door, "execute", lambda resolved: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(dataclasses.replace(config, force=True))
    assert read_record_of(EvaluationRecord, tmp_path / "runs" / first.run_id / "record.json") == first


def test_the_command(pair: SimpleNamespace, tmp_path: Path) -> None:
    """As a user types it: a sweep over two folders, one of which is not there."""
    command = [
        *(sys.executable, "experiments/evaluate.py", "-m", f"model.path={pair.quantized},{tmp_path}/none"),
        *(f"reference={pair.folder}", f"data.path={pair.texts}", "data.split=train", "data.seq_len=32"),
        *(
            "data.samples=4",
            "tracking=none",
            "device=cpu",
            f"output_dir={tmp_path}/runs",
            f"cache.dir={tmp_path}/cache",
        ),
    ]
    done = subprocess.run(command, cwd=REPO_ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "naive against tiny (local)" in done.stdout and "nats a token" in done.stdout
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: model.path={tmp_path}/none: no such folder")
    wrong = subprocess.run([*command[:2], "protocol=all"], cwd=REPO_ROOT, capture_output=True, text=True, timeout=100)
    assert wrong.returncode == 1 and "did you mean evaluate.protocol=all?" in wrong.stderr


def test_an_evaluation_is_mirrored(pair: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EvaluationRecord] = []
    monkeypatch.setattr(door, "track_evaluation", lambda record, settings, tracking, folder: seen.append(record))
    config = dataclasses.replace(evaluation(pair, tmp_path), tracking=TrackingConfig("wandb"))
    record = evaluate(config)
    assert seen == [record]


def test_quantkits_own_folder_says_what_it_is(
    pair: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From quantize_model.py to the record: the label, the reference's remedy, bits, time, and the shared text."""
    values = [
        *(f"model.path={pair.folder}", "model.dtype=float32", f"data.path={pair.texts}", "data.seq_len=32"),
        *("data.samples=12", f"cache.dir={pair.cache}", f"output_dir={tmp_path}", "method=sse", "calibrate=parallel"),
        *("hessian=output", "device=cpu", "tracking=none"),
    ]
    made = resolve_model(compose_as("quantize_model", QuantizeConfig, values))
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        quantize_model.run(compose("quantize_model", overrides=values), quantize_model.ModelConsole())
    asked = evaluation(pair, tmp_path, model__path=str(made.run_dir))  # of the run, which holds the model's folder
    record = evaluate(asked)
    assert (record.model, record.format, record.block_size, record.method) == (made.run_id, "nvfp4", 16, "sse")
    assert record.bits_per_weight == 4.5 and record.quantize_s > 0 and record.calibrated_on == 0
    write_quantized(pair, tmp_path / "sse", lambda name: "sse")
    plain = evaluate(evaluation(pair, tmp_path, model__path=str(tmp_path / "sse")))
    assert record.kl_mean == pytest.approx(plain.kl_mean, rel=0.2)  # q, k, v and gate, up share a global scale
    with caplog.at_level(logging.WARNING):
        everything = evaluate(evaluation(pair, tmp_path, model__path=str(made.run_dir), data__samples=10_000))
    assert everything.calibrated_on == 12
    assert "was calibrated on 12 of these" in caplog.text and "use another text, split" in caplog.text
    with pytest.raises(ValueError, match=r"was made from tiny \(local\): name its folder, reference=FOLDER"):
        evaluate(dataclasses.replace(asked, reference=None))


@pytest.mark.parametrize("layout", ["compressed_tensors", "modelopt"])
def test_an_export_lost_what_its_source_lost(pair: SimpleNamespace, tmp_path: Path, layout: str) -> None:
    """An export's codes are the same, read by their format; and as transformers reads them, where it does."""
    source = quantized(tmp_path, "qwen3", "nvfp4")
    folder = tmp_path / layout
    export(source, folder, layout)
    asked = evaluation(pair, tmp_path, reference=str(tmp_path / "qwen3-source"), data__samples=4)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, path=str(source.folder)))
    want = evaluate(asked)
    asked = dataclasses.replace(asked, model=dataclasses.replace(asked.model, path=str(folder)))
    assert evaluate(asked).kl_mean == want.kl_mean
    by_transformers = dataclasses.replace(asked, evaluate=dataclasses.replace(asked.evaluate, reader="transformers"))
    if layout == "modelopt":
        with pytest.raises(ValueError, match="cannot be loaded by transformers"):
            evaluate(by_transformers)
    else:
        # compressed-tensors computes in the dtype in which the model is stored.
        with pytest.raises(ValueError, match=r"does not compute in float32.*evaluate.dtype=bfloat16"):
            evaluate(by_transformers)
        half = [
            dataclasses.replace(c, evaluate=dataclasses.replace(c.evaluate, dtype="bfloat16"))
            for c in (asked, by_transformers)
        ]
        assert evaluate(half[0]).kl_mean == evaluate(half[1]).kl_mean


def test_the_first_sequences_of_a_text(pair: SimpleNamespace, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    record = evaluate(evaluation(pair, tmp_path, evaluate__order="first", data__samples=3))
    assert record.data_split == "train, from its beginning"
    text = (pair.texts / "train.txt").read_text()
    ids = AutoTokenizer.from_pretrained(pair.folder)(text, add_special_tokens=False)["input_ids"][: 3 * 32]
    with torch.no_grad():
        log = pair.model(torch.tensor(ids).view(3, 32)).logits[:, :-1].log_softmax(-1)
    labels = torch.tensor(ids).view(3, 32)[:, 1:, None]
    assert record.reference_ppl == pytest.approx(float((-log.gather(-1, labels).mean()).exp()), rel=1e-4)
