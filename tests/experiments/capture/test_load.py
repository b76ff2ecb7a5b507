"""Capture and the activation cache: correct numbers, bounded memory, resuming, damage, sharing, bundles."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.capture import forward, load, shards, tap
from experiments.capture.forward import capture_layers
from experiments.capture.inputs import LayerInputs
from experiments.capture.limit import limit_calibration
from experiments.capture.store import is_intact
from experiments.capture.tokens import token_sequences
from experiments.config import CONF_DIR, Config, LayerConfig, ModelConfig, ModelSource
from experiments.files import SourceError
from experiments.sources import checkpoints
from experiments.sources.resolved import resolve
from tests.experiments.tiny_models import INNER, SEVEN, change, configuration, text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """A "MiB" of 32 KiB: a shard is 4 sequences of 32 tokens of 64 float32 channels, captured in batches of 2."""
    monkeypatch.setattr(forward, "MIB", 1 << 15)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    monkeypatch.setattr(load, "_memo", type(load._memo)())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each forward pass, trial runs aside."""
    counts: list[int] = []
    real = tap.InputTap.run

    def run(self: Any, token_ids: Tensor, consume: Any) -> None:
        counts.append(len(token_ids))
        real(self, token_ids, consume)

    monkeypatch.setattr(tap.InputTap, "run", run)
    return counts


def load_layer_inputs(config: Config) -> LayerInputs:
    return load.load_layer_inputs(resolve(config))


def layer_folder(config: Config) -> Path:
    return resolve(config).layer_folder()


def forget() -> None:
    load._memo.clear()


def config_for(tiny: SimpleNamespace, **changes: Any) -> Config:
    return configuration(tiny.folder, tiny.texts, **changes)


def all_inputs(inputs: LayerInputs, split: str = "calibration") -> Tensor:
    return torch.cat(list(inputs.batches(split)))


def same(a: LayerInputs, b: LayerInputs) -> bool:
    pairs = [(a.weight, b.weight), (a.gram_calibration, b.gram_calibration), (a.gram_heldout, b.gram_heldout)]
    return all(torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


# --- what is captured -------------------------------------------------------------------------------------------------


def test_weight_inputs_and_gram_matrices_are_the_models(tiny: SimpleNamespace) -> None:
    config = config_for(tiny, layer__index=2)
    inputs = load_layer_inputs(config)
    module = tiny.model.model.layers[2].mlp.down_proj
    assert torch.equal(inputs.weight, module.weight)

    checkpoint = checkpoints.open_checkpoint(config.model, config.cache.folder)
    tokens = token_sequences(config, checkpoint.tokenizer()).ids
    assert {split: tuple(ids.shape) for split, ids in tokens.items()} == {"calibration": (12, 32), "heldout": (4, 32)}
    for split, gram in (("calibration", inputs.gram_calibration), ("heldout", inputs.gram_heldout)):
        seen: list[Tensor] = []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].reshape(-1, INNER)))
        with torch.no_grad():
            tiny.model(input_ids=tokens[split])
        handle.remove()
        torch.testing.assert_close(all_inputs(inputs, split), seen[0], rtol=1e-5, atol=1e-5)
        assert gram is not None and gram.dtype == torch.float32
        torch.testing.assert_close(gram, seen[0].T @ seen[0], rtol=1e-4, atol=1e-3)
    assert (inputs.tokens_calibration, inputs.tokens_heldout) == (12 * 32, 4 * 32)


def test_provenance_says_what_was_used(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    used = load_layer_inputs(config).provenance
    assert (used.model, used.data, used.data_split, used.sequences) == (
        "tiny (local)",
        "words (texts, local)",
        "train",
        16,
    )
    assert used.dtype == "float32" and not used.substituted and not used.from_cache
    forget()
    assert load_layer_inputs(config).provenance.from_cache
    assert load.load_layer_inputs(dataclasses.replace(resolve(config), substituted=True)).provenance.substituted


def test_the_split_is_by_sequence_seeded_and_reproducible(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    tokenize = checkpoints.open_checkpoint(config.model, config.cache.folder).tokenizer()

    def split(**changes: Any) -> dict[str, set[tuple[int, ...]]]:
        tokens = token_sequences(change(config, **changes), tokenize).ids
        return {name: {tuple(row) for row in ids.tolist()} for name, ids in tokens.items()}

    first = split()
    assert first == split()
    assert first != split(seed=1)
    assert not first["calibration"] & first["heldout"]
    assert set(split(data__heldout=0.0)) == {"calibration"}
    # A larger sample contains the smaller one, so that calibration sizes can be compared.
    assert split(data__heldout=0.0)["calibration"] < split(data__heldout=0.0, data__samples=24)["calibration"]


def test_the_published_protocol_holds_nothing_out(tiny: SimpleNamespace) -> None:
    inputs = load_layer_inputs(config_for(tiny, data__heldout=0.0))
    assert inputs.gram_heldout is None
    assert (inputs.tokens_calibration, inputs.tokens_heldout) == (16 * 32, 0)
    assert list(inputs.batches("heldout")) == []


def local_text(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "valid.txt").write_text(text(60))
    (folder / "test.txt").write_text(text(40, start=100))
    return folder


def test_a_heldout_split_of_its_own(tiny: SimpleNamespace, tmp_path: Path) -> None:
    data = dict(data__name="mine", data__path=str(local_text(tmp_path)))
    own = load_layer_inputs(config_for(tiny, **data, data__heldout_split="test"))
    shared = load_layer_inputs(config_for(tiny, **data))
    assert own.provenance.data_split == "validation, held out: test"
    assert own.provenance.data_hash != shared.provenance.data_hash
    assert own.tokens_heldout == shared.tokens_heldout == 4 * 32
    assert own.gram_heldout is not None and not torch.equal(own.gram_heldout, shared.gram_heldout)
    with pytest.raises(SourceError, match=r"data\.heldout_split=validation: this is the calibration text"):
        load_layer_inputs(config_for(tiny, **data, data__heldout_split="validation"))


def test_less_text_than_asked_for_is_all_taken(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    data = dict(data__name="mine", data__path=str(local_text(tmp_path)))
    inputs = load_layer_inputs(config_for(tiny, **data, data__samples=1000))
    count = inputs.provenance.sequences
    assert 2 < count < 1000
    assert inputs.tokens_calibration + inputs.tokens_heldout == count * 32
    assert f"has {count} sequences of 32 tokens, fewer than data.samples=1000; taking all" in caplog.text


def test_texts_that_are_too_short(tiny: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("too short")
    data = dict(data__name="mine", data__path=str(tmp_path))
    with pytest.raises(SourceError, match=r"split train has \d+ tokens, fewer than one sequence of data.seq_len=32"):
        load_layer_inputs(config_for(tiny, **data))
    (tmp_path / "train.txt").write_text(text(3))
    with pytest.raises(SourceError, match=r"leaves no calibration sequence of 1"):
        load_layer_inputs(config_for(tiny, **data, data__samples=1))
    with pytest.raises(SourceError, match=r"data.seq_len=512: tiny .* takes 256 tokens at most"):
        load_layer_inputs(config_for(tiny, data__seq_len=512))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_warm_cache_loads_no_model(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tiny)
    first = load_layer_inputs(config)
    forget()
    monkeypatch.setattr(checkpoints, "open_checkpoint", None)
    second = load_layer_inputs(config)
    assert same(first, second)
    assert torch.equal(all_inputs(first), all_inputs(second))


def test_a_warm_cache_does_not_import_transformers(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    load_layer_inputs(config)
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from tests.experiments.tiny_models import configuration\n"
        "from experiments.capture.load import load_layer_inputs\n"
        "from experiments.sources.resolved import resolve\n"
        f"config = configuration({str(tiny.folder)!r}, {str(tiny.texts)!r})\n"
        "assert load_layer_inputs(resolve(config)).provenance.from_cache\n"
        "assert not {'datasets', 'accelerate', 'tokenizers', 'gguf'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF_DIR.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_layer_stays_in_memory_between_runs(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tiny)
    first = load_layer_inputs(config)
    monkeypatch.setattr(load, "_open", None)
    assert load_layer_inputs(change(config, block_size=32)).weight is first.weight


def test_memory_of_layers_is_bounded(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "MEMO_BYTES", 1)
    for index in range(3):
        load_layer_inputs(config_for(tiny, layer__index=index))
    assert len(load._memo) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"layer__index": 1},
        {"layer__module": "mlp.up_proj"},
        {"data__seq_len": 16},
        {"data__samples": 8},
        {"data__heldout": 0.5},
        {"seed": 1},
        {"model__dtype": "bfloat16"},
    ],
)
def test_whatever_changes_the_inputs_changes_the_key(tiny: SimpleNamespace, changes: dict[str, Any]) -> None:
    config = config_for(tiny)
    assert layer_folder(config) != layer_folder(change(config, **changes))
    assert layer_folder(config) == layer_folder(change(config, block_size=32, method__name="sse", force=True))


def test_shards_and_manifest(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    load_layer_inputs(config)
    folder = layer_folder(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: entry["rows"] for name, entry in manifest["shards"].items()} == {
        "calibration-00000.safetensors": 128,
        "calibration-00001.safetensors": 128,
        "calibration-00002.safetensors": 128,
        "heldout-00000.safetensors": 128,
    }
    for name, entry in {**manifest["shards"], **manifest["files"]}.items():
        assert is_intact(folder / name, entry)
    assert {entry["dtype"] for entry in manifest["shards"].values()} == {"float32"}
    names = {path.name for path in folder.iterdir()}
    assert names == {*manifest["shards"], *manifest["files"], "manifest.json"}  # no temporary file, no journal


def test_memory_does_not_grow_with_tokens(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(samples: int) -> tuple[int, int]:
        """(largest number of buffered bytes alive at once, buffers made)"""
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        most, made = 0, 0
        real = shards._new_buffer

        def new_buffer(*args: Any) -> Tensor:
            nonlocal most, made
            buffer = real(*args)
            alive.add(buffer)
            most, made = max(most, sum(b.nbytes for b in alive)), made + 1
            return buffer

        with monkeypatch.context() as patch:
            patch.setattr(shards, "_new_buffer", new_buffer)
            load_layer_inputs(config_for(tiny, data__samples=samples, layer__index=1))
        return most, made

    assert peak(16) == (1 << 15, 4)
    assert peak(64) == (1 << 15, 16)


class Interrupt(Exception):
    pass


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, saved = shards.save_tensors, []

    def save(path: Path, tensors: dict[str, Tensor]) -> Any:
        if len(saved) == count:
            raise Interrupt
        saved.append(path)
        return real(path, tensors)

    monkeypatch.setattr(shards, "save_tensors", save)
    monkeypatch.setattr(forward, "save_tensors", save)


def test_an_interrupted_capture_goes_on_at_the_first_missing_shard(
    tiny: SimpleNamespace, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load_layer_inputs(config_for(tiny, cache__dir=str(tmp_path / "whole")))
    assert passes == [2] * 8
    passes.clear()

    config = config_for(tiny)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_after(2, patch)
        load_layer_inputs(config)
    assert not (layer_folder(config) / "manifest.json").exists()
    passes.clear()
    resumed = load_layer_inputs(config)
    assert passes == [2] * 4  # shards 2 and 3 of 4
    assert same(whole, resumed)  # to the last bit
    assert torch.equal(all_inputs(whole), all_inputs(resumed))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_a_shard_damaged_before_the_resume_is_captured_again(
    tiny: SimpleNamespace, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny)
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        interrupt_after(2, patch)
        load_layer_inputs(config)
    flip_a_byte(layer_folder(config) / "calibration-00000.safetensors")
    passes.clear()
    load_layer_inputs(config)
    assert passes == [2] * 6


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
@pytest.mark.parametrize("name", ["calibration-00001.safetensors", "gram.safetensors", "weight.safetensors"])
def test_a_damaged_file_is_found_and_rebuilt(
    tiny: SimpleNamespace, passes: list[int], caplog: pytest.LogCaptureFixture, damage: Any, name: str
) -> None:
    config = config_for(tiny)
    whole = load_layer_inputs(config)
    wanted = all_inputs(whole)
    whole = dataclasses.replace(whole, weight=whole.weight.clone(), gram_calibration=whole.gram_calibration.clone())
    path = layer_folder(config) / name
    damage(path)
    forget()
    passes.clear()
    again = load_layer_inputs(config)
    assert torch.equal(all_inputs(again), wanted)
    assert torch.equal(again.weight, whole.weight)
    assert torch.equal(again.gram_calibration, whole.gram_calibration)
    assert len(passes) == (2 if name.startswith("calibration") else 0)  # that shard alone
    assert "capturing it again" in caplog.text
    entry = json.loads((path.parent / "manifest.json").read_text())
    assert is_intact(path, {**entry["shards"], **entry["files"]}[name])


def test_a_manifest_that_is_no_json_is_rebuilt(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    load_layer_inputs(config)
    (layer_folder(config) / "manifest.json").write_text("{")
    forget()
    assert not load_layer_inputs(config).provenance.from_cache


def test_two_who_want_the_same_layer_capture_it_once(tiny: SimpleNamespace, passes: list[int]) -> None:
    config = config_for(tiny)
    threads = [threading.Thread(target=capture_layers, args=(resolve(config), [config.layer])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(passes) == 8
    assert load_layer_inputs(config).provenance.from_cache


# --- Gram matrices alone, and many layers at once ---------------------------------------------------------------------


def test_gram_matrices_alone(tiny: SimpleNamespace, passes: list[int]) -> None:
    kept = load_layer_inputs(config_for(tiny))
    config = config_for(tiny, cache__activations=False, cache__dir=str(layer_folder(config_for(tiny)).parent / "other"))
    inputs = load_layer_inputs(config)
    torch.testing.assert_close(inputs.gram_calibration, kept.gram_calibration, rtol=1e-5, atol=1e-4)
    assert not list(layer_folder(config).glob("calibration*"))
    with pytest.raises(SourceError, match=r"has only Gram matrices. Capture with cache.activations=true"):
        next(inputs.batches())
    # Asking for the inputs later captures them.
    passes.clear()
    assert torch.equal(all_inputs(load_layer_inputs(change(config, cache__activations=True))), all_inputs(kept))
    assert len(passes) == 8
    # And a cache with inputs serves a run that needs none.
    forget()
    passes.clear()
    load_layer_inputs(config)
    assert not passes


@pytest.mark.parametrize("activations_kept", [True, False])
def test_many_layers_in_one_forward_pass(
    tiny: SimpleNamespace, passes: list[int], tmp_path: Path, activations_kept: bool
) -> None:
    base = config_for(tiny, cache__activations=activations_kept, cache__shard_mib=4)
    many = [change(base, layer=LayerConfig(i, module)) for i in (0, 1, 3) for module in SEVEN]
    capture_layers(resolve(base), [config.layer for config in many])
    assert passes == [2] * 8
    passes.clear()
    grams = {(c.layer.index, c.layer.module): load_layer_inputs(c) for c in many}
    assert not passes
    assert all(inputs.provenance.from_cache for inputs in grams.values())
    for index, module in ((1, "self_attn.v_proj"), (3, "mlp.up_proj"), (3, "mlp.down_proj")):
        alone = load_layer_inputs(change(base, layer=LayerConfig(index, module), cache__dir=str(tmp_path / "alone")))
        assert same(alone, grams[index, module])
        if activations_kept:
            assert torch.equal(all_inputs(alone), all_inputs(grams[index, module]))

    def inode(module: str, name: str) -> int:
        return (layer_folder(change(base, layer=LayerConfig(1, module))) / name).stat().st_ino

    # q, k and v keep one Gram matrix on the disk, and each folder is complete by itself.
    names = ["gram.safetensors"] + ["calibration-00000.safetensors"] * activations_kept
    for name in names:
        assert len({inode(f"self_attn.{x}_proj", name) for x in "qkv"}) == 1
        assert inode("mlp.gate_proj", name) == inode("mlp.up_proj", name) != inode("mlp.down_proj", name)


def test_many_layers_are_captured_in_as_many_passes_as_memory_asks(
    tiny: SimpleNamespace, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "PASS_BYTES", 2 * (2 * 4 * INNER**2))
    base = config_for(tiny, cache__activations=False)
    capture_layers(resolve(base), [LayerConfig(i) for i in range(4)])
    assert passes == [2] * 16  # two layers a pass over the text


def test_a_capture_leaves_what_is_there(tiny: SimpleNamespace, passes: list[int]) -> None:
    load_layer_inputs(config_for(tiny))
    passes.clear()
    capture_layers(resolve(config_for(tiny)), [LayerConfig()])
    assert not passes


# --- bundles ----------------------------------------------------------------------------------------------------------


def bundle_of(config: Config, target: Path) -> Config:
    shutil.copytree(layer_folder(config), target)
    model = ModelConfig("bundle", ModelSource.bundle, path=str(target))
    return change(config, model=model, layer=LayerConfig(), data__path=None)


def test_a_bundle_works_without_the_model(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny, layer=LayerConfig(1, "self_attn.o_proj"), seed=3)
    original = load_layer_inputs(config)
    bundle = bundle_of(config, tmp_path / "bundle")
    bundle = change(bundle, seed=0, data__name="wikitext2", data__seq_len=7)
    shutil.rmtree(config.cache.folder)
    monkeypatch.setattr(checkpoints, "open_checkpoint", None)
    resolved = resolve(bundle).config
    assert resolved.layer == config.layer
    assert resolved.data == change(config, data__path=None).data and resolved.seed == 3
    inputs = load_layer_inputs(bundle)
    assert same(inputs, original)
    assert all_inputs(inputs).shape == (12 * 32, 32)
    assert inputs.provenance.model == "tiny (local)"
    for path in (tmp_path / "bundle").iterdir():
        assert str(tiny.folder) not in path.read_bytes().decode("latin1")  # nothing of the machine it came from


def test_bundles_that_are_wrong(tiny: SimpleNamespace, tmp_path: Path) -> None:
    config = config_for(tiny)
    load_layer_inputs(config)
    bundle = bundle_of(config, tmp_path / "bundle")
    with pytest.raises(SourceError, match=r"layer.index=2 .* is a bundle of layer 0 mlp.down_proj"):
        load_layer_inputs(change(bundle, layer__index=2))
    with pytest.raises(SourceError, match=r"model=bundle needs model.path"):
        load_layer_inputs(change(bundle, model__path=None))
    with pytest.raises(SourceError, match=r"not a layer bundle, manifest.json is missing \(no such folder\)"):
        load_layer_inputs(change(bundle, model__path=str(tmp_path / "nowhere")))
    flip_a_byte(tmp_path / "bundle" / "heldout-00000.safetensors")
    inputs = load_layer_inputs(bundle)  # errors need the Gram matrices alone
    with pytest.raises(SourceError, match=r"heldout-00000.safetensors is missing or damaged. Copy the bundle again"):
        list(inputs.batches("heldout"))
    flip_a_byte(tmp_path / "bundle" / "gram.safetensors")
    forget()
    with pytest.raises(SourceError, match=r"gram.safetensors is missing or damaged. Copy the bundle again"):
        load_layer_inputs(bundle)


# --- synthetic --------------------------------------------------------------------------------------------------------


def synthetic(**changes: Any) -> Config:
    model = ModelConfig("synthetic", ModelSource.synthetic, out_features=48, in_features=256, dtype="bfloat16")
    config = change(configuration(), model=model, data__name="synthetic", data__source="synthetic")
    return change(config, **changes)


def test_synthetic_layers_are_seeded_and_of_any_shape() -> None:
    inputs = load_layer_inputs(synthetic())
    assert inputs.weight.shape == (48, 256) and inputs.weight.dtype == torch.bfloat16
    assert inputs.weight.float().std().item() == pytest.approx(0.02, rel=0.05)
    assert (inputs.tokens_calibration, inputs.tokens_heldout) == (12 * 32, 4 * 32)
    x = all_inputs(inputs)
    assert x.shape == (12 * 32, 256) and x.dtype == torch.bfloat16
    torch.testing.assert_close(inputs.gram_calibration, x.float().T @ x.float(), rtol=1e-4, atol=1e-2)
    forget()
    assert same(inputs, load_layer_inputs(synthetic()))
    assert not same(inputs, load_layer_inputs(synthetic(seed=1)))
    assert load_layer_inputs(synthetic(data__heldout=0.0)).gram_heldout is None


def test_synthetic_inputs_have_heavy_and_correlated_channels() -> None:
    gram = load_layer_inputs(synthetic()).gram_calibration
    power = gram.diagonal().sort(descending=True).values
    assert power[1] > 10 * power[20]  # 2 of 256 channels
    correlation = gram / (gram.diagonal().sqrt()[:, None] * gram.diagonal().sqrt())
    assert (correlation - torch.eye(256)).abs().max() > 0.3


def test_an_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"split=train: use calibration or heldout"):
        load_layer_inputs(synthetic()).batches("train")


def test_fewer_calibration_tokens_are_nested_and_leave_the_heldout_ones_alone(tiny: SimpleNamespace) -> None:
    """12 calibration sequences of 32 tokens."""
    whole = load_layer_inputs(config_for(tiny))
    sequences = torch.cat(list(whole.batches())).double().split(32)

    def limited(tokens: int, seed: int = 0) -> LayerInputs:
        inputs = limit_calibration(whole, tokens, 32, seed)
        assert inputs.tokens_calibration == tokens and inputs.tokens_heldout == whole.tokens_heldout
        assert inputs.gram_heldout is whole.gram_heldout and inputs.weight is whole.weight
        return inputs

    def made_of(gram: torch.Tensor, x: torch.Tensor) -> bool:
        return torch.allclose(gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)

    first = [i for i, x in enumerate(sequences) if made_of(limited(32).gram_calibration, x)]
    assert len(first) == 1
    assert made_of(limited(10).gram_calibration, sequences[first[0]][:10])
    more = limited(80).gram_calibration.double() - sequences[first[0]].T @ sequences[first[0]]
    assert any(
        made_of(more, torch.cat([x, y[:16]]))
        for i, x in enumerate(sequences)
        for j, y in enumerate(sequences)
        if len({i, j, *first}) == 3
    )
    assert limit_calibration(whole, 12 * 32, 32, 0) is whole and limit_calibration(whole, 10**6, 32, 0) is whole
    assert len({limited(32, seed).gram_calibration.sum().item() for seed in range(8)}) > 1


def test_the_number_of_calibration_tokens_is_no_part_of_the_cache(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    limited = change(config, data__calibration_tokens=32)
    assert layer_folder(limited) == layer_folder(config)
    load_layer_inputs(limited)
    manifest = json.loads((layer_folder(config) / "manifest.json").read_text())
    assert manifest["data"]["calibration_tokens"] is None
    model = ModelConfig("bundle", ModelSource.bundle, path=str(layer_folder(config)))
    bundle = change(limited, model=model, data__path=None)
    assert resolve(bundle).config.data.calibration_tokens == 32
    with pytest.raises(SourceError, match=r"cache\.activations=true"):
        gram_only = load_layer_inputs(change(config, cache__activations=False, seed=5))
        limit_calibration(gram_only, 32, 32, 0)
