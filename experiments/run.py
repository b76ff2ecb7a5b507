"""Quantize one layer and measure it; with `-m`, once for every combination of the given values.

    python experiments/run.py -m format=nvfp4,mxfp4 method=naive,sse,hessian

A run resolves its sources, executes its stages (measure/stages.py) and writes one record last. A finished run is
skipped unless `force=true`. An unsupported or failed run is tried again. A failed run leaves its traceback in the
`run.log` of its folder. The sweep goes on, and the exit status is then 1.

Only the stages import torch, so `--help` and a sweep of finished runs are quick.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from experiments import launchers, provenance, sweep, tracking
from experiments.config import Config, to_config
from experiments.console import Console, full_errors, reason
from experiments.files import remove_orphans
from experiments.overrides import refusal
from experiments.record import BLOCKS_NAME, RECORD_NAME, WEIGHTS_NAME, Histograms, RecordError, RunRecord, read_record
from experiments.run_log import AGAIN_LOG_NAME, LOG_NAME, run_log, status_of
from experiments.sweep import layers_ahead

if TYPE_CHECKING:
    from experiments.sources.resolved import Resolved

log = logging.getLogger(__name__)

CONSOLE = Console()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(composed: DictConfig) -> None:
    if launchers.is_elsewhere():
        console = Console()
        run(composed, console)
        launchers.tell_outcome(console.counts)
        return
    if HydraConfig.get().mode == RunMode.RUN and (swept := HydraConfig.get().sweeper.params):
        print(f"Without -m this is one run only: the experiment's values of {', '.join(swept)} are not swept.")
    run(composed, CONSOLE)
    if CONSOLE.is_lost:
        raise SystemExit(1)  # the runs after this one could not be written either


def run(composed: DictConfig, console: Console) -> None:
    """One run, from the composed configuration to its record.

    No error leaves this function, because Hydra would show only a sweep's first one. Errors go to the record and the
    console. A configuration that the library refuses, and a folder that cannot be written, leave no record.
    """
    try:
        _run(composed, console)
    except OSError as error:
        console.lost(error, str(composed.output_dir))


def _run(composed: DictConfig, console: Console) -> None:
    try:
        config = to_config(composed)
    except Exception as error:
        console.refused(error)
        return
    with launchers.own_device(config.device) as device:
        _run_on(replace(config, device=device), console)


def _run_on(config: Config, console: Console) -> None:
    from experiments.sources.resolved import resolve

    try:
        resolved = resolve(config)
    except Exception as error:
        console.refused(error)
        return

    config = resolved.config
    console.heading(config)
    previous = finished_record(resolved)
    if previous is not None and not config.force:
        remove_orphans(resolved.run_dir)
        console.skipped(previous)
        return
    if (invalid := invalid_options(config)) is not None:
        console.refused(invalid, config)
        return
    with running(resolved.run_dir):
        if previous is None and (previous := finished_record(resolved)) is not None:
            console.skipped(previous)  # another process ran it meanwhile
            return
        measure_and_record(resolved, console, again=previous is not None)


@contextmanager
def running(run_dir: Path) -> Iterator[None]:
    """A context in which no other process executes this run: of two that start it, one executes it and one waits."""
    from filelock import FileLock

    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / ".lock"):
        yield


def measure_and_record(resolved: Resolved, console: Console, again: bool) -> None:
    """again: the run is forced. The earlier run's files stay unchanged until this one has ended well."""
    log_file = resolved.run_dir / (AGAIN_LOG_NAME if again else LOG_NAME)
    with run_log(log_file):
        record, histograms = measure(resolved)
        if record.status == "ok" or not again:
            record.write(resolved.run_dir)
            config = resolved.config
            tracking.track(record, resolved.settings, config.tracking, Path(config.output_dir), histograms)
    if again and record.status == "ok":
        log_file = log_file.replace(resolved.run_dir / LOG_NAME)
    console.ran(record, log_file)
    if again and record.status != "ok":
        console.kept()


def measure(resolved: Resolved) -> tuple[RunRecord, Callable[[], Histograms] | None]:
    """(record, function that makes the histograms, None unless the run ended well). An error is in the record."""
    started = time.perf_counter()
    log.info("%s\n%s", resolved.run_id, OmegaConf.to_yaml(OmegaConf.structured(resolved.config)))
    fields = base_fields(resolved)
    histograms = None
    try:
        if resolved.error is not None:
            raise resolved.error
        from experiments.measure.stages import execute

        shared = launchers.shares_device(resolved.device)
        outcome = execute(resolved, layers_ahead(resolved.config), shared)
        fields |= outcome.fields | {"status": "ok", "reason": None}
        histograms = outcome.histograms
    except Exception as error:
        fields |= {"status": status_of(error), "reason": reason(error)}
        log.info("%s: %s\n%s", fields["status"], fields["reason"], traceback.format_exc())
        if full_errors():
            traceback.print_exc()
    return RunRecord(**fields, duration_s=time.perf_counter() - started), histograms


def invalid_options(config: Config) -> Exception | None:
    """The library's error for options that it never accepts; None for options that it accepts."""
    from experiments.measure.stages import check_options

    try:
        check_options(config)
    except Exception as error:
        return error
    return None


def finished_record(resolved: Resolved) -> RunRecord | None:
    """The record of an earlier run that ended well, from the same sources; from any if the sources are not available.

    None for a record of another schema version, and for one without blocks if record.blocks=true, or without weights if
    record.weights=true.
    """
    run_dir, wanted = resolved.run_dir, resolved.config.record
    for is_wanted, name in ((wanted.blocks, BLOCKS_NAME), (wanted.weights, WEIGHTS_NAME)):
        if is_wanted and not (run_dir / name).is_file():
            return None
    try:
        record = read_record(run_dir / RECORD_NAME)
    except (FileNotFoundError, RecordError):
        return None
    same = resolved.error is not None or record.config_hash == resolved.config_hash
    return record if record.status == "ok" and same else None


def base_fields(resolved: Resolved) -> dict[str, Any]:
    """The fields of a record that are known before the run starts."""
    config, device = resolved.config, resolved.device
    return {
        "run_id": resolved.run_id,
        "sweep": config.sweep,
        "format": config.format.name,
        "block_size": config.block_size,
        "method": config.method.name,
        "backend": resolved.backend,
        "requested_backend": config.backend.name,
        "device": device,
        "device_name": provenance.device_name(device),
        "global_scale": config.format.global_scale,
        "scale_rule": config.format.rule,
        "model": config.model.label,
        "model_revision": config.model.revision,
        "model_origin": config.model.origin,
        "data": config.data.name,
        "layer_index": config.layer.index,
        "layer_module": config.layer.module,
        "seq_len": config.data.seq_len,
        "heldout": config.data.heldout,
        "seed": config.seed,
        "config_hash": resolved.config_hash,
        **provenance.record_fields(),
    }


def cli() -> int:
    """The exit status: 1 if a run failed, 130 if interrupted."""
    if (refused := refusal(sys.argv[1:])) is not None:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    launchers.prepare()
    try:
        main()
        if sweep.elsewhere is not None:
            CONSOLE.add(launchers.read_outcomes(sweep.elsewhere), sweep.output_dir)
    except SystemExit:
        if not CONSOLE.is_lost:
            raise
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues where it stopped.", file=sys.stderr)
        CONSOLE.close()
        return 130
    return CONSOLE.close()


if __name__ == "__main__":
    sys.exit(cli())
