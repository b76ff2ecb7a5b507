"""Runs every public function of library and pipeline under a caller's defaults, and keeps hashes of what comes out.

    python -m tests.every_function folder     writes found.json: {"results": {default: {name: hash}}, "missed": [name]}

Each default has a process of its own, forked before anything of quantkit has run, so that nothing is cached. missed:
the public functions that no call reached, without those that need a GPU, the network or packages that need not be here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import multiprocessing
import pkgutil
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests import conftest  # noqa: F401  makes the interpreter quick

DEFAULTS: dict[str, Callable[[], object]] = {
    "float32": lambda: None,
    "float16": lambda: torch.set_default_dtype(torch.float16),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "meta": lambda: torch.set_default_device("meta"),
}
# Not called here, and why.
ELSEWHERE = {
    "experiments.bench": "writes timings of what is called here",
    "experiments.peers": "runs other tools; its own tests call it",
    "experiments.model.peers": "packages that need not be there",
    "experiments.model.evaluation.peer_label": "of another tool's folder, and makes no tensor",
    "experiments.model.evaluate_settings.peer_about": "of another tool's folder, and makes no tensor",
    "experiments.run": "runs what is called here, under Hydra",
    "experiments.bench_model": "starts processes of what is called here",
    "experiments.random_model": "makes a model from nothing; its own tests read one",
    "experiments.train_small": "makes a model from nothing; its own tests train one",
    "experiments.launchers": "processes and GPUs of other runs",
    "experiments.one_block.main": "writes what survey returns, of a model that is fetched",
    "experiments.one_block.survey": "its parts are called",
    "experiments.measure.bench_clock": "a GPU's clock",
    "experiments.measure.bench_peers": "packages that need not be there",
    "experiments.measure.bench_rows": "timings",
    "experiments.measure.timing": "timings",
    "experiments.provenance": "the machine",
    "experiments.sources.decoder.build_decoder": "its parts are called",
    "experiments.sources.checkpoints.Checkpoint": "an interface",
    "experiments.sources.checkpoints.GgufCheckpoint.save_around": "files, and a tokenizer that is fetched",
    "experiments.sources.checkpoints.GgufCheckpoint.tokenizer": "a model that is fetched",
    "experiments.sources.checkpoints.HoldsCodes": "an interface",
    "quantkit.kernels.ptx": "writes text, when it is imported",
    "quantkit.layer.common.Pass.replace": "of a rare case, and makes no tensor",
    "quantkit.methods.Method.of_objective": "called when it is imported",
    "quantkit.methods.Method.of_layer": "called when it is imported",
    "quantkit.formats.ScaleGrid.naive_rules": "called when it is imported",
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def library(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of the library's public functions, on both backends."""
    import quantkit
    from quantkit import calibration, formats, kernels, metrics, parallel, search, tensor
    from quantkit.bounds import first_useful_code, hessian_window, sse_window
    from quantkit.reference import amax

    weight, tokens, cpu = normal(8, 64), normal(40, 64, seed=1), torch.device("cpu")
    gram, experts = tokens.T @ tokens, weight.view(2, 4, 64)
    hessians = calibration.block_hessians(gram, 16)
    given: dict[str | None, dict[str, Any]] = {
        None: {},
        "hessian": {"activations": tokens},
        "gram": {"gram": gram},
    }
    one = weight[:, :16].contiguous()  # one block column for the interpreted kernels, which take their time
    for fmt in quantkit.FORMATS.values():
        for name, method in quantkit.METHODS.items():
            call = partial(quantkit.quantize, format=fmt, block_size=16, method=name, count_candidates=True)
            yield f"quantize {fmt.name} {name}", partial(call, weight, backend="reference", **given[method.needs])
            if method.needs == "hessian":
                yield f"quantize {fmt.name} {name} by hessian", partial(call, weight, hessian=hessians)
            if method.has_kernel and fmt.name in ("nvfp4", "mxfp4"):
                few: dict[str | None, dict[str, Any]] = {
                    "hessian": {"hessian": hessians[:1]},
                    "gram": {"gram": gram[:16, :16]},
                }
                extra = few.get(method.needs, {})
                yield f"quantize {fmt.name} {name} triton", partial(call, one, backend="triton", **extra)
        for rule in fmt.scale_rules:
            yield f"rule {fmt.name} {rule}", partial(quantkit.quantize, weight, fmt, 16, "naive", scale_rule=rule)
        every = torch.arange(fmt.scale.max_code + 1, dtype=torch.int32, device="cpu")
        yield (
            f"grids {fmt.name}",
            lambda fmt=fmt, every=every: (
                fmt.scale.decode(every),
                fmt.scale.floor_code(weight.abs()),
                fmt.scale.ceil_code(weight.abs()),
                fmt.element.encode_signed(weight),
                fmt.element.decode_signed(every[:8].to(torch.uint8)),
                fmt.bits_per_weight(16),
            ),
        )
        q = quantkit.quantize(weight, fmt, 16, "sse")
        yield f"verify {fmt.name}", partial(quantkit.verify, q, weight)
        yield f"verify by hessian {fmt.name}", partial(quantkit.verify, q, weight, hessians)
        yield f"dequantize {fmt.name}", lambda q=q: [q.dequantize(d) for d in calibration.FLOAT_DTYPES]
        yield (
            f"values {fmt.name}",
            lambda q=q: (q.values(), q.scale_values(), q[0] if q.codes.ndim > 2 else q.to("cpu")),
        )

        def saved(q: quantkit.QuantizedTensor = q, path: Path = folder / fmt.name) -> object:
            q.save(path)
            torch.save(q, f"{path}.pt")
            module = quantkit.QuantizedWeight(q)
            state = module.state_dict()
            module.load_state_dict(state)
            module.half()
            return (
                q.load(path),
                torch.load(f"{path}.pt", weights_only=True),
                state,
                module.tensor,
                module(),
                module.double()(),
            )

        yield f"save and load {fmt.name}", saved
    own = [
        {"global_scale": torch.full((2, 1, 1), 0.01, dtype=torch.float32, device="cpu")},
        {"global_scale": "amax_per_expert"},
    ]
    for number, extra in enumerate([{"hessian": torch.stack([hessians, hessians])}, *own]):
        method = "hessian" if "hessian" in extra else "sse"
        yield f"experts {number}", partial(quantkit.quantize, experts, method=method, **extra)
        yield (
            f"verify experts {number}",
            lambda method=method, extra=extra: (
                quantkit.verify(q := quantkit.quantize(experts, method=method, **extra), experts, extra.get("hessian"))
                and q[1].dequantize()
            ),
        )
    yield (
        "gap",
        partial(
            quantkit.verify, quantkit.quantize(one, method="joint", hessian=hessians[:1]), one, hessians[:1], gap=2
        ),
    )
    for scale in ("none", "headroom", "search", 0.5):
        yield f"global scale {scale}", partial(quantkit.quantize, weight, global_scale=scale)
    for name in quantkit.blockwise.__all__:
        call = getattr(quantkit, name)
        arguments = [one.view(8, 1, 16)]
        extra = {"X": tokens[:, :16]} if "hessian" in name else {}
        if name.endswith("dequantize"):
            arguments = [normal(8, 4).abs(), normal(8, 4, 16)]
        else:
            extra["return_dequant"] = True
        yield name, partial(call, *arguments, **extra)
    rough = quantkit.quantize(weight).dequantize()
    yield (
        "metrics",
        lambda: (
            quantkit.compute_metrics(weight, rough, tokens),
            metrics.output_error_from_gram(weight, rough, gram),
            quantkit.quantize(weight).nbytes,
            quantkit.quantize(weight, method="hessian", gram=gram).device,
        ),
    )

    def accumulated() -> object:
        accumulator = calibration.GramAccumulator(64, "cpu")
        accumulator.update(tokens.view(2, 20, 64))
        accumulator.update(tokens * 1e-30)
        accumulator.add(gram, 40)
        tiny = calibration.gram_matrix(tokens * 1e-30)
        return accumulator.gram, accumulator.hessians(16), tiny, calibration.hessians_from_activations(tokens, 16)

    yield "accumulated", accumulated
    first = quantkit.quantize(weight, method="naive")
    yield "from given codes", partial(quantkit.quantize, weight, method="descent", gram=gram, init=first)
    outputs = torch.eye(len(weight), dtype=torch.float32, device="cpu")
    for method in ("gptq", "descent"):
        yield (
            f"rows together by {method}",
            partial(quantkit.quantize, weight, method=method, gram=gram, output_gram=outputs),
        )
    yield "factors", lambda: (calibration.factorize(hessians), search.factorize(hessians, "reference").tensors)
    scale = torch.ones((), dtype=torch.float32, device="cpu")
    e4m3, e2m1 = formats.E4M3, formats.E2M1
    inverse = torch.ones(16, dtype=torch.float64, device="cpu")
    blocks = weight.view(8, 4, 16)
    error = blocks.double().square().sum(-1) / 100
    yield (
        "bounds",
        lambda: (
            sse_window(blocks.abs().amax(-1), e2m1, e4m3, scale, 16),
            hessian_window(blocks.abs().double(), error, inverse, e2m1, e4m3, scale),
            first_useful_code(error * 100, error, inverse[:4] * 16, e2m1, e4m3, scale),
        ),
    )
    launch = kernels.launcher()
    q = quantkit.quantize(weight)
    yield (
        "launch",
        lambda: (
            launch.dequantize(q.codes, q.scales, q.global_scale, q.format, 16, torch.float16),
            launch.block_hessians(tokens[:, :16], 16),
            launch.unpack_factors(launch.factorize(hessians[:1])),
            int(launch.amax_parts(weight).max()),
            amax.global_scale_of(weight, formats.NVFP4),
        ),
    )
    yield (
        "chosen",
        lambda: (
            quantkit.resolve_backend("auto", "cpu", "hessian", 16, "nvfp4"),
            search.quantize_matrix(weight, formats.NVFP4, 16, "sse", backend="reference"),
            tensor.unpack_codes(tensor.pack_codes(q.codes & 15)),
            quantkit.get_method("sse").name,
            parallel.for_each(lambda: None, [()], cpu),
        ),
    )

    def stored() -> object:
        from quantkit import layouts

        found: list[object] = [layouts.layout_of({"quant_method": "modelopt"}) is layouts.get_layout("modelopt")]
        for layout in layouts.LAYOUTS.values():
            for name, size in layout.holds:
                q = quantkit.quantize(experts, name, size)
                q = q if layout.name in ("gguf", "gpt_oss") else q[0]
                tensors = layout.to_tensors("p", q)
                found += [tensors, [layout.from_tensors(n, tensors).dequantize() for n in layout.names(tensors)]]
                found.append(layout.config(q.format, size, ["lm_head"]))
        scale = layouts.exact_global_scale(q.global_scale * 0.3)
        pair = {f"a.{part}_proj": quantkit.quantize(weight, global_scale=scale) for part in ("gate", "up")}
        layouts.check_fused(pair)
        apart = layouts.expert_matrices("m.experts.gate_up_proj", quantkit.quantize(experts))
        return found, scale, layouts.fused_groups(pair), {name: one.dequantize() for name, one in apart}

    yield "layouts", stored


def pipeline(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) of the pipeline: whole runs on a tiny model, on a bundle and on seeded numbers, and what they leave
    out."""
    from experiments import config as c
    from experiments import one_block
    from experiments.capture import forward
    from experiments.capture.limit import limit_calibration
    from experiments.capture.load import load_layer_inputs
    from experiments.measure import bench_cases, bench_gram, stages
    from experiments.measure.blocks import block_columns
    from experiments.model import divergence
    from experiments.model.evaluate_settings import EvaluateConfig, EvaluationConfig
    from experiments.model.evaluation import execute, resolve_evaluation
    from experiments.sources.resolved import resolve
    from tests.experiments.tiny_models import configuration

    own = {"cache": c.CacheConfig(dir=str(folder / "cache"), shard_mib=1), "output_dir": str(folder / "runs")}
    tiny = configuration(folder.parent / "model", folder.parent / "texts", **own, method__name="hessian", verify=True)
    seeded = configuration(**own, method__name="sse", verify=True, data__seq_len=8, data__samples=4)
    seeded = dataclasses.replace(
        seeded,
        model=c.ModelConfig("synthetic", c.ModelSource.synthetic, in_features=64, out_features=8, dtype="float32"),
    )

    forward.KEEP_SECONDS = 0  # as if each capture were long

    def run(config: c.Config) -> object:
        stages.check_options(config)
        resolved = resolve(config)
        inputs = load_layer_inputs(resolved)
        outcome, work = stages.execute(resolved), stages.quantize_layer(resolved, inputs).result
        fields = {name: value for name, value in outcome.fields.items() if not name.startswith("time")}
        grams = inputs.gram_calibration, inputs.gram_heldout
        kept = stages.keep_blocks(block_columns(inputs.weight, *[work] * 2, inputs.gram_calibration), folder)
        stages.keep_weights(work, folder)
        return inputs.weight, grams, list(inputs.batches("calibration")), fields, outcome.histograms(), kept

    loss = c.HessianConfig(c.Weighting.loss, groups=2)
    yield "run of a model", partial(run, tiny)
    yield "run by the loss", partial(run, dataclasses.replace(tiny, hessian=loss))
    yield "run of seeded numbers", partial(run, seeded)
    yield "run of a whole layer", partial(run, dataclasses.replace(seeded, method=c.MethodConfig("gptq")))
    yield "whole model", partial(quantize_whole, folder, tiny)
    yield "experts of a whole model", sum_experts
    yield "fewer tokens", lambda: limit_calibration(load_layer_inputs(resolve(tiny)), 40, 32, 0).gram_calibration

    def one() -> object:
        weight, tokens = normal(4, 32), normal(64, 32)
        hessian = (
            (tokens.T @ tokens).unflatten(0, (2, 16)).unflatten(2, (2, 16)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        )
        chosen = {
            method: one_block.quantize(weight, "nvfp4", 16, method, hessian=h)
            for method, h in (("naive", None), ("sse", None), ("hessian", hessian))
        }
        surveyed = one_block.survey_block(weight, hessian[0], chosen, 0, 0)
        return one_block.blocks_that_differ(weight, chosen), one_block.as_json(surveyed)

    yield "one block", one

    def evaluated() -> object:
        other = folder / "other"
        shutil.copytree(folder.parent / "model", other)
        for path in other.glob("model-*.safetensors"):
            tensors = {name: tensor.bfloat16().float() for name, tensor in load_file(path).items()}
            save_file(tensors, path, metadata={"format": "pt"})
        config = EvaluationConfig(
            model=dataclasses.replace(tiny.model, path=str(other)),
            data=tiny.data,
            evaluate=EvaluateConfig(resamples=100, layers=True, layers_by="decoder", layers_samples=2),
            cache=own["cache"],
            tracking=tiny.tracking,
            reference=str(tiny.model.path),
            device="cpu",
            output_dir=str(folder / "evaluations"),
        )
        return execute(resolve_evaluation(config))

    yield "evaluation", evaluated
    yield (
        "divergence",
        lambda: divergence.compare(
            normal(5, 40)[divergence.scored(5, "llama_cpp")],
            normal(5, 40, seed=1)[divergence.scored(5, "llama_cpp")],
            torch.arange(2, dtype=torch.int64, device="cpu"),
        ),
    )

    def whole() -> object:
        from experiments.model.checkpoint import load_dequantized, open_quantized
        from experiments.sources.checkpoints import CodesCheckpoint, open_checkpoint
        from tests.experiments.model.folders import open_source, source, write
        from tests.experiments.sources.test_layouts import write_layout

        write(folder / "whole", open_source(folder.parent / "model"), stop=1)
        written = write(folder / "whole", open_source(folder.parent / "model"))
        opened = open_quantized(folder / "whole")
        opened.verify()
        files = {name: value["sha256"] for name, value in opened.files.items()}
        engine = write_layout(folder / "whole", folder / "engine", "modelopt")
        codes = open_checkpoint(source(engine), folder)
        assert isinstance(codes, CodesCheckpoint)
        others = codes.read(codes.names[:9]), [codes.quantized(name) for name in codes.matrices.values()]
        tensors = [opened.tensor(name) for name in opened.kept], [opened.quantized(name) for name in opened.names]
        return files, tensors, others, load_dequantized(folder / "whole").state_dict(), written.quantized(0)

    yield "whole model", whole

    def exported() -> object:
        from experiments.files import sha256_file
        from experiments.model import gguf_file, judge, selfcheck, stored_names
        from experiments.model.checkpoint import open_quantized
        from experiments.model.export import export
        from experiments.sources import gguf_names, gguf_rope
        from experiments.sources.checkpoints import GgufCheckpoint, alternating, open_checkpoint
        from tests.experiments.model.folders import open_source, source, write

        found: list[object] = []
        for fmt, size, layouts in (("nvfp4", 16, ("compressed_tensors", "modelopt")), ("mxfp4", 32, ("gguf",))):
            given = {"global_scale": 2.0**-11} if fmt == "nvfp4" else {}
            write(folder / f"own-{fmt}", open_source(folder.parent / "model"), format=fmt, size=size, **given)
            opened = open_quantized(folder / f"own-{fmt}")
            for name in layouts:
                verdict = export(opened, folder / name, name)
                files = {path.name: sha256_file(path) for path in sorted((folder / name).iterdir())}
                found += [verdict.ok, verdict, files]
        original = source(folder.parent / "model")
        for name in ("own-mxfp4", "modelopt", "gguf"):
            found.append(list(judge.judge_model(source(folder / name), original, folder / "judged")))
        read = open_checkpoint(source(folder / "gguf"), folder / "judged")
        assert isinstance(read, GgufCheckpoint)
        found += [read.read(read.names), [read.quantized(name) for name in read.matrices.values()]]
        model = selfcheck.load_in_transformers(folder / "compressed_tensors", "compressed_tensors")
        found.append(selfcheck.loaded_weight(model, "model.layers.0.mlp.up_proj", True))
        gguf_file.check_columns([("p", 64)])
        found += [alternating([normal(4, 3), normal(4, 3)], dim) for dim in (-1, -2)]
        found.append(gguf_names.fused_name("model.layers.0.mlp.experts.3.up_proj"))
        rope = dict(zip(gguf_rope.LLAMA3, gguf_rope.PUBLISHED[0], strict=True))
        factors = gguf_rope.frequency_factors(rope, 500000.0, 16)
        llama = gguf_names.architecture_of("llama")
        found += [factors, gguf_rope.read_scaling("file", llama, {}, factors, 500000.0, 16)]
        gguf_file.check_format({"model_type": "qwen3"}, opened.quantized(opened.names[0]).format)
        return found, stored_names.left_out(stored_names.skeleton(folder / "own-nvfp4"), [])

    yield "exported model", exported
    weight = bench_cases.sample_weight(8, 64)
    task = bench_gram.gram_task(weight)
    yield (
        "bench",
        lambda: (
            weight,
            bench_cases.sample_hessian(bench_cases.sample_tokens(weight), 16),
            [case.call() for case in bench_cases.cases(weight, ["reference"], [16])],
            len(list(bench_cases.block_hessian_cases(16, torch.float32, "cpu"))),
            [case.call() for case in bench_gram.gram_cases(task, ["reference"], ["nvfp4"], [16])],
            (task.judge(weight.roll(1, 1)), task.global_scale),
        ),
    )


def quantize_whole(folder: Path, tiny: Any) -> object:
    """Two layers of a whole tiny model, by the loss and sequentially, and what it becomes."""
    from experiments import config as c
    from experiments.capture import losses
    from experiments.model import checkpoint, job, ranks, settings

    config = settings.QuantizeConfig(
        **{name: getattr(tiny, name) for name in settings.SHARED if name not in ("hessian", "method", "output_dir")},
        method=c.MethodConfig("gptq"),
        hessian=c.HessianConfig(c.Weighting.loss, outputs=True),
        tracking=tiny.tracking,
        output_dir=str(folder / "models"),
        export=settings.Export.modelopt,
    )
    config.model = dataclasses.replace(config.model, include=["*.0.self_attn.o_proj", "*.1.mlp.*_proj"])
    job.refuse_layer_bundle(config)
    run = job.resolve_model(config)
    losses.compute_share(run.resolved, 0, 2)
    assert ranks.started().device("cpu") == "cpu"
    fields = job.quantize_model(run, job.Listener())
    hessian = c.HessianConfig(c.Weighting.loss)
    refined = dataclasses.replace(config, method=c.MethodConfig("descent"), hessian=hessian, init=str(run.folder))
    better = job.resolve_model(refined)
    job.quantize_model(better, job.Listener())
    folders = (run.folder, better.folder)
    shards = [path.read_bytes() for folder in folders for path in sorted(folder.glob("*.safetensors"))]
    errors = [record.get("weight_error") for record in checkpoint.layer_records(run.folder)]
    return {name: value for name, value in fields.items() if name != "seconds"}, errors, shards


def sum_experts() -> object:
    """The inputs of each of four experts in a call of their module, and their sums."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from experiments.model import experts
    from experiments.model.layer import Call
    from experiments.model.ranks import Ranks
    from experiments.model.sums import Inputs
    from experiments.sources.modules import fused_experts

    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=32, num_experts=4)
    config._experts_implementation = "eager"
    module = Qwen3MoeExperts(config)
    for name, shape in (("gate_up_proj", (4, 64, 16)), ("down_proj", (4, 16, 32))):
        setattr(module, name, torch.nn.Parameter(normal(*shape), requires_grad=False))
    index = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int64, device="cpu")
    factors, weights = normal(3, 2).abs(), normal(3).square()
    call = Call((normal(3, 16), index, factors), {}).with_input(normal(3, 16, seed=1))
    _, target = next(fused_experts(module))
    target = dataclasses.replace(target, module=module)
    rows, own = experts.expert_rows(target, call), experts.routed_weights(call, 4, weights)
    experts.check_rows(call, rows, own)
    sums = experts.ExpertSums(4, 16, torch.device("cpu"), 2, weighted=True)
    for expert in range(sums.num_groups):
        sums.update(expert, Inputs(rows[expert]), own[expert])
    sums.add(sums, 0, Ranks())
    assert Ranks().share_tensors(("plain", rows), 0, torch.device("cpu"))[0] == "plain"
    return rows, own, sums.few(), [sums.of_group(expert)[0] for expert in range(4)]


# ---- one process for each default ------------------------------------------------------------------------------------


def digest(value: object) -> str:
    """Of all bytes in a result: tensors with dtype, shape and device, floats to the last bit."""
    found = hashlib.sha256()
    for part in _parts(value):
        found.update(part)
    return found.hexdigest()[:16]


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype} {list(value.shape)} {value.device}".encode()
        if not value.is_meta:
            yield bytes(value.detach().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        yield from (part for item in value.items() for part in _parts(item))
    elif isinstance(value, list | tuple):
        yield from (part for item in value for part in _parts(item))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _parts([getattr(value, field.name) for field in dataclasses.fields(value)])
    else:
        yield repr(value).encode()


def run_all(default: str, folder: Path, reached: bool, answers: Any) -> None:
    folder.mkdir()
    seen: set[CodeType] = set()

    def trace(frame: Any, event: str, _: object) -> None:
        if event == "call":
            seen.add(frame.f_code)

    DEFAULTS[default]()
    if reached:
        threading.setprofile(trace)
        sys.setprofile(trace)
    found = {}
    for calls in (library, pipeline):
        try:
            for name, call in calls(folder):
                try:
                    found[name] = digest(call())
                except Exception as error:
                    found[name] = _one_line(error)
        except Exception as error:  # of what the calls are made from
            found[calls.__name__] = _one_line(error)
    sys.setprofile(None)
    missed = [name for name, code in public_functions() if reached and code not in seen]
    answers.put((default, found, missed))


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def modules() -> Iterator[ModuleType]:
    """Those of quantkit, and those of experiments that make or read tensors."""
    for package in ("quantkit", "experiments"):
        root = importlib.import_module(package)
        for info in pkgutil.walk_packages(root.__path__, f"{package}."):
            module = importlib.import_module(info.name)
            if "torch" in vars(module) or package == "quantkit":
                yield module


def public_functions() -> Iterator[tuple[str, CodeType]]:
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            members = vars(value).items() if inspect.isclass(value) else [("", value)]
            for inner, member in members:
                function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", None) or member)
                if (
                    inspect.isfunction(function)
                    and not inner.startswith("_")
                    and function.__code__.co_filename == module.__file__
                ):
                    path = f"{module.__name__}.{name}{'.' * bool(inner)}{inner}"
                    if not any(path == other or path.startswith(f"{other}.") for other in ELSEWHERE):
                        yield path, function.__code__


def main(folder: Path) -> None:
    from tests.experiments.tiny_models import qwen3, write_text

    torch.set_num_threads(1)
    qwen3(folder / "model")
    write_text(folder / "texts")
    for _ in modules():
        pass
    context = multiprocessing.get_context("fork")
    answers: Any = context.Queue()
    processes = [
        context.Process(target=run_all, args=(default, folder / default, default == "float32", answers))
        for default in DEFAULTS
    ]
    for process in processes:
        process.start()
    received = [answers.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    missed = [name for *_, names in received for name in names]
    found = {default: results for default, results, _ in received}
    (folder / "found.json").write_text(json.dumps({"results": found, "missed": missed}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
