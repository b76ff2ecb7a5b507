"""Atheris, guided by the coverage of the readers: each input is read, or refused by their own error in one line.

    python -m tests.experiments.faults.guided TARGET RUNS FOLDER

The mutations are libFuzzer's of bytes, or of a JSON value inside them. A file with a checksum gets that of the mutated
values, so that the reader behind the checksum is reached. FOLDER is used for files. The last line printed is a JSON
object with the number of inputs that were read and refused.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import atheris

MODULES = (
    "experiments.capture.cache",
    "experiments.files",
    "experiments.record",
    "experiments.sources.bundles",
    "experiments.sources.checkpoints",
    "experiments.sources.hashes",
    "experiments.sources.quantized",
)
with atheris.instrument_imports(include=list(MODULES)):
    from experiments.capture.cache import complete_manifest
    from experiments.files import CHECKSUM, SourceError, parse_json, sealed
    from experiments.record import RecordError, RunRecord
    from experiments.sources.bundles import resolve_bundle
    from experiments.sources.checkpoints import open_checkpoint
    from experiments.sources.quantized import open_quantized
    from tests.experiments import tiny_models
    from tests.experiments.faults.test_bad_input import MANIFEST, bundle_at, mutate_json
    from tests.experiments.model.folders import open_source, source, write
    from tests.experiments.test_record import RECORD


class Target(NamedTuple):
    """read: the reader. seed: what it reads without an error, the beginning of the corpus."""

    read: Callable[[bytes], object]
    seed: bytes


def resealed(data: bytes) -> bytes:
    """JSON with the checksum of its values; other bytes as they are."""
    try:
        values = parse_json(data)
    except ValueError:
        return data
    if not isinstance(values, dict):
        return data
    return json.dumps(sealed({key: value for key, value in values.items() if key != CHECKSUM})).encode()


def record(folder: Path) -> Target:
    def read(data: bytes) -> None:
        found = RunRecord.from_json(data.decode(errors="replace"))
        assert RunRecord.from_json(found.to_json()) == found

    return Target(read, json.dumps(RECORD.to_dict()).encode())


def manifest(folder: Path) -> Target:
    """Of a captured layer: as the cache's, which is captured again, and as a bundle's, which is refused."""
    config, path = bundle_at(folder), folder / "manifest.json"

    def read(data: bytes) -> None:
        path.write_bytes(resealed(data))
        assert complete_manifest(folder, True) is None  # no such files are there
        resolve_bundle(config)

    return Target(read, json.dumps(MANIFEST).encode())


def header(folder: Path) -> Target:
    """Of a safetensors file: the length of the header, and the header. The tensors' bytes stay."""
    tiny_models.qwen3(folder / "tiny", sharded=False)
    path = folder / "tiny" / "model.safetensors"
    whole = path.read_bytes()
    length = 8 + struct.unpack("<Q", whole[:8])[0]

    def read(data: bytes) -> None:
        path.write_bytes(data + whole[length:])
        opened = open_checkpoint(source(folder / "tiny"), folder / "cache")
        opened.read(opened.names)

    return Target(read, whole[:length])


def checkpoint(folder: Path) -> Target:
    """The manifest of a quantized model's folder, and what it names."""
    tiny_models.qwen3(folder / "tiny", sharded=False)
    write(folder / "out", open_source(folder / "tiny"))
    path = folder / "out" / "quantkit.json"

    def read(data: bytes) -> None:
        path.write_bytes(resealed(data))
        opened = open_quantized(folder / "out")
        for name in opened.model_names:
            opened.tensor(name)
            assert {"bytes", "sha256"} <= opened.files[opened.model_names[name]].keys()

    return Target(read, path.read_bytes())


TARGETS = {"record": record, "manifest": manifest, "header": header, "checkpoint": checkpoint}


def mutated(data: bytes, most: int, seed: int) -> bytes:
    """A JSON value of other values, behind a header's length where it has one; or libFuzzer's own mutation."""
    chance = random.Random(seed)
    prefix = 0 if data[:1] in (b"{", b"[") else 8
    try:
        if chance.random() < 0.2:
            raise ValueError
        body = mutate_json(data[prefix:], chance)
    except (ValueError, RecursionError):
        return bytes(atheris.Mutate(data, most))
    return ((struct.pack("<Q", len(body)) if prefix else b"") + body)[:most]


def main(name: str, runs: str, place: str) -> None:
    folder = Path(place)
    target, ended = TARGETS[name](folder), Counter[str]()
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(target.seed)
    target.read(target.seed)

    def one(data: bytes) -> None:
        try:
            target.read(data)
            ended["read"] += 1
        except (SourceError, RecordError) as error:
            assert str(error).strip() and "\n" not in str(error), error
            ended["refused"] += 1
        if sum(ended.values()) == int(runs):
            print(json.dumps(dict(ended)), flush=True)
            os._exit(0)  # Python's own end takes so long that libFuzzer's timer kills it

    options = ["-timeout=60", "-rss_limit_mb=4096", "-seed=1", "-mutate_depth=2", "-reduce_inputs=0"]
    options += [f"-artifact_prefix={folder}/", f"-max_len={4 * len(target.seed)}"]
    logging.disable(logging.WARNING)
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    shutil.rmtree(sys.argv[3], ignore_errors=True)
    Path(sys.argv[3]).mkdir(parents=True)
    main(*sys.argv[1:])
