"""A whole model from its configuration to its folder: sources, loss weights, walk, checkpoint."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from experiments.capture import output_grams
from experiments.capture.losses import LossPieces, compute_share, loss_bytes, open_loss_weights
from experiments.capture.progress import waiting
from experiments.capture.tokens import Sequences, token_sequences
from experiments.config import HessianConfig, Weighting, config_hash
from experiments.files import SourceError, check_output, told_as
from experiments.model import exportable
from experiments.model.card import About
from experiments.model.checkpoint import CheckpointWriter, kept_tensors, open_quantized
from experiments.model.export import export
from experiments.model.given import GivenCodes, given_model
from experiments.model.layer import LayerRunner
from experiments.model.ranks import Ranks
from experiments.model.select import Selection, check_fused, select
from experiments.model.settings import (
    Calibration,
    QuantizeConfig,
    as_run,
    method_fields,
    model_run_id,
    result_settings,
    with_sources,
)
from experiments.model.shared_writer import SharedWriter
from experiments.model.solve import mean_error
from experiments.model.steps import check_fused_steps, find_steps
from experiments.model.walk import Clock, Job, Walk
from experiments.model_record import ModelRecord
from experiments.sources.bundles import MANIFEST_NAME
from experiments.sources.checkpoints import Checkpoint, open_checkpoint
from experiments.sources.decoder import Decoder, build_front
from experiments.sources.identity import losses_folder
from experiments.sources.models import model_identity
from experiments.sources.resolved import Resolved, resolve
from quantkit import get_method, quantize, resolve_backend
from quantkit.formats import get_format
from quantkit.layer.common import LayerOptions

log = logging.getLogger(__name__)

MODEL_FOLDER = "model"
Fields = dict[str, Any]


@dataclass(frozen=True)
class ModelRun:
    """config: with the sources that are really used. resolved: of a run on the same model and text. settings: the
    values that determine the result, as plain JSON values. identity: hash of all that determines the bytes of the
    quantized model."""

    config: QuantizeConfig
    resolved: Resolved
    settings: Fields
    run_id: str
    identity: str

    @property
    def run_dir(self) -> Path:
        return Path(self.config.output_dir) / self.run_id

    @property
    def folder(self) -> Path:
        """Of the quantized model."""
        return self.run_dir / MODEL_FOLDER


def resolve_model(config: QuantizeConfig) -> ModelRun:
    """Raises ValueError for what `resolve` and the library refuse. Missing sources are in resolved.error."""
    _check_options(config)
    resolved = resolve(as_run(config))
    if resolved.error is None and not _loss_fits(config, resolved):
        method = replace(config.method, rows=None, output_damping=None)  # of hessian.outputs
        calibrate = replace(config.calibrate, weight_exponent=1.0)  # of the loss weights
        config = replace(config, hessian=HessianConfig(), method=method, calibrate=calibrate)
        resolved = resolve(as_run(config))
    config = with_sources(config, resolved.config)
    settings = result_settings(config, resolved.device, resolved.backend)
    if config.init is not None:
        with told_as("init"):  # its bytes, not its place
            settings["init"] = model_identity(given_model(config.init), config.cache.folder).key
    sources = None if resolved.identity is None else {k: v for k, v in resolved.identity.items() if k != "layer"}
    return ModelRun(config, resolved, settings, model_run_id(config, settings), config_hash([settings, sources]))


def _loss_fits(config: QuantizeConfig, resolved: Resolved) -> bool:
    """Whether the loss weights, if they are needed, fit into the device's memory. Warns if not.

    Raises SourceError if only the Gram matrices of hessian.outputs do not.
    """
    if config.hessian.weighting != Weighting.loss or get_method(config.method.name).needs is None:
        return True
    folder = losses_folder(resolved.config, resolved.sources)
    if (folder / MANIFEST_NAME).is_file():
        return True
    checkpoint = open_checkpoint(resolved.config.model, config.cache.folder)
    decoder = Decoder(checkpoint, [], torch.float32)
    parameters = sum(p.numel() for p in decoder.model.parameters())
    need, have = loss_bytes(checkpoint.config, parameters, resolved.config.data.seq_len), memory_of(resolved.device)
    if need > have:
        log.warning(
            "hessian=loss: the backward pass of %s would take about %.0f GiB, and %s has %.0f GiB. This runs on "
            "hessian=output instead.",
            *(checkpoint.name, need / 2**30, resolved.device, have / 2**30),
        )
    elif config.hessian.outputs and need + (outputs := output_grams.bytes_of(decoder)) > have:
        raise SourceError(
            f"hessian.outputs=true: the backward pass of {checkpoint.name} would take about {need / 2**30:.0f} GiB and "
            f"the Gram matrices of its outputs {outputs / 2**30:.0f} GiB ({outputs} bytes), and {resolved.device} has "
            f"{have / 2**30:.0f} GiB. Use hessian=loss."
        )
    return need <= have


def memory_of(device: str) -> int:
    """Bytes of the device's memory, whether in use or not."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_options(config: QuantizeConfig) -> None:
    """Raises the library's error for options that it refuses, before anything is loaded."""
    exportable.check_options(config)
    method, size = get_method(config.method.name), config.block_size
    gram = torch.eye(size, dtype=torch.float32, device="cpu")
    given: dict[str, Any] = {"gram": {"gram": gram}, "hessian": {"hessian": gram[None]}}.get(method.needs or "", {})
    if config.hessian.outputs:
        given["output_gram"] = gram[:0, :0]
    quantize(
        torch.empty(0, size, dtype=torch.float32, device="cpu"),
        config.format.name,
        size,
        method.name,
        global_scale=config.format.global_scale,
        scale_rule=config.format.rule,
        **given,
        **config.method.settings,
    )


@dataclass(frozen=True)
class Listener:
    """What a run tells while it runs. began: the number of layers, those finished before, what is left out. layer: the
    record of a finished layer. tick: something happened."""

    began: Callable[[int, int, Selection], None] = lambda total, done, selection: None
    layer: Callable[[Fields], None] = lambda record: None
    tick: Callable[[float], None] = lambda share: None


def quantize_model(run: ModelRun, listener: Listener, ranks: Ranks | None = None) -> Fields:
    """Quantize the model of a run and write its folder. Returns the fields of ModelRecord that this determines.

    ranks: the processes that do it together. Only the first one writes and returns fields. Raises SourceError for every
    problem that the user can fix.
    """
    config, resolved = run.config, run.resolved
    checkpoint, given = _checked(run)
    clock = Clock(torch.device(resolved.device))
    ranks = ranks or Ranks()
    with clock.of("loss"):
        loss = _loss(run, ranks)
    with clock.of("read"), waiting(f"reading {checkpoint.name}"):
        decoder = build_front(checkpoint, config.model.dtype, resolved.device)
    selection = select(decoder, config.model, config.block_size)
    sequences = token_sequences(resolved.config, checkpoint.tokenizer())
    make = partial(CheckpointWriter, run.folder, run.identity, len(decoder.stack), force=config.force)
    with SharedWriter(ranks, make) as shared:
        listener.began(len(decoder.stack), len(shared.finished), selection)
        job = replace(_job(run, decoder, selection, sequences, loss, given), ranks=ranks)
        if not shared.is_complete:
            Walk(job, shared, listener.layer, listener.tick, clock).run()
        if shared.writer is None:
            return {}
        writer = shared.writer
        if not writer.is_complete:
            resolved.check_unchanged()
            with clock.of("write"):
                finish(run, writer, checkpoint, decoder, selection, sequences)
        records = [writer.finished[index] for index in sorted(writer.finished)]
    with clock.of("export"):
        exports = export_model(run)
    return describe(run, sequences, selection, records) | {
        "exports": exports,
        "seconds": _seconds(clock, records),
        "processes": ranks.size,
        "resumed_layers": len(shared.finished),
        "peak_device_bytes": _peak(resolved.device),
    }


def _checked(run: ModelRun) -> tuple[Checkpoint, GivenCodes | None]:
    """The model, and the codes of `init`. Raises ValueError for what can be known to be wrong before any long work."""
    config, resolved = run.config, run.resolved
    if resolved.error is not None:
        raise resolved.error
    resolve_backend(resolved.backend, resolved.device, config.method.name, config.block_size, config.format.name)
    checkpoint = open_checkpoint(config.model, config.cache.folder)
    exportable.check_checkpoint(config, checkpoint)
    given = None
    if config.init is not None:
        given = GivenCodes(config.init, config.cache.folder, get_format(config.format.name), config.block_size)
    _check_shapes(config, checkpoint, given)
    return checkpoint, given


def _check_shapes(config: QuantizeConfig, checkpoint: Checkpoint, given: GivenCodes | None) -> None:
    """Raises ValueError for what the model's names and shapes rule out, before loss weights and before most weights."""
    decoder = Decoder(checkpoint, [], torch.float32)
    selection = select(decoder, config.model, config.block_size)
    check_fused(config.fused, selection)
    exportable.check_model(config, decoder, selection)
    if given is not None:
        given.check(decoder.model, selection)
    if config.fused and config.calibrate.mode == Calibration.sequential and get_method(config.method.name).needs:
        _check_steps(config, checkpoint)


def _check_steps(config: QuantizeConfig, checkpoint: Checkpoint) -> None:
    """Raises SourceError where layers of `fused` have different inputs in the first decoder layer, which is read."""
    decoder = build_front(checkpoint, config.model.dtype, "cpu")
    decoder.load_layer(0)
    matrices = select(decoder, config.model, config.block_size).layers[0]
    with torch.no_grad():
        check_fused_steps(config.fused, find_steps(LayerRunner(decoder), 0, matrices))


def export_model(run: ModelRun) -> dict[str, Fields]:
    """Write the finished model in the layout of `export`, if there is one. Returns the record's `exports`."""
    config = run.config
    if config.export is None:
        return {}
    name = str(config.export)
    source = open_quantized(run.folder, config.cache.folder)
    verdict = export(source, run.run_dir / name, name, About(command=exportable.command_of(config)), config.force)
    return {name: {"folder": name} | verdict.to_dict()}


def _job(
    run: ModelRun,
    decoder: Decoder,
    selection: Selection,
    sequences: Sequences,
    loss: LossPieces | None,
    given: GivenCodes | None,
) -> Job:
    start = None if given is None else partial(given.matrix, decoder.model)
    return Job(run.config, run.resolved.backend, decoder, selection, sequences.ids["calibration"], loss, start)


def _loss(run: ModelRun, ranks: Ranks) -> LossPieces | None:
    """The loss weights, if the method needs Hessians and hessian=loss. All processes compute them together."""
    config = run.config
    if config.hessian.weighting != Weighting.loss or get_method(config.method.name).needs is None:
        return None
    check_output(config.cache.folder, "cache.dir")
    if ranks.size > 1:
        compute_share(run.resolved, ranks.rank, ranks.size)
        ranks.wait()
    if not ranks.is_first:
        ranks.wait()  # until the first one has listed the pieces
    loss = open_loss_weights(run.resolved)
    if ranks.is_first:
        ranks.wait()
    gc.collect()  # the whole model, which the backward pass needed
    if run.resolved.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return loss


def finish(
    run: ModelRun,
    writer: CheckpointWriter,
    checkpoint: Checkpoint,
    decoder: Decoder,
    selection: Selection,
    sequences: Sequences,
) -> None:
    rest = kept_tensors(decoder, None, selection.names)
    writer.finish(rest, checkpoint, about(run, sequences, selection))


def about(run: ModelRun, sequences: Sequences, selection: Selection) -> Fields:
    """What the folder's manifest says about the model; without times."""
    config = run.config
    model = run.resolved.model
    assert model is not None
    return {
        "run_id": run.run_id,
        **method_fields(config),
        **_output_settings(config),
        "model": model.name,
        "model_revision": model.revision,
        "model_origin": config.model.origin,
        "model_dtype": config.model.dtype,
        "tokenizer": model.tokenizer,
        "data": sequences.data,
        "data_hash": sequences.data_hash,
        "data_split": sequences.data_split,
        "seq_len": config.data.seq_len,
        "sequences": len(sequences.ids["calibration"]),
        "tokens": sequences.ids["calibration"].numel(),
        "seed": config.seed,
        "left_out": selection.left_out,
    }


def _output_settings(config: QuantizeConfig) -> Fields:
    """Those of hessian.outputs, with the library's defaults where the configuration has none."""
    if not config.hessian.outputs:
        return {}
    options = LayerOptions(**config.method.settings)
    return {"rows": options.rows, "output_damping": options.output_damping}


def describe(run: ModelRun, sequences: Sequences, selection: Selection, records: list[Fields]) -> Fields:
    """Fields of ModelRecord from the layers' records."""
    matrices = [matrix for record in records for matrix in record["matrices"]]
    names = ("naive_weight_error", "weight_error", "naive_output_error", "output_error")
    few = {name: tokens for record in records for name, tokens in record.get("few_tokens", {}).items()}
    size = quantized_bits(run.config)
    return ModelRecord.known(about(run, sequences, selection)) | {
        "substituted": run.resolved.substituted,
        "folder": MODEL_FOLDER,
        "layers": len(records),
        "matrices": len(matrices),
        "weights": sum(torch.Size(matrix["shape"]).numel() for matrix in matrices),
        "bits_per_weight": size,
        "few_tokens": few,
        "warned": sum("warnings" in matrix for matrix in matrices),
        "without_outputs": sum(not m["outputs"] for m in matrices) if run.config.hessian.outputs else None,
        "hidden_error": records[-1].get("hidden_error") if records else None,
        **{name: mean_error(matrices, name) for name in names},
    }


def quantized_bits(config: QuantizeConfig) -> float:
    from quantkit.formats import get_format

    return get_format(config.format.name).bits_per_weight(config.block_size)


def _seconds(clock: Clock, records: list[Fields]) -> dict[str, float]:
    """Phase → seconds, of this process's own phases and of all layers."""
    total = {phase: round(value, 3) for phase, value in clock.seconds.items()}
    for record in records:
        for phase, value in record["seconds"].items():
            total[phase] = round(total.get(phase, 0.0) + value, 3)
    return total


def _peak(device: str) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else None


def refuse_layer_bundle(config: QuantizeConfig) -> None:
    """Raises SourceError for a model that is no language model."""
    if config.model.source in ("synthetic", "bundle"):
        raise SourceError(
            f"model={config.model.name}: it is a single layer. Name a language model, or run experiments/run.py."
        )
