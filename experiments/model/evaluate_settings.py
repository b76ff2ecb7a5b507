"""The schema of conf/evaluate.yaml. It shares the groups of experiments/config.py. Imports no torch.

An evaluation's identity derives from the values that determine its result, as a run's does.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from experiments.config import (
    CONF_DIR,
    DTYPES,
    BackendConfig,
    CacheConfig,
    Config,
    DataConfig,
    FormatConfig,
    LayerConfig,
    MethodConfig,
    ModelConfig,
    ModelSource,
    Offline,
    RecordConfig,
    TimingConfig,
    TrackingConfig,
    check_sweep,
    check_text,
    compose_as,
    config_hash,
    new_sweep_id,
    require,
)
from experiments.files import SourceError, one_line
from experiments.sources.exported import read_export
from experiments.sources.hashes import file_hashes
from experiments.sources.models import model_name

EVALUATION_VERSION = 1  # part of every evaluation's identity: raise it when the same configuration gives other numbers
PROTOCOLS = ("all", "llama_cpp")
UNITS = ("linear", "decoder")
ORDERS = ("shuffled", "first")
READERS = ("quantkit", "transformers")
BASE_MODEL = re.compile(r"^base_model:\s*(?:\n\s*-\s*)?[\"']?([\w.-]+/[\w.-]+)", re.MULTILINE)  # of a model card


MODEL_FOLDER = "model"  # in the folder of a run of quantize_model.py
PEER_NAME = "peer.json"  # beside another tool's checkpoint, written by peers.py
MANIFEST_NAME = "quantkit.json"  # the same in sources/quantized.py, which imports torch


@dataclass
class EvaluateConfig:
    dtype: str = "float32"  # of both models
    protocol: str = "all"
    resamples: int = 10000
    batch_tokens: int | None = None
    layers: bool = False  # also the KL with one layer quantized at a time
    layers_by: str = "linear"
    layers_samples: int = 8
    order: str = "shuffled"
    reader: str = "quantkit"  # of codes: quantkit, or transformers as engines' users get them
    label: str | None = None

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"evaluate.dtype={self.dtype}: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
        require(self.protocol in PROTOCOLS, f"evaluate.protocol={self.protocol}: use {' or '.join(PROTOCOLS)}.")
        require(self.layers_by in UNITS, f"evaluate.layers_by={self.layers_by}: use {' or '.join(UNITS)}.")
        require(self.order in ORDERS, f"evaluate.order={self.order}: use {' or '.join(ORDERS)}.")
        require(self.reader in READERS, f"evaluate.reader={self.reader}: use {' or '.join(READERS)}.")
        require(self.resamples >= 100, f"evaluate.resamples={self.resamples}: use 100 or more, 2000 for a report.")
        require(self.layers_samples > 0, f"evaluate.layers_samples={self.layers_samples}: must be positive.")
        tokens = self.batch_tokens
        require(tokens is None or tokens > 0, f"evaluate.batch_tokens={tokens}: must be positive, or null.")


@dataclass(kw_only=True)
class EvaluationConfig:
    """Of evaluate.py. Fields of the same name mean the same as in Config."""

    model: ModelConfig
    data: DataConfig
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    cache: CacheConfig
    tracking: TrackingConfig
    reference: str | None = None
    paired: str | None = None
    seed: int = 0
    device: str = "auto"
    offline: Offline = Offline.auto
    force: bool = False
    output_dir: str = "results/runs/model"
    sweep: str = field(default_factory=new_sweep_id)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, f"seed={self.seed}: use 0 <= seed < 2**32.")
        check_sweep(self.sweep)
        check_text(self.data)
        for name in ("include", "exclude"):
            chosen = getattr(self.model, name)
            require(chosen is None, f"model.{name}={chosen}: a whole model is evaluated. Leave it out.")


def compose_evaluation(*overrides: str) -> EvaluationConfig:
    """The configuration of `evaluate.py OVERRIDES`."""
    return compose_as("evaluate", EvaluationConfig, overrides)


def as_run(config: EvaluationConfig, model: ModelConfig) -> Config:
    """The configuration of a run on this model and the same text, for the sources."""
    return Config(
        format=FormatConfig("nvfp4"),
        method=MethodConfig("naive"),
        backend=BackendConfig("auto"),
        model=model,
        layer=LayerConfig(),
        data=config.data,
        cache=config.cache,
        record=RecordConfig(),
        tracking=TrackingConfig("none"),
        timing=TimingConfig(enabled=False),
        seed=config.seed,
        offline=config.offline,
    )


def evaluated_model(config: EvaluationConfig) -> ModelConfig:
    """The model to evaluate, or that of a run of quantize_model.py.

    Raises SourceError where none is named.
    """
    model = config.model
    if model.path is None and model.source == ModelSource.hub:
        raise SourceError(
            "model.path is not set. Name the folder to evaluate: model.path=FOLDER, such as one of results/models."
        )
    if model.path is not None and model.source == ModelSource.hub and model.path.endswith(".gguf"):
        return _gguf(model.path, "model.path")
    if model.path is not None and (Path(model.path).expanduser() / MODEL_FOLDER / MANIFEST_NAME).is_file():
        return replace(model, path=str(Path(model.path) / MODEL_FOLDER))
    if model.source not in (ModelSource.hub, ModelSource.pypi_gguf):
        raise SourceError(f"model={model.name} is no whole language model. Use model.path=FOLDER.")
    return model


def reference_model(config: EvaluationConfig, model: ModelConfig) -> ModelConfig:
    """The reference: the named one, else the one that the folder names. Raises SourceError where there is none."""
    name = config.reference
    if name is None:
        found = _reference_of(Path(str(model.path)).expanduser()) if model.source == ModelSource.hub else None
        if found is None:
            raise SourceError(
                f"{model.label} does not say what it was made from: no {MANIFEST_NAME} and no base_model in its "
                "README.md. Name the unquantized model: reference=FOLDER, or a name of conf/model."
            )
        return found
    return original_model(name)


def original_model(name: str) -> ModelConfig:
    """An unquantized model by its folder, its .gguf file or its name in conf/model. Raises SourceError for others."""
    if name.endswith(".gguf"):
        return _gguf(name, "reference")
    if (CONF_DIR / "model" / f"{name}.yaml").is_file():
        named = named_model(name)
        if named.source not in (ModelSource.hub, ModelSource.pypi_gguf):
            raise SourceError(f"reference={name}: no whole language model. Give a folder, or another name.")
        return named
    if Path(name).expanduser().is_dir():
        return ModelConfig(name=Path(name).expanduser().resolve().name, source=ModelSource.hub, path=name)
    names = ", ".join(sorted(path.stem for path in (CONF_DIR / "model").glob("*.yaml")))
    raise SourceError(f"reference={name}: no such folder, and no model of conf/model ({names}). Give one of them.")


def named_model(name: str, **changes: Any) -> ModelConfig:
    """conf/model/NAME.yaml."""
    values = OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(CONF_DIR / "model" / f"{name}.yaml"))
    result = OmegaConf.to_object(values)
    assert isinstance(result, ModelConfig)
    return replace(result, **changes)


def _gguf(path: str, setting: str) -> ModelConfig:
    """The pinned model of conf/model that GGUF files hold, if the file is that one; else the file itself.

    Raises SourceError for no file; setting: the one that names it.
    """
    if not Path(path).expanduser().is_file():
        raise SourceError(f"{setting}={path}: no such file. Give a .gguf file that is there, or a folder.")
    names = (path.stem for path in sorted((CONF_DIR / "model").glob("*.yaml")))
    name = next(name for name in names if named_model(name).source == ModelSource.pypi_gguf)
    pinned, file = named_model(name, path=path), Path(path).expanduser()
    if file_hashes([file])[file] != pinned.sha256:
        return ModelConfig(name=file.stem, source=ModelSource.hub, path=path)
    return pinned


def _reference_of(folder: Path) -> ModelConfig | None:
    """What the folder was made from, by its manifest or its card. Raises SourceError for a local folder."""
    models = [named_model(path.stem) for path in sorted((CONF_DIR / "model").glob("*.yaml"))]
    told = manifest_about(folder).get("model")
    if told is not None:
        known = next((model for model in models if model_name(model) == told), None)
        if known is None:
            raise SourceError(f"{folder} was made from {told}: name its folder, reference=FOLDER.")
        return known
    card = folder / "README.md"
    found = BASE_MODEL.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if found is None:
        return None
    repo = found[1]
    hub = ModelConfig(name=repo.rpartition("/")[2], source=ModelSource.hub, repo=repo)
    return next((model for model in models if model.repo == repo), hub)


def peer_about(folder: Path) -> dict[str, Any]:
    """What peers.py says of another tool's folder; {} for another folder. Raises SourceError for a damaged file."""
    path = folder / PEER_NAME
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Run peers.py again.") from None


def manifest_about(folder: Path) -> dict[str, Any]:
    """What quantkit's own folder, or an export of it, says of itself; {} for another folder.

    Raises SourceError for a damaged manifest.
    """
    path = folder / MANIFEST_NAME
    if not path.is_file():
        about = (read_export(folder) or {}).get("about")
        return about if isinstance(about, dict) else {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["about"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is damaged ({one_line(error)}). Copy the folder again.") from None


def result_settings(config: EvaluationConfig, device: str) -> dict[str, Any]:
    """The part of a configuration that determines the result, as plain JSON values; without the models."""
    values: dict[str, Any] = {"version": EVALUATION_VERSION, "seed": config.seed, "device": device.partition(":")[0]}
    evaluate = {name: value for name, value in asdict(config.evaluate).items() if name != "batch_tokens"}
    if config.evaluate.order == "shuffled":
        del evaluate["order"]
    if not config.evaluate.layers:
        evaluate = {name: value for name, value in evaluate.items() if not name.startswith("layers")}
    data = config.data
    return values | {"evaluate": evaluate, "seq_len": data.seq_len, "samples": data.samples}


def evaluation_id(label: str, reference: str, data: str, settings: Any) -> str:
    """The name of an evaluation's folder: a readable prefix and a hash that makes it unique."""
    prefix = re.sub(r"[^A-Za-z0-9._-]+", "_", f"{label}-vs-{reference}-{data}")[:100]
    return f"{prefix}-{config_hash(settings)}"


ConfigStore.instance().store(name="evaluation_config", node=EvaluationConfig)
