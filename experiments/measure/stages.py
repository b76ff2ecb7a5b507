"""The stages of a run: load → quantize → describe → measure errors → verify → measure time.

`execute` runs them in order. Each stage returns the record fields that it determines. This module needs torch, so it is
imported only when there is something to run.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import provenance
from experiments.capture.inputs import LayerInputs
from experiments.capture.limit import limit_calibration
from experiments.capture.load import load_layer_inputs
from experiments.capture.weighted import weigh_by_loss
from experiments.config import Config, LayerConfig, Matmul, Weighting
from experiments.files import replacing
from experiments.measure import timing
from experiments.measure.blocks import block_columns, counts, histograms, write_blocks
from experiments.measure.groups import Statistics, quantize_groups, statistics_of, verify_groups
from experiments.record import BLOCKS_NAME, WEIGHTS_NAME, Histograms
from experiments.sources.resolved import Resolved
from quantkit import BACKENDS, QuantizedTensor, get_method, quantize, resolve_backend
from quantkit.calibration import block_hessians
from quantkit.metrics import output_error_from_gram, weight_error

log = logging.getLogger(__name__)

GAP_BLOCKS = 32  # of moved codes: blocks that verify=true compares with the exact optimum

Fields = dict[str, Any]  # field of RunRecord → value


@dataclass(frozen=True)
class Quantized:
    """A quantized layer on the run's device.

    weight: [out_features, in_features]. given: the statistics that the method needs, for each group of rows.
    result: by the run's method. naive: by the naive method, for comparison.
    quantize: quantkit's quantize() with the run's options filled in.
    """

    weight: Tensor
    given: Sequence[Statistics]
    result: QuantizedTensor
    seconds: float  # duration of the call that made `result`
    quantize: Callable[..., QuantizedTensor]
    naive: QuantizedTensor


@dataclass(frozen=True)
class Outcome:
    """fields: record fields. histograms: a function that computes the distributions over the blocks."""

    fields: Fields
    histograms: Callable[[], Histograms]


def execute(resolved: Resolved, ahead: Sequence[LayerConfig] = (), shared: bool = False) -> Outcome:
    """Run all stages. A backend that cannot run on the device raises ValueError before anything is loaded.

    ahead: layers of the same model and text that later runs of the sweep need. shared: other runs may use the device at
    the same time, so no time is measured.
    """
    config = resolved.config
    resolve_backend(resolved.backend, resolved.device, config.method.name, config.block_size, config.format.name)
    inputs = load_layer_inputs(resolved, ahead)
    if weighs_by_loss(config):
        inputs = weigh_by_loss(resolved, inputs)
    if config.data.calibration_tokens is not None:
        inputs = limit_calibration(inputs, config.data.calibration_tokens, config.data.seq_len, config.seed)
    work = quantize_layer(resolved, inputs)
    log.info("quantized")
    fields = describe(config, inputs, work) | measure_errors(inputs, work)
    log.info("errors: %s", {name: value for name, value in fields.items() if "error" in name})
    blocks = cache(partial(block_columns, work.weight, work.result, work.naive, inputs.gram_calibration))
    if config.verify:
        fields |= verify_scales(config, work)
    fields |= measure_time(resolved, work, shared)
    if config.record.blocks:  # written last, like the record
        fields |= keep_blocks(blocks(), resolved.run_dir)
    if config.record.weights:
        keep_weights(work.result, resolved.run_dir)
    return Outcome(fields, lambda: histograms(blocks()))


def check_options(config: Config) -> None:
    """Raise the library's ValueError for options that it refuses, before a capture that may take minutes.

    The library checks format, block size, method, scale and the backend's name on a weight without rows.
    """
    if config.backend.name not in BACKENDS:
        resolve_backend(config.backend.name, "cpu")
    size = config.block_size
    gram = torch.eye(size, dtype=torch.float32, device="cpu").unsqueeze(0)
    given = statistics_of(get_method(config.method.name).needs, gram, size, "cpu")
    weight = torch.empty(0, size, dtype=torch.float32, device="cpu")
    call = partial(quantize, backend="reference", **options(config))
    quantize_groups(call, weight, given, method=config.method.name, **config.method.settings)


def weighs_by_loss(config: Config) -> bool:
    """Whether the run uses loss weights: a method that takes no Hessian has no use for them."""
    return config.hessian.weighting == Weighting.loss and get_method(config.method.name).needs is not None


def options(config: Config) -> dict[str, Any]:
    """quantize()'s arguments from the configuration, without method and backend."""
    return {
        "format": config.format.name,
        "block_size": config.block_size,
        "global_scale": config.format.global_scale,
        "scale_rule": config.format.rule,
    }


def quantize_layer(resolved: Resolved, inputs: LayerInputs) -> Quantized:
    config, device = resolved.config, resolved.device
    weight = inputs.weight.to(device)
    given = statistics_of(get_method(config.method.name).needs, inputs.method_grams, config.block_size, device)
    of_rows: Callable[..., QuantizedTensor] = partial(quantize, backend=resolved.backend, **options(config))
    start = time.perf_counter()
    method, settings = config.method.name, config.method.settings
    result = quantize_groups(of_rows, weight, given, method=method, count_candidates=True, **settings)
    seconds = time.perf_counter() - start
    # Scales are compared at one global scale, which naive would search for itself.
    shared = {"global_scale": result.global_scale} if config.format.global_scale == "search" else {}
    naive = result if method == "naive" else of_rows(weight, method="naive", **shared)
    return Quantized(weight, given, result, seconds, of_rows, naive)


def describe(config: Config, inputs: LayerInputs, work: Quantized) -> Fields:
    """The sources that were really used, and the format's defaults where the configuration is null."""
    used, layout = inputs.provenance, work.result.format
    scale = config.format.global_scale
    by_loss = weighs_by_loss(config)
    return {
        "model": used.model,
        "model_revision": used.model_revision,
        "model_origin": used.model_origin,
        "tokenizer": used.tokenizer,
        "data": used.data,
        "data_hash": used.data_hash,
        "data_split": used.data_split,
        "substituted": used.substituted,
        "sequences": used.sequences,
        "out_features": work.weight.shape[0],
        "in_features": work.weight.shape[1],
        "weight_dtype": str(work.weight.dtype).removeprefix("torch."),
        "weight_std": work.weight.double().std(correction=0).item(),
        "tokens_calibration": inputs.tokens_calibration,
        "tokens_heldout": inputs.tokens_heldout,
        "global_scale": layout.default_global_scale if scale is None else scale,
        "scale_rule": config.format.rule or layout.scale_rules[0],
        "method_settings": config.method.settings or None,
        "hessian_weighting": str(config.hessian.weighting) if by_loss else None,
        "hessian_groups": config.hessian.groups if by_loss else None,
        "hessian_samples": config.hessian.samples if by_loss else None,
        "hessian_matmul": None if config.hessian.matmul == Matmul.float32 else str(config.hessian.matmul),
    }


def measure_errors(inputs: LayerInputs, work: Quantized) -> Fields:
    """Weight error, output errors on calibration and held-out tokens, and statistics of the search."""
    result = work.result
    quantized = result.dequantize()

    def on_tokens(gram: Tensor | None) -> float | None:
        return None if gram is None else output_error_from_gram(work.weight, quantized, gram.to(quantized.device))

    naive = work.naive
    fields: Fields = {
        "weight_error": weight_error(work.weight, quantized),
        "output_error": on_tokens(inputs.gram_calibration),
        "output_error_heldout": on_tokens(inputs.gram_heldout),
        "bits_per_weight": result.bits_per_weight,
        "scales_moved": (result.scales != naive.scales).double().mean().item(),
    }
    if result.objective is not None:
        fields["objective"] = list(result.objective)
    if result.candidates is not None:
        fields["candidates_mean"] = result.candidates.double().mean().item()
        fields["candidates_max"] = int(result.candidates.max())
    return fields


def keep_blocks(blocks: dict[str, Tensor], run_dir: Path) -> Fields:
    write_blocks(blocks, run_dir / BLOCKS_NAME)
    return {"scale_shifts": counts(blocks["shift"]), "candidate_counts": counts(blocks.get("candidates"))}


def keep_weights(result: QuantizedTensor, run_dir: Path) -> None:
    """Write the quantized weight beside the record; `QuantizedTensor.load` reads it back, bit for bit."""
    with replacing(run_dir / WEIGHTS_NAME) as temporary:
        result.save(temporary)


def verify_scales(config: Config, work: Quantized) -> Fields:
    """Compare every scale with all representable ones. For a method without a promised optimum, violations are the
    blocks that have a better scale. A method of the whole layer is compared with method hessian instead."""
    if get_method(config.method.name).needs == "gram":
        return {"verified_to_hessian": error_to_hessian(config, work)}
    found = verify_groups(work.result, work.weight, work.given, gap=0 if work.result.nearest_codes else GAP_BLOCKS)
    log.info("verified: %s", found)
    if not found.ok and get_method(config.method.name).is_optimal:
        log.warning(
            "%d of %d blocks break the optimality contract, worst excess %g; %d codes are not the nearest.",
            found.violations, found.blocks, found.worst_excess, found.wrong_codes,
        )  # fmt: skip
    return {
        "verified_blocks": found.blocks,
        "verified_violations": found.violations,
        "verified_worst_excess": found.worst_excess,
        "verified_wrong_codes": found.wrong_codes,
    }


def error_to_hessian(config: Config, work: Quantized) -> float:
    """Squared output error on the calibration tokens over that of method hessian. More than 1 is a defect."""
    grams = [one["gram"] for one in work.given]
    blocks = [{"hessian": block_hessians(gram, config.block_size)} for gram in grams]
    shared = {"global_scale": work.result.global_scale} if work.result.format.two_level else {}
    other = quantize_groups(work.quantize, work.weight, blocks, method="hessian", **shared)

    def energy(result: QuantizedTensor) -> float:
        error = work.weight.double() - result.dequantize().double()
        parts = zip(error.tensor_split(len(grams)), grams, strict=True)
        return float(sum(((rows @ gram.double()) * rows).sum() for rows, gram in parts))

    own, least = energy(work.result), energy(other)
    if own > least:
        log.warning("%s: error %g on the calibration tokens, above hessian's %g", config.method.name, own, least)
    return own / least if least else 1.0


def measure_time(resolved: Resolved, work: Quantized, shared: bool = False) -> Fields:
    config, device = resolved.config, resolved.device
    call = partial(
        quantize_groups,
        work.quantize,
        work.weight,
        work.given,
        method=config.method.name,
        check_finite=False,
        **config.method.settings,
    )
    interpreted = resolved.backend == "triton" and device == "cpu"
    name = provenance.device_name(device)
    measured = timing.measure(
        call, device, name, config.timing, interpreted=interpreted, shared=shared, expected_s=work.seconds
    )
    log.info("time: %s", measured)
    return {
        "time_ms_median": measured.ms_median,
        "time_ms_p20": measured.ms_p20,
        "time_ms_p80": measured.ms_p80,
        "time_iterations": measured.iterations,
        "time_timer": measured.timer,
        "time_device": measured.device,
    }
