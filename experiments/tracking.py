"""W&B as the mirror of the records: one run a record, offline unless asked otherwise.

The sweep is the group and the run's identity the id, so a run that is repeated with `force=true` updates its W&B run
when it is synced. Nothing about the host, the user, the code or the console is sent. A failure here is a warning: the
record is on disk already.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from experiments.config import TrackingConfig
from experiments.record import RunRecord

log = logging.getLogger(__name__)

Mode = Literal["offline", "online", "disabled"]
MODES: tuple[Mode, ...] = ("offline", "online", "disabled")


def track(record: RunRecord, config: Mapping[str, Any], tracking: TrackingConfig, output_dir: Path) -> None:
    """Mirror one record. Offline runs lie in `output_dir/wandb/offline-run-*`, which `wandb sync` sends."""
    if tracking.name == "none":
        return
    try:
        _log_run(record, config, tracking, output_dir)
    except Exception as error:
        log.debug("W&B failed", exc_info=True)
        log.warning(
            "W&B did not log %s (%s); its record is complete. tracking=none turns W&B off.", record.run_id, error
        )


def tracking_mode(tracking: TrackingConfig) -> Mode:
    """The mode asked for, else $WANDB_MODE, else offline."""
    asked = str(tracking.mode or os.environ.get("WANDB_MODE") or "offline")
    for mode in MODES:
        if mode == asked:
            return mode
    raise ValueError(f"WANDB_MODE={asked}: use {', '.join(MODES)}")


def _log_run(record: RunRecord, config: Mapping[str, Any], tracking: TrackingConfig, output_dir: Path) -> None:
    mode = tracking_mode(tracking)
    if mode == "disabled":
        return
    import wandb

    output_dir.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        silent=True,
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
    with wandb.init(
        project=tracking.project,
        group=record.sweep,
        id=record.run_id,
        name=record.run_id,
        job_type=record.method,
        tags=[record.format, record.method, record.backend, record.status],
        config=dict(config),
        dir=str(output_dir),
        mode=mode,
        resume="allow",
        reinit="finish_previous",
        settings=settings,
    ) as run:
        run.summary.update({name: value for name, value in record.to_dict().items() if value is not None})
        # Leaving the block would call an unsupported run finished, too; only a failed one is shown as crashed.
        run.finish(exit_code=1 if record.status == "failed" else 0)
