"""Gram matrices of gradients at outputs: right numbers, the same bytes for several processes, resume, damage."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from experiments.capture import gradients, losses, output_grams
from experiments.capture.store import is_intact
from experiments.config import Config, LayerConfig
from experiments.files import SourceError, read_sealed
from experiments.model.job import memory_of
from experiments.sources.resolved import resolve
from tests.experiments.capture.test_losses import (
    SEQUENCES,
    Interrupt,
    batches,  # noqa: F401  a fixture
    config_for,
    folder_of,
    independent_gradients,
    small_pieces,  # noqa: F401  a fixture
)
from tests.experiments.tiny_models import INNER, NUM_LAYERS, SEVEN, WIDTH, change

pytestmark = pytest.mark.usefixtures("one_thread")

OUT = {"self_attn.k_proj": 16, "self_attn.v_proj": 16, "mlp.gate_proj": INNER, "mlp.up_proj": INNER}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path / "cache"))


def outputs_for(tiny: SimpleNamespace, samples: int = 1, **changes: Any) -> Config:
    return change(config_for(tiny, samples=samples, **changes), hessian__outputs=True)


def grams_of(config: Config) -> dict[str, Tensor]:
    """Of all modules, from the cache."""
    pieces = losses.open_loss_weights(resolve(config))
    layers = [LayerConfig(index, name) for index in range(NUM_LAYERS) for name in SEVEN]
    found = {gradients.layer_name(layer): pieces.output_gram(layer) for layer in layers}
    return {name: gram for name, gram in found.items() if gram is not None}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "samples"), [("2.mlp.down_proj", 1), ("0.self_attn.k_proj", 2)])
def test_they_are_the_sums_over_tokens_and_labels(tiny: SimpleNamespace, name: str, samples: int) -> None:
    config = outputs_for(tiny, samples, data__samples=8, seed=3)  # 6 sequences, so that the second piece is smaller
    got = grams_of(config)[name]
    g = independent_gradients(tiny, config, name).flatten(0, 2)
    want = g.T @ g
    assert got.dtype == torch.float32 and len(g) == 6 * 32 * samples
    # Float32 gradients of a model of four layers.
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()))


def test_every_linear_module_has_one_and_the_weights_are_as_without(tiny: SimpleNamespace) -> None:
    config, plain = outputs_for(tiny), config_for(tiny)
    shapes = {name: tuple(gram.shape) for name, gram in grams_of(config).items()}
    assert shapes == {f"{index}.{name}": (OUT.get(name, WIDTH),) * 2 for index in range(NUM_LAYERS) for name in SEVEN}
    losses.open_loss_weights(resolve(plain))
    own, other = folder_of(config), folder_of(plain)
    assert own != other
    for piece in range(3):
        name = f"weights-{piece:05d}.safetensors"
        assert (own / name).read_bytes() == (other / name).read_bytes()
    with pytest.raises(SourceError, match="no loss weights"):
        losses.open_loss_weights(resolve(config)).of(LayerConfig(0, "mlp"))
    assert losses.open_loss_weights(resolve(plain)).output_gram(LayerConfig(0, "mlp.down_proj")) is None


def test_the_manifest_has_their_hashes_and_nothing_else_is_left(tiny: SimpleNamespace) -> None:
    config = outputs_for(tiny)
    losses.open_loss_weights(resolve(config))
    folder = folder_of(config)
    manifest = read_sealed(folder / "manifest.json")
    outputs = manifest["outputs"]
    assert (outputs["pieces"], outputs["sequences"]) == (3, SEQUENCES)
    assert set(outputs["files"]) == {f"outputs-00003-{index:05d}.safetensors" for index in range(NUM_LAYERS)}
    assert all(is_intact(folder / name, entry) for name, entry in outputs["files"].items())
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest["pieces"], *outputs["files"]}
    assert not any("outputs" in entry for entry in manifest["pieces"].values())


class Watched(Tensor):
    """Notes the precision of its products."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__matmul__, Tensor.matmul, Tensor.addmm_):
            cls.seen.append(torch.get_float32_matmul_precision())
        return super().__torch_function__(func, types, args, kwargs)


def test_products_are_in_float32_also_where_the_pass_takes_tf32() -> None:
    sums = output_grams.OutputSums(decoder_of_one())
    with gradients.matmul("tf32"):
        for _ in range(2):
            sums.add("0.a", torch.ones(4, 3).as_subclass(Watched))
        assert torch.get_float32_matmul_precision() == "high"
    assert Watched.seen == ["highest"] * 2
    assert torch.equal(torch.Tensor(sums.sums["0.a"]), torch.full((3, 3), 8.0))


def decoder_of_one() -> Any:
    return SimpleNamespace(name="tiny", stack=[torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3)})])


# --- one pass, its cache ----------------------------------------------------------------------------------------------


def test_processes_write_the_bytes_of_one(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
) -> None:
    whole, shared = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "shared"))
    losses.open_loss_weights(resolve(whole))
    batches.clear()
    for process in (1, 0):
        losses.compute_share(resolve(shared), process, 2)
    assert len(batches) == 6
    assert len(list(folder_of(shared).glob("partial-*"))) == 3 * NUM_LAYERS
    batches.clear()
    losses.open_loss_weights(resolve(shared))
    assert not batches and files_of(folder_of(shared)) == files_of(folder_of(whole))
    losses.compute_share(resolve(shared), 0, 2)
    assert not batches


@pytest.mark.parametrize("layers_are_run_twice", [False, True])
def test_layers_that_are_computed_again_give_the_same_bytes(
    tiny: SimpleNamespace, tmp_path: Path, layers_are_run_twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = outputs_for(tiny, 2, data__samples=6)
    losses.open_loss_weights(resolve(want))
    if layers_are_run_twice:
        monkeypatch.setattr(losses, "GRAPH_BYTES", 0)
    again = change(want, cache__dir=str(tmp_path / "again"))
    losses.open_loss_weights(resolve(again))
    assert files_of(folder_of(again)) == files_of(folder_of(want))


@pytest.mark.parametrize(("step", "computed"), [("piece", 4), ("total", 4), ("journal", 2), ("manifest", 0)])
def test_an_interrupted_pass_goes_on_where_it_stopped(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
    step: str,
    computed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the second piece is computed or added, and while the manifest takes the journal's place."""
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    losses.open_loss_weights(resolve(whole))
    batches.clear()
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupt):
            losses.open_loss_weights(resolve(config))
    done = len(batches)
    losses.open_loss_weights(resolve(config))
    # The second piece, of two batches, is not listed before it is among the totals.
    assert len(batches) == done + computed
    assert files_of(folder_of(config)) == files_of(folder_of(whole))


def test_an_interrupted_share_goes_on_where_it_stopped(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A process stops while it writes its second piece, another one between two pieces that it adds."""
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    losses.open_loss_weights(resolve(whole))
    for step in ("partial", "journal"):
        with monkeypatch.context() as patch:
            stop_at(step, patch)
            with pytest.raises(Interrupt):
                losses.compute_share(resolve(config), 0, 1)
                losses.open_loss_weights(resolve(config))
    batches.clear()
    losses.open_loss_weights(resolve(config))
    assert not batches and files_of(folder_of(config)) == files_of(folder_of(whole))


def stop_at(step: str, patch: pytest.MonkeyPatch) -> None:
    if step == "manifest":

        def replace(source: Path, target: Path) -> None:
            raise Interrupt

        patch.setattr(losses, "os", SimpleNamespace(replace=replace))
        return
    module, name = {
        "piece": (losses, "save_tensors"), "journal": (losses.Totals, "remove_others")
    }.get(step, (output_grams, "save_tensors"))  # fmt: skip
    real = getattr(module, name)
    wanted = {"piece": "weights-00001", "partial": "partial-00001-00002", "total": "outputs-00002-00001"}.get(step)

    def save(path: Any, *args: Any) -> Any:
        if wanted is None:
            if path.pieces == 2:
                raise Interrupt
        elif path.name.startswith(wanted):
            raise Interrupt
        return real(path, *args)

    patch.setattr(module, name, save)


@pytest.mark.parametrize(
    ("file", "computed"),
    [("outputs-00003-00001.safetensors", 6), ("weights-00001.safetensors", 2), ("manifest.json", 6)],
)
def test_what_is_damaged_is_computed_again(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    file: str,
    computed: int,
) -> None:
    """A piece's own Gram matrices are gone when the pass has ended, so damaged totals need all pieces."""
    config = outputs_for(tiny)
    losses.open_loss_weights(resolve(config))
    good = files_of(folder_of(config))
    path = folder_of(config) / file
    path.write_bytes(good[file][:-3] + bytes([good[file][-3] ^ 1]) + good[file][-2:])
    batches.clear()
    losses.open_loss_weights(resolve(config))
    assert len(batches) == computed and files_of(folder_of(config)) == good


def test_a_damaged_partial_file_is_computed_again(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
) -> None:
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    losses.open_loss_weights(resolve(whole))
    losses.compute_share(resolve(config), 0, 1)
    path = folder_of(config) / "partial-00001-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    batches.clear()
    losses.open_loss_weights(resolve(config))
    assert len(batches) == 2 and files_of(folder_of(config)) == files_of(folder_of(whole))


def test_the_device_holds_the_sums_of_one_piece(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = output_grams.OutputSums.parts, []

    def parts(self: output_grams.OutputSums, *args: Any) -> Any:
        made.append(sum(gram.nbytes for gram in self.sums.values()))
        return real(self, *args)

    monkeypatch.setattr(output_grams.OutputSums, "parts", parts)
    losses.open_loss_weights(resolve(outputs_for(tiny)))
    widths = [OUT.get(name, WIDTH) for name in SEVEN]
    assert made == [4 * NUM_LAYERS * sum(width**2 for width in widths)] * 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_sums_that_do_not_fit_are_refused(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    need = 4 * NUM_LAYERS * sum(OUT.get(name, WIDTH) ** 2 for name in SEVEN)
    monkeypatch.setattr(output_grams, "free_bytes", lambda device: need - 1)
    message = (
        rf"hessian\.outputs=true: the Gram matrices of the outputs of tiny .* \({need} bytes\), and cpu has .* free"
    )
    with pytest.raises(SourceError, match=rf"{message}\. Use hessian=loss\.") as caught:
        losses.open_loss_weights(resolve(outputs_for(tiny)))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(output_grams, "free_bytes", lambda device: need)
    assert len(grams_of(outputs_for(tiny))) == NUM_LAYERS * len(SEVEN)


def test_free_memory_is_a_part_of_the_memory() -> None:
    assert 0 < output_grams.free_bytes(torch.device("cpu")) < memory_of("cpu")


def test_squares_beyond_float32_are_refused() -> None:
    sums = output_grams.OutputSums(decoder_of_one())
    sums.add("0.a", torch.full((1, 3), 1e20))
    with pytest.raises(SourceError, match=r"tiny: squares of the loss's gradients at 0\.a are beyond float32"):
        list(sums.parts(["0.a"]))
    sums.sums["0.a"] = torch.ones(3, 3)
    sums.add("0.experts", torch.ones(1, 3))  # no linear module
    ((index, grams),) = sums.parts(["0.a"])
    assert index == 0 and torch.equal(grams["0.a"], torch.ones(3, 3))
