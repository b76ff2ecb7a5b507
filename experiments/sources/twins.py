"""Chooses the sources of a run: the configured ones, or their offline twins.

If the hub's model or text is neither cached nor reachable, `choose_sources` uses the offline twin instead, and says so
once. Every record names the sources that were really used. With `offline=never` this is an error. Imports neither torch
nor transformers.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TypeVar

from experiments.config import CONF_DIR, Config, DataConfig, DataSource, ModelConfig, ModelSource, Offline, Weighting
from experiments.files import SourceError
from experiments.sources import hub
from experiments.sources.bundles import MANIFEST_NAME, resolve_bundle
from experiments.sources.identity import folder_in_cache, layer_identity
from experiments.sources.models import model_identity
from experiments.sources.texts import is_kept

log = logging.getLogger(__name__)

TWIN_MODEL = "smollm2_135m"
TWIN_DATA = "python_docs"
# Settings that a twin takes over from the source that it replaces, where they were overridden.
CARRIED_OVER = {"model": ("dtype",), "data": ("seq_len", "samples", "heldout", "calibration_tokens")}

T = TypeVar("T", ModelConfig, DataConfig)
_announced: set[str] = set()


@dataclass(frozen=True)
class Choice:
    """config: with available sources. substituted: whether an offline twin is among them."""

    config: Config
    substituted: bool = False


def choose_sources(config: Config) -> Choice:
    """The configuration with available sources. Raises SourceError if there are none.

    A hub model or text that is neither cached nor reachable is replaced by its offline twin (`offline=auto`), or raises
    an error (`offline=never`). `offline=always` takes the twins without a request. The twins keep overrides of dtype,
    sequence length, samples, held-out share and calibration tokens. model=synthetic implies data=synthetic. A bundle
    implies its own layer and text.
    """
    if config.model.source == ModelSource.bundle:
        resolved = resolve_bundle(config)
        _tell_unused(config.data, resolved.data)
        return Choice(resolved)
    if config.model.source == ModelSource.synthetic:
        if config.data.source == DataSource.synthetic:
            return Choice(config)
        return Choice(replace(config, data=_replacement("data", "synthetic", DataConfig, config.data)))
    missing = _missing(config)
    if not missing:
        return Choice(config)
    if config.offline == Offline.never:
        raise SourceError(_never_message(config, missing))
    _announce(config, missing)
    model = _replacement("model", TWIN_MODEL, ModelConfig, config.model) if "model" in missing else config.model
    data = _replacement("data", TWIN_DATA, DataConfig, config.data) if "data" in missing else config.data
    return Choice(replace(config, model=model, data=data), substituted=True)


def _tell_unused(asked: DataConfig, used: DataConfig) -> None:
    """Warns, once per process, of settings of the text that differ from those of the bundle."""
    for key in _overridden("data", asked):
        value = getattr(asked, key)
        if value != getattr(used, key) and key not in _announced:
            _announced.add(key)
            log.warning("data.%s=%s is not used: the bundle was captured with %s", key, value, getattr(used, key))


def is_captured(config: Config) -> bool:
    """Whether the cache holds this layer, so that neither model nor hub is needed. Makes no request."""
    asks_hub = config.data.source == DataSource.hub and config.data.path is None
    if asks_hub and not is_kept(config.data, config.cache.folder):
        return False
    identity = layer_identity(config, model_identity(config.model, config.cache.folder))
    return (folder_in_cache(config, identity, config.layer) / MANIFEST_NAME).is_file()


def refuse_idle_paths(config: Config) -> None:
    """Raises SourceError for a path, or a choice of layers, that nothing of this configuration reads."""
    model, data = config.model, config.data
    if model.path is not None and model.source == ModelSource.synthetic:
        raise SourceError(f"model.path={model.path}: model={model.name} reads no folder. Leave one of the two out.")
    for name in ("include", "exclude"):
        if getattr(model, name) is not None:
            raise SourceError(
                f"model.{name} chooses the layers of a whole model: use quantize_model.py, or leave it out."
            )
    own_text = model if model.source in (ModelSource.synthetic, ModelSource.bundle) else None
    if data.path is not None and (own_text is not None or data.source != DataSource.hub):
        which = f"data={data.name}" if own_text is None else f"model={own_text.name}, which has its own inputs,"
        raise SourceError(f"data.path={data.path}: {which} reads no text folder. Leave one of the two out.")


def refuse_loss_without_model(config: Config) -> None:
    """Raises SourceError for loss weights of a layer without a model."""
    if config.hessian.weighting == Weighting.loss and config.model.source == ModelSource.synthetic:
        raise SourceError(
            f"hessian=loss: model={config.model.name} has no loss, because it is only a seeded weight. Use "
            "hessian=output, or a language model."
        )


def _missing(config: Config) -> dict[str, str]:
    """The hub sources that are not available, "model" or "data" → why."""
    wanted = [
        role
        for role, source in (("model", config.model), ("data", config.data))
        if source.path is None and source.source in (ModelSource.hub, DataSource.hub)
    ]
    if not wanted:
        return {}
    if config.offline == Offline.always:
        return dict.fromkeys(wanted, "offline=always")
    questions = _questions(config)
    hub.learn_commits(questions[role] for role in wanted)
    return {} if is_captured(config) else _out_of_reach(config, wanted)


def _questions(config: Config) -> dict[str, hub.Question]:
    model, data = config.model, config.data
    return {"model": (str(model.repo), model.revision, "model"), "data": (str(data.repo), data.revision, "dataset")}


def _out_of_reach(config: Config, wanted: list[str]) -> dict[str, str]:
    """The roles that are not available → why. Checks the caches first, then the hub for the rest, concurrently."""
    questions, asked = _questions(config), {}
    if "model" in wanted and not hub.model_is_cached(config.model, config.layer.index):
        asked["model"] = questions["model"]
    if "data" in wanted and not (is_kept(config.data, config.cache.folder) or hub.dataset_is_cached(config.data)):
        asked["data"] = questions["data"]
    reasons = hub.why_not(asked.values())
    missing = {role: reasons[question] for role, question in asked.items() if question in reasons}
    if missing and len(missing) == len(asked):
        hub.stop_asking()
    return missing


def _replacement(group: str, name: str, schema: type[T], asked: ModelConfig | DataConfig) -> T:
    """conf/<group>/<name>.yaml as an object; what `asked` overrides in its own yaml file carries over."""
    from omegaconf import OmegaConf

    values = OmegaConf.load(CONF_DIR / group / f"{name}.yaml")
    for key in _overridden(group, asked):
        OmegaConf.update(values, key, getattr(asked, key))
    result = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))
    assert isinstance(result, schema)
    return result


def _overridden(group: str, asked: ModelConfig | DataConfig) -> list[str]:
    """The settings of CARRIED_OVER that differ from the yaml file of the configured source."""
    from omegaconf import OmegaConf

    own = CONF_DIR / group / f"{asked.name}.yaml"
    defaults = OmegaConf.load(own) if own.is_file() else OmegaConf.create({})
    return [
        key
        for key in CARRIED_OVER[group]
        if getattr(asked, key) != OmegaConf.select(defaults, key, default=getattr(asked, key))
    ]


def _names(config: Config, missing: dict[str, str]) -> str:
    names = {"model": str(config.model.repo), "data": str(config.data.repo)}
    return " and ".join(names[role] for role in missing)


def _pin(missing: dict[str, str]) -> str:
    twins = {"model": TWIN_MODEL, "data": TWIN_DATA}
    return " ".join(f"{role}={twins[role]}" for role in missing)


def _never_message(config: Config, missing: dict[str, str]) -> str:
    return (
        f"{_names(config, missing)}: {_reasons(missing)}, and "
        f"offline=never. Connect to the hub, set {' and '.join(f'{role}.path' for role in missing)} to a local copy, "
        f"or use the offline twin: {_pin(missing)}."
    )


def _reasons(missing: dict[str, str]) -> str:
    """All reasons in one phrase, each reason once."""
    return "not in the local cache; " + "; ".join(dict.fromkeys(missing.values()))


def _announce(config: Config, missing: dict[str, str]) -> None:
    """Warns about the offline twins, once per process and role."""
    news = {role: reason for role, reason in missing.items() if role not in _announced}
    _announced.update(news)
    if not news:
        return
    if config.offline == Offline.always:
        why = f"offline=always, so {_names(config, news)} {'was' if len(news) == 1 else 'were'} not asked for"
        remedy = ""
    else:
        why = f"{_names(config, news)} {'is' if len(news) == 1 else 'are'} not available ({_reasons(news)})"
        remedy = f" Pin that with `{_pin(news)}`, or make it an error with `offline=never`."
    log.warning("OFFLINE TWINS: %s; this runs on %s instead.%s", why, _pin(news), remedy)
