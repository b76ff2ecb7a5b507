"""Captures that are interrupted, that cannot be written, or that have NaN or Inf."""

from __future__ import annotations

import errno
import io
import json
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.capture import forward, load, progress, tap
from experiments.capture.inputs import LayerInputs
from experiments.capture.store import JOURNAL_NAME, PARTIAL_NAME, save_tensors
from experiments.config import Config, LayerConfig
from experiments.files import SourceError, read_sealed
from experiments.sources import decoder
from experiments.sources.resolved import resolve
from tests.experiments.tiny_models import SEVEN, configuration, qwen3, shard_of, write_text


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A "MiB" of 32 KiB: a shard is 4 sequences of 32 tokens of 64 float32 channels, in batches of 2: 6 and 2."""
    monkeypatch.setattr(forward, "MIB", 1 << 15)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    monkeypatch.setattr(load, "_memo", type(load._memo)())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """count: number of forward passes, without trial runs. In the middle of pass `stop`, `error` is raised."""
    state = SimpleNamespace(count=0, stop=None, error=KeyboardInterrupt)
    real = tap.InputTap.run

    def run(self: Any, token_ids: Tensor, consume: Callable[[int, Tensor], None]) -> None:
        def half(group: int, x: Tensor) -> None:
            consume(group, x)
            if state.count == state.stop:
                raise state.error

        state.count += 1
        real(self, token_ids, half)

    monkeypatch.setattr(tap.InputTap, "run", run)
    return state


def captured(config: Config, *ahead: LayerConfig) -> LayerInputs:
    load._memo.clear()
    return load.load_layer_inputs(resolve(config), ahead)


def folder_of(config: Config) -> Path:
    return resolve(config).layer_folder()


def same(a: LayerInputs, b: LayerInputs) -> bool:
    pairs = [(a.weight, b.weight), (a.gram_calibration, b.gram_calibration), (a.gram_heldout, b.gram_heldout)]
    return all(torch.equal(x, y) for x, y in pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("stop", [2, 4, 8])
def test_an_interrupted_capture_goes_on_where_it_stopped(
    tiny: SimpleNamespace, tmp_path: Path, passes: SimpleNamespace, activations: bool, stop: int
) -> None:
    """Also in the middle of a shard, and without shards. The sums are bitwise equal."""
    config = configuration(tiny.folder, tiny.texts, cache__activations=activations)
    whole = captured(configuration(tiny.folder, tiny.texts, cache__dir=str(tmp_path / "whole")))
    assert passes.count == 8
    passes.count, passes.stop = 0, stop
    with pytest.raises(KeyboardInterrupt):
        captured(config)
    assert (folder_of(config) / PARTIAL_NAME).is_file() and not (folder_of(config) / "manifest.json").exists()
    passes.count, passes.stop = 0, None
    resumed = captured(config)
    assert passes.count == 8 - stop
    assert same(whole, resumed)
    if activations:
        assert torch.equal(torch.cat(list(whole.batches())), torch.cat(list(resumed.batches())))
    assert not (folder_of(config) / PARTIAL_NAME).exists() and not (folder_of(config) / JOURNAL_NAME).exists()


def test_many_layers_go_on_each_where_it_stopped(
    tiny: SimpleNamespace, tmp_path: Path, passes: SimpleNamespace
) -> None:
    """Interrupted between two layers of one pass: one layer has the batch, the other one lacks it."""
    layers = [LayerConfig(index, module) for index in (0, 2) for module in SEVEN]
    config = configuration(tiny.folder, tiny.texts, layer=layers[0])
    whole = configuration(tiny.folder, tiny.texts, layer=layers[0], cache__dir=str(tmp_path / "whole"))
    captured(whole, *layers)
    passes.count, passes.stop = 0, 5
    with pytest.raises(KeyboardInterrupt):
        captured(config, *layers)
    passes.count, passes.stop = 0, None
    captured(config, *layers)
    assert passes.count == 4  # the fifth again, for the layers that lack it
    for layer in layers:
        folders = [resolve(c).layer_folder(layer) for c in (whole, config)]
        one, two = (load_file(folder / "gram.safetensors") for folder in folders)
        assert all(torch.equal(one[name], two[name]) for name in one)
        one, two = (json.loads((folder / "manifest.json").read_text()) for folder in folders)
        assert one == two


def test_a_capture_that_is_killed_goes_on_where_it_was_kept_last(
    tiny: SimpleNamespace, passes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(forward._Keeper, "__exit__", lambda *_: None)  # nothing is done on the way out
    config = configuration(tiny.folder, tiny.texts, cache__activations=False)
    monkeypatch.setattr(forward.time, "monotonic", lambda: 0.0)  # each tick is late
    passes.stop = 4
    with pytest.raises(KeyboardInterrupt):
        captured(config)
    passes.count, passes.stop = 0, None
    captured(config)
    assert passes.count == 5  # the fourth batch was lost


@pytest.mark.parametrize("stop", range(2, 9))
def test_a_capture_that_is_killed_after_a_shard_counts_no_token_twice(
    tiny: SimpleNamespace, tmp_path: Path, passes: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """The journal that a shard's end writes has the numbers of the Gram matrices that were kept before."""
    whole = configuration(tiny.folder, tiny.texts, cache__dir=str(tmp_path / "whole"))
    captured(whole)
    monkeypatch.setattr(forward, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(forward._Keeper, "__exit__", lambda *_: None)  # nothing is done on the way out
    monkeypatch.setattr(forward.time, "monotonic", lambda: 0.0)  # each batch is kept
    config = configuration(tiny.folder, tiny.texts)
    passes.count, passes.stop = 0, stop
    with pytest.raises(KeyboardInterrupt):
        captured(config)
    passes.count, passes.stop = 0, None
    captured(config)
    one, two = (read_sealed(folder_of(c) / "manifest.json") for c in (whole, config))
    assert one == two
    assert not (folder_of(config) / JOURNAL_NAME).exists() and not (folder_of(config) / PARTIAL_NAME).exists()


@pytest.mark.parametrize("damage", ["cut short", "another layout", "a missing shard"])
def test_what_was_kept_is_not_trusted_where_it_is_damaged(
    tiny: SimpleNamespace, tmp_path: Path, passes: SimpleNamespace, damage: str
) -> None:
    config = configuration(tiny.folder, tiny.texts)
    whole = captured(configuration(tiny.folder, tiny.texts, cache__dir=str(tmp_path / "whole")))
    passes.count, passes.stop = 0, 5
    with pytest.raises(KeyboardInterrupt):
        captured(config)
    folder = folder_of(config)
    if damage == "cut short":
        (folder / PARTIAL_NAME).write_bytes((folder / PARTIAL_NAME).read_bytes()[:-1])
    elif damage == "another layout":
        config = configuration(tiny.folder, tiny.texts, cache__shard_mib=2)
    else:
        (folder / "calibration-00000.safetensors").unlink()
    passes.count, passes.stop = 0, None
    assert same(whole, captured(config))
    assert passes.count == {"cut short": 4, "another layout": 8, "a missing shard": 6}[damage]


def test_the_bar_moves_within_a_forward_pass(tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The progress bar moves within a pass, because a pass of a large model takes long."""
    shown: list[float] = []

    class Bar(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": False})

        def update(self, n: float | None = 1) -> bool | None:
            result = super().update(n)
            if str(self.desc).startswith("capture"):  # hashing has a bar, too
                shown.append(self.n)
            return result

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 1 << 20)
    captured(configuration(tiny.folder, tiny.texts, cache__activations=False, layer__index=3))
    assert shown == sorted(shown) and shown[-1] == 16  # sequences, in two passes
    assert sum(0 < n < 12 for n in shown) > 20 and sum(12 < n < 16 for n in shown) > 20


def test_a_clock_goes_on_while_the_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(sys, "stderr", Terminal())
    drawn = threading.Event()
    real = tqdm.tqdm.refresh
    monkeypatch.setattr(tqdm.tqdm, "refresh", lambda bar, *rest, **more: (real(bar, *rest, **more), drawn.set()))
    with progress.waiting("reading a model"):
        drawn.clear()
        assert drawn.wait(timeout=10)  # drawn anew though nobody updates it
    assert "reading a model [00:00]" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.waiting("reading a model"):
        pass
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [("float16", "model.dtype=bfloat16 or float32"), ("bfloat16", "model.dtype=float32"), ("float32", "checkpoint")],
)
def test_inputs_that_are_not_finite_name_layer_type_and_remedy(tmp_path: Path, dtype: str, remedy: str) -> None:
    qwen3(tmp_path / "tiny")
    write_text(tmp_path / "texts")
    name = "model.layers.0.mlp.up_proj.weight"
    file = tmp_path / "tiny" / shard_of(name)
    tensors = load_file(file)
    tensors[name][3, :] = 3e38  # finite as stored
    save_file(tensors, file, {"format": "pt"})
    config = configuration(tmp_path / "tiny", tmp_path / "texts", model__dtype=dtype)
    with pytest.raises(SourceError) as caught:
        captured(config)
    message = str(caught.value)
    assert message.startswith("layer 0 mlp.down_proj of tiny (local): its inputs hold ") and dtype in message
    assert "NaN or Inf" in message and remedy in message and "\n" not in message
    assert not (folder_of(config) / PARTIAL_NAME).exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_that_are_not_finite_as_stored_name_their_tensor(tmp_path: Path, dtype: str, value: float) -> None:
    """Another model.dtype would not help, so none is named."""
    qwen3(tmp_path / "tiny")
    write_text(tmp_path / "texts")
    name = "model.layers.0.mlp.up_proj.weight"
    file = tmp_path / "tiny" / shard_of(name)
    tensors = load_file(file)
    tensors[name][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    message = f"{name} holds NaN or Inf as it is stored, so no model.dtype helps. Download the checkpoint again"
    with pytest.raises(SourceError, match=message):
        captured(configuration(tmp_path / "tiny", tmp_path / "texts", model__dtype=dtype))


def test_a_width_that_the_block_size_does_not_divide_is_refused_before_the_capture(
    tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder.Decoder, "load", lambda self: pytest.fail("weights were read"))
    monkeypatch.setattr(forward, "token_sequences", lambda *_: pytest.fail("the text was tokenized"))
    config = configuration(tiny.folder, tiny.texts, block_size=48)
    with pytest.raises(SourceError, match=r"block_size=48: layer 0 mlp.down_proj of tiny \(local\) has 64 .*=16 or 32"):
        captured(config)


def test_a_width_of_a_synthetic_layer_is_refused_before_it_is_made() -> None:
    from experiments.config import compose

    config = compose(["model=synthetic", "model.in_features=40", "device=cpu", "tracking=none"])
    with pytest.raises(SourceError, match=r"block_size=16: .* has 40 input features"):
        captured(config)


@contextmanager
def file_size(limit: int) -> Iterator[None]:
    """Limits the size of files. The system's error is like that of a full disk, with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_the_systems_error_with_the_file(tmp_path: Path) -> None:
    with file_size(4096), pytest.raises(OSError) as caught:
        save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(4096)})
    assert caught.value.errno == errno.EFBIG and caught.value.filename == str(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_cache_on_a_full_disk_is_one_line_with_folder_and_remedy(tiny: SimpleNamespace) -> None:
    config = configuration(tiny.folder, tiny.texts)
    resolved = resolve(config)
    with file_size(4096), pytest.raises(SourceError) as caught:
        load.load_layer_inputs(resolved)
    message = str(caught.value)
    assert str(config.cache.folder) in message and "cache.dir" in message and "\n" not in message
