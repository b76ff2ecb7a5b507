"""Times of every method × format × block size × backend on one device, beside a plain copy and the peers installed.

    python experiments/bench.py --out results/bench/NAME.csv
    python experiments/bench.py --shapes 2560x9728 --backends triton --rounds 50

What is timed. `gpu_us`: the GPU's work alone, a CUDA graph of the whole quantkit call (no check for NaN, the global
scale given), between two events. `call_us`: the call from Python until the GPU is done, by the host's clock. Three
calls on a few rows of the weight come just before, which bring its code to the host's caches; calls on all of it would
make the host wait, by a millisecond where a kernel is long, and lose it again. On a CPU there is only the call. Before
each measurement a buffer larger than the L2 cache is overwritten, and the cases take turns, so that a drift of the
clocks meets all of them. The reference and the peers come last in a round, because what comes just after their long
calls takes longer, and before the first of the next round the device and the host settle on it, untimed. The calls of
the kernels are timed in rounds of their own, before the reference is run and the peers are imported: every call after
these costs the host more (so it does for the second of several shapes; `--no-peers --backends triton` spares it that).
`floor_us` is what the bytes alone need, each read or written once, at the rate of a large copy in the same process;
`ratio_to_copy` compares gpu_us with a copy of the same weight. The line `launch` adds one number to another: the least
that any kernel takes.

Peers take part where they are installed, and return other things than codes and scales. qwantize: element and scale
values, float32; its Hessian method builds H itself, here from 2048 tokens. nvidia-modelopt: naive, the dequantized
weight; sse and hessian, the best amax of each block.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import errno
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from experiments.files import check_writable, write_atomically
from experiments.provenance import device_name, git_state, resolve_device, versions
from quantkit import FORMATS, METHODS, quantize, resolve_backend

QWEN3_4B = ((4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728))  # q, k and v, o, gate and up, down
MAIN = ((2560, 9728),)
ROWS = tuple((rows, 9728) for rows in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536))
SETS = {"main": MAIN, "qwen3_4b": QWEN3_4B, "rows": ROWS}
TOKENS = 65536  # of the activations whose block Hessians are timed
WEIGHT_STD = 0.02
LARGEST = 5.3  # what a Gaussian of MAIN's size has by itself
FLUSH_BYTES = 256 << 20  # larger than any L2
LARGE_COPY_BYTES = 1 << 29  # read and written; far beyond the caches. In a graph, a copy of 1 GiB is a third slower
SETTLING = 5  # calls at the beginning of a round
WARM_CALLS = 3  # before a call is timed; of what is captured in a graph, so takes less than SLOW_S
WARM_ROWS = 32  # of the weight
SLOW_S = 0.2  # a call that takes longer is timed SLOW_ROUNDS times
SLOW_ROUNDS = 3


@dataclass(frozen=True)
class BenchRow:
    """A line of the CSV; times are microseconds, quantiles over `iterations`."""

    kind: str  # kernel, copy, launch, or peer
    tool: str
    operation: str  # naive, sse, hessian, dequantize, amax, block_hessians, copy, launch
    format: str
    block_size: int | None
    backend: str
    rows: int
    columns: int
    dtype: str
    global_scale: str
    gpu_us_median: float | None
    gpu_us_20: float | None
    gpu_us_80: float | None
    call_us_median: float | None
    call_us_20: float | None
    call_us_80: float | None
    bytes: int
    floor_us: float | None
    ratio_to_copy: float | None
    iterations: int
    device: str
    commit: str
    dirty: bool | None
    versions: str


@dataclass
class Case:
    """Something to time: a line of the CSV in the making."""

    kind: str
    tool: str
    operation: str
    call: Callable[[], object]
    bytes: int
    format: str = ""
    block_size: int | None = None
    backend: str = ""
    global_scale: str = ""
    warm_up: Callable[[], object] | None = None  # the same on a weight of a few rows; None: the call itself
    gpu_us: list[float] = field(default_factory=list)
    call_us: list[float] = field(default_factory=list)
    graph: Any = None
    limit: int = 1 << 30


def cases(weight: Tensor, backends: list[str], block_sizes: tuple[int, ...]) -> Iterator[Case]:
    """Everything of ours that is timed on one weight ``[rows, columns]``, and the copy."""
    size, itemsize = weight.numel(), weight.element_size()
    target = torch.empty_like(weight)
    yield Case("copy", "torch", "copy", lambda: target.copy_(weight), 2 * size * itemsize)
    one = torch.zeros(1, device=weight.device)
    yield Case("launch", "torch", "launch", lambda: one.add_(1), 0)
    tokens = sample_tokens(weight)
    for name, fmt in FORMATS.items():
        amax = weight.abs().amax().float() / (fmt.element.max_value * fmt.scale.max_value)
        for block_size in [size for size in block_sizes if size in fmt.block_sizes]:
            blocks = tokens.unflatten(1, (-1, block_size))
            hessian = torch.einsum("tbi,tbj->bij", blocks, blocks).contiguous()
            for method in METHODS:
                scales: list[tuple[str, Any]] = [("given", amax)] if fmt.two_level else [("none", None)]
                if fmt.two_level:
                    scales.append(("amax", "amax"))
                for backend in backends:
                    if backend == "triton" and not METHODS[method].has_kernel:
                        continue
                    for label, scale in scales:
                        given: dict[str, Any] = {"hessian": hessian} if METHODS[method].needs_hessian else {}
                        if scale is not None:
                            given["global_scale"] = scale
                        moved = size * itemsize + size // 2 + size // block_size
                        moved += hessian.nbytes if METHODS[method].needs_hessian else 0
                        yield Case(
                            "kernel",
                            "quantkit",
                            method,
                            quantizer(weight, name, block_size, method, backend, given),
                            moved,
                            name,
                            block_size,
                            backend,
                            label,
                            quantizer(weight[:WARM_ROWS], name, block_size, method, backend, given),
                        )
            if "triton" in backends and weight.is_cuda:
                yield dequantizer(weight, name, block_size)
    if "triton" in backends and weight.is_cuda:
        from quantkit.kernels import launch

        yield Case(
            "kernel",
            "quantkit",
            "amax",
            lambda: launch.amax_parts(weight),
            size * itemsize,
            "nvfp4",
            None,
            "triton",
            "amax",
            lambda: launch.amax_parts(weight[:WARM_ROWS]),
        )


def sample_weight(rows: int, columns: int) -> Tensor:
    """Float32 ``[rows, columns]``, Gaussian; the largest magnitude is LARGEST standard deviations, whatever the size.

    So that all shapes have one global scale: it decides where block scales lie in their grid, and how many larger ones
    there are, which changes what SSE takes by 4 %, and Hessian by a quarter within a binade.
    """
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).clamp_(-LARGEST, LARGEST)
    weight[0, 0] = LARGEST
    return WEIGHT_STD * weight


def sample_tokens(weight: Tensor) -> Tensor:
    """Float32 activations ``[2048, columns]`` whose neighbouring channels correlate, as in a layer's inputs."""
    columns, device = weight.shape[1], weight.device
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(2048, columns, generator=generator, device=device)
    tokens *= torch.logspace(-0.5, 0.5, columns, device=device)
    return tokens + 0.5 * tokens.roll(1, 1)


def quantizer(
    weight: Tensor, format: str, block_size: int, method: str, backend: str, given: dict[str, Any]
) -> Callable[[], object]:
    return lambda: quantize(weight, format, block_size, method, backend=backend, check_finite=False, **given)


def dequantizer(weight: Tensor, format: str, block_size: int) -> Case:
    q, few = (quantize(rows, format, block_size, "naive") for rows in (weight, weight[:WARM_ROWS]))
    return Case(
        "kernel",
        "quantkit",
        "dequantize",
        lambda: q.dequantize(weight.dtype),
        weight.nbytes + q.codes.nbytes + q.scales.nbytes,
        format,
        block_size,
        "triton",
        "given",
        lambda: few.dequantize(weight.dtype),
    )


def block_hessian_cases(columns: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    from quantkit.kernels import launch

    activations = torch.randn(TOKENS, columns, device=device, dtype=dtype)
    for block_size in (16, 32):
        yield Case(
            "kernel",
            "quantkit",
            "block_hessians",
            lambda b=block_size: launch.block_hessians(activations, b),  # type: ignore[misc]
            activations.nbytes + 4 * columns * block_size,
            "",
            block_size,
            "triton",
            warm_up=lambda b=block_size: launch.block_hessians(activations[:WARM_ROWS], b),  # type: ignore[misc]
        )


def qwantize_cases(weight: Tensor) -> Iterator[Case]:
    rows, columns = weight.shape
    if importlib.util.find_spec("qwantize"):
        import qwantize

        tokens = sample_tokens(weight)
        for block_size in (16, 32):
            blocked = weight.reshape(rows, columns // block_size, block_size)
            for format, method, name in (
                ("nvfp4", "naive", "nvfp4_naive_triton"),
                ("nvfp4", "sse", "nvfp4_optimal_triton"),
                ("nvfp4", "hessian", "nvfp4_optimal_hessian_triton"),
                ("mxfp4", "naive", "mxfp4_naive_triton"),
                ("mxfp4", "sse", "mxfp4_optimal_triton"),
            ):
                function = getattr(qwantize, name)
                inputs = {"X": tokens} if method == "hessian" else {}
                yield Case(
                    "peer",
                    "qwantize",
                    method,
                    lambda f=function, w=blocked, i=inputs: f(w, dim=-1, **i),  # type: ignore[misc]
                    weight.nbytes + 4 * weight.numel() + 4 * weight.numel() // block_size,
                    format,
                    block_size,
                    "triton",
                    "none",
                )


def modelopt_cases(weight: Tensor) -> Iterator[Case]:
    if importlib.util.find_spec("modelopt"):
        from modelopt.torch.kernels.quantization import gemm

        tokens = sample_tokens(weight)
        block_size = 16
        amax = weight.abs().amax().float()
        blocks = tokens.unflatten(1, (-1, block_size))
        hessian = torch.einsum("tbi,tbj->bij", blocks, blocks).contiguous()
        flat = weight.reshape(-1, block_size)
        scale_bytes = 4 * weight.numel() // block_size
        for method, call, moved in (
            ("naive", lambda: gemm.fp4_fake_quant_block(weight, amax, block_size), 2 * weight.nbytes),
            ("sse", lambda: gemm.nvfp4_fp8_scale_sweep(flat, amax, block_size), weight.nbytes + scale_bytes),
            (
                "hessian",
                lambda: gemm.nvfp4_fp8_scale_sweep_hessian(flat, amax, hessian, block_size),
                weight.nbytes + scale_bytes + hessian.nbytes,
            ),
        ):
            yield Case("peer", "modelopt", method, call, moved, "nvfp4", block_size, "triton", "given")


class Clock:
    """Times calls on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.flush = torch.empty(FLUSH_BYTES if self.cuda else 0, dtype=torch.int8, device=device)

    def prepare(self, case: Case) -> None:
        """Compile, warm up, and capture the call in a graph where it can be."""
        case.call()
        if case.warm_up is not None:
            case.warm_up()
        start = time.perf_counter()
        case.call()
        self.wait()
        if time.perf_counter() - start > SLOW_S:
            case.limit = SLOW_ROUNDS
        elif self.cuda:
            case.graph = self.capture(case.call)

    def capture(self, call: Callable[[], object]) -> Any:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                call()
        except RuntimeError:  # it waits for the device
            torch.cuda.synchronize()
            return None
        graph.replay()
        self.wait()
        return graph

    def settle(self, case: Case) -> None:
        """Measures and forgets."""
        for _ in range(SETTLING):
            self.time_gpu(dataclasses.replace(case, gpu_us=[]))

    def time_gpu(self, case: Case) -> None:
        if not self.cuda or len(case.gpu_us) >= case.limit:
            return
        work = case.graph.replay if case.graph is not None else case.call
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        case.gpu_us.append(1e3 * begin.elapsed_time(end))

    def time_call(self, case: Case) -> None:
        if len(case.call_us) >= case.limit:
            return
        if self.cuda:
            for _ in range(1 if case.graph is None else WARM_CALLS):
                (case.warm_up or case.call)()
            self.flush.zero_()
        self.wait()
        start = time.perf_counter()
        case.call()
        self.wait()
        case.call_us.append(1e6 * (time.perf_counter() - start))

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def bandwidth(self) -> float | None:
        """Bytes a second of a copy that no cache helps, read and written counted; None on a CPU."""
        if not self.cuda:
            return None
        source = torch.ones(LARGE_COPY_BYTES // 2, dtype=torch.int8, device="cuda")
        target = torch.empty_like(source)
        case = Case("copy", "torch", "copy", lambda: target.copy_(source), LARGE_COPY_BYTES)
        self.prepare(case)
        for _ in range(10):
            self.time_gpu(case)
        return LARGE_COPY_BYTES / (1e-6 * statistics.median(case.gpu_us))


def quantiles(times: list[float]) -> tuple[float | None, float | None, float | None]:
    """(median, 20 %, 80 %)."""
    if not times:
        return None, None, None
    values = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(round(float(v), 3) for v in values)  # type: ignore[return-value]


def cases_of(shape: tuple[int, int], options: argparse.Namespace) -> tuple[list[Case], list[Iterator[Case]]]:
    """Ours, and each peer's, which is imported when the first of its cases is asked for."""
    rows, columns = shape
    weight = sample_weight(rows, columns).to(options.device, getattr(torch, options.dtype))
    block_sizes = tuple(int(b) for b in options.block_sizes.split(","))
    ours = list(cases(weight, options.backends.split(","), block_sizes))
    if options.block_hessians and weight.is_cuda:
        ours += block_hessian_cases(columns, weight.dtype, options.device)
    return ours, [] if options.no_peers or not weight.is_cuda else [qwantize_cases(weight), modelopt_cases(weight)]


def compile_ahead(arguments: list[str], jobs: int) -> None:
    """Fills Triton's cache, which takes most of a benchmark's time where it is empty: each process calls some cases."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    processes = [subprocess.Popen([*command, "--compile", f"{job}/{jobs}"]) for job in range(jobs)]
    for process in processes:
        process.wait()  # an error there will show here


def compile_share(options: argparse.Namespace) -> None:
    """What one of these processes does: calls every ``jobs``-th of the first shape's cases that Triton compiles."""
    job, jobs = (int(number) for number in options.compile.split("/"))
    options.block_hessians = False  # two kernels, soon compiled, whose activations would fill a GPU many times over
    ours, peers = cases_of(options.shapes[0], options)
    for case in [case for case in (*ours, *available(peers)) if case.backend == "triton"][job::jobs]:
        try:
            case.call()
            if case.warm_up is not None:
                case.warm_up()
        except Exception:
            if case.kind != "peer":  # a peer that cannot run is reported by the measurement
                raise


def available(peers: list[Iterator[Case]]) -> Iterator[Case]:
    """The cases of those peers that can be imported."""
    for peer in peers:
        try:
            yield from peer
        except Exception as error:
            print(f"{getattr(peer, '__name__', 'peer')} left out: {error!r:.200}", file=sys.stderr)


def run_shape(
    shape: tuple[int, int], clock: Clock, bandwidth: float | None, options: argparse.Namespace
) -> list[BenchRow]:
    rows, columns = shape
    ours, peers = cases_of(shape, options)
    quick = [case for case in ours if case.backend != "reference"]  # kernels, the copy, the launch
    reference = [case for case in ours if case.backend == "reference"]
    for case in quick:
        clock.prepare(case)
    for _ in range(options.rounds):
        for case in quick:
            clock.time_call(case)
    others = []
    for case in (*reference, *available(peers)):
        try:
            clock.prepare(case)
        except Exception as error:
            if case.kind != "peer":
                raise
            print(f"{case.tool} {case.operation} {case.format} left out: {error!r:.200}", file=sys.stderr)
            continue
        others.append(case)
    for _ in range(options.rounds):
        clock.settle(quick[0])
        for case in quick:
            clock.time_gpu(case)
        for case in others:
            clock.time_gpu(case)
            clock.time_call(case)
    ready = [*ours, *(case for case in others if case.kind == "peer")]
    copy = quantiles(next(case for case in ready if case.operation == "copy").gpu_us)[0]
    commit, dirty = git_state()
    device = device_name(options.device)
    found = versions() | {peer: v for peer in ("qwantize", "nvidia-modelopt") if (v := installed(peer))}
    lines = []
    for case in ready:
        gpu, call = quantiles(case.gpu_us), quantiles(case.call_us)
        lines.append(
            BenchRow(
                case.kind,
                case.tool,
                case.operation,
                case.format,
                case.block_size,
                case.backend,
                TOKENS if case.operation == "block_hessians" else rows,
                columns,
                options.dtype,
                case.global_scale,
                *gpu,
                *call,
                case.bytes,
                None if bandwidth is None else round(1e6 * case.bytes / bandwidth, 3),
                None if copy is None or gpu[0] is None else round(gpu[0] / copy, 3),
                len(case.call_us),
                device,
                commit,
                dirty,
                " ".join(f"{name}={version}" for name, version in found.items()),
            )
        )
    return lines


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def to_csv(lines: list[BenchRow]) -> str:
    from io import StringIO

    text = StringIO()
    writer = csv.DictWriter(text, [f.name for f in dataclasses.fields(BenchRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(line) for line in lines)
    return text.getvalue()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="main", help="main, rows, qwen3_4b, or ROWSxCOLUMNS; several by commas")
    parser.add_argument("--backends", help="triton,reference; default: triton on a GPU, else reference")
    parser.add_argument("--block-sizes", default="16,32")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--no-peers", action="store_true", help="leave out qwantize and nvidia-modelopt")
    parser.add_argument("--block-hessians", action="store_true", help=f"also of {TOKENS} tokens of activations")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(12, os.cpu_count() or 1),
        help="processes that compile the kernels before anything is timed; 1: none",
    )
    parser.add_argument("--compile", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="CSV file to write")
    options = parser.parse_args(arguments)
    known = {str(size) for fmt in FORMATS.values() for size in fmt.block_sizes}
    if not set(options.block_sizes.split(",")) <= known:
        parser.error(f"--block-sizes {options.block_sizes}: known sizes: {', '.join(sorted(known))}")
    if options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: at least 1")
    if options.device not in ("auto", "cpu") and not options.device.startswith("cuda"):
        parser.error(f"--device {options.device}: cpu, cuda, or cuda:INDEX")
    if options.backends and not set(options.backends.split(",")) <= {"triton", "reference"}:
        parser.error(f"--backends {options.backends}: known backends: triton, reference")
    try:
        options.device = resolve_device(options.device)
        options.backends = options.backends or resolve_backend("auto", options.device)
        for backend in options.backends.split(","):
            resolve_backend(backend, options.device)
        options.shapes = [shape for name in options.shapes.split(",") for shape in parse_shapes(name)]
        if options.out:  # known before anything is measured for it
            if options.out.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a folder; name a file in it")
            check_writable(options.out.parent)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {options.out} cannot be written: {error.strerror}")
    return options


def parse_shapes(name: str) -> tuple[tuple[int, int], ...]:
    if name in SETS:
        return SETS[name]
    rows, cross, columns = name.partition("x")
    if not (cross and rows.isdigit() and columns.isdigit() and int(columns) % 32 == 0 and int(rows) and int(columns)):
        raise ValueError(f"--shapes {name}: use {', '.join(SETS)}, or ROWSxCOLUMNS with columns divisible by 32")
    return ((int(rows), int(columns)),)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.compile:
        compile_share(options)
        return 0
    if options.jobs > 1 and options.device.startswith("cuda") and "triton" in options.backends:
        compile_ahead(sys.argv[1:] if arguments is None else arguments, options.jobs)
    clock = Clock(options.device)
    bandwidth = clock.bandwidth()
    lines: list[BenchRow] = []
    try:
        for shape in dict.fromkeys(options.shapes):
            found = run_shape(shape, clock, bandwidth, options)
            lines += found
            if options.out:
                write_atomically(options.out, to_csv(lines))
            show(found)
    except KeyboardInterrupt:
        print(f"\nInterrupted; {len(lines)} lines were measured.", file=sys.stderr)
        return 130
    return 0


def show(lines: list[BenchRow]) -> None:
    for line in lines:
        times = f"{line.gpu_us_median or line.call_us_median:10.1f} µs"
        ratio = f"{line.ratio_to_copy:7.2f} × copy" if line.ratio_to_copy else ""
        what = f"{line.tool} {line.operation} {line.format} {line.block_size or ''} {line.global_scale} {line.backend}"
        print(
            f"{line.rows:6d}x{line.columns:<5d} {what:55s} {times} {ratio}  call {line.call_us_median:.1f}", flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
