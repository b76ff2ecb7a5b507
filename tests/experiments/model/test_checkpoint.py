"""quantkit's own folder: written layer by layer, finished or absent, read back bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.config import ModelConfig, ModelSource
from experiments.files import SourceError, sealed, sha256_file
from experiments.model.checkpoint import CheckpointWriter, load_dequantized, open_quantized
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.decoder import build_whole
from experiments.sources.models import model_identity
from quantkit import FORMATS, QuantizedTensor, quantize
from tests.experiments.model.folders import IDENTITY, expected, open_source, quantize_layer, write
from tests.experiments.sources.every_decoder import IDS, tiny_model
from tests.experiments.sources.test_decoder import write_gguf
from tests.experiments.tiny_models import NUM_LAYERS, SEVEN, qwen3

pytestmark = pytest.mark.usefixtures("one_thread")
SHARDS = [f"model-{number:05d}-of-{NUM_LAYERS + 1:05d}.safetensors" for number in range(1, NUM_LAYERS + 2)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A tiny Qwen3 and its finished folder."""
    folder = tmp_path_factory.mktemp("made")
    qwen3(folder / "tiny")
    write(folder / "out", open_source(folder / "tiny"))
    return SimpleNamespace(root=folder, source=folder / "tiny", out=folder / "out")


@pytest.fixture
def gguf(tmp_path: Path) -> ModelConfig:
    path = tmp_path / "model" / "tiny.Q4_1.gguf"
    write_gguf(path, tmp_path / "model" / "tokenizer")
    return ModelConfig(
        "tiny", ModelSource.pypi_gguf, path=str(path), dtype="float32", filename=path.name, sha256=sha256_file(path)
    )


def copied(made: SimpleNamespace, folder: Path) -> Path:
    return Path(shutil.copytree(made.out, folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, without the journal's, which has times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "layers.jsonl"}


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    fields = ("codes", "scales", "global_scale")
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in fields)
    kinds = [(t.format, t.block_size, t.method, t.nearest_codes, t.global_scale.shape) for t in (a, b)]
    return equal and kinds[0] == kinds[1]


# --- what is in the folder --------------------------------------------------------------------------------------------


def test_the_folder_has_the_hubs_layout(made: SimpleNamespace) -> None:
    index = json.loads((made.out / "model.safetensors.index.json").read_text())
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "quantkit.json", *SHARDS} <= set(
        os.listdir(made.out)
    )
    assert sorted(os.listdir(made.root)) == ["out", "tiny"]  # neither a lock nor a half-written folder is left
    stored = {name: shard for shard in SHARDS for name in load_file(made.out / shard)}
    assert index["weight_map"] == stored
    sizes = [t.nbytes for shard in SHARDS for t in load_file(made.out / shard).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert stored["model.layers.2.mlp.up_proj.codes"] == SHARDS[2] and stored["lm_head.weight"] == SHARDS[-1]


def test_a_quantized_matrix_has_three_tensors_and_is_read_bit_for_bit(made: SimpleNamespace) -> None:
    decoder = build_whole(open_source(made.source), "float32")
    opened = open_quantized(made.out)
    assert opened.names == [f"model.layers.{i}.{name}" for i in range(NUM_LAYERS) for name in SEVEN]
    for index in range(NUM_LAYERS):
        for name, want in quantize_layer(decoder, index)[0].items():
            assert same(opened.quantized(name), want)
            shard = load_file(made.out / SHARDS[index])
            assert torch.equal(shard[f"{name}.codes"], want.codes) and shard[f"{name}.codes"].dtype == torch.uint8
            assert torch.equal(shard[f"{name}.scales"], want.scales)
            assert shard[f"{name}.global_scale"].shape == () and f"{name}.weight" not in shard


def test_other_tensors_are_the_checkpoints_bit_for_bit(tmp_path: Path) -> None:
    model = qwen3(tmp_path / "tiny", sharded=False)
    tensors = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    save_file(tensors, tmp_path / "tiny" / "model.safetensors")
    write(tmp_path / "out", open_source(tmp_path / "tiny"))
    opened = open_quantized(tmp_path / "out")
    assert sorted(opened.kept) == sorted(name for name in tensors if name.removesuffix(".weight") not in opened.names)
    for name in opened.kept:
        assert opened.tensor(name).dtype == torch.bfloat16 and torch.equal(opened.tensor(name), tensors[name])


def test_about_records_and_marks(made: SimpleNamespace) -> None:
    opened = open_quantized(made.out)
    assert opened.about == {"method": "naive"} and opened.identity == IDENTITY
    lines = [json.loads(line) for line in (made.out / "layers.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines[1:-1]] == [{"seconds": index / 8} for index in range(NUM_LAYERS)]
    config = json.loads((made.out / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "quantkit",
        "groups": [{"format": "nvfp4", "block_size": 16}],
    }
    assert config == json.loads((made.source / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (made.out / name).read_bytes() == (made.source / name).read_bytes()


@pytest.mark.parametrize("name", ["mxfp4", "fp4_ue5m3"])
@pytest.mark.parametrize("size", [16, 32])
def test_every_format_and_block_size(made: SimpleNamespace, tmp_path: Path, name: str, size: int) -> None:
    source = open_source(made.source)
    write(tmp_path / "out", source, format=name, size=size, method="sse")
    decoder, opened = build_whole(source, "float32"), open_quantized(tmp_path / "out")
    want, _ = quantize_layer(decoder, 1, format=name, size=size, method="sse")
    assert all(same(opened.quantized(own), q) for own, q in want.items())


def test_a_format_without_a_name_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    import dataclasses

    odd = dataclasses.replace(FORMATS["nvfp4"], name="mine")
    q = quantize(torch.ones(2, 32, dtype=torch.float32, device="cpu"), odd)
    with (
        CheckpointWriter(tmp_path / "out", IDENTITY, 1) as writer,
        pytest.raises(ValueError, match="format mine is none of nvfp4"),
    ):
        writer.write_layer(0, {"model.layers.0.a": q}, {}, {})


# --- read as a model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phi3"])
def test_the_dequantized_model_is_the_original_with_dequantized_weights(kind: str, tmp_path: Path) -> None:
    """gpt2 and gpt_oss store matrices as [in, out]; mixtral and qwen3_moe store each expert apart."""
    tiny_model(kind).save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    write(tmp_path / "out", source)
    want, got = expected(source), load_dequantized(tmp_path / "out", torch.float32)
    assert want.state_dict().keys() == got.state_dict().keys()
    assert all(torch.equal(value, got.state_dict()[name]) for name, value in want.state_dict().items())
    assert torch.equal(got(input_ids=IDS).logits, want(input_ids=IDS).logits)
    assert not got.training and not any(p.requires_grad for p in got.parameters())


def test_each_expert_may_have_a_global_scale_of_its_own(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "source")
    decoder = build_whole(open_source(tmp_path / "source"), "float32")
    name = f"{decoder.path}.0.mlp.experts.down_proj"
    q = quantize(decoder.model.get_parameter(name)[..., :16], global_scale="amax_per_expert", method="naive")
    with CheckpointWriter(tmp_path / "out", IDENTITY, 1) as writer:
        writer.write_layer(0, {name: q}, {}, {})
        assert same(writer.quantized(0)[name], q)
        writer.finish({}, open_source(tmp_path / "source"), {})
    assert same(open_quantized(tmp_path / "out").quantized(name), q)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(tied: bool, tmp_path: Path) -> None:
    tiny_model("qwen3", tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    write(tmp_path / "out", source)
    got = load_dequantized(tmp_path / "out", torch.float32)
    assert (got.lm_head.weight is got.model.embed_tokens.weight) == tied
    assert torch.equal(got(input_ids=IDS).logits, expected(source)(input_ids=IDS).logits)


def test_a_quantized_head_of_tied_embeddings_is_no_longer_tied(tmp_path: Path) -> None:
    tiny_model("qwen3", tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    source = open_source(tmp_path / "source")
    decoder = build_whole(source, "float32")
    head = quantize(decoder.model.lm_head.weight, method="naive")
    from experiments.model.checkpoint import kept_tensors

    with CheckpointWriter(tmp_path / "out", IDENTITY, len(decoder.stack)) as writer:
        for index in range(len(decoder.stack)):
            writer.write_layer(index, {}, kept_tensors(decoder, index, ["lm_head"]), {})
        writer.finish(kept_tensors(decoder, None, ["lm_head"]), source, {}, {"lm_head": head})
    got = load_dequantized(tmp_path / "out", torch.float32)
    assert torch.equal(got.lm_head.weight, head.dequantize())
    assert torch.equal(got.model.embed_tokens.weight, decoder.model.model.embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_rounded_once(made: SimpleNamespace, dtype: torch.dtype) -> None:
    got, opened = load_dequantized(made.out, dtype), open_quantized(made.out)
    for name in opened.names:
        assert torch.equal(got.get_parameter(f"{name}.weight"), opened.quantized(name).dequantize(dtype))


def test_the_folder_is_a_model_path(made: SimpleNamespace, tmp_path: Path) -> None:
    """Layers are captured from it and its tokenizer is used, as from any checkpoint."""
    import dataclasses

    from experiments.capture.load import load_layer_inputs
    from experiments.sources.resolved import resolve
    from tests.experiments.tiny_models import configuration, write_text

    write_text(tmp_path / "texts")
    config = configuration(made.out, tmp_path / "texts", layer__index=1, cache__dir=str(tmp_path / "cache"))
    inputs = load_layer_inputs(resolve(config))
    assert torch.equal(inputs.weight, open_quantized(made.out).quantized("model.layers.1.mlp.down_proj").dequantize())
    plain = expected(open_source(made.source))
    plain.save_pretrained(tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "plain" / name).write_bytes((made.source / name).read_bytes())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, path=str(tmp_path / "plain")))
    want = load_layer_inputs(resolve(other))
    assert torch.equal(inputs.gram_calibration, want.gram_calibration)


def test_a_gguf_model_gets_a_configuration_and_a_tokenizer(gguf: ModelConfig, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    checkpoint = open_checkpoint(gguf, tmp_path / "cache")
    write(tmp_path / "out", checkpoint)
    got = load_dequantized(tmp_path / "out", torch.float32)
    assert torch.equal(got(input_ids=IDS).logits, expected(checkpoint)(input_ids=IDS).logits)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.model_type == "llama" and config.architectures == ["LlamaForCausalLM"]
    sample = "the quick brown fox"
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(sample, add_special_tokens=False).input_ids
    assert tokens == checkpoint.tokenizer()(sample)


def test_transformers_does_not_load_the_folder_in_silence(
    made: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    transformers.logging.enable_propagation()
    try:
        transformers.AutoModelForCausalLM.from_pretrained(made.out)
    finally:
        transformers.logging.disable_propagation()
    assert "Unknown quantization type, got quantkit" in caplog.text


# --- bytes, interruption, damage --------------------------------------------------------------------------------------


def test_the_same_model_gives_the_same_bytes(made: SimpleNamespace, tmp_path: Path) -> None:
    """In another process, with another seed for the hashes of strings."""
    code = (
        "import sys; from pathlib import Path; from tests.experiments.model.folders import open_source, write; "
        "write(Path(sys.argv[2]), open_source(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(made.source), str(tmp_path / "out")]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=Path(__file__).parents[3])
    assert contents(tmp_path / "out") == contents(made.out)
    own = [ModelConfig("a", ModelSource.hub, path=str(path)) for path in (tmp_path / "out", made.out)]
    assert model_identity(own[0]).key == model_identity(own[1]).key


@pytest.mark.parametrize("stop", [0, 1, NUM_LAYERS - 1])
def test_an_interrupted_writer_continues(made: SimpleNamespace, tmp_path: Path, stop: int) -> None:
    source = open_source(made.source)
    write(tmp_path / "out", source, stop=stop)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SourceError, match=r"out: no finished quantkit checkpoint, quantkit\.json is missing"):
        open_quantized(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS) as writer:
        assert writer.finished == {index: {"seconds": index / 8} for index in range(stop)}
        assert not writer.is_complete
        for index in writer.finished:
            got = writer.quantized(index)
            want, _ = quantize_layer(build_whole(source, "float32"), index)
            assert got.keys() == want.keys() and all(same(got[name], want[name]) for name in want)
    before = {path.name: path.stat().st_ino for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    write(tmp_path / "out", source)
    assert contents(tmp_path / "out") == contents(made.out)
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in before} == before and len(before) == stop
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_written_files_are_removed(made: SimpleNamespace, tmp_path: Path) -> None:
    write(tmp_path / "out", open_source(made.source), stop=2)
    partial = tmp_path / ".out.partial"
    for name in (f".{SHARDS[2]}.0123456789abcdef.tmp", SHARDS[2], "config.json", "quantkit.json"):
        (partial / name).write_bytes(b"half")
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS) as writer:
        assert sorted(writer.finished) == [0, 1]
    assert sorted(path.name for path in partial.iterdir()) == ["layers.jsonl", *SHARDS[:2]]
    write(tmp_path / "out", open_source(made.source))
    assert contents(tmp_path / "out") == contents(made.out)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
def test_only_a_damaged_layer_is_written_again(
    made: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], Any], finished: bool
) -> None:
    out = tmp_path / "out"
    write(out, open_source(made.source), stop=None if finished else NUM_LAYERS - 1)
    damage((out if finished else tmp_path / ".out.partial") / SHARDS[1])
    with CheckpointWriter(out, IDENTITY, NUM_LAYERS) as writer:
        assert 1 not in writer.finished and 0 in writer.finished and 2 in writer.finished and not writer.is_complete
    write(out, open_source(made.source))
    assert contents(out) == contents(made.out) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["config.json", "quantkit.json", "tokenizer.json"])
def test_a_damaged_small_file_is_written_again(made: SimpleNamespace, tmp_path: Path, name: str) -> None:
    out = copied(made, tmp_path / "out")
    (out / name).write_text("{}")
    write(out, open_source(made.source))
    assert contents(out) == contents(made.out) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_finished_folder_is_left_alone_unless_forced(made: SimpleNamespace, tmp_path: Path) -> None:
    out = copied(made, tmp_path / "out")
    with CheckpointWriter(out, IDENTITY, NUM_LAYERS) as writer:
        assert writer.is_complete and sorted(writer.finished) == list(range(NUM_LAYERS)) and writer.quantized(0)
    inode = out.stat().st_ino
    with CheckpointWriter(out, IDENTITY, NUM_LAYERS, force=True) as writer:
        assert not writer.is_complete and not writer.finished
        writer.write_layer(0, writer_input(made, 0), {}, {})
    assert out.stat().st_ino == inode and open_quantized(out).names  # the old one stays until the new one is whole
    with CheckpointWriter(out, IDENTITY, NUM_LAYERS, force=True) as writer:
        assert sorted(writer.finished) == [0]  # the same command continues
        for index in range(1, NUM_LAYERS):
            writer.write_layer(index, writer_input(made, index), {}, {})
        writer.finish({}, open_source(made.source), {"forced": True})
    assert open_quantized(out).about == {"forced": True} and [path.name for path in tmp_path.iterdir()] == ["out"]


def writer_input(made: SimpleNamespace, index: int) -> dict[str, QuantizedTensor]:
    return quantize_layer(build_whole(open_source(made.source), "float32"), index)[0]


def test_force_does_not_continue_what_was_begun_without_it(made: SimpleNamespace, tmp_path: Path) -> None:
    write(tmp_path / "out", open_source(made.source), stop=2)
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS, force=True) as writer:
        assert not writer.finished


def test_nothing_unfinished_is_finished(made: SimpleNamespace, tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS) as writer:
        writer.write_layer(1, writer_input(made, 1), {}, {})
        with pytest.raises(ValueError, match="layer 0 is not written yet"):
            writer.finish({}, open_source(made.source), {})
        with pytest.raises(ValueError, match="layer 4: the model has the layers 0 to 3"):
            writer.write_layer(NUM_LAYERS, {}, {}, {})


# --- other folders, other processes -----------------------------------------------------------------------------------


def test_a_folder_of_another_run_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"identity 0123456789, not other\)\. Name another folder, or delete this"):
        CheckpointWriter(made.out, "other", NUM_LAYERS)
    write(tmp_path / "out", open_source(made.source), stop=1)
    with pytest.raises(SourceError, match=r"\.out\.partial belongs to another model, text or settings"):
        CheckpointWriter(tmp_path / "out", "other", NUM_LAYERS)


def test_a_folder_with_other_files_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").write_text("")
    write(tmp_path / "out", open_source(made.source))  # an empty folder is fine
    assert contents(tmp_path / "out") == contents(made.out)
    for folder in (made.source, tmp_path / "file"):
        with pytest.raises(SourceError, match=r"and no checkpoint of quantkit\. Name another folder\."):
            CheckpointWriter(folder, IDENTITY, NUM_LAYERS)
    assert not (made.root / ".tiny.lock").exists()


def _hold(folder: Path, ready: Any, seconds: float) -> None:
    with CheckpointWriter(folder, IDENTITY, NUM_LAYERS):
        ready.set()
        time.sleep(seconds)


def test_a_second_writer_waits_for_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready, 2.5))
    process.start()
    assert ready.wait(60)
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS):
        assert f"waiting for another process that writes {tmp_path / 'out'}" in caplog.text
    process.join()
    assert process.exitcode == 0 and not (tmp_path / ".out.lock").exists()


def test_the_lock_ends_with_its_holder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "out", ready, 300))
    process.start()
    assert ready.wait(60)
    process.kill()
    process.join()
    with CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS) as writer:
        assert not writer.finished


def test_a_full_disk_is_told_in_one_line(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from experiments.model import checkpoint

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with (
        CheckpointWriter(tmp_path / "out", IDENTITY, NUM_LAYERS) as writer,
        pytest.raises(SourceError, match=r"out cannot be written \(No space left on device\)\. Free some space"),
    ):
        writer.write_layer(0, {}, {}, {})


# --- folders from elsewhere -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (SHARDS[1], flip),
        (SHARDS[1], lambda path: path.write_bytes(path.read_bytes() + b"\0")),
        (SHARDS[1], Path.unlink),
        ("config.json", flip),
        ("tokenizer.json", Path.unlink),
        ("quantkit.json", lambda path: path.write_text("{")),
        ("quantkit.json", lambda path: path.write_text("[" * 100_000)),
        ("quantkit.json", lambda path: path.write_bytes(b"\xff\xfe")),
    ],
)
def test_damage_names_the_file_and_the_remedy(
    made: SimpleNamespace, tmp_path: Path, name: str, damage: Callable[[Path], Any]
) -> None:
    out = copied(made, tmp_path / "out")
    damage(out / name)
    with pytest.raises(SourceError) as raised:
        open_quantized(out).quantized("model.layers.1.mlp.up_proj")
    message = str(raised.value)
    assert str(out / name) in message and "\n" not in message
    assert "Copy the folder again, or run the command that wrote it again" in message
    with pytest.raises(SourceError, match=name):
        load_dequantized(out)


def forged(made: SimpleNamespace, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    out = copied(made, folder)
    manifest = json.loads((out / "quantkit.json").read_text())
    del manifest["checksum"]
    change(manifest)
    (out / "quantkit.json").write_text(json.dumps(sealed(manifest)))
    return out


@pytest.mark.parametrize("name", ["../tiny/config.json", "/etc/passwd", "..", "", "a\\b.json", "sub/file.json"])
def test_no_name_leads_out_of_the_folder(made: SimpleNamespace, tmp_path: Path, name: str) -> None:
    out = forged(made, tmp_path / "out", lambda m: m["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(SourceError, match="is no name of a file in the folder"):
        open_quantized(out)
    outside = forged(made, tmp_path / "other", lambda m: m["quantized"][UP].update(file="../x.safetensors"))
    with pytest.raises(SourceError, match=r"\.\./x\.safetensors is not among its files"):
        open_quantized(outside)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("files"), "quantkit.json is damaged"),
        (lambda m: m.update(quantized=[]), "quantkit.json is damaged"),
        (lambda m: m.update(about=None), "quantkit.json is damaged"),
        (lambda m: m.update(version=2), "has version 2, this release reads 1"),
        (lambda m: m["quantized"][UP].pop("format"), "quantkit.json is damaged"),
        (lambda m: m["quantized"][UP].update(shape=[64]), "a matrix of shape"),
        (lambda m: m["kept"].update({f"{UP}.weight": SHARDS[1]}), "a tensor is listed twice"),
        (lambda m: m["quantized"][UP].update(format="int4"), "format int4 is none of"),
        (lambda m: m["quantized"][UP].update(block_size=32), "up_proj.scales is torch.uint8"),
        (lambda m: m["quantized"][UP].update(shape=[64, 64]), "up_proj.codes is torch.uint8"),
        (lambda m: m["quantized"][UP].update(shape=[64, "x"]), "is damaged"),
        (lambda m: m["quantized"][UP].update(block_size=0), "not a whole number of blocks of 0"),
        (lambda m: m["quantized"][UP].update(file=SHARDS[0]), "model.layers.1.mlp.up_proj"),
    ],
)
def test_a_forged_manifest_is_refused(
    made: SimpleNamespace, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    out = forged(made, tmp_path / "out", change)
    with pytest.raises(SourceError) as raised:
        open_quantized(out).quantized(UP)
    assert message in str(raised.value)


def test_a_name_that_is_not_there(made: SimpleNamespace) -> None:
    opened = open_quantized(made.out)
    with pytest.raises(SourceError, match="lm_head is no quantized matrix there"):
        opened.quantized("lm_head")
    with pytest.raises(SourceError, match="no tensor model there"):
        opened.tensor("model")


def test_a_plain_folder_is_no_quantized_one(made: SimpleNamespace) -> None:
    with pytest.raises(SourceError, match=r"tiny: no finished quantkit checkpoint, quantkit\.json is missing"):
        load_dequantized(made.source)
