"""peers.py: what it writes around another tool, what it refuses, and the tools themselves where they are installed."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import peers as door
from experiments.capture.tokens import token_sequences
from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError
from experiments.model.evaluate_settings import as_run, compose_evaluation
from experiments.model.evaluation import peer_label, quantization_fields
from experiments.model.loading import load_network
from experiments.model.peers import PEERS, Peer, PeerTask, modelopt_config
from experiments.sources.checkpoints import open_checkpoint


def settings(tiny: SimpleNamespace, tmp_path: Path, *more: str) -> list[str]:
    return [
        f"model.path={tiny.folder}",
        f"data.path={tiny.texts}",
        "data.split=train",
        "data.samples=4",
        "data.seq_len=32",
        f"cache.dir={tmp_path / 'cache'}",
        "device=cpu",
        *more,
    ]


def test_a_tool_gets_the_sequences_of_a_calibration_and_its_folder_says_what_ran(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks: list[PeerTask] = []

    def slow(task: PeerTask) -> None:
        tasks.append(task)
        time.sleep(0.25)  # loading, which is not the tool's time
        task.network()
        time.sleep(0.125)

    monkeypatch.setitem(PEERS, "modelopt_max", Peer(("numpy",), slow))
    arguments = settings(tiny, tmp_path, "tool=modelopt_max", f"out={tmp_path / 'out'}")
    assert door.main(arguments) == 0
    (task,) = tasks
    config = compose_evaluation("data.heldout=0", *settings(tiny, tmp_path))
    model = ModelConfig("tiny", ModelSource.hub, path=str(tiny.folder))
    tokenize = open_checkpoint(model, tmp_path).tokenizer()
    assert torch.equal(task.ids, token_sequences(as_run(config, model), tokenize).ids["calibration"])
    assert (task.ids.shape, task.model, task.device) == ((4, 32), tiny.folder, "cpu")
    about = json.loads((tmp_path / "out" / "peer.json").read_text())
    assert about["quantize_s"] >= 0.125 and {"torch", "numpy"} <= about["versions"].keys()
    assert about["label"] == f"ModelOpt, max ({about['versions']['numpy']})"
    assert (about["settings"]["sequences"], about["settings"]["seq_len"]) == (4, 32)
    assert task.begun is not None
    assert capsys.readouterr().out.startswith(f"modelopt_max: {tmp_path / 'out'}")
    assert door.main(arguments) == 1
    assert "is not empty: name a new folder" in capsys.readouterr().err and len(tasks) == 1


def test_an_evaluation_takes_name_format_and_time_from_the_folder(tmp_path: Path) -> None:
    model = ModelConfig("out", ModelSource.hub, path=str(tmp_path))
    assert quantization_fields(model) == {} and peer_label(model) is None
    task = PeerTask(tmp_path, torch.zeros(4, 32, dtype=torch.int64, device="cpu"), tmp_path, "cpu")
    about = door.about_peer("autoround", task, "words") | {"quantize_s": 2.5}
    (tmp_path / "peer.json").write_text(json.dumps(about))
    found = quantization_fields(model)
    assert (found["format"], found["block_size"], found["bits_per_weight"]) == ("nvfp4", 16, 4.5)
    assert (found["quantize_s"], found["settings"]["sequences"]) == (2.5, 4)
    assert str(peer_label(model)).startswith("AutoRound, learned rounding (")
    (tmp_path / "peer.json").write_text("{")
    with pytest.raises(SourceError, match=r"peer\.json is damaged .* Run peers.py again"):
        peer_label(model)


def test_calibration_is_on_256_sequences_of_the_validation_split(tmp_path: Path) -> None:
    tool, out, config = door.parse(["tool=autoround", "out=folder", "model.path=x"])
    assert (tool, out) == ("autoround", Path("folder"))
    assert (config.data.split, config.data.samples, config.data.heldout) == ("validation", 256, 0)
    assert door.parse(["tool=autoround", "out=folder", "data.samples=8"])[2].data.samples == 8


def test_the_float_folder_is_the_unquantized_model_in_float32(tiny: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "float"
    assert door.main(settings(tiny, tmp_path, "tool=float", f"out={out}")) == 0
    network = AutoModelForCausalLM.from_pretrained(out)
    ids = torch.arange(20, dtype=torch.int64, device="cpu")[None]
    with torch.no_grad():
        assert torch.equal(network(ids).logits, tiny.model.float()(ids).logits)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    text = "one two three"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tiny.folder)(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tool=gptq", "out={}/o"], "tool=gptq: known tools: llmcompressor_rtn, llmcompressor_gptq, modelopt_max"),
        (["tool=autoround"], "give tool=NAME and out=FOLDER"),
        (["tool=autoround", "out={}/o", "model=smollm2_135m"], "model.path is not set to a float folder"),
        (["tool=autoround", "out={}/o", "data.samples=0"], "data.samples=0"),
    ],
)
def test_what_is_refused_is_named(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert door.main([word.format(tmp_path) for word in arguments]) == 1
    assert message in capsys.readouterr().err and not list(tmp_path.glob("o/*"))


def test_a_tool_that_is_missing_or_fails_leaves_no_record(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(task: PeerTask) -> None:
        raise ModuleNotFoundError("No module named 'tool'")

    def broken(task: PeerTask) -> None:
        raise RuntimeError("no\nkernel")

    for name, run, message in (
        ("autoround", absent, "tool=autoround cannot be imported: No module named 'tool'. pip install auto-round"),
        ("modelopt_mse", broken, "tool=modelopt_mse failed: RuntimeError: no kernel"),
    ):
        monkeypatch.setitem(PEERS, name, Peer(PEERS[name].packages, run))
        out = tmp_path / name
        assert door.main(settings(tiny, tmp_path, f"tool={name}", f"out={out}")) == 1
        assert message in capsys.readouterr().err and not (out / "peer.json").exists()


@pytest.mark.parametrize(
    ("tool", "package"),
    [("llmcompressor_rtn", "llmcompressor"), ("llmcompressor_gptq", "llmcompressor"), ("modelopt_max", "modelopt")],
)
def test_the_exported_weights_are_near_the_models(
    tool: str, package: str, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    """Each linear layer of the decoder is quantized, and nothing else. quantkit's readers read the folder."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    out = tmp_path / "out"
    assert door.main(settings(tiny, tmp_path, f"tool={tool}", f"out={out}")) == 0
    found = load_network(ModelConfig("out", ModelSource.hub, path=str(out)), tmp_path, "float32", "cpu").state_dict()
    for name, weight in tiny.model.float().state_dict().items():
        error = float((found[name] - weight).norm() / weight.norm())
        quantized = name.endswith("proj.weight")
        assert (0.05 < error < 0.3) if quantized else error < 1e-6, name


def test_modelopt_quantizes_weights_only() -> None:
    pytest.importorskip("modelopt")
    for method in ("max", "mse", "local_hessian", "gptq"):
        config = modelopt_config(method)
        algorithm = config["algorithm"]
        assert (algorithm if isinstance(algorithm, str) else algorithm["method"]) == method
        assert config["quant_cfg"][-1] == {"quantizer_name": "*input_quantizer", "enable": False}
