"""Names that must not change by accident. A run with a new name is run again, a layer with a new key is captured again,
and references to the old names break."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.config import ModelSource, compose
from experiments.sources import texts, twins
from experiments.sources.resolved import resolve

# overrides, run_id, config_hash, folder of the layer in the cache (None: a bundle), substituted
PINNED = {
    "synthetic": (
        ["model=synthetic"],
        "nvfp4-b16-hessian-reference-synthetic-l0-mlp.down_proj-synthetic-1c3fab41c9",
        "2140e87842",
        "synthetic-l0-mlp.down_proj-de0cdff9d73ae8b5",
        False,
    ),
    "a small synthetic layer": (
        ["model=synthetic", "model.out_features=32", "model.in_features=64", "data.samples=8", "data.seq_len=16",
         "format=mxfp4", "block_size=32", "method=sse", "seed=3", "layer.index=2"],
        "mxfp4-b32-sse-reference-synthetic-l2-mlp.down_proj-synthetic-c6604e57d3",
        "c35e23b722",
        "synthetic-l2-mlp.down_proj-fdff38d5edd20c8a",
        False,
    ),
    "bundle": (
        ["model=bundle", "model.path=bundle", "method=naive"],
        "nvfp4-b16-naive-reference-bundle-l3-mlp.up_proj-wikitext2-9b8ba3fa80",
        "751f0621c8",
        None,
        False,
    ),
    "local model and text": (
        ["model.path=tiny", "data.path=text", "layer.module=self_attn.q_proj", "layer.index=1"],
        "nvfp4-b16-hessian-reference-tiny-l1-self_attn.q_proj-wikitext2-4f6f46b028",
        "daf52e2d70",
        "tiny-l1-self_attn.q_proj-57589003f841a0c6",
        False,
    ),
    "held-out split of its own": (
        ["model.path=tiny", "data.path=text", "data.heldout_split=test", "data.calibration_tokens=100"],
        "nvfp4-b16-hessian-reference-tiny-l0-mlp.down_proj-wikitext2-342c5fb293",
        "c21eeb05e0",
        "tiny-l0-mlp.down_proj-516af52a8924855c",
        False,
    ),
    "twins by name": (
        ["model=smollm2_135m", "data=python_docs"],
        "nvfp4-b16-hessian-reference-smollm2_135m-l0-mlp.down_proj-python_docs-a8a9d72a04",
        "9ce5203735",
        "smollm2_135m-l0-mlp.down_proj-799ae48210d55892",
        False,
    ),
    "switched to the twins": (
        ["offline=always", "data.seq_len=128"],
        "nvfp4-b16-hessian-reference-smollm2_135m-l0-mlp.down_proj-python_docs-fb45124fa1",
        "de7ffa4ba1",
        "smollm2_135m-l0-mlp.down_proj-70a823cd3be240d5",
        True,
    ),
    "the model alone switched": (
        ["offline=always", "data.path=text"],
        "nvfp4-b16-hessian-reference-smollm2_135m-l0-mlp.down_proj-wikitext2-95a464a555",
        "5e8620b7df",
        "smollm2_135m-l0-mlp.down_proj-2e45a106552c8f2e",
        True,
    ),
    "options of the format": (
        ["model=smollm2_135m", "data=python_docs", "format.global_scale=none", "format.scale_rule=nearest",
         "backend=triton", "verify=true", "timing=none"],
        "nvfp4-b16-hessian-triton-smollm2_135m-l0-mlp.down_proj-python_docs-26bbd38fcb",
        "ee6f6ba266",
        "smollm2_135m-l0-mlp.down_proj-799ae48210d55892",
        False,
    ),
}  # fmt: skip


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, a text and a bundle of known bytes in the working folder. None is ever loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(texts, "_python_docs", lambda: "the text of the documentation\n" * 40)
    monkeypatch.setattr(twins, "_announced", set())
    manifest = {
        "capture_version": 1,
        "key": "0123456789abcdef",
        "layer": {"index": 3, "module": "mlp.up_proj"},
        "data": {"name": "wikitext2", "source": "hub", "seq_len": 64, "samples": 32, "heldout": 0.25},
        "seed": 5,
        "source": {},
        "tokens": {},
        "activations": False,
        "files": {},
        "shards": {},
    }
    files = {
        "tiny/config.json": b'{"model_type": "llama", "num_hidden_layers": 2}',
        "tiny/tokenizer.json": b'{"version": "1.0"}',
        "tiny/model.safetensors": bytes(range(256)) * 1024,
        "text/train.txt": b"some words to train on\n" * 20,
        "text/test.txt": b"others to test\n" * 20,
        "bundle/manifest.json": json.dumps(manifest).encode(),
    }
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)


@pytest.mark.parametrize("name", PINNED)
def test_run_ids_hashes_and_cache_keys_stay(folders: None, name: str) -> None:
    overrides, run_id, config_hash, folder, substituted = PINNED[name]
    resolved = resolve(compose(["cache.dir=cache", "device=cpu", *overrides]))
    assert resolved.error is None
    assert (resolved.run_id, resolved.config_hash, resolved.substituted) == (run_id, config_hash, substituted)
    assert resolved.run_dir == Path("results/runs") / run_id
    if folder is None:
        assert resolved.config.model.source == ModelSource.bundle
    else:
        assert resolved.layer_folder() == Path("cache/layers") / folder


def test_another_layer_of_a_run_has_the_folder_of_its_own_run(folders: None) -> None:
    common = ["cache.dir=cache", "device=cpu", "model.path=tiny", "data.path=text"]
    own = resolve(compose([*common, "layer.index=1", "layer.module=self_attn.q_proj"]))
    other = resolve(compose([*common, "layer.index=0", "layer.module=mlp.up_proj"]))
    assert other.layer_folder(own.config.layer) == own.layer_folder() != other.layer_folder()


def test_sources_that_cannot_be_had_are_told_when_they_are_needed(folders: None) -> None:
    resolved = resolve(compose(["cache.dir=cache", "device=cpu", "model.path=nowhere", "data.path=text"]))
    assert resolved.run_id and resolved.config_hash
    with pytest.raises(ValueError, match=r"model\.path=nowhere: no such folder"):
        resolved.layer_folder()
