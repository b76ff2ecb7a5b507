"""W&B mirrors the records: one W&B run per record, and one for the report. Offline is the default.

The W&B group is the sweep, and the W&B id is the run's identity. So a run that is repeated with `force=true` updates
its W&B run when it is synced. A run's page has the settings as its configuration, the measurements as its summary, and
histograms over its blocks. A quantized model's page has its layers instead, one a step. The report's run, of job type
`report`, has the tables and figures of `results/`. Nothing about the host, the user, the code or the console is sent. A
failure to log a run is a warning, because the record is already on disk. Imports no torch.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.config import TrackingConfig
from experiments.evaluation_record import FIELDS as EVALUATION_FIELDS
from experiments.evaluation_record import EvaluationRecord
from experiments.model_record import ModelRecord
from experiments.record import Histograms, Record, RunRecord

log = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = ("offline", "online", "disabled")

SERVER_SECONDS = 5.0  # time limit for the first answer of W&B's server
INIT_SECONDS = 20.0  # time limit for wandb.init, for a server that then stops answering
ID_LENGTH = 128  # W&B's limit

RESULT = re.compile(r"(kl|same_top|reference_ppl|ppl|paired)(_(?!by_|with)\w+)?$")
# The fields of a record in a run's summary. The others go to its configuration, by which W&B filters runs.
MEASURED = (
    *("status", "reason", "weight_error", "output_error", "output_error_heldout", "bits_per_weight", "scales_moved"),
    *("candidates_mean", "candidates_max", "time_ms_median", "time_ms_p20", "time_ms_p80", "time_iterations"),
    *("verified_blocks", "verified_violations", "verified_worst_excess", "verified_wrong_codes", "duration_s"),
)
# Such fields of an evaluation's record.
EVALUATED = ("status", "reason", "duration_s", *(name for name in EVALUATION_FIELDS if RESULT.match(name)))
# Such fields of a quantized model's record.
MODEL_MEASURED = (
    *("status", "reason", "layers", "matrices", "weights", "bits_per_weight", "few_tokens", "warned"),
    *("naive_weight_error", "weight_error", "naive_output_error", "output_error", "hidden_error", "without_outputs"),
    *("seconds", "peak_device_bytes", "processes", "resumed_layers", "exports", "duration_s"),
)
AS_HISTOGRAMS = ("scale_shifts", "candidate_counts")
AS_LISTS = ("kl_by_position", "kl_by_layer")  # neither in the summary nor in the configuration
COUNTED = ("few_tokens", "without_outputs")  # a record may list them by name
HASHES = ("commit", "config_hash", "data_hash", "model_revision")  # read as text, even if all digits are decimal


@dataclass(frozen=True)
class Page:
    """What a record's W&B run has. measured: the fields of its summary. log: adds series and histograms to the run."""

    job_type: str
    tags: list[str]
    measured: tuple[str, ...]
    log: Callable[[Any], None] = lambda run: None


def track(
    record: RunRecord,
    config: Mapping[str, Any],
    tracking: TrackingConfig,
    output_dir: Path,
    histograms: Callable[[], Histograms] | None = None,
) -> None:
    """Log one record to W&B. Offline runs are in `output_dir/wandb/offline-run-*`, which `wandb sync` sends.

    histograms: computes the distributions over the run's blocks. It is not called if nothing is logged.
    """
    tags = [record.format, record.method, record.backend, record.status]
    page = Page(record.method, tags, MEASURED, functools.partial(_log_histograms, histograms))
    _track(record, config, tracking, output_dir, page)


def track_evaluation(
    record: EvaluationRecord, config: Mapping[str, Any], tracking: TrackingConfig, output_dir: Path
) -> None:
    """Log the record of a whole model's evaluation, as `track` does."""
    tags = [tag for tag in ("evaluation", record.format, record.method, record.status) if tag]
    page = Page("evaluation", tags, EVALUATED)
    _track(record, config, tracking, output_dir, page)


def track_model(
    record: ModelRecord,
    config: Mapping[str, Any],
    tracking: TrackingConfig,
    output_dir: Path,
    layers: Callable[[], Sequence[Mapping[str, Any]]],
) -> None:
    """Log the record of a quantized model, as `track` does.

    layers: reads the records of its decoder layers, each one a step. It is not called if nothing is logged.
    """
    tags = ["model", record.format, record.method, record.backend, record.status]
    page = Page("model", tags, MODEL_MEASURED, functools.partial(_log_layers, layers))
    _track(record, config, tracking, output_dir, page)


def _track(record: Record, config: Mapping[str, Any], tracking: TrackingConfig, output_dir: Path, page: Page) -> None:
    """A failure is a warning."""
    if tracking.name == "none":
        return
    try:
        mode = _usable(tracking_mode(tracking))
        if mode != "disabled":
            _log_run(record, config, tracking, mode, output_dir, page)
    except Exception as error:
        log.debug("W&B failed", exc_info=True)
        log.warning(
            "W&B did not log %s (%s); its record is complete. tracking=none turns W&B off.", record.run_id, error
        )


def track_report(
    group: str,
    tables: Mapping[str, Path],
    figures: Mapping[str, Path],
    facts: Mapping[str, Any],
    tracking: TrackingConfig,
    output_dir: Path,
) -> bool:
    """Log the CSV files `tables` and the pictures `figures` as the group's report. False where W&B is disabled.

    facts: the W&B run's configuration, which says what the report was made from. A repeated call updates the same run.
    """
    mode = _usable(tracking_mode(tracking))
    if mode == "disabled":
        return False
    import pandas as pd
    import wandb

    with wandb.init(
        group=group,
        id=report_id(group),
        name=f"report-{group}",
        job_type="report",
        tags=["report"],
        config=dict(facts),
        **_common(tracking, mode, output_dir),
    ) as run:
        logged: dict[str, Any] = {}
        for name, path in tables.items():
            frame = pd.read_csv(path, dtype=dict.fromkeys(HASHES, str)).astype(object)
            logged[f"tables/{name}"] = wandb.Table(
                columns=list(frame.columns),
                data=frame.where(frame.notna(), None).to_numpy().tolist(),
                allow_mixed_types=True,
            )
        for name, path in figures.items():
            logged[f"figures/{name}"] = wandb.Image(str(path), caption=name)
        run.log(logged)
        run.summary.update({"tables": len(tables), "figures": len(figures)})
    return True


def tracking_mode(tracking: TrackingConfig) -> Mode:
    """The configured mode, else $WANDB_MODE, else offline."""
    asked = str(tracking.mode or os.environ.get("WANDB_MODE") or "offline")
    for mode in MODES:
        if mode == asked:
            return mode
    raise ValueError(f"WANDB_MODE={asked}: use {', '.join(MODES)}")


def report_id(group: str) -> str:
    """The id of the group's report; a hash where it would exceed W&B's limit."""
    plain = f"report-{group}"
    return plain if len(plain) <= ID_LENGTH else f"report-{hashlib.sha256(group.encode()).hexdigest()}"


def _usable(mode: Mode) -> Mode:
    """The mode, with offline instead of online if no server answers."""
    if mode != "online":
        return mode
    return mode if _server_problem() is None else "offline"


@functools.cache
def _server_problem() -> str | None:
    """Why W&B's server cannot be reached, which is also logged; None if it answers at all. Asked once per process.

    wandb.init() itself would wait 90 s in each run.
    """
    import requests
    import wandb

    url = str(wandb.setup().settings.base_url)
    try:
        requests.get(url, timeout=SERVER_SECONDS, stream=True).close()
    except requests.exceptions.SSLError:
        return None
    except (requests.exceptions.ConnectionError, requests.exceptions.Timeout) as error:
        problem = f"{url} did not answer within {SERVER_SECONDS} s"
        if not isinstance(error, requests.exceptions.Timeout):
            problem = f"no connection to {url}"
        log.warning("W&B: %s, so this command logs offline. `wandb sync` sends the runs later.", problem)
        return problem
    return None


def _log_run(
    record: Record, config: Mapping[str, Any], tracking: TrackingConfig, mode: Mode, output_dir: Path, page: Page
) -> None:
    import wandb

    values = {name: value for name, value in record.to_dict().items() if value is not None}
    used = {name: value for name, value in values.items() if name not in (*page.measured, *AS_HISTOGRAMS, *AS_LISTS)}
    with wandb.init(
        group=record.sweep,
        id=record.run_id,
        name=record.run_id,
        job_type=page.job_type,
        tags=page.tags,
        config={**config, "record": used},
        **_common(tracking, mode, output_dir),
    ) as run:
        page.log(run)
        run.summary.update({name: _count(name, values[name]) for name in page.measured if name in values})
        # Leaving the block would call an unsupported run finished, too; only a failed one is shown as crashed.
        run.finish(exit_code=1 if record.status == "failed" else 0)


def _log_histograms(histograms: Callable[[], Histograms] | None, run: Any) -> None:
    import wandb

    made = {} if histograms is None else histograms()
    if made:
        run.log({f"blocks/{name}": wandb.Histogram(np_histogram=counted) for name, counted in made.items()})


def _log_layers(layers: Callable[[], Sequence[Mapping[str, Any]]], run: Any) -> None:
    """One step a decoder layer. The summary is the model's own, so it takes none of these values."""
    run.define_metric("layers/*", summary="none")
    for record in layers():
        run.log({f"layers/{name}": value for name, value in layer_metrics(record).items()}, step=record["index"])


def layer_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a decoder layer's record: errors before (naive's) and after, and seconds, also by phase."""
    numbers = {name: value for name, value in record.items() if isinstance(value, int | float) and name != "index"}
    counts = {name: _count(name, record[name]) for name in COUNTED if name in record}
    return numbers | counts | {f"seconds/{phase}": value for phase, value in record.get("seconds", {}).items()}


def _count(name: str, value: Any) -> Any:
    """The number of matrices in place of their names."""
    return len(value) if name in COUNTED and not isinstance(value, int) else value


def _common(tracking: TrackingConfig, mode: Mode, output_dir: Path) -> dict[str, Any]:
    """The arguments of wandb.init() that every run shares."""
    import wandb

    output_dir.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
        init_timeout=INIT_SECONDS,
        console="off",
        host="",
        username="",
        disable_git=True,
        disable_code=True,
        save_code=False,
        disable_job_creation=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
    )
    return {
        "project": tracking.project,
        "dir": str(output_dir),
        "mode": mode,
        "resume": "allow",
        "reinit": "finish_previous",
        "settings": settings,
    }
