"""Gram matrices of gradients at outputs: right numbers, the same bytes for several processes, resume, damage."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from experiments.capture import gradients, losses, output_grams
from experiments.capture.store import is_intact, load_tensors
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


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of totals that are written, in order."""
    written: list[str] = []
    real = output_grams.save_tensors

    def noting(path: Path, tensors: dict[str, Tensor]) -> Any:
        written.extend([path.name] * path.name.startswith("outputs-"))
        return real(path, tensors)

    monkeypatch.setattr(output_grams, "save_tensors", noting)
    return written


def keep(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """How the totals are kept. As usual, a pass as short as these saves them at the end alone."""
    if where == "on disk":
        monkeypatch.setattr(losses, "has_room", lambda decoder: False)
    if where == "saved after each piece":
        monkeypatch.setattr(output_grams, "SAVE_SECONDS", 0.0)
        monkeypatch.setattr(output_grams, "SAVE_SHARE", 0)
    if where == "saved after the second piece":
        monkeypatch.setattr(output_grams.RunningTotals, "is_due", property(lambda totals: totals.pieces == 2))


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


@pytest.mark.parametrize("where", ["saved after each piece", "on disk"])
@pytest.mark.parametrize(("step", "computed"), [("piece", 4), ("total", 4), ("journal", 2), ("manifest", 0)])
def test_an_interrupted_pass_goes_on_where_it_stopped(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
    where: str,
    step: str,
    computed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while the second piece is computed or added, and while the manifest takes the journal's place."""
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    losses.open_loss_weights(resolve(whole))
    keep(where, monkeypatch)
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
    keep("saved after each piece", monkeypatch)
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
    wanted = {
        "piece": "weights-00001",
        "partial": "partial-00001-00002",
        "total": "outputs-00002-00001",
        "last total": "outputs-00003-00001",
    }.get(step)

    def save(path: Any, *args: Any) -> Any:
        if wanted is None:
            if path.pieces == 2:
                raise Interrupt
        elif path.name.startswith(wanted):
            raise Interrupt
        return real(path, *args)

    patch.setattr(module, name, save)


WAYS = [
    ("at the end", [3]),
    ("saved after the second piece", [2, 3]),
    ("saved after each piece", [1, 2, 3]),
    ("on disk", [1, 2, 3]),
]


@pytest.mark.parametrize(("where", "written"), WAYS)
@pytest.mark.parametrize("shared", [False, True])
def test_totals_have_the_same_bytes_wherever_they_are_kept(
    tiny: SimpleNamespace,
    tmp_path: Path,
    saves: list[str],
    where: str,
    written: list[int],
    shared: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """written: numbers of pieces in the totals that come to disk."""
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "other"))
    losses.open_loss_weights(resolve(whole))
    keep(where, monkeypatch)
    if shared:
        losses.compute_share(resolve(config), 0, 1)
    saves.clear()
    losses.open_loss_weights(resolve(config))
    assert saves == [f"outputs-{pieces:05d}-{index:05d}.safetensors" for pieces in written for index in range(4)]
    assert files_of(folder_of(config)) == files_of(folder_of(whole))


@pytest.mark.parametrize(("saved", "computed"), [(False, 6), (True, 2)])
def test_pieces_after_the_last_save_are_computed_again(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    tmp_path: Path,
    saved: bool,
    computed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped before the third and last piece is listed: all three are computed again, or the last one alone."""
    whole, config = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "parts"))
    losses.open_loss_weights(resolve(whole))
    if saved:
        keep("saved after the second piece", monkeypatch)
    with monkeypatch.context() as patch:
        stop_at("last total", patch)
        with pytest.raises(Interrupt):
            losses.open_loss_weights(resolve(config))
    journal = read_sealed(folder_of(config) / "capture.json")
    assert len(journal["pieces"]) == 2 and journal["outputs"]["pieces"] == (2 if saved else 0)
    batches.clear()
    losses.open_loss_weights(resolve(config))
    assert len(batches) == computed and files_of(folder_of(config)) == files_of(folder_of(whole))


def test_sums_of_other_processes_stay_until_totals_with_them_are_saved(
    tiny: SimpleNamespace,
    batches: list[int],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = outputs_for(tiny)
    losses.compute_share(resolve(config), 0, 1)
    folder, left = folder_of(config), []
    real = losses._Pass._write_journal

    def noting(self: Any) -> None:
        real(self)
        listed = read_sealed(folder / "capture.json")["pieces"].values()
        files = {path.name for path in folder.glob("partial-*")}
        assert files == {name for entry in listed for name in entry.get("outputs", {})}
        left.append(len(files) // NUM_LAYERS)

    monkeypatch.setattr(losses._Pass, "_write_journal", noting)
    keep("saved after the second piece", monkeypatch)
    batches.clear()
    losses.open_loss_weights(resolve(config))
    assert left == [3, 1, 0] and not batches


@contextmanager
def stopping(step: int, folder: Path) -> Iterator[list[str]]:
    """Stops before one of the steps that change the folder's files: number `step`. Yields their names."""
    seen: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if Path(path).parent == folder:
                if len(seen) == step:
                    raise Interrupt
                seen.append(Path(path).name)
            return real(path, *args, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((losses, "save_tensors"), (output_grams, "save_tensors"), (losses, "write_sealed")):
            patch.setattr(module, name, counted(getattr(module, name)))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(losses, "os", SimpleNamespace(replace=counted(losses.os.replace)))
        yield seen


@pytest.mark.parametrize(("shared", "least"), [(False, 22), (True, 30)])
def test_a_pass_that_stops_at_any_step_ends_with_the_same_bytes(
    tiny: SimpleNamespace, tmp_path: Path, shared: bool, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Totals are saved after the second of three pieces, and after the last."""
    whole, shares = (outputs_for(tiny, cache__dir=str(tmp_path / name)) for name in ("whole", "shares"))
    losses.open_loss_weights(resolve(whole))
    if shared:
        losses.compute_share(resolve(shares), 0, 1)
    keep("saved after the second piece", monkeypatch)
    for step in itertools.count():
        config = outputs_for(tiny, cache__dir=str(tmp_path / f"{step}"))
        folder = folder_of(config)
        if shared:
            shutil.copytree(folder_of(shares), folder)
        try:
            with stopping(step, folder) as seen:
                losses.open_loss_weights(resolve(config))
            break
        except Interrupt:
            losses.open_loss_weights(resolve(config))
            assert files_of(folder) == files_of(folder_of(whole)), seen
    assert step == len(seen) >= least


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


class Clock:
    """Of `time`: each call of save_tensors takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 1000.0, seconds

    def monotonic(self) -> float:
        return self.now

    def save(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        self.now += self.seconds
        return {}


@pytest.mark.parametrize(("seconds", "pause"), [(0.5, 60.0), (3.0, 60.0), (5.0, 100.0)])
def test_a_save_is_due_after_a_minute_and_20_times_what_the_last_one_took(
    tmp_path: Path, seconds: float, pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(seconds)
    monkeypatch.setattr(output_grams, "time", clock)
    monkeypatch.setattr(output_grams, "save_tensors", clock.save)
    totals = output_grams.RunningTotals(tmp_path, output_grams.Totals(), in_memory=True)
    for wait in (60.0, pause):
        totals.add(2, iter([(0, {"0.a": torch.ones(2, 2)})]))
        clock.now += wait - 1
        assert not totals.is_due
        clock.now += 1
        assert totals.is_due
        totals.save()
        assert totals.saved.pieces == totals.pieces
    totals.save()  # there is nothing new
    assert clock.now == 1000 + 60 + pause + 2 * seconds


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
def test_a_module_has_a_total_if_every_piece_has_its_sums(tmp_path: Path, in_memory: bool, resumed: bool) -> None:
    """An expert has loss weights of a piece if its router happened to send it all tokens."""
    one = torch.ones(2, 2)
    pieces = [
        [(0, {"0.a": one, "0.b": one}), (1, {"1.a": one})],
        [(0, {"0.a": 2 * one, "0.c": one}), (2, {"2.a": one})],
        [(0, {"0.a": 4 * one, "0.b": one}), (1, {"1.a": one})],
    ]
    totals = output_grams.RunningTotals(tmp_path, output_grams.Totals(), in_memory)
    for piece in pieces:
        totals.add(1, iter([(index, {name: gram.clone() for name, gram in grams.items()}) for index, grams in piece]))
        if resumed:
            totals.save()
            totals = output_grams.RunningTotals(tmp_path, totals.saved, in_memory)
    totals.save()
    assert list(totals.saved.files) == ["outputs-00003-00000.safetensors"]
    ((name, gram),) = load_tensors(tmp_path / "outputs-00003-00000.safetensors").items()
    assert name == "0.a" and torch.equal(gram, 7 * one)


@pytest.mark.parametrize(("device", "copies"), [("cpu", 2), ("cuda", 1)])
def test_totals_take_half_of_the_available_memory_at_most(
    device: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 outputs, 36 bytes. On a CPU, a piece has as many."""
    decoder = SimpleNamespace(stack=decoder_of_one().stack, device=torch.device(device))
    monkeypatch.setattr(output_grams, "free_bytes", lambda of: {"cpu": 2 * copies * 36}[of.type])
    assert output_grams.has_room(decoder)
    monkeypatch.setattr(output_grams, "free_bytes", lambda of: {"cpu": 2 * copies * 36 - 1}[of.type])
    assert not output_grams.has_room(decoder)


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


@pytest.mark.parametrize("gradient", [[1e20, 1e20, 1e20], [0.0, 1e20, -1.0], [0.0, float("nan"), 0.0]])
def test_squares_beyond_float32_are_refused(gradient: list[float]) -> None:
    sums = output_grams.OutputSums(decoder_of_one())
    sums.add("0.a", torch.tensor([gradient]))
    with pytest.raises(SourceError, match=r"tiny: squares of the loss's gradients at 0\.a are beyond float32"):
        list(sums.parts(["0.a"]))
    sums.sums["0.a"] = torch.ones(3, 3)
    sums.add("0.experts", torch.ones(1, 3))  # no linear module
    ((index, grams),) = sums.parts(["0.a"])
    assert index == 0 and torch.equal(grams["0.a"], torch.ones(3, 3))
