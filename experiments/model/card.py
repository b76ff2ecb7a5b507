"""The model card, README.md of an exported folder. What it states comes from the manifest and from the self-check."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.evaluation_record import EvaluationRecord
from experiments.files import write_atomically
from experiments.provenance import versions
from experiments.sources.exported import CARD_NAME, EXPORT_NAME, read_export
from experiments.sources.quantized import MANIFEST_NAME, QuantizedCheckpoint
from quantkit.layouts import get_layout

SERVE = {
    "compressed_tensors": {
        "vLLM": "vllm serve FOLDER",
        "SGLang": "python -m sglang.launch_server --model-path FOLDER",
        "transformers": 'AutoModelForCausalLM.from_pretrained("FOLDER", dtype=torch.bfloat16)',
    },
    "modelopt": {
        "vLLM": "vllm serve FOLDER --quantization modelopt",
        "SGLang": "python -m sglang.launch_server --model-path FOLDER --quantization modelopt_fp4",
        "TensorRT-LLM": "trtllm-serve FOLDER",
    },
    "gpt_oss": {
        "vLLM": "vllm serve FOLDER",
        "SGLang": "python -m sglang.launch_server --model-path FOLDER",
        "TensorRT-LLM": "trtllm-serve FOLDER",
        "transformers": 'AutoModelForCausalLM.from_pretrained("FOLDER", dtype=torch.bfloat16)',
    },
    "gguf": {"llama.cpp": "llama-server -m FOLDER/model.gguf"},
}
NOT_EVALUATED = "Not evaluated yet"
TOLD = ("method", "calibrate", "data", "sequences", "seq_len", "tokens", "seed", "alpha", "residual_alpha")
WEIGHTING = ("hessian_weighting", "hessian_groups", "hessian_samples", "hessian_matmul")
OUTPUTS = ("hessian_outputs", "rows", "output_damping")
TWO_SIDED = (
    "The rows of a weight make up for each other's errors. The Gram matrix of the loss's gradients at the layer's "
    "outputs says how errors of rows add up: it is the other factor of Kronecker-factored curvature."
)


@dataclass(frozen=True)
class About:
    """What a card tells that the folder does not. command: that quantized the model. tables: Markdown of evaluations,
    such as of KL."""

    command: str = ""
    tables: Sequence[str] = field(default_factory=tuple)


def card(source: QuantizedCheckpoint, verdict: Mapping[str, Any], about: About) -> str:
    """Markdown. verdict: fields of selfcheck.Verdict."""
    layout, told = get_layout(verdict["layout"]), source.about
    model = str(told.get("model", "the model"))
    formats = _formats(source)
    parts = [
        _front(layout.name, model),
        f"# {model}, {formats}",
        f"{len(source.names)} weights of {model} in {formats}, in the layout `{layout.name}`. Made by quantkit.",
        "## Method",
        _method(told),
        "## Evaluation",
        "\n\n".join(about.tables) or f"{NOT_EVALUATED}: `python experiments/evaluate.py model.path=FOLDER`.",
        "## Serve",
        _serve(layout.name),
        "## Check",
        _check(verdict),
        "## Not quantized",
        _left_out(told),
        "## Reproduce",
        _reproduce(source, about),
    ]
    return "\n\n".join(parts) + "\n"


def _formats(source: QuantizedCheckpoint) -> str:
    kinds = {(q.format.name.upper(), q.block_size) for q in map(source.quantized, source.names[:1])}
    return " and ".join(f"{name} with block size {size}" for name, size in sorted(kinds))


def _front(layout: str, model: str) -> str:
    library = "gguf" if layout == "gguf" else "transformers"
    tags = "\n".join(f"- {tag}" for tag in ("quantkit", "fp4", layout))
    return f"---\nbase_model: {json.dumps(model)}\nlibrary_name: {library}\ntags:\n{tags}\n---"


def _method(told: Mapping[str, Any]) -> str:
    rows = [(name, told[name]) for name in (*TOLD, *WEIGHTING, *OUTPUTS) if told.get(name) is not None]
    rows += sorted((f"method.{name}", value) for name, value in dict(told.get("method_settings") or {}).items())
    table = _table(("setting", "value"), rows)
    return f"{table}\n\n{TWO_SIDED}" if told.get("hessian_outputs") else table


def _serve(layout: str) -> str:
    commands = "\n".join(f"- {engine}: `{command}`" for engine, command in SERVE[layout].items())
    return f"{commands}\n\nWhich of these were run, and known defects: `docs/serving.md` of quantkit."


def _check(verdict: Mapping[str, Any]) -> str:
    lines = [
        f"After the export {', '.join(verdict['routes'])} read the folder back: {verdict['equal']} of "
        f"{verdict['weights']} stored weights are bit for bit what was quantized.",
        *(f"- Wrong: {problem}" for problem in verdict["problems"]),
        *(f"- Note: {warning}" for warning in verdict["warnings"]),
    ]
    return "\n".join(lines)


def _left_out(told: Mapping[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for name, reason in dict(told.get("left_out") or {}).items():
        reasons.setdefault(str(reason), []).append(name)
    lines = [
        f"- {reason}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for reason, names in reasons.items()
    ]
    return "\n".join(lines) or "Everything but the quantized weights is stored as in the original checkpoint."


def _reproduce(source: QuantizedCheckpoint, about: About) -> str:
    rows = [("identity of the quantized model", source.identity)]
    rows += [(name, source.about[name]) for name in ("model_revision", "data_hash") if source.about.get(name)]
    rows += sorted(versions().items())
    command = f"```\n{about.command}\n```\n\n" if about.command else ""
    return command + _table(("what", "value"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([str(value) for value in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# --- the table of evaluations -----------------------------------------------------------------------------------------

EVALUATION = re.compile(r"(?<=^## Evaluation\n\n).*?(?=\n\n## Serve$)", re.MULTILINE | re.DOTALL)
COLUMNS = ("text", "tokens", "KL, nats a token", "median", "99 %", "same top token", "perplexity, ratio")


def with_evaluations(text: str, records: Sequence[EvaluationRecord]) -> str:
    """A card with the table of these evaluations in the place of what it told before. Raises ValueError for a text that
    is no card of quantkit."""
    if EVALUATION.search(text) is None:
        raise ValueError("it has no section Evaluation before its section Serve, so it is no model card of quantkit")
    table = evaluation_table(records)
    return EVALUATION.sub(lambda _: table, text)


def cards_of(folder: Path) -> list[Path]:
    """The cards that an evaluation of this folder belongs to: an export's own, or those of a quantized model's exports
    beside it."""
    if (folder / EXPORT_NAME).is_file():
        return [folder / CARD_NAME]
    try:
        identity = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    beside = sorted(path.parent for path in folder.resolve().parent.glob(f"*/{EXPORT_NAME}"))
    return [path / CARD_NAME for path in beside if (read_export(path) or {}).get("identity") == identity]


def put_into_cards(folder: Path, records: Sequence[EvaluationRecord]) -> list[Path]:
    """Write the table of these evaluations of `folder` into its cards. Returns those that were changed.

    A card that its owner has rewritten, without the sections of quantkit, is left alone.
    """
    changed = []
    for path in cards_of(folder):
        try:
            before = path.read_text(encoding="utf-8")
            after = with_evaluations(before, records)
        except (OSError, ValueError):
            continue
        if after != before:
            write_atomically(path, after)
            changed.append(path)
    return changed


def evaluations_of(path: Path) -> list[str]:
    """The tables of evaluations that a card has, for a new card of the same model; [] without any."""
    try:
        found = EVALUATION.search(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [] if found is None or found[0].startswith(NOT_EVALUATED) else [found[0]]


def evaluation_table(records: Sequence[EvaluationRecord]) -> str:
    """Markdown: a row for each evaluation, and what it was measured against."""
    rows = [
        (
            f"{record.data}, {record.data_split} ({record.protocol})",
            f"{record.tokens:,}" if record.tokens is not None else "–",
            _interval(record.kl_mean, record.kl_low, record.kl_high),
            _number(record.kl_median),
            _number(record.kl_p99),
            _interval(record.same_top, record.same_top_low, record.same_top_high),
            _interval(record.ppl_ratio, record.ppl_ratio_low, record.ppl_ratio_high),
        )
        for record in records
    ]
    notes = dict.fromkeys(
        f"Against {record.reference}, both in {record.dtype}; 95 % intervals over {record.sequences} sequences of "
        f"{record.seq_len} tokens."
        for record in records
    )
    origins = dict.fromkeys(record.reference_origin for record in records if record.reference_origin)
    return "\n\n".join([_table(COLUMNS, rows), *notes, *origins])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return f"{_number(value)} [{_number(low)}, {_number(high)}]"
