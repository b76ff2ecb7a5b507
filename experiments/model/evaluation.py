"""An evaluation of a whole model, from its resolved sources to the fields of its record.

The text is cut into sequences of data.seq_len tokens, without special tokens; a seeded shuffle chooses data.samples of
them, from its end, because calibration takes them from its beginning. Both models see each sequence alone. KL and
perplexities are over the scored tokens of all of them (divergence.py), intervals over sequences (intervals.py).
"""

from __future__ import annotations

import json
import logging
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import provenance
from experiments.config import DataConfig, DataSource, ModelConfig
from experiments.evaluation_record import TOKENS_NAME, EvaluationRecord
from experiments.files import SourceError, check_output, one_line, replacing, sha256_json, told_as
from experiments.model.evaluate_settings import (
    EvaluationConfig,
    as_run,
    evaluated_model,
    evaluation_id,
    manifest_about,
    peer_about,
    reference_model,
    result_settings,
)
from experiments.record import RECORD_NAME, read_record_of
from experiments.sources.models import ModelIdentity, gguf_path, model_identity
from experiments.sources.texts import Text, load_text
from experiments.sources.twins import choose_sources

if TYPE_CHECKING:
    from experiments.model.comparing import Comparer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedEvaluation:
    """config: with the text that is really used, and its device resolved. Made once and passed down."""

    config: EvaluationConfig
    device: str
    model: ModelConfig
    reference: ModelConfig
    model_identity: ModelIdentity
    reference_identity: ModelIdentity
    text: Text
    substituted: bool
    settings: dict[str, Any]
    run_id: str
    config_hash: str

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir) / self.run_id

    @property
    def label(self) -> str:
        return name_of(self.model)

    def check_unchanged(self) -> None:
        """Raises SourceError if a checkpoint has changed since it was hashed."""
        cache = self.config.cache.folder
        for model, identity in ((self.model, self.model_identity), (self.reference, self.reference_identity)):
            if model_identity(model, cache) != identity:
                raise SourceError(f"{model.label} changed while it was read. Run again.")


def resolve_evaluation(config: EvaluationConfig) -> ResolvedEvaluation:
    """Raises ValueError for sources that are not there, and for a device that does not exist. Reads no weights."""
    device = provenance.resolve_device(config.device)
    model = evaluated_model(config)
    reference = reference_model(config, model)
    choice = choose_sources(as_run(config, model))
    config = replace(config, data=_one_text(choice.config.data))
    cache = config.cache.folder
    with told_as("reference"):
        of_reference = model_identity(reference, cache)
    identities = model_identity(model, cache), of_reference
    text = load_text(config.data, cache)
    settings = result_settings(config, device)
    sources = [identity.key for identity in identities] + [text.sha256, config.paired]
    label = config.evaluate.label or name_of(model)
    return ResolvedEvaluation(
        config=config,
        device=device,
        model=model,
        reference=reference,
        model_identity=identities[0],
        reference_identity=identities[1],
        text=text,
        substituted=choice.substituted,
        settings=settings,
        run_id=evaluation_id(label, reference.label, config.data.name, [settings, sources]),
        config_hash=sha256_json([settings, sources])[:10],
    )


def name_of(model: ModelConfig) -> str:
    """The run that made quantkit's own folder, else the folder's name."""
    return str(about_of(model).get("run_id", model.label))


def about_of(model: ModelConfig) -> dict[str, Any]:
    return {} if model.path is None else manifest_about(Path(model.path).expanduser())


def peer_label(model: ModelConfig) -> str | None:
    """The name in tables of a folder by peers.py: the tool, its version and its method; None for another folder."""
    return None if model.path is None else peer_about(Path(model.path).expanduser()).get("label")


def _one_text(data: DataConfig) -> DataConfig:
    """Without a split where the source is one text."""
    return replace(data, split="train") if data.source == DataSource.python_docs else data


def base_fields(resolved: ResolvedEvaluation) -> dict[str, Any]:
    """The fields of a record that are known before the evaluation starts."""
    config, device = resolved.config, resolved.device
    return {
        "run_id": resolved.run_id,
        "sweep": config.sweep,
        "model": resolved.label,
        "label": config.evaluate.label or peer_label(resolved.model),
        "model_revision": resolved.model_identity.revision,
        "reference": resolved.reference_identity.name,
        "reference_revision": resolved.reference_identity.revision,
        "reference_origin": resolved.reference.origin,
        "data": resolved.text.name,
        "data_hash": resolved.text.sha256,
        "data_split": resolved.text.split + (", from its beginning" if config.evaluate.order == "first" else ""),
        "substituted": resolved.substituted,
        "seq_len": config.data.seq_len,
        "protocol": config.evaluate.protocol,
        "seed": config.seed,
        "resamples": config.evaluate.resamples,
        "dtype": config.evaluate.dtype,
        "tf32": False,
        "device": device,
        "device_name": provenance.device_name(device),
        "file_bytes": stored_bytes(resolved.model),
        **quantization_fields(resolved.model),
        "config_hash": resolved.config_hash,
        **provenance.record_fields(),
    }


PEER_FIELDS = ("format", "block_size", "settings", "bits_per_weight", "quantize_s", "quantize_device")
SETTINGS = (
    *("method_settings", "calibrate", "alpha", "residual_alpha", "calibrate_damping", "weight_exponent"),
    *("global_scale", "scale_rule", "init", "hessian_weighting", "hessian_groups", "hessian_samples", "hessian_matmul"),
    *("hessian_outputs", "rows", "output_damping"),
    *("data", "seq_len", "sequences", "seed"),
)


def quantization_fields(model: ModelConfig) -> dict[str, Any]:
    """What quantkit's own folder, and the record beside it, or the file of peers.py say of format, size and time."""
    about = about_of(model)
    if not about:
        told = {} if model.path is None else peer_about(Path(model.path).expanduser())
        return {name: told.get(name) for name in PEER_FIELDS} if told else {}
    fields: dict[str, Any] = {name: about.get(name) for name in ("format", "block_size", "method")}
    fields["settings"] = {name: about[name] for name in SETTINGS if name in about}
    try:
        record = json.loads((Path(str(model.path)).expanduser().parent / RECORD_NAME).read_text(encoding="utf-8"))
        if record["run_id"] == about.get("run_id"):
            fields["bits_per_weight"] = record["bits_per_weight"]
            fields["quantize_s"] = round(sum(record["seconds"].values()), 3)
            fields["quantize_device"] = record["device_name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # the folder was copied without its record
    return fields


def stored_bytes(model: ModelConfig) -> int | None:
    """The size of all weights as stored; None for a model of the hub."""
    if model.path is None:
        return None
    path = Path(model.path).expanduser()
    own = gguf_path(model)
    files = [own] if own is not None else [path] if path.suffix == ".gguf" else sorted(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def finished_evaluation(resolved: ResolvedEvaluation) -> EvaluationRecord | None:
    """The record of an earlier evaluation that ended well, from the same sources and settings."""
    try:
        record = read_record_of(EvaluationRecord, resolved.run_dir / RECORD_NAME)
    except (FileNotFoundError, ValueError):
        return None
    return record if record.status == "ok" and (resolved.run_dir / TOKENS_NAME).is_file() else None


def execute(resolved: ResolvedEvaluation) -> dict[str, Any]:
    """The fields of the result. Writes tokens.npz. Raises ValueError for whatever the user can mend."""
    from experiments.model.comparing import Comparer
    from experiments.model.divergence import scored
    from experiments.model.loading import load_network
    from experiments.model.predictions import Predictor, exact
    from experiments.model.reference import StatesCache

    config, cache = resolved.config, resolved.config.cache.folder
    scored(config.data.seq_len, config.evaluate.protocol)
    partner = None if config.paired is None else read_partner(Path(config.paired))
    if config.cache.activations:
        check_output(cache, "cache.dir")
    ids, calibrated_on = token_ids(resolved)
    same = sequences_hash(resolved, ids)
    if partner is not None:
        _check_paired(partner.record, resolved, same, len(ids))
    dtype = config.evaluate.dtype
    identity = {"model": resolved.reference_identity.key, "ids": same, "dtype": dtype}
    identity |= {"device": resolved.device.partition(":")[0]}
    states = StatesCache.of(cache, resolved.reference.label, identity) if config.cache.activations else None
    with exact(resolved.device):
        reference, model = (
            Predictor(load_network(each, cache, dtype, resolved.device, config.evaluate.reader), resolved.device)
            for each in (resolved.reference, resolved.model)
        )
        batch_tokens = config.evaluate.batch_tokens
        comparer = Comparer(reference, model, ids, config.evaluate.protocol, batch_tokens, states)
        values = comparer.run(f"evaluating {resolved.label}")
        layers = _kl_by_layer(comparer, config)
    resolved.check_unchanged()
    fields = summary(values, ids.shape[1], config)
    if partner is not None:
        fields |= {"paired_with": partner.record.run_id} | paired_fields(values.kl, partner.kl, config)
    write_tokens(resolved.run_dir, values)
    return fields | {
        "sequences": len(ids),
        "sequences_hash": same,
        "calibrated_on": calibrated_on,
        "parameters": sum(parameter.numel() for parameter in reference.network.parameters()),
        "kl_by_layer": layers,
    }


def _kl_by_layer(comparer: Comparer, config: EvaluationConfig) -> list[dict[str, Any]] | None:
    """For `evaluate.layers`, on its first sequences; else None."""
    from experiments.model.by_layer import kl_by_layer

    if not config.evaluate.layers:
        return None
    few = replace(comparer, ids=comparer.ids[: config.evaluate.layers_samples], states=None)
    return kl_by_layer(few, config.evaluate.layers_by)


def token_ids(resolved: ResolvedEvaluation) -> tuple[Any, int | None]:
    """([sequences, seq_len], how many of them the model was calibrated on). Raises SourceError for two tokenizers."""
    from experiments.capture.tokens import evaluated_sequences
    from experiments.model.loading import tokenizer_of

    config, cache = resolved.config, resolved.config.cache.folder
    tokenize, own = (tokenizer_of(each, cache) for each in (resolved.reference, resolved.model))
    used = tokenize or own
    if used is None:
        raise SourceError(f"neither {resolved.reference.label} nor {resolved.label} has a tokenizer. Copy it there.")
    ids, chosen, count = evaluated_sequences(
        as_run(config, resolved.reference), resolved.text, used, config.evaluate.order
    )
    if tokenize is not None and own is not None:
        sample = resolved.text.read()[:20000]
        if tokenize(sample) != own(sample):
            raise SourceError(
                f"{resolved.reference.label} and {resolved.label} have different vocabularies: their tokenizers make "
                "other tokens of the text. Compare a model with the one that it was made from: reference=FOLDER."
            )
    return ids, calibrated_among(resolved, chosen, count)


def calibrated_among(resolved: ResolvedEvaluation, chosen: list[int], count: int) -> int | None:
    """How many of the chosen sequences, of `count`, the model was calibrated on; None if its folder does not say.

    Warns of them, since KL on them is too low.
    """
    from experiments.capture.tokens import shuffled

    about = about_of(resolved.model)
    if "data_hash" not in about:
        return None
    if about["data_hash"] != resolved.text.sha256:
        return 0
    if about["seq_len"] != resolved.config.data.seq_len:
        log.warning("%s was calibrated on this text, in sequences of another length", resolved.label)
        return None
    shared = len(set(chosen) & set(shuffled(count, about["seed"])[: about["sequences"]]))
    if shared:
        log.warning(
            "%s was calibrated on %d of these %d sequences, so its KL is too low: use another text, split or a smaller "
            "data.samples",
            *(resolved.label, shared, len(chosen)),
        )
    return shared


def _check_paired(record: EvaluationRecord, resolved: ResolvedEvaluation, same: str, sequences: int) -> None:
    """Raises SourceError where the other evaluation has not the hash `same` of this one's sequences."""
    if record.sequences_hash != same:
        raise SourceError(
            f"paired={resolved.config.paired}: it was evaluated on other sequences, another reference or another "
            f"protocol{_differences(record, resolved, sequences)}. Evaluate it with the same text and settings."
        )


def _differences(record: EvaluationRecord, resolved: ResolvedEvaluation, sequences: int) -> str:
    """What the other evaluation has, and this one has not, in brackets; "" where the records do not tell."""
    own = base_fields(resolved) | {"sequences": sequences}
    names = ("reference", "data", "data_split", "seq_len", "sequences", "seed", "protocol")
    found = {name: (getattr(record, name), own[name]) for name in names}
    told = [f"{name} {other}, here {here}" for name, (other, here) in found.items() if other != here]
    if not told and record.data_hash != own["data_hash"]:
        told = ["another text of the same name"]
    return f" ({'; '.join(told)})" if told else ""


def sequences_hash(resolved: ResolvedEvaluation, ids: Any) -> str:
    """Of all that two evaluations must share to be paired."""
    return sha256_json([resolved.reference_identity.key, resolved.config.evaluate.protocol, ids.tolist()])[:16]


def summary(values: Any, seq_len: int, config: EvaluationConfig) -> dict[str, Any]:
    """The statistics of a record. values: a TokenValues."""
    from experiments.model.divergence import scored
    from experiments.model.intervals import by_position, estimate, exponential, quantiles

    resamples, seed = config.evaluate.resamples, config.seed
    kl, agree = (estimate(array.mean(1), resamples, seed) for array in (values.kl, values.same_top))
    logs = {
        "reference_ppl": -values.reference_logprob.mean(1),
        "ppl": -values.logprob.mean(1),
        "ppl_ratio": (values.reference_logprob - values.logprob).mean(1),
    }
    fields: dict[str, Any] = {"tokens": int(values.kl.size)}
    fields |= {"kl_mean": kl.mean, "kl_error": kl.error, "kl_low": kl.low, "kl_high": kl.high}
    fields |= {f"kl_{name}": value for name, value in quantiles(values.kl).items()}
    fields |= {"same_top": agree.mean, "same_top_low": agree.low, "same_top_high": agree.high}
    for name, per_sequence in logs.items():
        found = exponential(estimate(per_sequence, resamples, seed))
        fields |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    first = scored(seq_len, config.evaluate.protocol).start
    return fields | {"kl_by_position": by_position(values.kl, first)}


def paired_fields(kl: Any, other: Any, config: EvaluationConfig) -> dict[str, Any]:
    from experiments.model.intervals import paired

    found = paired(kl.mean(1), other.mean(1), config.evaluate.resamples, config.seed)
    return {
        "paired_mean": found.mean,
        "paired_error": found.error,
        "paired_low": found.low,
        "paired_high": found.high,
    }


@dataclass(frozen=True)
class Partner:
    """Another evaluation: its record, and kl [sequences, scored tokens]."""

    record: EvaluationRecord
    kl: Any


def read_partner(folder: Path) -> Partner:
    """Raises SourceError for a folder that is no finished evaluation."""
    import numpy as np

    try:
        record = read_record_of(EvaluationRecord, folder / RECORD_NAME)
        with np.load(folder / TOKENS_NAME) as file:
            kl = file["kl"].astype(np.float64)
    except (OSError, ValueError, KeyError) as error:
        why = f"no {Path(error.filename).name}" if isinstance(error, FileNotFoundError) else one_line(error)
        raise SourceError(
            f"paired={folder}: no finished evaluation there ({textwrap.shorten(why, 200)}). Name a folder with "
            f"{RECORD_NAME} and {TOKENS_NAME}, such as one of results/runs/model."
        ) from None
    return Partner(record, kl)


def write_tokens(folder: Path, values: Any) -> None:
    """Every token's values as float32, before the record."""
    import numpy as np

    arrays = {name: getattr(values, name) for name in ("kl", "reference_logprob", "logprob")}
    with replacing(folder / TOKENS_NAME) as temporary, temporary.open("xb") as file:
        np.savez_compressed(
            file, same_top=values.same_top, **{name: array.astype(np.float32) for name, array in arrays.items()}
        )
