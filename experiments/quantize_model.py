"""Quantize a whole model and write it; with `-m`, once for every combination of the given values.

    python experiments/quantize_model.py model=qwen3_4b format=nvfp4 method=descent
    torchrun --nproc-per-node 4 experiments/quantize_model.py model=qwen3_4b    on four GPUs, with the same result

The model's folder is OUTPUT_DIR/RUN/model (model/checkpoint.py), beside it record.json and run.log, and a folder for
each `export` (model/export.py). OUTPUT_DIR/latest leads to the last finished RUN. A finished model is skipped unless
`force=true`; an export that it lacks is written. An interrupted one continues at the first unfinished layer. A failed
run leaves its traceback in run.log. A sweep goes on, and the exit status is then 1.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hydra
from omegaconf import DictConfig, OmegaConf

from experiments import launchers, provenance, sweep
from experiments.config import plain_config
from experiments.console import full_errors, reason
from experiments.files import SourceError, check_output
from experiments.model.settings import QuantizeConfig, method_fields
from experiments.model_record import ModelRecord
from experiments.overrides import refusal
from experiments.record import RECORD_NAME, RecordError, read_record_of
from experiments.run_log import LOG_NAME, run_log, status_of
from experiments.tracking import track_model

if TYPE_CHECKING:
    from experiments.model.job import ModelRun
    from experiments.model.ranks import Ranks
    from experiments.model.select import Selection

log = logging.getLogger(__name__)

LATEST = "latest"

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} layers [{elapsed}<{remaining}]"


@hydra.main(version_base="1.3", config_path="../conf", config_name="quantize_model")
def main(composed: DictConfig) -> None:
    if launchers.is_elsewhere():
        console = ModelConsole()
        run(composed, console)
        launchers.tell_outcome(console.counts)
        return
    run(composed, CONSOLE)


def run(composed: DictConfig, console: ModelConsole) -> None:
    """One model, from the composed configuration to its record.

    No error leaves this function, but one of several processes ends, so that torchrun ends the others.
    """
    from experiments.model.ranks import started

    ranks = started()
    try:
        config = plain_config(composed, QuantizeConfig)
        if config.device in ("auto", "cuda"):
            config.device = ranks.device(config.device)
        with launchers.own_device(config.device) as device:
            is_made = _run_on(replace(config, device=device), console, ranks)
    except Exception as error:
        console.refused(error)
        is_made = False
    if not is_made and ranks.size > 1:
        raise SystemExit(1)


def _run_on(config: QuantizeConfig, console: ModelConsole, ranks: Ranks) -> bool:
    """Whether the model is finished."""
    from experiments.model.job import Listener, quantize_model, refuse_layer_bundle, resolve_model

    check_output(Path(config.output_dir))
    refuse_layer_bundle(config)
    resolved = resolve_model(config)
    previous = finished_record(resolved)
    if not ranks.is_first:
        if previous is None or config.force:
            quantize_model(resolved, Listener(), ranks)
        return True
    if previous is not None and not config.force:
        console.skipped(resolved, with_export(resolved, previous))
        point_to(resolved)
        return True
    return quantize_and_record(resolved, console, ranks).status == "ok"


def finished_record(run: ModelRun) -> ModelRecord | None:
    """The record of an earlier run that ended well, from the same sources, if its model is still there, bit for bit.

    Raises SourceError for a damaged model that cannot be made again, because its sources are missing.
    """
    try:
        record = read_record_of(ModelRecord, run.run_dir / RECORD_NAME)
    except (FileNotFoundError, RecordError):
        return None
    same = run.resolved.error is not None or record.config_hash == run.identity
    if record.status != "ok" or not same or not run.folder.is_dir():
        return None
    return record if _is_intact(run) else None


def _is_intact(run: ModelRun) -> bool:
    from experiments.sources.quantized import open_quantized

    try:
        open_quantized(run.folder, run.config.cache.folder).verify()
    except SourceError as error:
        if run.resolved.error is not None:
            raise
        log.warning("%s", error)
        return False
    return True


def with_export(run: ModelRun, record: ModelRecord) -> ModelRecord:
    """The record of a finished model, which is exported now if it was not before. Raises ValueError."""
    from experiments.model.job import export_model

    exports = export_model(run)
    if not exports.items() <= record.exports.items():
        record = replace(record, exports=record.exports | exports)
        record.write(run.run_dir)
    return record


def quantize_and_record(run: ModelRun, console: ModelConsole, ranks: Ranks) -> ModelRecord:
    """Quantizes, and writes the record last. A failure is in the record."""
    from experiments.model.checkpoint import layer_records
    from experiments.model.job import Listener, quantize_model

    started = time.perf_counter()
    log_file = run.run_dir / LOG_NAME
    fields = base_fields(run)
    with run_log(log_file):
        log.info("%s\n%s", run.run_id, OmegaConf.to_yaml(OmegaConf.structured(run.config)))
        console.heading(run)
        try:
            with console.bar() as shown:
                listener = Listener(shown.began, shown.layer, shown.tick)
                fields |= quantize_model(run, listener, ranks) | {"status": "ok", "reason": None}
        except Exception as error:
            fields |= {"status": status_of(error), "reason": reason(error)}
            log.info("%s: %s\n%s", fields["status"], fields["reason"], traceback.format_exc())
            if full_errors():
                traceback.print_exc()
        record = ModelRecord(**fields, duration_s=round(time.perf_counter() - started, 3))
        record.write(run.run_dir)
        if record.status == "ok":
            point_to(run)
        layers = partial(layer_records, run.folder) if record.status == "ok" else list
        track_model(record, run.settings, run.config.tracking, Path(run.config.output_dir), layers)
    console.ran(run, record, log_file)
    return record


def point_to(run: ModelRun) -> None:
    """Make OUTPUT_DIR/latest a link to the run's folder."""
    link = run.run_dir.with_name(LATEST)
    temporary = link.with_name(f".{LATEST}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(run.run_id)
    temporary.replace(link)


def base_fields(run: ModelRun) -> dict[str, Any]:
    """The fields of a record that are known before the run starts."""
    config, device = run.config, run.resolved.device
    return {
        "run_id": run.run_id,
        "sweep": config.sweep,
        **ModelRecord.known(method_fields(config)),
        "backend": run.resolved.backend,
        "device": device,
        "device_name": provenance.device_name(device),
        "model": config.model.label,
        "data": config.data.name,
        "seq_len": config.data.seq_len,
        "seed": config.seed,
        "config_hash": run.identity,
        **provenance.record_fields(),
    }


@dataclass
class ModelConsole:
    """Prints a heading for each model, a line for each layer, and a closing line."""

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("done", "skipped", "unsupported", "failed"), 0)
    )
    started: float = field(default_factory=time.perf_counter)

    def heading(self, run: ModelRun) -> None:
        config = run.config
        parts = [config.model.label, config.format.name, f"block {config.block_size}", config.method.name]
        hessian = "kronecker" if config.hessian.outputs else str(config.hessian.weighting)
        parts += [str(config.calibrate.mode), f"hessian {hessian}", config.data.name]
        print(" · ".join(parts), flush=True)

    def bar(self) -> LayerBar:
        return LayerBar()

    def skipped(self, run: ModelRun, record: ModelRecord) -> None:
        self.counts["skipped"] += 1
        self.heading(run)
        print(f"  finished before: {run.folder}", flush=True)
        self.exported(run, record)

    def ran(self, run: ModelRun, record: ModelRecord, log_file: Path) -> None:
        self.counts["done" if record.status == "ok" else record.status] += 1
        if record.status != "ok":
            print(f"  {record.status}: {record.reason} (traceback: {log_file})", file=sys.stderr, flush=True)
            return
        phases = ", ".join(f"{name} {value:.0f} s" for name, value in record.seconds.items())
        print(f"  {record.matrices} matrices{_errors(record.to_dict())}   {record.duration_s:.0f} s ({phases})")
        if record.warned:
            print(
                f"  for {record.warned} matrices the text is short: see warnings in layers.jsonl, or more data.samples"
            )
        if record.without_outputs:
            print(f"  {record.without_outputs} matrices have no gradients at their outputs: solved as by hessian=loss")
        for name, tokens in record.few_tokens.items():
            print(f"  {name}: {tokens} tokens; the experts' shared Hessian is mixed in")
        print(f"  {run.folder}", flush=True)
        self.exported(run, record)

    def exported(self, run: ModelRun, record: ModelRecord) -> None:
        if run.config.export is None:
            return
        verdict = record.exports[str(run.config.export)]
        print(f"  {run.run_dir / verdict['folder']}: {verdict['equal']} of {verdict['weights']} weights read back are")
        print(f"    bit for bit what was quantized ({', '.join(verdict['routes'])})", flush=True)
        for warning in verdict["warnings"]:
            print(f"    note: {warning}", flush=True)

    def refused(self, error: Exception) -> None:
        """Reports a configuration that cannot be run."""
        self.counts["failed"] += 1
        print(f"error: {reason(error)}", file=sys.stderr, flush=True)
        if full_errors():
            traceback.print_exception(error)

    def add(self, counts: dict[str, int]) -> None:
        """Counts models that other processes made."""
        for name, count in counts.items():
            self.counts[name] += count

    def close(self) -> int:
        """Print the closing line. Returns the exit status."""
        total = sum(self.counts.values())
        if total:
            parts = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
            print(f"\n{total} model{'s' * (total > 1)} in {time.perf_counter() - self.started:.0f} s: {parts}")
        return 1 if self.counts["failed"] else 0


class LayerBar:
    """A context with the progress of a model: a bar with the time left on a terminal, and a line for each layer."""

    def __init__(self) -> None:
        self.depth = 0
        self.shown: Any = None

    def __enter__(self) -> LayerBar:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.shown is not None:
            self.shown.close()

    def began(self, depth: int, finished: int, selection: Selection) -> None:
        from tqdm import tqdm

        self.depth = depth
        left_out: dict[str, list[str]] = {}
        for name, why in selection.left_out.items():
            left_out.setdefault(why, []).append(name)
        for why, names in left_out.items():
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            print(f"  left out: {shown} ({why})", flush=True)
        if finished:
            print(f"  {finished} of {depth} layers were finished before", flush=True)
        self.shown = tqdm(total=depth, desc="quantize", bar_format=BAR, disable=None)

    def layer(self, record: dict[str, Any]) -> None:
        line = f"  layer {record['index']:>3} of {self.depth}{_errors(record)}   {record['duration_s']:.1f} s"
        self.shown.write(line) if not self.shown.disable else print(line, flush=True)

    def tick(self, share: float) -> None:
        """share: of a layer, done since the last tick."""
        self.shown.update(share)


def _errors(record: dict[str, Any]) -> str:
    """The errors before, which are naive's, and after."""
    name = "output_error" if record.get("output_error") is not None else "weight_error"
    before, after = record.get(f"naive_{name}"), record.get(name)
    if before is None or after is None:
        return ""
    text = f"   {name.replace('_', ' ')} {100 * before:5.2f} % → {100 * after:5.2f} %"
    hidden = record.get("hidden_error")
    return text if hidden is None else f"{text}   hidden states {100 * hidden:5.2f} %"


CONSOLE = ModelConsole()


def cli() -> int:
    """The exit status: 1 if a model failed, 130 if interrupted."""
    if (refused := refusal(sys.argv[1:], QuantizeConfig, "quantize_model.py")) is not None:
        print(f"error: {refused}", file=sys.stderr)
        return 1
    launchers.prepare()
    try:
        main()
        if sweep.elsewhere is not None:
            CONSOLE.add(launchers.read_outcomes(sweep.elsewhere))
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues at the first unfinished layer.", file=sys.stderr)
        CONSOLE.close()
        return 130
    return CONSOLE.close()


if __name__ == "__main__":
    sys.exit(cli())
