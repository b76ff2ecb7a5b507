"""Console output of a sweep: one line per run, a heading where a value outside the columns changes, a closing line."""

from __future__ import annotations

import os
import sys
import time
import traceback
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from experiments.config import Config
from experiments.files import one_line
from experiments.record import RunRecord

COLUMNS = (
    f"  {'format':<10}{'block':>5}  {'method':<8} {'backend':<10}"
    f"{'weight error':>13}{'output error':>14}{'held out':>10}{'time a call':>13}{'run':>9}"
)
NEXT_COMMAND = "python experiments/report.py --runs"
# Overrides that every line already shows, or that change no result. The heading leaves them out.
NOT_IN_HEADING = (
    *("format", "block_size", "method", "backend", "model", "data", "layer.index", "layer.module"),
    *("cache", "experiment", "force", "offline", "output_dir", "record", "sweep", "timing", "tracking"),
)


def reason(error: BaseException) -> str:
    """The message of a user's error (ValueError, OSError). Any other error also has its type."""
    text = one_line(error)
    if not isinstance(error, (ValueError, OSError)) or not text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def full_errors() -> bool:
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


@dataclass
class Console:
    """Prints one line per run, a heading where model, layer, text or another swept value changes, a closing line."""

    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("done", "skipped", "unsupported", "failed"), 0)
    )
    started: float = field(default_factory=time.perf_counter)
    output_dir: str = ""
    shown: str = ""  # the heading
    is_lost: bool = False  # the output folder cannot be written
    reason: str | None = None  # the last one shown, why a run did not end well

    def heading(self, config: Config) -> None:
        self.output_dir = config.output_dir
        parts = [config.model.label, f"layer {config.layer.index} {config.layer.module}", config.data.name]
        if HydraConfig.initialized():
            overrides = [str(o) for o in HydraConfig.get().overrides.task]
            parts += [o for o in overrides if not _in_every_line(o) and _is_used(o, config)]
        text = " · ".join(parts)
        if text != self.shown:
            if not self.shown:
                print(f"\n{COLUMNS}")
            self.shown = text
            print(text, flush=True)

    def skipped(self, record: RunRecord) -> None:
        self.counts["skipped"] += 1
        self._line(record, "skipped")

    def ran(self, record: RunRecord, log_file: Path) -> None:
        if record.status == "ok":
            self.counts["done"] += 1
            self._line(record, f"{record.duration_s:.1f} s")
            if record.verified_blocks is not None or record.verified_to_hessian is not None:
                print(f"    {_verified(record)}", flush=True)
            return
        self.counts[record.status] += 1
        text = f"{_label(record)} {record.status}: {'as above' if record.reason == self.reason else record.reason}"
        self.reason = record.reason
        if record.status == "failed":
            print(f"{text} (traceback: {log_file})", file=sys.stderr, flush=True)
        else:
            print(text, flush=True)

    def kept(self) -> None:
        print("    The record of an earlier run that ended well is kept.", flush=True)

    def refused(self, error: Exception, config: Config | None = None) -> None:
        """Reports a configuration that cannot be run; config: None where it cannot be composed."""
        self.counts["failed"] += 1
        which = ""
        if config is not None:
            which = _columns(config.format.name, config.block_size, config.method.name, config.backend.name) + " "
        print(f"{which}error: {reason(error)}", file=sys.stderr, flush=True)
        if full_errors():
            traceback.print_exception(error)

    def lost(self, error: OSError, output_dir: str) -> None:
        """The run's folder cannot be written: nothing of this run is kept."""
        self.is_lost = True
        self.counts["failed"] += 1
        why = f"{error.strerror} ({error.filename})" if error.filename else error.strerror
        remedy = "free some space or choose another"
        print(f"error: output_dir={output_dir} cannot be written: {why}; {remedy}", file=sys.stderr, flush=True)
        if full_errors():
            traceback.print_exception(error)

    def _line(self, record: RunRecord, last: str) -> None:
        if record.time_ms_median is not None:
            speed = _milliseconds(record.time_ms_median)
        else:
            speed = "interpreted" if record.time_timer == "interpreter" else "–"
        print(
            f"{_label(record)}{_percent(record.weight_error):>13}{_percent(record.output_error):>14}"
            f"{_percent(record.output_error_heldout):>10}{speed:>13}{last:>9}",
            flush=True,
        )

    def add(self, counts: dict[str, int], output_dir: str) -> None:
        """Counts runs that other processes executed."""
        self.output_dir = output_dir
        for name, count in counts.items():
            self.counts[name] += count

    def close(self) -> int:
        """Print the closing lines. Returns the exit status."""
        total = sum(self.counts.values())
        if total:
            parts = ", ".join(f"{count} {name}" for name, count in self.counts.items() if count)
            print(f"\n{total} run{'s' * (total > 1)} in {time.perf_counter() - self.started:.0f} s: {parts}")
            if self.counts["skipped"]:
                print("Skipped runs were finished before; force=true runs them again.")
            if self.counts["done"] or self.counts["skipped"]:
                print(f"Records: {self.output_dir}    Tables: {NEXT_COMMAND} {self.output_dir}", flush=True)
        return 1 if self.counts["failed"] else 0


def _in_every_line(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return key in NOT_IN_HEADING or key.partition(".")[0] in ("cache", "record", "timing", "tracking")


def _is_used(override: str, config: Config) -> bool:
    """Whether the run has this value. A bundle or an offline twin may replace it."""
    key, _, text = override.lstrip("+~").partition("=")
    value: object = config
    for name in key.split("."):
        if not hasattr(value, name):
            return True  # not a setting of the run, so unknown
        value = getattr(value, name)
    if is_dataclass(value):
        return True  # a choice of a whole group
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return text.strip("'\"").lower() == ("null" if value is None else str(value)).lower()


def _verified(record: RunRecord) -> str:
    """The result of verify, in words."""
    if record.verified_to_hessian is not None:
        return (
            "verified: no block by itself, since blocks make up for each other's errors; squared output error on the "
            f"calibration tokens {record.verified_to_hessian:.3f} × that of hessian"
        )
    excess = f"worst excess {record.verified_worst_excess:.1g}" if record.verified_worst_excess else "no excess"
    wrong = f", {record.verified_wrong_codes:,} wrong codes" if record.verified_wrong_codes else ""
    return (
        f"verified: {record.verified_violations:,} of {record.verified_blocks:,} blocks have a better scale "
        f"({excess}){wrong}"
    )


def _label(record: RunRecord) -> str:
    return _columns(record.format, record.block_size, record.method, record.backend)


def _columns(format: str, block_size: int, method: str, backend: str) -> str:
    """The first columns of a line."""
    return f"  {format:<10}{block_size:>5}  {method:<8} {backend:<10}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _milliseconds(value: float) -> str:
    """Three significant digits, never an exponent: 0.123 ms, 12.3 ms, 1.23 s."""
    unit = "ms"
    if value >= 1000:
        value, unit = value / 1000, "s"
    decimals = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {unit}"
