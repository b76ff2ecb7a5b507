"""A whole model quantized by another tool, in that tool's own checkpoint, for evaluate.py to judge beside quantkit's.

    python experiments/peers.py tool=float out=FLOAT model=smollm2_135m model.path=FILE.gguf
    python experiments/peers.py tool=llmcompressor_gptq out=FOLDER model.path=FLOAT data.path=TEXT
    python experiments/evaluate.py model.path=FOLDER reference=FLOAT data.path=TEXT

tool=float writes the unquantized model as a float32 folder in the hub's layout, which the tools read. Further settings
are those of conf/evaluate.yaml. Calibration takes data.samples=256 sequences of data.split=validation, the same as
quantize_model.py does with these settings. FOLDER/peer.json, written last, has the tool's versions and its time, from
the loaded model to the written checkpoint. experiments/model/peers.py lists the tools.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import provenance
from experiments.capture.tokens import token_sequences
from experiments.config import ModelConfig, ModelSource
from experiments.console import full_errors
from experiments.evaluation_record import PEER_LABELS
from experiments.files import SourceError, check_writable, write_atomically
from experiments.model.evaluate_settings import (
    PEER_NAME,
    EvaluationConfig,
    as_run,
    compose_evaluation,
    evaluated_model,
)
from experiments.model.loading import load_network
from experiments.model.peers import PeerTask, get_peer, run_peer
from experiments.sources.checkpoints import open_checkpoint
from experiments.sources.models import model_folder

CALIBRATION = ("data.split=validation", "data.samples=256", "data.heldout=0")


def main(arguments: list[str] | None = None) -> int:
    try:
        quantize_by(*parse(sys.argv[1:] if arguments is None else arguments))
    except Exception as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if full_errors() or not isinstance(error, ValueError):
            traceback.print_exc()
        return 1
    return 0


def parse(arguments: list[str]) -> tuple[str, Path, EvaluationConfig]:
    """(tool, folder to write, settings). Raises SourceError without tool= or out=."""
    own = dict(word.split("=", 1) for word in arguments if word.startswith(("tool=", "out=")))
    if own.keys() != {"tool", "out"}:
        raise SourceError("give tool=NAME and out=FOLDER; experiments/model/peers.py lists the tools.")
    rest = [word for word in arguments if not word.startswith(("tool=", "out="))]
    if own["tool"] != "float":
        get_peer(own["tool"])
    return own["tool"], Path(own["out"]).expanduser(), compose_evaluation(*CALIBRATION, *rest)


def quantize_by(tool: str, out: Path, config: EvaluationConfig) -> None:
    """Writes the folder. Raises SourceError for a folder that holds files, and where a tool cannot run."""
    if out.exists() and any(out.iterdir()):
        raise SourceError(f"out={out} is not empty: name a new folder.")
    check_writable(out)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    model = evaluated_model(config)
    device = provenance.resolve_device(config.device)
    if tool == "float":
        save_float(model, out, config)
        return
    if model.path is None or model.source != ModelSource.hub:
        raise SourceError("model.path is not set to a float folder: write one with tool=float.")
    sequences = token_sequences(as_run(config, model), open_checkpoint(model, config.cache.folder).tokenizer())
    task = PeerTask(model_folder(model), sequences.ids["calibration"], out, device)
    seconds = run_peer(tool, task)
    about = about_peer(tool, task, sequences.data) | {"quantize_s": round(seconds, 3)}
    write_atomically(out / PEER_NAME, json.dumps(about, indent=1))
    print(f"{tool}: {out}, {about['quantize_s']:.1f} s on {about['quantize_device']}", flush=True)


def save_float(model: ModelConfig, out: Path, config: EvaluationConfig) -> None:
    """The unquantized model as float32 safetensors, with its config and tokenizer."""
    cache = config.cache.folder
    load_network(model, cache, "float32", "cpu").save_pretrained(out)
    open_checkpoint(model, cache).save_around(out, {"dtype": "float32"})


def about_peer(tool: str, task: PeerTask, data: str) -> dict[str, Any]:
    """What peer.json says, without the time."""
    peer = get_peer(tool)
    installed = provenance.installed(peer.packages)
    settings: dict[str, Any] = {"tool": tool}
    if peer.calibrated:
        settings |= {"data": data, "sequences": len(task.ids), "seq_len": task.ids.shape[1]}
    return {
        "label": f"{PEER_LABELS[tool]} ({installed.get(peer.packages[0], 'unknown version')})",
        "format": "nvfp4",
        "block_size": 16,
        "bits_per_weight": 4.5,
        "settings": settings,
        "versions": provenance.versions() | installed,
        "quantize_device": provenance.device_name(task.device),
    }


if __name__ == "__main__":
    sys.exit(main())
