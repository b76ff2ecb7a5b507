"""Quantizes a model layer by layer, with two streams of hidden states: the original model's and the quantized one's.

calibrate=sequential. In each decoder layer, first the original layer runs once: it keeps the inputs of its matrices and
advances the original stream. Then each step (steps.py) runs the layer on the quantized stream, with the matrices of the
steps before it quantized, sums over the inputs, and quantizes its own matrices. At last the quantized layer advances
the quantized stream. calibrate=parallel has the original stream alone, and one pass for all steps. A method without
Hessians needs no stream. In a step, parts of the layer whose output is final are not computed again: self_attn, say, is
the product of o_proj with its kept input. Several processes share the batches and the matrices (ranks.py).

A layer that was finished before is read back, and advances both streams. So a continued walk gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.capture.losses import LossPieces
from experiments.config import LayerConfig
from experiments.files import SourceError
from experiments.model.checkpoint import kept_tensors
from experiments.model.experts import ExpertSums, check_rows, expert_rows, routed_weights
from experiments.model.layer import LayerRunner, Taps, replaced, swapped
from experiments.model.ranks import Ranks, segment_of
from experiments.model.select import Matrix, Selection
from experiments.model.settings import Calibration, QuantizeConfig
from experiments.model.shared_writer import SharedWriter
from experiments.model.solve import Solved, Solver, Start, Work, mean_error
from experiments.model.steps import Step, check_fused_steps, find_steps
from experiments.model.sums import Inputs, Sums
from experiments.sources.decoder import Decoder
from quantkit import QuantizedTensor

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}  # of a forward pass
STORE_SHARE = 0.5  # of a GPU's free memory that stored hidden states may take; else they are on the CPU

Stream = dict[int, Tensor]  # batch → hidden states, of the batches of this process
Changed = dict[tuple[nn.Module, str], Tensor]
Stored = dict[str, Tensor]  # module → its input in a batch
AllSums = dict[str, Sums | ExpertSums]  # matrix → its sums


@dataclass
class Clock:
    """Seconds of each phase. A GPU's work is waited for at the end of a phase."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Job:
    """All that a walk needs. ids: calibration token ids [sequences, seq_len]; loss: weights of the tokens, or None for
    1; start: the codes of a matrix of that shape to begin with, or None."""

    config: QuantizeConfig
    backend: str
    decoder: Decoder
    selection: Selection
    ids: Tensor
    loss: LossPieces | None
    start: Start | None = None
    ranks: Ranks = field(default_factory=Ranks)


class Walk:
    """tell: called with the record of each layer after it is written, and the number of layers. tick: called with the
    share of a layer that is done. outer: gets the seconds that are in no layer's record, those of writing."""

    def __init__(
        self,
        job: Job,
        writer: SharedWriter,
        tell: Callable[[dict[str, Any]], None],
        tick: Callable[[float], None] = lambda share: None,
        outer: Clock | None = None,
    ) -> None:
        self.job, self.writer, self.tell, self.tick = job, writer, tell, tick
        self.config, self.decoder = job.config, job.decoder
        self.device = job.decoder.device
        self.ranks = job.ranks
        self.solver = Solver(job.config, job.backend, job.start, job.ranks)
        self.runner = LayerRunner(job.decoder)
        self.clock = Clock(self.device)  # of a layer
        self.outer = outer or Clock(self.device)
        calibrate = self.config.calibrate
        self.has_data = self.solver.method.needs is not None
        self.sequential = self.has_data and calibrate.mode == Calibration.sequential
        self.corrects = self.sequential and bool(calibrate.alpha or calibrate.residual_alpha)
        per_batch = max(1, BATCH_TOKENS[self.device.type] // job.ids.shape[1])
        self.batches = list(job.ids.split(per_batch)) if self.has_data else []
        count = len(self.batches)
        segments = segment_of(count - 1, count) + 1 if count else 0
        self.own = [n for n in range(count) if self.ranks.source(segment_of(n, count), segments) == self.ranks.rank]
        self.few_tokens: dict[str, int] = {}  # expert's matrix → its tokens, in this layer
        self.share = 1.0  # of a layer's passes that one batch is
        self.original: Stream = {}
        self.quantized: Stream = {}

    def run(self) -> None:
        """Quantize and write every layer that is not finished."""
        finished = dict(self.writer.finished)
        depth = len(self.decoder.stack)
        self._start()
        for index in range(depth):
            left = any(later not in finished for later in range(index + 1, depth))
            with torch.no_grad():
                if index not in finished:
                    self._layer(index)
                elif left and self.has_data:
                    self._advance_finished(index)
            self.decoder.drop_layer(index)

    def _start(self) -> None:
        """The streams that enter layer 0."""
        with self.clock.of("forward"):
            hidden = {number: self.runner.embed(self.batches[number]) for number in self.own}
        store = self._store(list(hidden.values()))
        if self.corrects or not self.sequential:
            self.original = {number: x.to(store) for number, x in hidden.items()}
        if self.sequential:
            self.quantized = {number: x.to(store) for number, x in hidden.items()}

    def _store(self, hidden: Sequence[Tensor]) -> torch.device:
        """Where hidden states and a layer's inputs are kept between passes."""
        if self.device.type != "cuda" or not hidden:
            return torch.device("cpu")
        widths = {m.target.path: m.target.in_features for m in self.job.selection.layers[0]}
        tokens, size = sum(x[..., 0].numel() for x in hidden), hidden[0].element_size()
        need = tokens * size * 2 * (hidden[0].shape[-1] + sum(widths.values()))
        free, _ = torch.cuda.mem_get_info(self.device)
        return self.device if need < STORE_SHARE * free else torch.device("cpu")

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _layer(self, index: int) -> None:
        started = time.perf_counter()
        self.clock.seconds = {}
        self.few_tokens = {}
        with self.clock.of("read"):
            self.decoder.load_layer(index)
        matrices = self.job.selection.layers[index]
        if not self.has_data:
            solved = self._solve(index, matrices, {})
            self.tick(1.0)
        else:
            steps = find_steps(self.runner, index, matrices)
            passes = len(steps) + 1 + self.corrects if self.sequential else 1
            self.share = 1 / (passes * max(1, len(self.own)))
            walk = self._sequential if self.sequential else self._parallel
            solved = walk(index, steps)
        record = self._record(index, solved, started)
        with self.outer.of("write"):  # the record is written, too, so it cannot have this time
            self._write(index, solved, record)
        self.tell(record)

    def _parallel(self, index: int, steps: Sequence[Step]) -> list[Solved]:
        """All steps from one pass of the original layer."""
        weights = self._weights(index, steps)

        def sum_up(sums: AllSums, number: int) -> None:
            taps = Taps(_taps(steps))
            after = self._run(index, number, self.original, taps)
            with self.clock.of("sums"):
                for step in steps:
                    self._add(sums, step, taps, None, weights, number, {})
            assert after is not None
            self.original[number] = after.to(self.original[number].device)

        sums = self._over_batches(steps, sum_up)
        return self._solve(index, [matrix for step in steps for matrix in step.matrices], sums)

    def _sequential(self, index: int, steps: Sequence[Step]) -> list[Solved]:
        check_fused_steps(self.config.fused, steps)
        kept = self._keep_original(index, steps) if self.corrects else None
        changed: Changed = {}
        solved: list[Solved] = []
        done = _Done(self.decoder.stack[index])
        for step in steps:
            weights = self._weights(index, [step])

            def sum_up(sums: AllSums, number: int, step: Step = step, weights: Any = weights) -> None:
                taps = Taps(_taps([step]), step.tap)
                with swapped(changed), done.skipped(number):
                    self._run(index, number, self.quantized, taps)
                done.keep(number, step, taps, self.quantized[number].device)
                with self.clock.of("sums"):
                    self._add(sums, step, taps, None if kept is None else kept[number], weights, number, changed)

            found = self._solve(index, step.matrices, self._over_batches([step], sum_up))
            changed.update(self._changed(found))
            solved += found
            done.finish(step)
        self._advance(index, self.quantized, changed, done)
        return solved

    def _over_batches(self, steps: Sequence[Step], sum_up: Callable[[AllSums, int], None]) -> AllSums:
        """The sums over all batches, by segments (ranks.py). sum_up: adds a batch of this process to sums."""
        total, count, ranks = self._new_sums(steps), len(self.batches), self.ranks
        segments = range(segment_of(count - 1, count) + 1)
        parts: dict[int, AllSums] = {}
        for segment in segments:
            if ranks.source(segment, len(segments)) == ranks.rank:
                parts[segment] = self._new_sums(steps)
                for number in (number for number in self.own if segment_of(number, count) == segment):
                    sum_up(parts[segment], number)
                if ranks.size == 1:
                    self._add_segment(total, parts.pop(segment), 0)
        with self.clock.of("sums"):
            for segment in segments if ranks.size > 1 else ():
                self._add_segment(total, parts.pop(segment, None), ranks.source(segment, len(segments)))
        return total

    def _add_segment(self, total: AllSums, part: AllSums | None, source: int) -> None:
        """part: of the process `source`."""
        for name, sums in {id(sums): (name, sums) for name, sums in total.items()}.values():
            sums.add(None if part is None else part[name], source, self.ranks)  # type: ignore[arg-type]

    def _keep_original(self, index: int, steps: Sequence[Step]) -> dict[int, Stored]:
        """The inputs of the original layer's modules, for each batch; advances the original stream."""
        kept = {}
        for number in self.own:
            taps = Taps(_taps(steps))
            store = self.original[number].device
            after = self._run(index, number, self.original, taps)
            kept[number] = {path: call.input.to(store) for path, call in taps.calls.items()}
            assert after is not None
            self.original[number] = after.to(store)
        return kept

    def _advance(self, index: int, stream: Stream, changed: Changed, done: _Done | None = None) -> None:
        for number in self.own:
            with swapped(changed), done.skipped(number) if done else nullcontext():
                after = self._run(index, number, stream, None)
                assert after is not None
                stream[number] = after.to(stream[number].device)

    def _advance_finished(self, index: int) -> None:
        self.decoder.load_layer(index)
        self.share = 1 / (max(1, bool(self.original) + self.sequential) * max(1, len(self.own)))
        if self.corrects or not self.sequential:
            self._advance(index, self.original, {})
        if self.sequential:
            matrices = {matrix.full_name: matrix for matrix in self.job.selection.layers[index]}
            read = self.writer.quantized(index)
            changed: Changed = {}
            for name, matrix in matrices.items():
                changed |= self._parameter(matrix, read[name].to(self.device).dequantize())
            self._advance(index, self.quantized, changed)

    def _run(self, index: int, number: int, stream: Stream, taps: Taps | None) -> Tensor | None:
        with self.clock.of("forward"):
            after = self.runner.run(index, self.batches[number], stream[number].to(self.device), taps)
        self.tick(self.share)
        return after

    # --- sums and solutions -------------------------------------------------------------------------------------------

    def _new_sums(self, steps: Sequence[Step]) -> AllSums:
        """Without weights, the matrices of a step share one."""
        sums: AllSums = {}
        calibrate = self.config.calibrate
        for step in steps:
            first = step.matrices[0]
            for matrix in step.matrices:
                if matrix.experts:
                    sums[matrix.name] = self._new_expert_sums(matrix)
                    continue
                if self.job.loss is None and matrix is not first:
                    sums[matrix.name] = sums[first.name]
                    continue
                parameter = getattr(matrix.target.module, matrix.target.parameter)
                out_features = matrix.target.as_matrix(parameter).shape[-2]
                compensates = self.corrects and step.residual is not None and bool(calibrate.residual_alpha)
                sums[matrix.name] = Sums(
                    matrix.target.in_features,
                    self.device,
                    groups=None if self.job.loss is None else self.config.hessian.groups,
                    with_shift=self.corrects and bool(calibrate.alpha),
                    residual_features=out_features if compensates else None,
                )
        return sums

    def _new_expert_sums(self, matrix: Matrix) -> ExpertSums:
        calibrate, target = self.config.calibrate, matrix.target
        return ExpertSums(
            len(getattr(target.module, target.parameter)),
            target.in_features,
            self.device,
            calibrate.min_tokens,
            weighted=self.job.loss is not None,
            with_shift=self.corrects and bool(calibrate.alpha),
        )

    def _weights(self, index: int, steps: Sequence[Step]) -> dict[str, Tensor]:
        """Matrix → token weights [tokens, groups] on the device, of mean 1: their scale changes nothing."""
        if self.job.loss is None:
            return {}
        weights = {}
        for matrix in (matrix for step in steps for matrix in step.matrices):
            name = matrix.target.path if matrix.experts else matrix.name
            own = self.job.loss.of(LayerConfig(index, name)).to(self.device)
            own = own**self.config.calibrate.weight_exponent
            weights[matrix.name] = own / own.mean().clamp(min=torch.finfo(torch.float32).tiny)
        return weights

    def _add(
        self,
        sums: AllSums,
        step: Step,
        taps: Taps,
        original: Stored | None,
        weights: Mapping[str, Tensor],
        number: int,
        changed: Changed,
    ) -> None:
        """One batch to the sums of a step's matrices."""
        if step.matrices[0].experts:
            self._add_experts(sums, step, taps, original, weights, number, changed)
            return
        tokens = self.batches[number].numel()

        def rows(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.reshape(-1, x.shape[-1]).to(self.device)

        x = taps.calls[step.tap].input
        if x.numel() != tokens * x.shape[-1]:
            raise SourceError(
                f"{step.matrices[0].full_name} sees {x.numel() // x.shape[-1]} rows for {tokens} tokens; leave it out "
                "with model.exclude."
            )
        residual = None if step.residual is None else taps.calls[step.residual].input
        inputs = Inputs(
            rows(x),  # type: ignore[arg-type]
            rows(original and original[step.tap]),  # type: ignore[arg-type]
            rows(residual),
            rows(original[step.residual]) if original and step.residual else None,
        )
        for total, name in {id(sums[m.name]): (sums[m.name], m.name) for m in step.matrices}.values():
            own = self._of_batch(weights[name], number) if weights else None
            assert isinstance(total, Sums)
            total.update(inputs, own)

    def _add_experts(
        self,
        sums: AllSums,
        step: Step,
        taps: Taps,
        original: Stored | None,
        weights: Mapping[str, Tensor],
        number: int,
        changed: Changed,
    ) -> None:
        """One batch to the sums of the experts, by the routing of the stream that is quantized."""
        (matrix,) = step.matrices
        call, total = taps.calls[step.tap], sums[matrix.name]
        assert isinstance(total, ExpertSums)
        with swapped(changed):
            rows = expert_rows(matrix.target, call)
        before = None
        if original is not None:
            before = expert_rows(matrix.target, call.with_input(original[step.tap].to(self.device)))
        own = None
        if weights:
            of_tokens = self._of_batch(weights[matrix.name], number).mean(1)
            own = routed_weights(call, len(rows), of_tokens)
            check_rows(call, rows, own)
        for expert, x in enumerate(rows):
            inputs = Inputs(x, None if before is None else before[expert])
            total.update(expert, inputs, None if own is None else own[expert])

    def _of_batch(self, weights: Tensor, number: int) -> Tensor:
        """The token weights of one batch. All batches but the last have the size of the first."""
        return weights[number * self.batches[0].numel() :][: self.batches[number].numel()]

    def _solve(self, index: int, matrices: Sequence[Matrix], sums: AllSums) -> list[Solved]:
        for matrix in matrices:
            own = sums.get(matrix.name)
            if isinstance(own, ExpertSums):
                self.few_tokens |= {f"{matrix.full_name}.{e}": tokens for e, tokens in own.few().items()}
        with self.clock.of("solve"):
            read = partial(self._output_gram, index) if self.config.hessian.outputs else None
            return self.solver.solve([Work(m, self._weight, self.device, sums.get(m.name), read) for m in matrices])

    def _weight(self, matrix: Matrix) -> Tensor:
        """[out_features, in_features] in the checkpoint's dtype, on the device."""
        stored = self.decoder.stored.tensor(matrix.stored, None)
        return matrix.target.as_matrix(stored).contiguous().to(self.device)

    def _output_gram(self, index: int, matrix: Matrix) -> Tensor | None:
        """[out_features, out_features], float32 on the CPU; None without gradients at the matrix's outputs."""
        assert self.job.loss is not None  # since hessian.outputs needs loss weights
        return self.job.loss.output_gram(LayerConfig(index, matrix.name))

    def _changed(self, solved: Sequence[Solved]) -> Changed:
        changed: Changed = {}
        for one in solved:
            changed |= self._parameter(one.matrix, one.values)
        return changed

    def _parameter(self, matrix: Matrix, values: Tensor) -> Changed:
        target = matrix.target
        return {(target.module, target.parameter): target.as_parameter(values.to(self.decoder.dtype))}

    # --- records ------------------------------------------------------------------------------------------------------

    def _record(self, index: int, solved: Sequence[Solved], started: float) -> dict[str, Any]:
        matrices = [one.record for one in solved]
        names = ("naive_weight_error", "weight_error", "naive_output_error", "output_error")
        means = {name: mean_error(matrices, name) for name in names}
        record: dict[str, Any] = {"index": index} | {name: value for name, value in means.items() if value is not None}
        if self.corrects:
            record["hidden_error"] = self._hidden_error()
        if self.few_tokens:
            record["few_tokens"] = self.few_tokens
        without = [one["name"] for one in matrices if not one.get("outputs", True)]
        if without:  # such as experts; solved as by hessian=loss
            record["without_outputs"] = without
        seconds = {phase: round(value, 3) for phase, value in self.clock.seconds.items()}
        record |= {"matrices": matrices, "seconds": seconds, "duration_s": round(time.perf_counter() - started, 3)}
        return record

    def _hidden_error(self) -> float:
        """‖h_q − h‖ / ‖h‖ of the streams."""
        energies = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number in self.own:
            one, other = self.quantized[number].float(), self.original[number].float()
            energies[0] += (one - other).square().sum(dtype=torch.float64).to(self.device)
            energies[1] += other.square().sum(dtype=torch.float64).to(self.device)
        error, norm = self.ranks.total(energies).tolist()
        return float((error / norm) ** 0.5) if norm else 0.0

    def _write(self, index: int, solved: Sequence[Solved], record: dict[str, Any]) -> None:
        if not self.ranks.is_first:
            return
        quantized: dict[str, QuantizedTensor] = {s.matrix.full_name: s.quantized.to("cpu") for s in solved}
        kept = kept_tensors(self.decoder, index, self.job.selection.names)
        transposed = [s.matrix.full_name for s in solved if s.matrix.target.transposed]
        self.writer.write_layer(index, quantized, kept, record, transposed)


class _Done:
    """The parts of a decoder layer whose output is final: that of one quantized matrix, from its kept input."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.steps: list[Step] = []
        self.kept: dict[tuple[int, str], Tensor] = {}  # batch, tap → input

    def keep(self, number: int, step: Step, taps: Taps, store: torch.device) -> None:
        if step.child is not None:
            self.kept[number, step.tap] = taps.calls[step.tap].input.to(store)

    def finish(self, step: Step) -> None:
        if step.child is not None:
            self.steps.append(step)

    def skipped(self, number: int) -> AbstractContextManager[None]:
        """A context in which these parts compute the product with their matrix alone, for one batch."""
        forwards = {}
        for step in self.steps:
            assert step.child is not None
            module = self.layer.get_submodule(step.child.path)
            forwards[module] = partial(self._forward, step, self.kept[number, step.tap])
        return replaced(forwards)

    def _forward(self, step: Step, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        module = self.layer.get_submodule(step.tap)
        assert step.child is not None
        weight = getattr(module, step.matrices[0].target.parameter)
        return step.child.output(module(x.to(weight.device)))


def _taps(steps: Sequence[Step]) -> list[str]:
    paths = [path for step in steps for path in (step.residual, step.tap) if path is not None]
    return list(dict.fromkeys(paths))
