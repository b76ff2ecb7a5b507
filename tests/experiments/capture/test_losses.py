"""Loss weights: right numbers, one pass for all layers, bounded memory, resume, damage, sharing, bundles."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.capture import forward, gradients, load, losses, weighted
from experiments.capture.gradients import draw_labels
from experiments.capture.inputs import LayerInputs
from experiments.capture.limit import limit_calibration
from experiments.capture.store import is_intact
from experiments.capture.tokens import token_sequences
from experiments.capture.weighted import weigh_by_loss
from experiments.config import Config, HessianConfig, LayerConfig, Matmul, ModelConfig, ModelSource, Weighting
from experiments.files import SourceError
from experiments.sources import decoder as decoders
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.identity import loss_file, losses_folder
from experiments.sources.resolved import resolve
from tests.experiments.tiny_models import NUM_LAYERS, SEVEN, change, configuration

pytestmark = pytest.mark.usefixtures("one_thread")

SEQ_LEN, SEQUENCES = 32, 12  # of calibration; 4 more are held out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece is 4 sequences of 32 tokens, in batches of 2."""
    monkeypatch.setattr(forward, "MIB", 1 << 15)
    monkeypatch.setattr(losses, "PIECE_TOKENS", 128)
    monkeypatch.setattr(losses, "BATCH_TOKENS", 64)
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process does not know."""
    monkeypatch.setattr(load, "_memo", type(load._memo)())
    monkeypatch.setattr(weighted, "_last", {})


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each backward pass."""
    counts: list[int] = []
    real = losses.loss_weights

    def counted(decoder: Any, ids: Tensor, *rest: Any) -> dict[str, Tensor]:
        counts.append(len(ids))
        return real(decoder, ids, *rest)

    monkeypatch.setattr(losses, "loss_weights", counted)
    return counts


def config_for(tiny: SimpleNamespace, groups: int = 1, samples: int = 1, **changes: Any) -> Config:
    hessian = HessianConfig(Weighting.loss, groups, samples)
    return configuration(tiny.folder, tiny.texts, hessian=hessian, **changes)


def load_weighted(config: Config) -> LayerInputs:
    resolved = resolve(config)
    return weigh_by_loss(resolved, load.load_layer_inputs(resolved))


def folder_of(config: Config) -> Path:
    return losses_folder(config, resolve(config).sources)


def weights_of(inputs: LayerInputs) -> Tensor:
    assert inputs.loss is not None
    return inputs.loss.weights


# --- the numbers ------------------------------------------------------------------------------------------------------


def one_label(probabilities: Tensor, draw: float) -> int:
    """The first label whose cumulative probability exceeds the draw."""
    total = 0.0
    for label, probability in enumerate(probabilities.double().tolist()):
        total += probability
        if total > draw:
            return label
    return len(probabilities) - 1


def independent_gradients(tiny: SimpleNamespace, config: Config, name: str) -> Tensor:
    """Float64 [sequences, samples, SEQ_LEN, out_features] at one module's output, by torch.autograd on transformers'
    own model, a sequence and a token at a time."""
    ids = token_sequences(config, open_checkpoint(config.model, config.cache.folder).tokenizer()).ids["calibration"]
    module = tiny.model.get_submodule(f"model.layers.{name}")
    samples = config.hessian.samples
    gradients = []
    for number, sequence in enumerate(ids):
        generator = torch.Generator("cpu").manual_seed(config.seed * 1_000_003 + number)
        draws = torch.rand(samples, SEQ_LEN, generator=generator, dtype=torch.float64)
        for sample in range(samples):
            seen: list[Tensor] = []
            handle = module.register_forward_hook(lambda _, args, output, seen=seen: seen.append(output))
            logits = tiny.model(input_ids=sequence[None]).logits[0]
            handle.remove()
            loss = sum(
                -logits[t].log_softmax(-1)[one_label(logits[t].detach().softmax(-1), float(draws[sample, t]))]
                for t in range(SEQ_LEN)
            )
            (gradient,) = torch.autograd.grad(loss, seen[0])
            gradients.append(gradient[0].double())
    return torch.stack(gradients).unflatten(0, (len(ids), samples))


def independent_weights(tiny: SimpleNamespace, config: Config, name: str) -> Tensor:
    """[tokens, groups] of one module."""
    squares = independent_gradients(tiny, config, name).square().mean(1).flatten(0, 1)
    return torch.stack([part.mean(1) for part in squares.tensor_split(config.hessian.groups, 1)], 1)


@pytest.mark.parametrize(
    ("name", "groups", "samples"),
    [("2.mlp.down_proj", 1, 1), ("0.self_attn.q_proj", 3, 1), ("1.mlp.gate_proj", 1, 2)],
)
def test_weights_are_the_mean_squared_gradients(tiny: SimpleNamespace, name: str, groups: int, samples: int) -> None:
    index, module = name.split(".", 1)
    config = config_for(tiny, groups, samples, layer=LayerConfig(int(index), module), data__samples=6, seed=3)
    weights = weights_of(load_weighted(config))
    assert weights.shape == (4 * SEQ_LEN, groups) and weights.dtype == torch.float32
    want = independent_weights(tiny, config, name)
    # Float32 gradients of a model of four layers; the weights of a module vary by more than a hundred.
    torch.testing.assert_close(weights.double(), want, rtol=1e-3, atol=1e-5 * float(want.mean()))
    assert want.std() > 0.1 * want.mean()


def test_labels_are_drawn_by_cumulative_probability() -> None:
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25]).log().expand(1, 6, 4)
    draws = torch.tensor([[0.0, 0.49, 0.51, 0.74, 0.76, 1 - 2.0**-53]], dtype=torch.float64)
    assert draw_labels(logits, draws).tolist() == [[0, 0, 2, 2, 3, 3]]
    uniform = torch.rand(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = draw_labels(logits[:, :1].expand(1, 4000, 4), uniform).flatten().bincount(minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.25, 0.25]), rtol=0, atol=0.03)  # four sigma


def test_processes_compute_pieces_of_the_same_bytes(
    tiny: SimpleNamespace, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, shared = (config_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "shared"))
    load_weighted(whole)
    batches.clear()
    for process, own in ((1, 2), (0, 4)):  # of three pieces with two batches each
        losses.compute_share(resolve(shared), process, 2)
        assert len(batches) == own
        batches.clear()
    forget(monkeypatch)
    load_weighted(shared)
    assert not batches
    folders = [folder_of(config) for config in (whole, shared)]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1]
    for path in folders[0].glob("*.safetensors"):
        assert (folders[1] / path.name).read_bytes() == path.read_bytes()
    losses.compute_share(resolve(shared), 0, 2)
    assert not batches


@pytest.mark.parametrize("samples", [1, 2])
def test_layers_that_are_computed_again_give_the_same_bits(
    tiny: SimpleNamespace, tmp_path: Path, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = weights_of(load_weighted(config_for(tiny, groups=2, samples=samples)))
    forget(monkeypatch)
    monkeypatch.setattr(losses, "GRAPH_BYTES", 0)
    runs: list[int] = []
    real = gradients._Outputs._run_twice

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(gradients._Outputs, "_run_twice", counted)
    got = weights_of(load_weighted(config_for(tiny, groups=2, samples=samples, cache__dir=str(tmp_path / "again"))))
    assert torch.equal(got, want) and len(runs) == NUM_LAYERS * SEQUENCES // 2


def test_the_memory_of_the_loss_weights_is_estimated() -> None:
    text = SimpleNamespace(hidden_size=100, intermediate_size=300, num_attention_heads=4, num_hidden_layers=10)
    text.vocab_size = 1000
    config = SimpleNamespace(get_text_config=lambda decoder: text)
    assert losses.graph_bytes(config, 50, 25) == 4 * 50 * 10 * (1200 + 900 + 300)
    assert losses.loss_bytes(config, 5000, 25) == 20000 + losses.graph_bytes(config, 25, 25) + 3 * 4 * 25 * 1000


def test_the_gram_matrix_is_weighted_and_output_error_is_not(tiny: SimpleNamespace) -> None:
    inputs = load_weighted(config_for(tiny, groups=2, layer__index=1))
    plain = load.load_layer_inputs(resolve(configuration(tiny.folder, tiny.texts, layer__index=1)))
    assert inputs.loss is not None and inputs.method_grams is inputs.loss.gram
    x, weights = torch.cat(list(inputs.batches())).double(), inputs.loss.weights.double()
    for group in range(2):
        want = (x * weights[:, group, None]).T @ x
        scale = float(want.diagonal().max())
        torch.testing.assert_close(inputs.loss.gram[group].double(), want, rtol=1e-4, atol=1e-5 * scale)
    assert torch.equal(inputs.gram_calibration, plain.gram_calibration)
    assert inputs.gram_heldout is not None and plain.gram_heldout is not None
    assert torch.equal(inputs.gram_heldout, plain.gram_heldout)
    assert plain.loss is None and torch.equal(plain.method_grams[0], plain.gram_calibration)


def test_fewer_calibration_tokens_keep_their_weights(tiny: SimpleNamespace) -> None:
    inputs = load_weighted(config_for(tiny))
    fewer = limit_calibration(inputs, 70, SEQ_LEN, seed=0)
    assert fewer.loss is not None and fewer.loss.weights.shape == (70, 1)
    x, weights = torch.cat(list(inputs.batches())), weights_of(inputs)
    rows = [i for i in range(len(weights)) if bool((fewer.loss.weights == weights[i]).any())]
    assert len(rows) == 70
    want = (x[rows].double() * weights[rows].double()).T @ x[rows].double()
    torch.testing.assert_close(fewer.loss.gram[0].double(), want, rtol=1e-4, atol=1e-5 * float(want.diagonal().max()))


def test_seeds_reproduce_and_differ(tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = weights_of(load_weighted(config_for(tiny)))
    forget(monkeypatch)
    assert torch.equal(weights_of(load_weighted(config_for(tiny, cache__dir=str(tmp_path / "other")))), first)
    assert not torch.equal(weights_of(load_weighted(config_for(tiny, seed=1))), first)
    assert not torch.equal(weights_of(load_weighted(config_for(tiny, samples=2))), first)


# --- one pass, its cache ----------------------------------------------------------------------------------------------


def test_all_layers_share_one_pass(tiny: SimpleNamespace, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_for(tiny)
    load_weighted(config)
    assert batches == [2] * (SEQUENCES // 2)
    built: list[Any] = []
    monkeypatch.setattr(decoders, "build_whole", lambda *args: built.append(args))
    load_weighted(change(config, layer__index=3, layer__module="self_attn.o_proj"))
    forget(monkeypatch)
    load_weighted(config)
    assert not built and len(batches) == SEQUENCES // 2
    folder = folder_of(config)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {path.name for path in folder.iterdir()} == {*manifest["pieces"], "manifest.json"}  # no journal
    assert len(manifest["pieces"]) == 3
    for name, entry in manifest["pieces"].items():
        assert is_intact(folder / name, entry)
        tensors = weighted.load_tensors(folder / name)
        assert set(tensors) == {f"{index}.{module}" for index in range(NUM_LAYERS) for module in SEVEN}
        assert {tuple(tensor.shape) for tensor in tensors.values()} == {(128, 1)}


def test_the_type_of_the_captured_inputs_is_no_part_of_the_pass(tiny: SimpleNamespace) -> None:
    config = config_for(tiny)
    assert folder_of(change(config, model__dtype="bfloat16")) == folder_of(config)
    assert folder_of(change(config, layer__index=2)) == folder_of(config)
    others = [change(config, seed=1), change(config, data__samples=8), config_for(tiny, 2), config_for(tiny, 1, 2)]
    assert len({folder_of(other) for other in (config, *others)}) == 5


def test_memory_does_not_grow_with_tokens(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def peak(samples: int) -> tuple[int, int]:
        """(largest number of bytes of weights alive at once, batches)"""
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        most, made = 0, 0
        real = gradients.loss_weights

        def watched(*args: Any) -> dict[str, Tensor]:
            nonlocal most, made
            weights = real(*args)
            for tensor in weights.values():
                alive.add(tensor)
            most, made = max(most, sum(tensor.nbytes for tensor in alive)), made + 1
            return weights

        with monkeypatch.context() as patch:
            patch.setattr(losses, "loss_weights", watched)
            load_weighted(config_for(tiny, data__samples=samples))
        return most, made

    piece = 4 * 128 * NUM_LAYERS * len(SEVEN)
    assert peak(16) == (piece, 6)
    assert peak(64) == (piece, 24)


class Interrupt(Exception):
    pass


def test_an_interrupted_pass_goes_on_at_the_first_missing_piece(
    tiny: SimpleNamespace, batches: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, whole = config_for(tiny), config_for(tiny, cache__dir=str(tmp_path / "whole"))
    load_weighted(whole)
    batches.clear()
    forget(monkeypatch)

    real, saved = losses.save_tensors, []

    def save(path: Path, tensors: dict[str, Tensor]) -> Any:
        if len(saved) == 2:
            raise Interrupt
        saved.append(path)
        return real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "save_tensors", save)
        with pytest.raises(Interrupt):
            load_weighted(config)
    assert len(batches) == 6 and not (folder_of(config) / "manifest.json").exists()
    batches.clear()
    load_weighted(config)
    assert len(batches) == 2
    for path in folder_of(whole).iterdir():
        assert (folder_of(config) / path.name).read_bytes() == path.read_bytes()
    name = "loss-g1-s1.safetensors"
    folders = [resolve(c).layer_folder() for c in (config, whole)]
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_full_disk_is_one_line(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(losses, "save_tensors", full)
    with pytest.raises(SourceError, match=r"cannot be written \(No space left on device\)\. Free some space"):
        load_weighted(config_for(tiny))


def test_a_damaged_piece_is_computed_again(
    tiny: SimpleNamespace, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny)
    load_weighted(config)
    piece = folder_of(config) / "weights-00001.safetensors"
    good = piece.read_bytes()
    piece.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    batches.clear()
    forget(monkeypatch)
    load_weighted(change(config, layer__index=1))
    assert len(batches) == 2 and piece.read_bytes() == good


def test_a_damaged_file_of_a_layer_is_made_again(
    tiny: SimpleNamespace, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny)
    first = load_weighted(config).loss
    path = resolve(config).layer_folder() / "loss-g1-s1.safetensors"
    good = path.read_bytes()
    batches.clear()
    for damaged in (good[:-1], b""):
        path.write_bytes(damaged)
        forget(monkeypatch)
        again = load_weighted(config).loss
        assert first is not None and again is not None and torch.equal(first.gram, again.gram)
        assert path.read_bytes() == good and not batches


def test_two_who_want_the_same_weights_compute_them_once(tiny: SimpleNamespace, batches: list[int]) -> None:
    configs = [config_for(tiny, layer__index=index) for index in range(3)]
    for config in configs:
        load.load_layer_inputs(resolve(config))
    threads = [threading.Thread(target=load_weighted, args=(config,)) for config in configs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(batches) == SEQUENCES // 2


# --- what has no loss -------------------------------------------------------------------------------------------------


def test_a_bundle_has_the_weights_that_were_computed_before_it_was_copied(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny)
    first = load_weighted(config).loss
    shutil.copytree(resolve(config).layer_folder(), tmp_path / "bundle")
    model = ModelConfig("bundle", ModelSource.bundle, path=str(tmp_path / "bundle"))
    bundle = change(config, model=model, data__path=None)
    forget(monkeypatch)
    again = load_weighted(bundle).loss
    assert first is not None and again is not None and torch.equal(first.gram, again.gram)
    with pytest.raises(SourceError, match=r"hessian=loss: .*loss-g2-s1\.safetensors is missing, and a bundle has"):
        load_weighted(change(bundle, hessian=HessianConfig(Weighting.loss, 2)))
    before = resolve(bundle)
    (tmp_path / "bundle" / "loss-g1-s1.safetensors").write_bytes(b"")
    assert resolve(bundle).config_hash != before.config_hash  # its finished run is not this one's
    plain = change(bundle, hessian=HessianConfig())
    assert "loss" not in resolve(plain).sources
    forget(monkeypatch)
    with pytest.raises(SourceError, match=r"loss-g1-s1\.safetensors is damaged, .* use hessian=output"):
        load_weighted(bundle)


def test_a_synthetic_layer_is_refused() -> None:
    config = change(configuration(), model=ModelConfig("synthetic", ModelSource.synthetic))
    with pytest.raises(SourceError, match=r"hessian=loss: model=synthetic has no loss, .* Use hessian=output"):
        resolve(change(config, hessian=HessianConfig(Weighting.loss)))


def test_more_groups_than_rows_are_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(SourceError, match=r"hessian\.groups=17: 0\.self_attn\.k_proj has 16 outputs"):
        load_weighted(config_for(tiny, groups=17))


def test_kept_gram_matrices_alone_are_not_enough(tiny: SimpleNamespace) -> None:
    with pytest.raises(SourceError, match=r"cache\.activations=true"):
        load_weighted(config_for(tiny, cache__activations=False))


# --- precision --------------------------------------------------------------------------------------------------------


def test_tf32_is_another_pass_on_a_gpu_and_changes_nothing_on_a_cpu(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tiny)
    rounded = change(config, hessian=HessianConfig(Weighting.loss, matmul=Matmul.tf32))
    resolved = resolve(config)
    assert resolve(rounded) == resolved
    folder = losses_folder(rounded, resolved.sources)  # as on a GPU
    assert folder != folder_of(config) and loss_file(rounded) == "loss-g1-s1-tf32.safetensors"
    assert loss_file(config) == "loss-g1-s1.safetensors"
    seen: list[str] = []
    real = losses.loss_weights

    def noting(*arguments: Any) -> dict[str, Tensor]:
        seen.append(torch.get_float32_matmul_precision())
        return real(*arguments)

    monkeypatch.setattr(losses, "loss_weights", noting)
    before = torch.get_float32_matmul_precision()
    exact = losses.open_loss_weights(resolved)
    on_gpu = losses.open_loss_weights(replace(resolved, config=rounded))
    assert set(seen) == {"highest", "high"} and torch.get_float32_matmul_precision() == before
    layer = LayerConfig(0, "mlp.up_proj")
    assert torch.equal(exact.of(layer), on_gpu.of(layer))  # this is a CPU
    assert not {path.parent for path in exact.paths} & {path.parent for path in on_gpu.paths}
