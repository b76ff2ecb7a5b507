"""The schema of conf/quantize_model.yaml. It shares the groups of experiments/config.py. Imports no torch.

A model's identity derives from the values that determine its bytes, as a run's does.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from experiments.config import (
    BackendConfig,
    CacheConfig,
    Choice,
    Config,
    DataConfig,
    FormatConfig,
    HessianConfig,
    LayerConfig,
    Matmul,
    MethodConfig,
    ModelConfig,
    Offline,
    RecordConfig,
    TimingConfig,
    TrackingConfig,
    Weighting,
    check_outputs,
    check_run,
    check_text,
    config_hash,
    hessian_settings,
    new_sweep_id,
    require,
)

LAST_LAYER = 1 << 20  # beyond every model's depth: the hub's cache must hold all layers


class Calibration(Choice):
    sequential = "sequential"  # each layer on the inputs that the quantized layers before it give
    parallel = "parallel"  # each layer on the original model's inputs


class Export(Choice):
    """The layouts of quantkit.layouts."""

    compressed_tensors = "compressed_tensors"
    modelopt = "modelopt"
    gpt_oss = "gpt_oss"
    gguf = "gguf"


@dataclass
class CalibrateConfig:
    mode: Calibration = Calibration.sequential
    alpha: float = 0.5  # share of the inputs' error that a layer's target corrects
    residual_alpha: float = 0.5  # the same of the residual stream's error, in layers that write to it
    min_tokens: int = 128  # an expert with fewer tokens has the experts' shared Hessian mixed in
    damping: float | None = None  # of the corrections of targets; null: the method's
    weight_exponent: float = 1.0  # of the tokens' loss weights; below 1, the largest weigh less

    def __post_init__(self) -> None:
        require(
            self.damping is None or 0 < self.damping <= 1,
            f"calibrate.damping={self.damping}: use above 0 and at most 1, or null for the method's.",
        )
        require(
            0 <= self.weight_exponent <= 1,
            f"calibrate.weight_exponent={self.weight_exponent}: use 0 (all tokens weigh the same) to 1.",
        )
        for name in ("alpha", "residual_alpha"):
            value = getattr(self, name)
            require(math.isfinite(value) and 0 <= value <= 1, f"calibrate.{name}={value}: use 0 to 1.")
            require(
                self.mode == Calibration.sequential or value == 0,
                f"calibrate.{name}={value}: calibrate=parallel knows no quantized inputs. Use calibrate=sequential, or "
                f"calibrate=parallel without calibrate.mode, which sets {name} to 0.",
            )
        require(self.min_tokens >= 0, f"calibrate.min_tokens={self.min_tokens}: must not be negative.")


@dataclass(kw_only=True)
class QuantizeConfig:
    """Of quantize_model.py. Fields of the same name mean the same as in Config."""

    format: FormatConfig = field(default_factory=lambda: FormatConfig(name=MISSING))
    method: MethodConfig
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    hessian: HessianConfig = field(default_factory=HessianConfig)
    backend: BackendConfig
    model: ModelConfig
    data: DataConfig
    cache: CacheConfig
    tracking: TrackingConfig
    # Last parts of the names of layers that share a global scale; null: those that engines fuse.
    fused: list[list[str]] | None = None
    # For method=descent: a folder with codes of this model, quantkit's or another tool's; its sweeps begin with them.
    init: str | None = None
    block_size: int = 16
    seed: int = 0
    device: str = "auto"
    offline: Offline = Offline.auto
    force: bool = False
    export: Export | None = None  # also write the model as an engine reads it
    output_dir: str = "results/models"
    sweep: str = field(default_factory=new_sweep_id)

    def __post_init__(self) -> None:
        check_run(self.block_size, self.seed, self.sweep)
        check_text(self.data)
        require(
            self.data.heldout_split is None or self.data.heldout > 0,
            f"data.heldout_split={self.data.heldout_split}: no sequences are held out (data.heldout=0). Leave it out.",
        )
        listed = [name for group in self.fused or () for name in group]
        twice = next((name for name in listed if listed.count(name) > 1), None)
        require(twice is None, f"fused: {twice} is listed twice. A layer has one global scale: list it once.")
        require(
            self.init is None or self.method.name == "descent",
            f"init={self.init}: method={self.method.name} takes no codes to begin with. Use method=descent.",
        )
        check_outputs(self.method, self.hessian)
        require(
            self.hessian.weighting == Weighting.loss or self.calibrate.weight_exponent == 1,
            f"calibrate.weight_exponent={self.calibrate.weight_exponent}: hessian=output has equal weights. Use "
            "hessian=loss, or calibrate.weight_exponent=1.",
        )
        require(
            self.init is None or not self.hessian.outputs,
            f"hessian.outputs=true: errors could rise above those of init={self.init}. Use hessian=loss, or leave init "
            "out.",
        )
        require(
            self.init is None or self.format.global_scale in (None, "none", "amax"),  # the formats' own defaults
            f"format.global_scale={self.format.global_scale}: the codes of init have their own. Leave it out.",
        )
        require(
            self.format.global_scale != "search" or self.fused == [],
            "format.global_scale=search: layers that engines fuse share a global scale, which this script does not "
            "search. Use amax or headroom, or fused=[] for scales of their own.",
        )


SHARED = (
    *("format", "method", "hessian", "backend", "model", "data", "cache", "block_size", "seed", "device", "offline"),
    *("force", "output_dir", "sweep"),
)


def as_run(config: QuantizeConfig) -> Config:
    """The configuration of a run on the same model and text, for sources, token sequences and loss weights."""
    values = {name: getattr(config, name) for name in SHARED}
    values["model"] = replace(config.model, include=None, exclude=None)
    return Config(
        **values,
        layer=LayerConfig(index=LAST_LAYER),
        record=RecordConfig(),
        tracking=TrackingConfig("none"),
        timing=TimingConfig(enabled=False),
    )


def with_sources(config: QuantizeConfig, run: Config) -> QuantizeConfig:
    """`config` with the model and text of `run`, whose sources are available, and what its device leaves of hessian."""
    model = replace(run.model, include=config.model.include, exclude=config.model.exclude)
    return replace(config, model=model, data=run.data, hessian=run.hessian)


def result_settings(config: QuantizeConfig, device: str, backend: str) -> dict[str, Any]:
    """The part of a configuration that determines the model's bytes, as plain JSON values.

    config: with available sources; device and backend: those that `auto` resolved to.
    """
    values = asdict(config)
    for name in ("cache", "tracking", "offline", "force", "export", "output_dir", "sweep"):
        del values[name]
    for name in ("origin", "num_layers"):  # descriptions that do not select the model
        del values["model"][name]
    values["method"] = {"name": config.method.name} | config.method.settings
    values["hessian"] = hessian_settings(config.hessian)
    if config.init is None:
        del values["init"]
    values["device"] = device.partition(":")[0]
    values["backend"] = backend
    return values


def method_fields(config: QuantizeConfig) -> dict[str, Any]:
    """How the matrices are quantized, for the manifest and, as far as it has them, for the record."""
    return {
        "format": config.format.name,
        "block_size": config.block_size,
        "method": config.method.name,
        "method_settings": config.method.settings,
        "calibrate": str(config.calibrate.mode),
        "alpha": config.calibrate.alpha,
        "residual_alpha": config.calibrate.residual_alpha,
        "calibrate_damping": config.calibrate.damping,
        "weight_exponent": config.calibrate.weight_exponent,
        "global_scale": config.format.global_scale,
        "scale_rule": config.format.rule,
        "init": None if config.init is None else Path(config.init).name,
        "hessian_weighting": str(config.hessian.weighting),
        "hessian_groups": config.hessian.groups,
        "hessian_samples": config.hessian.samples,
        **({} if config.hessian.matmul == Matmul.float32 else {"hessian_matmul": str(config.hessian.matmul)}),
        **({"hessian_outputs": True} if config.hessian.outputs else {}),
    }


def model_run_id(config: QuantizeConfig, settings: dict[str, Any]) -> str:
    """The name of a model's folder: a readable prefix and a hash that makes it unique."""
    parts = (
        config.format.name,
        f"b{config.block_size}",
        config.method.name,
        str(config.calibrate.mode),
        config.model.label,
        config.data.name,
    )
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', '-'.join(parts))[:100]}-{config_hash(settings)}"


def model_folder_of(output_dir: str, run_id: str) -> Path:
    return Path(output_dir) / run_id


ConfigStore.instance().store(name="quantize_config", node=QuantizeConfig)
