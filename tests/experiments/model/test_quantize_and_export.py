"""quantize_model.py with export=…: quantized, exported, checked, read back as model.path, evaluated."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir

from experiments import quantize_model as entry
from experiments.config import CONF_DIR, ModelConfig, ModelSource
from experiments.evaluate import evaluate
from experiments.evaluation_record import EvaluationRecord
from experiments.files import SourceError
from experiments.model import exportable, gguf_file, gguf_vocabulary, job
from experiments.model.export import read_verdict
from experiments.model_record import ModelRecord
from experiments.record import read_record_of
from quantkit.layouts import LAYOUTS, exact_global_scale, get_layout
from tests.experiments.model.conftest import evaluation
from tests.experiments.model.exported import build
from tests.experiments.model.test_walk import composed, run_for
from tests.experiments.tiny_models import SEVEN

pytestmark = pytest.mark.usefixtures("one_thread")


def quantized(tiny: SimpleNamespace, output: Path, *overrides: str) -> tuple[ModelRecord, Path, entry.ModelConsole]:
    console = entry.ModelConsole()
    entry.run(composed(tiny, output, *overrides), console)
    folder = next(path.parent for path in output.glob("*/record.json"))
    return read_record_of(ModelRecord, folder / "record.json"), folder, console


def evaluated(tiny: SimpleNamespace, folder: Path, root: Path) -> EvaluationRecord:
    pair = SimpleNamespace(quantized=folder, texts=tiny.texts, folder=tiny.folder)
    return evaluate(evaluation(pair, root, evaluate__dtype="bfloat16"))


def test_the_choices_are_the_layouts() -> None:
    from experiments.model.settings import Export

    assert {str(choice) for choice in Export} == set(LAYOUTS)


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("compressed_tensors", ("format=nvfp4", "block_size=16")),
        ("compressed_tensors", ("format=mxfp4", "block_size=32")),
        ("modelopt", ("format=nvfp4", "block_size=16")),
        ("gguf", ("format=mxfp4", "block_size=32")),
    ],
)
def test_a_model_goes_through_export_check_import_and_evaluation(
    tiny: SimpleNamespace, tmp_path: Path, layout: str, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    record, folder, console = quantized(tiny, tmp_path / "out", f"export={layout}", "hessian=output", *overrides)
    assert record.status == "ok" and console.close() == 0
    verdict = record.exports[layout]
    assert verdict["equal"] == verdict["weights"] == 28 and verdict["problems"] == verdict["warnings"] == []
    assert read_verdict(folder / layout).to_dict() == {k: v for k, v in verdict.items() if k != "folder"}
    assert "28 of 28 weights read back" in capsys.readouterr().out
    card = (folder / layout / "README.md").read_text()
    assert "python experiments/quantize_model.py model=" in card and f"export={layout}" in card
    exported = evaluated(tiny, folder / layout, tmp_path / "exported")
    kl = f"| {exported.kl_mean:.4g} [{exported.kl_low:.4g}, {exported.kl_high:.4g}] |"
    assert kl in (folder / layout / "README.md").read_text()
    (folder / layout / "README.md").write_text(card)
    own = evaluated(tiny, folder / "model", tmp_path / "own")
    assert exported.kl_mean == own.kl_mean > 0.001 and exported.ppl == own.ppl
    assert kl in (folder / layout / "README.md").read_text()
    assert (exported.model, exported.method, exported.settings) == (own.model, own.method, own.settings)
    assert exported.calibrated_on == own.calibrated_on is not None


def test_a_damaged_export_is_not_evaluated(tiny: SimpleNamespace, tmp_path: Path) -> None:
    _, folder, _ = quantized(tiny, tmp_path / "out", "method=naive", "export=compressed_tensors")
    shard = next((folder / "compressed_tensors").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    for reader in ("quantkit", "transformers"):
        pair = SimpleNamespace(quantized=folder / "compressed_tensors", texts=tiny.texts, folder=tiny.folder)
        with pytest.raises(SourceError, match=rf"{shard.name} has another sha256. Run the command that exported it"):
            evaluate(evaluation(pair, tmp_path / reader, evaluate__reader=reader))


def test_a_damaged_model_is_found_by_the_same_command(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder, _ = quantized(tiny, tmp_path, "method=naive", "export=modelopt")
    files = {path: path.read_bytes() for part in ("model", "modelopt") for path in (folder / part).iterdir()}
    for shard in (folder / "model").glob("*-00002-*"), (folder / "modelopt").glob("*-00002-*"):
        path = next(shard)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    capsys.readouterr()
    record, _, console = quantized(tiny, tmp_path, "method=naive", "export=modelopt")
    assert record.status == "ok" and console.close() == 0
    assert {path: path.read_bytes() for path in files if path.name != "layers.jsonl"} == {
        path: data for path, data in files.items() if path.name != "layers.jsonl"
    }


def test_a_finished_model_is_exported_later(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder, _ = quantized(tiny, tmp_path, "method=naive", "block_size=16")
    assert before.exports == {} and not (folder / "modelopt").exists()
    monkeypatch.setattr(job, "quantize_model", None)
    for layout in ("modelopt", "compressed_tensors", "modelopt"):
        after, again, console = quantized(tiny, tmp_path, "method=naive", "block_size=16", f"export={layout}")
        assert again == folder and console.counts["skipped"] == 1 and after.exports[layout]["problems"] == []
    assert set(after.exports) == {"modelopt", "compressed_tensors"}
    assert {**vars(after), "exports": {}} == vars(before)  # the same run, with the same times
    assert "finished before" in capsys.readouterr().out


def test_force_writes_an_export_again(tiny: SimpleNamespace, tmp_path: Path) -> None:
    _, folder, _ = quantized(tiny, tmp_path, "method=naive", "export=modelopt")
    (folder / "modelopt" / "README.md").write_text("old")
    quantized(tiny, tmp_path, "method=naive", "export=modelopt")
    assert (folder / "modelopt" / "README.md").read_text() == "old"
    quantized(tiny, tmp_path, "method=naive", "export=modelopt", "force=true")
    assert (folder / "modelopt" / "README.md").read_text() != "old"


def test_global_scales_of_a_model_are_those_that_a_divisor_inverts(tiny: SimpleNamespace, tmp_path: Path) -> None:
    _, folder, _ = quantized(tiny, tmp_path, "method=naive", "format.global_scale=headroom")
    from experiments.model.checkpoint import open_quantized

    opened = open_quantized(folder / "model")
    for name in opened.names:
        scale = opened.quantized(name).global_scale
        assert torch.equal(exact_global_scale(scale), scale)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["export=modelopt", "format=mxfp4", "block_size=32"], "modelopt cannot hold mxfp4 with block size 32"),
        (["export=compressed_tensors", "block_size=32"], "compressed_tensors cannot hold nvfp4 with block size 32"),
        (["export=compressed_tensors", "format=mxfp4"], "compressed_tensors cannot hold mxfp4 with block size 16"),
        (["export=modelopt", "format.global_scale=search", "fused=[]"], "search gives each layer its own"),
        (["export=modelopt", "fused=[[q_proj,k_proj]]"], "does not have k_proj, q_proj, v_proj in one list"),
        (["export=awq"], "awq"),
    ],
)
def test_options_that_a_layout_cannot_express_are_refused_at_the_start(
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(job, "resolve", None)  # nothing is loaded
    try:
        values: Any = composed(tiny, tmp_path, "method=naive", *overrides)
    except Exception as error:
        assert message in str(error)  # at composition
        return
    console = entry.ModelConsole()
    entry.run(values, console)
    assert message in capsys.readouterr().err and console.close() == 1


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["export=gpt_oss", "format=mxfp4", "block_size=32"], "export=gpt_oss stores experts alone"),
        (["export=gguf"], "gguf stores nvfp4 by 64 columns, and K = 32"),
        (["export=modelopt", "model.exclude=['*.q_proj']"], "q_proj is not quantized; quantize all of them or none"),
    ],
)
def test_models_that_a_layout_cannot_express_are_refused_before_a_layer_is_quantized(
    tiny: SimpleNamespace, tmp_path: Path, overrides: list[str], message: str
) -> None:
    run = run_for(tiny, tmp_path, "method=naive", *overrides)
    with pytest.raises(ValueError, match=message):
        job.quantize_model(run, job.Listener())
    assert not run.folder.exists() and not list(tmp_path.glob("**/*.safetensors"))


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}, "the model's is Unigram; export"),
        ("config.json", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "embeddings of the type dynamic"),
    ],
)
def test_what_llama_cpp_does_not_know_is_refused_before_the_pass_for_loss_weights(
    tiny: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.folder, folder)
    told = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(told | changes))
    other = SimpleNamespace(**vars(tiny) | {"folder": folder})
    run = run_for(other, tmp_path / "out", "hessian=loss", "export=gguf", "format=mxfp4", "block_size=32")
    monkeypatch.setattr(job, "_loss", None)
    with pytest.raises(SourceError, match=message):
        job.quantize_model(run, job.Listener())


def test_an_own_list_of_fused_layers_is_taken_if_it_covers_what_engines_join(
    tiny: SimpleNamespace, tmp_path: Path
) -> None:
    run_for(
        tiny,
        tmp_path,
        "method=naive",
        "export=modelopt",
        "fused=[[q_proj,k_proj,v_proj],[gate_proj,up_proj,down_proj]]",
    )


def test_experts_in_one_tensor_are_refused_for_layouts_that_keep_them_apart(tmp_path: Path) -> None:
    from experiments.model.select import select
    from experiments.model.settings import Export
    from experiments.sources.checkpoints import open_checkpoint
    from experiments.sources.decoder import Decoder

    build("gpt_oss").save_pretrained(tmp_path / "gpt_oss")
    model = ModelConfig("tiny", ModelSource.hub, path=str(tmp_path / "gpt_oss"))
    decoder = Decoder(open_checkpoint(model, tmp_path), [], torch.bfloat16)
    config = SimpleNamespace(export=Export.compressed_tensors, format=SimpleNamespace(name="mxfp4"))
    with pytest.raises(ValueError, match="Export gpt-oss with mxfp4"):
        exportable.check_model(config, decoder, select(decoder, model, 32))
    config.export = Export.gpt_oss
    only = ModelConfig("tiny", ModelSource.hub, path=str(tmp_path / "gpt_oss"), include=["*.experts.*"])
    exportable.check_model(config, decoder, select(decoder, only, 32))


def test_experts_that_stay_unquantized_are_refused_for_gguf(tmp_path: Path) -> None:
    from experiments.model.select import select
    from experiments.model.settings import Export
    from experiments.sources.checkpoints import open_checkpoint
    from experiments.sources.decoder import Decoder

    config = SimpleNamespace(export=Export.gguf, format=SimpleNamespace(name="mxfp4"))
    for kind in ("qwen3_moe", "gpt_oss"):
        build(kind).save_pretrained(tmp_path / kind)
        model = ModelConfig("tiny", ModelSource.hub, path=str(tmp_path / kind))
        decoder = Decoder(open_checkpoint(model, tmp_path), [], torch.bfloat16)
        exportable.check_model(config, decoder, select(decoder, model, 32))
        some = ModelConfig("tiny", ModelSource.hub, path=str(tmp_path / kind), exclude=["*.1.mlp.experts.down_proj"])
        with pytest.raises(
            ValueError, match=r"layers.1.mlp.experts.down_proj: export=gguf writes quantized experts alone"
        ):
            exportable.check_model(config, decoder, select(decoder, some, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"model_type": "gemma3"},
            "writes llama, mistral, qwen2, qwen3, .* and this is gemma3",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic"}},
            "rotary embeddings of the type dynamic; .*hf_to",
        ),
        ({"attention_bias": True}, "without biases"),
    ],
)
def test_models_without_a_gguf_file_are_named(changes: dict[str, Any], message: str) -> None:
    for rope in ("default", "linear", "llama3"):
        gguf_file.check_config({"model_type": "llama", "rope_parameters": {"rope_type": rope}})
    with pytest.raises(ValueError, match=message):
        gguf_file.check_config({"model_type": "llama"} | changes)


def test_the_ways_of_splitting_text_that_llama_cpp_knows() -> None:
    def split(pattern: str) -> dict[str, Any]:
        step = {"type": "Split", "pattern": {"Regex": pattern}}
        return {
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [step, {"type": "ByteLevel", "use_regex": False}]}
        }

    for pattern, name in gguf_vocabulary.SPLITS.items():
        assert gguf_vocabulary.pre_tokenizer_name(split(pattern)) == name
    assert gguf_vocabulary.pre_tokenizer_name(split("other")) is None
    digits = {"pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]}
    assert gguf_vocabulary.pre_tokenizer_name({"pre_tokenizer": digits}) == "smollm"
    assert gguf_vocabulary.pre_tokenizer_name({"pre_tokenizer": {"type": "ByteLevel"}}) == "gpt-2"
    assert gguf_vocabulary.pre_tokenizer_name({"pre_tokenizer": None}) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=gptq", "method.damping=0.02", "calibrate.alpha=0.25", "export=modelopt"),
        ("method=descent", "hessian=loss", "hessian.samples=2", "format.global_scale=headroom", "seed=3"),
        ("method=naive", "format=mxfp4", "block_size=32", 'model.exclude=["*.q_proj","*.k_proj"]', "fused=[]"),
        ("method=gptq", "calibrate=parallel", "hessian=output", "fused=[[q_proj,k_proj,v_proj],[gate_proj,up_proj]]"),
    ],
)
def test_the_command_composes_to_the_same_model(
    tiny: SimpleNamespace, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    run = run_for(tiny, tmp_path, *overrides)
    command = exportable.command_of(run.config)
    assert command.startswith("python experiments/quantize_model.py ") and str(tmp_path) not in command
    words = shlex.split(command)[2:]
    assert {f"model.path={tiny.folder.name}", f"data.path={tiny.texts.name}"} <= set(words)
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):  # as within a script
        assert exportable.command_of(run.config) == command
    # run_for names the same model and text by their whole paths.
    again = run_for(tiny, tmp_path, *(word for word in words if not word.startswith(("model.path=", "data.path="))))
    assert again.identity == run.identity and again.config.export == run.config.export


def test_whole_groups() -> None:
    names = [f"m.{name}" for name in SEVEN]
    layout = get_layout("modelopt")
    exportable.check_whole_groups(layout, names, names)
    exportable.check_whole_groups(layout, names[3:4] + names[6:], names)  # o_proj and down_proj alone
    exportable.check_whole_groups(get_layout("gguf"), names[1:], names)
    with pytest.raises(ValueError, match=r"join m.mlp.gate_proj, m.mlp.up_proj, and m.mlp.up_proj is not quantized"):
        exportable.check_whole_groups(layout, names[:5], names)
