"""What a user may type wrong for a whole model: each is refused in one line, before any long work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import quantize_model as entry
from experiments.evaluate import evaluate
from experiments.model import job, loading
from experiments.model.evaluate_settings import named_model, original_model
from experiments.model.job import Listener, quantize_model
from experiments.sources.models import fetch_gguf
from tests.experiments import tiny_models
from tests.experiments.model.conftest import evaluation
from tests.experiments.model.folders import open_source, write
from tests.experiments.model.test_walk import composed, run_for

pytestmark = pytest.mark.usefixtures("one_thread")

LOSS = ("method=gptq", "hessian=loss")


@pytest.fixture
def no_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass, and reading or loading a model's weights, are an error of the test."""

    def begun(*_: object, **__: object) -> Any:
        raise AssertionError("long work has begun")

    for module, name in ((job, "open_loss_weights"), (job, "build_front"), (loading, "load_network")):
        monkeypatch.setattr(module, name, begun)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """wide, shallow: codes of models of another width, and of fewer layers."""
    folder = tmp_path_factory.mktemp("others")
    for name, size, value in (("wide", "WIDTH", 48), ("shallow", "NUM_LAYERS", 2)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny_models, size, value)
            tiny_models.qwen3(folder / f"{name}-float")
        write(folder / name, open_source(folder / f"{name}-float"))
    return folder


def refused(tiny: SimpleNamespace, output: Path, *overrides: str) -> str:
    """What a command says that ends without a model."""
    with pytest.raises(ValueError) as caught:
        quantize_model(run_for(tiny, output, *overrides), Listener())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.include=[foo]"], "model.include: foo matches no linear layer. Names are like model.layers.0."),
        (
            ["model.include=[lm_head]"],
            "model.include=['lm_head'] block_size=16: no linear layer is left to quantize (28 × not in model.include; "
            "2 × outside the decoder layers). Change or leave out the patterns.",
        ),
        (["export=modelopt", "model.include=[*.gate_proj]"], "model.layers.0.mlp.up_proj is not quantized"),
        (["export=gguf"], "gguf stores nvfp4 by 64 columns, and K = 32; use compressed_tensors or modelopt"),
        (["fused=[[q_proj,nope]]"], "fused: no layer is named nope. Names are down_proj, "),
        (["fused=[[q_proj,up_proj]]"], "fused: q_proj is in another module than up_proj. List layers of one module."),
        (["fused=[[q_proj,k_proj],[k_proj,v_proj]]"], "fused: k_proj is listed twice."),
        (["data.calibration_tokens=9"], "data.calibration_tokens=9: a whole model takes all tokens of its sequences."),
        (["data.heldout_split=test"], "data.heldout_split=test: no sequences are held out (data.heldout=0)."),
        (["calibrate.mode=parallel"], "Use calibrate=sequential, or calibrate=parallel without calibrate.mode, which"),
        (["backend=triton"], "backend 'triton' needs a GPU tensor, the weight is on the CPU"),
        (["backend.name=foo"], "unknown backend 'foo'; known backends: auto, reference, triton"),
    ],
)
def test_wrong_settings_are_refused_before_the_backward_pass(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert message in refused(tiny, tmp_path, *LOSS, *overrides)


@pytest.mark.usefixtures("no_long_work")
def test_codes_of_another_model_are_refused_before_the_backward_pass(
    tiny: SimpleNamespace, others: Path, tmp_path: Path
) -> None:
    def said(folder: Path) -> str:
        return refused(tiny, tmp_path, "method=descent", "hessian=loss", f"init={folder}")

    wide, shallow = others / "wide", others / "shallow"
    where = f"init={wide}: model.layers.0.self_attn.q_proj is [32, 48] there, not [32, 32]. Give the same model."
    assert said(wide) == where
    assert said(shallow).startswith(f"init={shallow} has no codes of model.layers.2.self_attn.q_proj. Leave it out")
    for folder, why in ((tmp_path / "none", "no such folder"), (tiny.texts, "no config.json there; found train.txt")):
        assert said(folder) == f"init={folder}: {why}. Give a folder that holds config.json and *.safetensors."


def test_init_may_be_the_folder_of_a_run(tiny: SimpleNamespace, tmp_path: Path) -> None:
    write(tmp_path / "run" / "model", open_source(tiny.folder))
    overrides = ("method=descent", "hessian=output")
    here, inside = (run_for(tiny, tmp_path, *overrides, f"init={tmp_path / p}") for p in ("run", "run/model"))
    assert here.run_id == inside.run_id and here.identity == inside.identity


def test_layers_with_different_inputs_are_fused_in_parallel_alone(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(job, "open_loss_weights", None)  # it would be called
        said = refused(tiny, tmp_path, *LOSS, "fused=[[q_proj,o_proj]]")
    assert said.startswith("fused: self_attn.q_proj, self_attn.o_proj have different inputs, so calibrate=sequential")
    fused = ("hessian=output", "fused=[[q_proj,o_proj]]", "model.include=[*.0.*]")
    run = run_for(tiny, tmp_path, *fused, "calibrate=parallel")
    quantize_model(run, Listener())
    opened = job.open_quantized(run.folder)
    q, o, k = (opened.quantized(f"model.layers.0.self_attn.{n}_proj").global_scale for n in "qok")
    assert q == o != k


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("name", ["file", "file/cache"])
def test_a_cache_that_cannot_be_written_is_named(tiny: SimpleNamespace, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / name
    message = f"cache.dir={folder} cannot be written: "
    assert refused(tiny, tmp_path, *LOSS, f"cache.dir={folder}").startswith(message)
    pair = SimpleNamespace(quantized=tiny.folder, texts=tiny.texts, folder=tiny.folder)
    with pytest.raises(ValueError, match="cannot be written") as caught:
        evaluate(evaluation(pair, tmp_path, cache__dir=str(folder)))
    assert str(caught.value).startswith(message) and str(caught.value).endswith("free some space or choose another.")


@pytest.mark.usefixtures("no_long_work")
def test_an_output_folder_that_cannot_be_written_is_one_line(
    tiny: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    console = entry.ModelConsole()
    entry.run(composed(tiny, tmp_path / "file"), console)
    assert console.close() == 1
    line = (
        f"error: output_dir={tmp_path / 'file'} cannot be written: File exists ({tmp_path / 'file'}); free some space"
    )
    assert capsys.readouterr().err.startswith(line)


def test_models_and_texts_are_named_by_their_setting(tiny: SimpleNamespace, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("one")
    message = f"data.path={file}: split short has 3 tokens, fewer than one sequence of data.seq_len=32."
    assert refused(tiny, tmp_path, f"data.path={file}", "hessian=output").startswith(message)
    wanted = "Give a folder that holds config.json and *.safetensors"
    assert refused(tiny, tmp_path, f"model.path={file}") == f"model.path={file}: a file. {wanted}, or a .gguf file."
    with pytest.raises(ValueError, match=r"a folder\. Leave model=smollm2_135m out, which is a \.gguf file\."):
        fetch_gguf(named_model("smollm2_135m", path=str(tmp_path)), tmp_path)


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"reference": "{texts}"},
            "reference={texts}: no config.json there; found train.txt. Give a folder that holds",
        ),
        ({"reference": "small_qwen3"}, "reference=results/models/small_qwen3: no such folder. Give a folder that"),
        (
            {"reference": "none.gguf"},
            "reference=none.gguf: no such file. Give a .gguf file that is there, or a folder.",
        ),
        ({"reference": "synthetic"}, "reference=synthetic: no whole language model. Give a folder, or another name."),
        ({"reference": "bundle"}, "reference=bundle: no whole language model. Give a folder, or another name."),
        ({"model__path": "none.gguf"}, "model.path=none.gguf: no such file. Give a .gguf file that is there"),
        ({"model__include": ["*"]}, "model.include=['*']: a whole model is evaluated. Leave it out."),
        ({"data__calibration_tokens": 9}, "data.calibration_tokens=9: a whole model takes all tokens"),
        ({"data__seq_len": 1}, "data.seq_len=1: protocol all scores no token of so short a sequence."),
        ({"paired": "{texts}"}, "paired={texts}: no finished evaluation there (no record.json). Name a folder with"),
    ],
)
def test_wrong_evaluations_are_refused_before_a_model_is_loaded(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    pair = SimpleNamespace(quantized=tiny.folder, texts=tiny.texts, folder=tiny.folder)
    given = {
        name: value.format(texts=tiny.texts) if isinstance(value, str) else value for name, value in changes.items()
    }
    with pytest.raises(ValueError) as caught:
        evaluate(evaluation(pair, tmp_path, **given))
    assert str(caught.value).startswith(message.format(texts=tiny.texts)) and "\n" not in str(caught.value)


def test_a_pair_of_other_sequences_says_what_differs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    pair = SimpleNamespace(quantized=tiny.folder, texts=tiny.texts, folder=tiny.folder)
    first = evaluate(evaluation(pair, tmp_path))
    other = tmp_path / "other" / tiny.texts.name
    other.mkdir(parents=True)
    (other / "train.txt").write_text(tiny_models.text(400, start=7))
    told: dict[str, dict[str, Any]] = {
        " (sequences 12, here 8)": {"data__samples": 8},
        " (seed 0, here 1)": {"seed": 1},
        " (protocol all, here llama_cpp)": {"evaluate__protocol": "llama_cpp"},
        " (seq_len 32, here 16)": {"data__seq_len": 16},
        " (another text of the same name)": {"data__path": str(other)},
    }
    for words, changes in told.items():
        with pytest.raises(ValueError) as caught:
            evaluate(evaluation(pair, tmp_path, paired=str(tmp_path / "runs" / first.run_id), **changes))
        assert f"or another protocol{words}. Evaluate it with the same text and settings." in str(caught.value)
    record = tmp_path / "model" / "record.json"
    record.parent.mkdir()
    record.write_text('{"alpha": 1}')
    with pytest.raises(ValueError, match="no finished evaluation there") as caught:
        evaluate(evaluation(pair, tmp_path, paired=str(record.parent)))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_a_reference_is_a_whole_model() -> None:
    assert original_model("smollm2_135m").name == "smollm2_135m"
