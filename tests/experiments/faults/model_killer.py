"""Kills quantize_model.py with SIGKILL at random moments, starts it again, and compares the ends; see killer.py.

    python -m tests.experiments.faults.model_killer FOLDER MOMENTS SEED

FOLDER has a tiny checkpoint in model/ and texts in text/. Each run quantizes the whole model, layer by layer, and
exports it.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from experiments import quantize_model  # noqa: F401  imported before the forks
from experiments.capture import losses
from experiments.config import REPO_ROOT
from experiments.model import export, walk
from experiments.model.checkpoint import CheckpointWriter
from experiments.model_record import ModelRecord
from tests.experiments.faults.killer import TIMES, Victim, survive

RUN = (
    *("format=nvfp4", "method=gptq", "hessian=loss", "model.dtype=float32", "data.seq_len=32", "data.samples=8"),
    *("offline=never", "device=cpu", "sweep=killed", "export=modelopt", "tracking=none"),
)
# Fields of a model's record that differ from run to run.
VARYING = (*TIMES, "seconds", "resumed_layers", "peak_device_bytes", "checksum")
PHASES: dict[str, tuple[Any, str]] = {
    "layer": (walk.Walk, "_layer"),
    "renaming": (CheckpointWriter, "_rename"),
    "exporting": (export, "_write"),
    "backward pass": (losses._Pass, "run"),
    "writing": (CheckpointWriter, "_write"),
    "finishing": (CheckpointWriter, "finish"),
    "self-check": (export, "check_export"),
    "recording": (ModelRecord, "write"),
}


def work(root: Path, folder: Path) -> int:
    """The command of a user."""
    losses.PIECE_TOKENS = losses.BATCH_TOKENS = 64
    walk.BATCH_TOKENS = {"cpu": 64}
    os.environ["QUANTKIT_COMMIT"] = "killed"  # whatever is edited meanwhile
    os.environ["QUANTKIT_CACHE"] = str(folder / "cache")
    places = [f"model.path={root / 'model'}", f"data.path={root / 'text'}", f"output_dir={folder / 'models'}"]
    sys.argv = ["quantize_model.py", *RUN, *places]
    try:
        runpy.run_path(str(REPO_ROOT / "experiments" / "quantize_model.py"), run_name="__main__")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def outcome(folder: Path) -> dict[str, Any]:
    """File → its contents, without times."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name in ("log", "run.log") or path.parent.name == "hashes" or "/cache/" in f"/{name}":
            continue
        found[name] = path.read_bytes()
        if path.name == "record.json":
            found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in VARYING}
        elif path.name == "layers.jsonl":
            lines = [json.loads(line) for line in found[name].splitlines()]
            found[name] = [{key: value for key, value in line.items() if key != "record"} for line in lines]
    return found


if __name__ == "__main__":
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    victim = Victim(PHASES, work, outcome)
    print(json.dumps(survive(victim, Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
