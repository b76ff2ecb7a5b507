"""The plan of a sweep: the overrides of all its runs, known before the first one starts.

Hydra starts one run at a time, but one forward pass should capture every layer that the sweep needs. `SweepPlan`, a
Hydra callback (conf/config.yaml), stores the overrides of all runs, in the form in which Hydra's sweeper makes them.
When a run finds its layer missing from the cache, `layers_ahead` names the layers to capture with it. A sweep with
cached layers or finished runs captures nothing. A launcher that starts other processes has no plan in them, so there
each run captures its own layer.

Imports no torch.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import launchers
from experiments.config import Config, LayerConfig, check_sweep, to_config
from experiments.files import SourceError, check_output

# Overrides that do not change what a forward pass captures. One that is missing here only costs another pass.
NOT_CAPTURED = (
    *("backend", "block_size", "experiment", "force", "format", "hessian", "method", "output_dir", "record", "sweep"),
    *("timing", "tracking", "verify", "data.calibration_tokens"),
)

elsewhere: Path | None = None  # the sweep's folder, where another process executes its runs
output_dir = ""
_plan: list[list[str]] = []  # the overrides of each run of this process's sweep, in order


class SweepPlan(Callback):
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_writable(Path(config.output_dir))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _plan.clear()
        try:
            check_sweep(str(config.sweep))  # before Hydra makes a folder of this name
        except ValueError as error:
            raise SystemExit(f"error: {error}") from None
        _check_writable(Path(config.output_dir))
        _note_launcher(config)
        sweeper = config.hydra.sweeper
        if not str(sweeper.get("_target_", "")).endswith(f".{BasicSweeper.__name__}"):
            return  # another sweeper may choose its runs one by one
        overrides = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        loader = GlobalHydra.instance().config_loader()  # expands globs to choices
        parsed = OverridesParser.create(loader).parse_overrides([*overrides, *config.hydra.overrides.task])
        _plan.extend(BasicSweeper.split_arguments(parsed, None)[0])


def _note_launcher(config: DictConfig) -> None:
    """Whether the sweep's outcomes are in a file, because its runs are executed by other processes."""
    global elsewhere, output_dir
    launcher = config.hydra.get("launcher")
    if launcher is None or str(launcher.get("_target_", "")).endswith(f".{launchers.SERIAL}"):
        return
    elsewhere, output_dir = Path(config.hydra.sweep.dir), str(config.output_dir)
    (elsewhere / launchers.OUTCOMES_NAME).unlink(missing_ok=True)


def _check_writable(folder: Path) -> None:
    """Ends the program with one line if the folder cannot be written. Hydra's own error would fill a page."""
    try:
        check_output(folder)
    except SourceError as error:
        raise SystemExit(f"error: {error}") from None


def layers_ahead(config: Config) -> list[LayerConfig]:
    """The layers that this run of a sweep and the later ones need of the same model and text, without repeats."""
    if not _plan or not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    if OmegaConf.is_missing(hydra.job, "num"):  # a single run
        return []
    number, own = hydra.job.num, list(hydra.overrides.task)
    if number >= len(_plan) or _plan[number] != own:
        return []
    wanted = _captured_by(own)
    layers = (_layer(overrides, config) for overrides in _plan[number:] if _captured_by(overrides) == wanted)
    return list({(layer.index, layer.module): layer for layer in layers}.values())


def _captured_by(overrides: list[str]) -> frozenset[str]:
    """The overrides that determine what a forward pass captures, without those of the layer."""

    def decides(override: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return key not in NOT_CAPTURED and key.partition(".")[0] not in (*NOT_CAPTURED, "layer")

    return frozenset(filter(decides, overrides))


def _layer(overrides: list[str], config: Config) -> LayerConfig:
    values: dict[str, Any] = {"index": config.layer.index, "module": config.layer.module}
    for override in overrides:
        key = override.partition("=")[0]
        if key in ("layer.index", "layer.module"):
            values[key.partition(".")[2]] = OverridesParser.create().parse_override(override).value()
    return LayerConfig(index=int(values["index"]), module=str(values["module"]))


def all_layers(*, _root_: DictConfig) -> str:
    """`${all_layers:}`: every layer index of the configured model, or of its offline twin, as a sweep's values.

    The model must not be swept itself. If it is not available, one index remains, and its run shows the error.
    """
    from experiments.sources.models import count_layers
    from experiments.sources.twins import choose_sources

    composed = copy.deepcopy(_root_)
    with open_dict(composed):
        composed.pop("hydra", None)
    config = to_config(composed)
    try:
        count = count_layers(choose_sources(config).config.model)
    except SourceError:
        count = None
    return str(config.layer.index) if count is None else ",".join(map(str, range(count)))


OmegaConf.register_new_resolver("all_layers", all_layers, replace=True)
