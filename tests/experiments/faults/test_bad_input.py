"""Whatever a user gives: a right result or an error in one line. Never NaN, never another error.

The cases of quantize() and of the configuration are Hypothesis's. Files are mutated by a seeded generator: their JSON
by values of other types and sizes, their bytes by flips, cuts and noise.
"""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json
import math
import random
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments.capture.cache import complete_manifest
from experiments.config import (
    CONF_DIR,
    Config,
    DataConfig,
    DataSource,
    LayerConfig,
    ModelConfig,
    ModelSource,
    config_hash,
    result_config,
    run_id,
    to_config,
)
from experiments.files import SourceError, write_sealed
from experiments.measure.stages import check_options
from experiments.overrides import _keys, mistake
from experiments.record import RecordError, RunRecord
from experiments.sources.bundles import MANIFEST_FIELDS, resolve_bundle
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.decoder import Decoder
from experiments.sources.models import count_layers, model_identity
from experiments.sources.texts import load_text
from quantkit import FORMATS, METHODS, quantize, verify
from quantkit.calibration import block_hessians, hessians_from_activations
from tests.experiments.faults.sizes import note, size
from tests.experiments.faults.test_damage import cut, flip, overwrite
from tests.experiments.test_record import RECORD
from tests.experiments.tiny_models import configuration, text

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(size(300, 7200)), pytest.mark.slow]

hypothetical = settings(
    max_examples=size(60, 10_000),
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
CASES = size(60, 10_000)

# quantize()

SPECIAL = (0.0, -0.0, 1e-45, 1e-38, 1e-10, 1e-3, 0.5, 1.0, 6.0, 448.0, 2688.0, 1e5, 1e30, 3e38, -1e30)
NOT_FINITE = (math.nan, math.inf, -math.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.bool, torch.complex64)
JUNK = (None, "", "none", "amax", "16", 0, -1, 1.5, math.nan, math.inf, 1e300, True, [], {}, object(), b"x")


def call(chance: random.Random) -> dict[str, Any]:
    """The arguments of a call: mostly of the right kind, with one or two that may be anything."""
    fmt, method = chance.choice(list(FORMATS)), chance.choice(list(METHODS))
    block = chance.choice(FORMATS[fmt].block_sizes)
    columns = block * chance.choice((1, 2, 3, 0)) + (chance.random() < 0.05)
    rows = chance.choice(((1,), (3,), (5,), (2, 2), (0,), ()))
    dtype = chance.choice(DTYPES[:4] if chance.random() < 0.95 else DTYPES)
    weight = values((*rows, columns), dtype, chance, finite=chance.random() < 0.9)
    arguments: dict[str, Any] = {"weight": weight, "format": fmt, "block_size": block, "method": method}
    needs = METHODS[method].needs
    if needs is not None or chance.random() < 0.1:
        kind = chance.choice(("activations", "gram") if needs == "gram" else ("activations", "gram", "hessian"))
        wide = columns + block * (chance.random() < 0.05)
        tokens = chance.choice((40, 5, 1, 0))
        x = values((tokens, wide), torch.float32, chance, finite=chance.random() < 0.9)
        count = wide // block
        if kind == "activations":
            arguments[kind] = x
        elif kind == "gram":
            arguments[kind] = x.T @ x
        elif count:
            arguments[kind] = torch.stack([y.T @ y for y in x[:, : count * block].split(block, 1)])
    for _ in range(chance.choice((0, 0, 0, 1, 2))):
        others = ("global_scale", "scale_rule", "backend", "damping", "sweeps", "order", "gram", "init")
        arguments[chance.choice((*arguments, *others))] = chance.choice(JUNK)
    return arguments


def values(shape: tuple[int, ...], dtype: torch.dtype, chance: random.Random, finite: bool) -> torch.Tensor:
    pool = SPECIAL if finite else (*SPECIAL, *NOT_FINITE)
    mixed = chance.random() < 0.5
    common = chance.choice(SPECIAL)
    numbers = [chance.choice(pool) if mixed else common * chance.gauss(0, 1) for _ in range(math.prod(shape))]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype, device="cpu")
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(shape).to(dtype)


def hessian_of(arguments: dict[str, Any]) -> torch.Tensor | None:
    """The block Hessians that a call was given in one form or another."""
    size = int(arguments["block_size"])
    if arguments.get("activations") is not None:
        return hessians_from_activations(arguments["activations"], size)
    if arguments.get("gram") is not None:
        return block_hessians(arguments["gram"], size)
    return arguments.get("hessian")


def said_in_one_line(error: BaseException, **shown: Any) -> None:
    assert str(error).strip() and "\n" not in str(error), (shown, repr(error))


def test_quantize_gives_a_right_result_or_one_line() -> None:
    ended: Counter[str] = Counter()

    @hypothetical
    @given(st.integers(0, 1 << 64))
    def one(seed: int) -> None:
        arguments = call(random.Random(seed))
        weight = arguments["weight"]
        try:
            result = quantize(**arguments)
        except (ValueError, TypeError) as error:
            said_in_one_line(error, arguments=arguments)
            ended[type(error).__name__] += 1
            return
        ended["result"] += 1
        assert result.shape == weight.shape and bool(result.dequantize().isfinite().all()), arguments
        if METHODS[str(result.method)].is_optimal:
            assert verify(result, weight, hessian_of(arguments)).ok, arguments

    one()
    assert ended["result"] > size(3, 1000) and ended["ValueError"] > size(3, 1000)
    note("quantize()", cases=sum(ended.values()), ended=dict(ended))


# The configuration

VALUES = ("", "null", "true", "0", "-1", "1", "3", "16", "1e3", "1e999", "nan", "inf", "0.5", "auto", "cpu", "none",
          "'a b'", "[]", "[1,2]", "{a:1}", "../up", "/etc", "\u2603", "99999999999999999999", "-0.0", "x" * 300,
          "cuda:x", "${seed}", "a.b", "1_000", "0x10", "~", "*")  # fmt: skip


def test_a_configuration_is_composed_or_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    ended: Counter[str] = Counter()
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        whole = compose("config", overrides=["model=synthetic", "data=synthetic"])
    plain = OmegaConf.to_container(whole, resolve=False)

    @hypothetical
    @given(st.lists(st.tuples(st.sampled_from(_keys(Config)), st.sampled_from(VALUES)), min_size=1, max_size=3))
    def one(overrides: list[tuple[str, str]]) -> None:
        try:
            config = configured(whole, overrides)
            check_options(config)
        except (HydraException, OmegaConfBaseException) as error:
            known = isinstance(error, HydraException) or any("${" in value for _, value in overrides)
            assert known, (overrides, error)
            ended["refused by Hydra"] += 1
        except (ValueError, TypeError) as error:
            said_in_one_line(error, overrides=overrides)
            ended["refused"] += 1
        else:
            ended["composed"] += 1
            assert run_id(config, "cpu", "reference") and config_hash(result_config(config, "cpu", "reference"))

    one()
    assert OmegaConf.to_container(whole, resolve=False) == plain
    assert min(ended["refused"], ended["composed"]) > size(0, 1000)
    capsys.readouterr()
    note("configuration", cases=sum(ended.values()), ended=dict(ended))


def configured(whole: DictConfig, overrides: list[tuple[str, str]]) -> Config:
    """What run.py makes of the overrides."""
    composed = copy.deepcopy(whole)
    for key, value in overrides:
        if (meant := mistake([f"{key}={value}"], Config)) is not None:
            raise ValueError(meant)
        parsed = OverridesParser.create().parse_override(f"{key}={value}")
        OmegaConf.update(composed, key, parsed.value(), force_add=False)
    config = to_config(composed)
    json.dumps(result_config(config, "cpu", "reference"))
    return config


# Model folders

ODD = (None, True, False, 0, 1, -1, 3, 7, 65, 1e9, -2.5, 1e308, "", "x", "../../etc/passwd", "/etc/passwd", [], {},
       [[]], {"a": 1}, ["x"], "\ud83d\ude00", 1 << 70)  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a JSON value."""
    inner = (
        list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    )
    return [(value, key) for key, _ in inner] + [place for _, part in inner for place in places(part)]


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    values = json.loads(data)
    for _ in range(chance.randrange(1, 4)):
        if not (found := places(values)):
            break
        container, key = chance.choice(found)
        if chance.random() < 0.2:
            del container[key]
        else:
            container[key] = copy.deepcopy(chance.choice(ODD))
    return json.dumps(values).encode()


def mutate(data: bytes, chance: random.Random) -> bytes:
    kind = chance.choice((cut, flip, overwrite)) if data else (lambda data, _: data)
    return kind(data, chance)


def mutate_header(data: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header has other dtypes, shapes, offsets, names or length."""
    length = struct.unpack("<Q", data[:8])[0]
    header = (
        mutate_json(data[8 : 8 + length], chance) if chance.random() < 0.8 else mutate(data[8 : 8 + length], chance)
    )
    told = len(header) if chance.random() < 0.8 else chance.choice((0, 1, 1 << 40, (1 << 64) - 1, len(header) + 9))
    return struct.pack("<Q", told) + header + data[8 + length :]


def use_model(folder: Path, cache: Path) -> None:
    """All that a capture does with a checkpoint, up to the first forward pass."""
    model = configuration(folder).model
    model_identity(model, cache)
    count_layers(model)
    checkpoint = open_checkpoint(model, cache)
    decoder = Decoder(checkpoint, [LayerConfig(1)], torch.float32)
    decoder.load()
    assert checkpoint.tokenizer()(text(3))


FOLDER_CASES: list[tuple[str, Callable[[bytes, random.Random], bytes]]] = [
    ("config.json", mutate_json),
    ("model.safetensors.index.json", mutate_json),
    ("tokenizer.json", mutate_json),
    ("tokenizer_config.json", mutate_json),
    ("shard", mutate_header),
]


@pytest.mark.parametrize(("name", "change"), FOLDER_CASES)
def test_a_model_folder_is_read_or_refused_in_one_line(
    tiny: SimpleNamespace, tmp_path: Path, name: str, change: Callable[[bytes, random.Random], bytes]
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny.folder, folder)
    path = next(folder.glob("*-00003-of-*")) if name == "shard" else folder / name
    whole, chance, ended = path.read_bytes(), random.Random(name), Counter[str]()
    for number in range(size(25, 10_000)):
        data = change(whole, chance) if chance.random() < 0.8 else mutate(whole, chance)
        path.write_bytes(data)
        try:
            use_model(folder, tmp_path / "cache")
            ended["read"] += 1
        except SourceError as error:
            said_in_one_line(error, number=number)
            ended["refused"] += 1
        except Exception as error:
            (tmp_path / "case").write_bytes(data)
            raise AssertionError(f"case {number}: {data[:300]!r}") from error
    assert ended["refused"] > 0
    note(f"model folder: {name}", cases=sum(ended.values()), ended=dict(ended))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model-00002-of-00006.safetensors"])
def test_a_link_out_of_a_model_folder_is_refused(tiny: SimpleNamespace, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny.folder, tmp_path / "tiny")
    path = tmp_path / "tiny" / name
    path.rename(tmp_path / name)
    path.symlink_to(tmp_path / name)
    with pytest.raises(SourceError, match=f"{name} is a link to .*, outside of the folder"):
        use_model(tmp_path / "tiny", tmp_path / "cache")


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tiny: SimpleNamespace, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    shutil.copytree(tiny.folder, snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    use_model(snapshot, tmp_path / "cache")


# Texts


def text_file(chance: random.Random) -> tuple[str, bytes]:
    """A file of texts of some kind, damaged or not of its kind."""
    lines = text(chance.randrange(0, 6)).splitlines()
    name, data = chance.choice(
        (
            ("train.txt", "\n".join(lines).encode()),
            ("train.jsonl", "".join(json.dumps({"text": line}) + "\n" for line in lines).encode()),
            ("train.jsonl", "".join(json.dumps({"text": chance.choice(ODD)}) + "\n" for _ in lines).encode()),
            ("train.jsonl", "".join(json.dumps(chance.choice(ODD)) + "\n" for _ in lines).encode()),
            ("train.csv", ("text,other\n" + "".join(f'"{line}",1\n' for line in lines)).encode()),
            ("train.tsv", ("text\tother\n" + "".join(f"{line}\t1\n" for line in lines)).encode()),
            ("train.json", json.dumps([{"text": line} for line in lines]).encode()),
            ("train.parquet", b"PAR1" + chance.randbytes(60) + b"PAR1"),
        )
    )
    if chance.random() < 0.2:
        name, data = f"{name}.gz", gzip.compress(data)
    return name, mutate(data, chance) if chance.random() < 0.7 else data


def test_a_text_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    chance, ended = random.Random(11), Counter[str]()
    for number in range(CASES):
        folder = tmp_path / "texts"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name, data = text_file(chance)
        (folder / name).write_bytes(data)
        try:
            content = load_text(DataConfig("words", DataSource.hub, path=str(folder)), tmp_path / "cache").read()
            content.encode()
            ended["read"] += 1
        except SourceError as error:
            said_in_one_line(error, number=number)
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {name} {data[:300]!r}") from error
    assert min(ended["read"], ended["refused"]) > size(5, 1000)
    note("texts", cases=sum(ended.values()), ended=dict(ended))


# Records and manifests


def test_a_record_is_read_or_refused_in_one_line() -> None:
    chance, ended = random.Random(12), Counter[str]()
    whole = json.dumps(RECORD.to_dict()).encode()
    for _ in range(size(1000, 20_000)):
        data = mutate_json(whole, chance) if chance.random() < 0.7 else mutate(whole, chance)
        try:
            record = RunRecord.from_json(data.decode(errors="replace"))
            assert RunRecord.from_json(record.to_json()) == record
            ended["read"] += 1
        except RecordError as error:
            said_in_one_line(error, data=data)
            ended["refused"] += 1
    note("records", cases=sum(ended.values()), ended=dict(ended))


ENTRY = {"bytes": 10, "sha256": "0" * 64}
MANIFEST: dict[str, Any] = dict.fromkeys(MANIFEST_FIELDS, 1) | {
    "capture_version": 1,
    "layer": {"index": 0, "module": "mlp.down_proj"},
    "data": {"name": "words", "source": "hub", "seq_len": 32, "samples": 4},
    "source": {"model": "m", "dtype": "float32"},
    "tokens": {"calibration": 1, "heldout": 1},
    "files": {"gram.safetensors": ENTRY, "weight.safetensors": ENTRY},
    "shards": {"calibration-00000.safetensors": ENTRY | {"split": "calibration"}},
}


def bundle_at(folder: Path) -> Config:
    """A configuration whose model is the bundle in this folder."""
    model = ModelConfig("bundle", ModelSource.bundle, path=str(folder), dtype="float32")
    return dataclasses.replace(configuration(), model=model)


def test_a_manifest_is_read_or_refused_in_one_line(tmp_path: Path) -> None:
    """Of a bundle, whose writer is unknown, and of the cache."""
    chance, ended = random.Random(13), Counter[str]()
    config, path = bundle_at(tmp_path), tmp_path / "manifest.json"
    for number in range(size(300, 20_000)):
        data = mutate_json(json.dumps(MANIFEST).encode(), chance)
        write_sealed(path, json.loads(data))
        if chance.random() < 0.2:
            path.write_bytes(mutate(path.read_bytes(), chance))
        try:
            resolve_bundle(config)
            ended["read"] += 1
        except SourceError as error:
            said_in_one_line(error, number=number)
            ended["refused"] += 1
        except Exception as error:
            raise AssertionError(f"case {number}: {data!r}") from error
        assert complete_manifest(tmp_path, True) is None  # no such files are there
    note("manifests", cases=sum(ended.values()), ended=dict(ended))
