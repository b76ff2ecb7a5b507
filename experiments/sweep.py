"""What a sweep asks for as a whole, known before its first run.

Hydra hands over one run at a time, but a capture should take every layer that the sweep will want in one forward pass.
`SweepPlan`, a Hydra callback (conf/config.yaml), notes the overrides of all runs as Hydra's own sweeper will form them;
when a run finds its layer missing from the cache, `layers_ahead` says which others to capture with it. So a sweep whose
layers are cached, or whose runs are finished, costs nothing. A launcher that starts processes elsewhere has no plan
there: each layer is then captured when its turn comes.

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

from experiments.config import Config, LayerConfig, check_sweep, to_config
from experiments.files import SourceError, check_writable

# Overrides that change nothing about what a forward pass captures. One that is missing here costs a pass, no more.
NOT_CAPTURED = (
    *("backend", "block_size", "experiment", "force", "format", "hessian", "method", "output_dir", "record", "sweep"),
    *("timing", "tracking", "verify", "data.calibration_tokens"),
)

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
        sweeper = config.hydra.sweeper
        if not str(sweeper.get("_target_", "")).endswith(f".{BasicSweeper.__name__}"):
            return  # a sweeper that chooses its runs as it goes
        overrides = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
        loader = GlobalHydra.instance().config_loader()  # knows the choices that a glob means
        parsed = OverridesParser.create(loader).parse_overrides([*overrides, *config.hydra.overrides.task])
        _plan.extend(BasicSweeper.split_arguments(parsed, None)[0])


def _check_writable(folder: Path) -> None:
    """Ends the program where a sweep could write nothing; Hydra's own error would be a page, for its multirun.yaml."""
    try:
        check_writable(folder)
    except OSError as error:
        raise SystemExit(f"error: output_dir={folder} cannot be written ({error.strerror}); choose another") from None


def layers_ahead(config: Config) -> list[LayerConfig]:
    """The layers that this run of a sweep and those after it want of the same model and text, each once."""
    if not _plan or not HydraConfig.initialized():
        return []
    hydra = HydraConfig.get()
    if OmegaConf.is_missing(hydra.job, "num"):  # not of a sweep
        return []
    number, own = hydra.job.num, list(hydra.overrides.task)
    if number >= len(_plan) or _plan[number] != own:
        return []
    wanted = _captured_by(own)
    layers = (_layer(overrides, config) for overrides in _plan[number:] if _captured_by(overrides) == wanted)
    return list({(layer.index, layer.module): layer for layer in layers}.values())


def _captured_by(overrides: list[str]) -> frozenset[str]:
    """The overrides that decide what a forward pass sees, the layer apart."""

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

    Takes the model of the command line, not one that is itself swept. Where the model cannot be had, one index is
    left, so that its run says why.
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
