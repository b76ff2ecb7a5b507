"""Times of every method × format × block size × backend on one device, beside a copy and the installed peers.

    python experiments/bench.py --out results/bench/NAME.csv
    python experiments/bench.py --shapes 2560x9728 --backends triton --rounds 50
    python experiments/bench.py --gram --formats nvfp4 --block-sizes 16 --rounds 10

measure/bench_clock.py describes the two clocks, measure/bench_rows.py the order of the measurements, and
measure/bench_peers.py what the peers compute. `floor_us` is the time for reading or writing each byte once, at the
bandwidth of a large copy in the same process. `ratio_to_copy` is gpu_us over that of a copy of the same weight. The
line `launch` adds two numbers, which gives the least time of any kernel.

With `--gram`, every method is timed on one Gram matrix, gptq and descent too, beside the peers' GPTQ. `output_error` is
in percent, under this matrix (measure/bench_gram.py). A peer that is not installed, or cannot run, has a line whose
`note` says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.files import check_writable, write_atomically
from experiments.measure.bench_cases import TOKENS
from experiments.measure.bench_clock import Clock
from experiments.measure.bench_peers import available
from experiments.measure.bench_rows import BenchRow, Settings, cases_of, run_shape, to_csv
from experiments.provenance import resolve_device
from quantkit import FORMATS, resolve_backend

QWEN3_4B = ((4096, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (2560, 9728))  # q, k and v, o, gate and up, down
MAIN = ((2560, 9728),)
ROWS = tuple((rows, 9728) for rows in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536))
SETS = {"main": MAIN, "qwen3_4b": QWEN3_4B, "rows": ROWS}


def settings_of(options: argparse.Namespace) -> Settings:
    return Settings(
        device=options.device,
        dtype=options.dtype,
        backends=options.backends.split(","),
        block_sizes=[int(size) for size in options.block_sizes.split(",")],
        rounds=options.rounds,
        peers=not options.no_peers,
        block_hessians=options.block_hessians,
        formats=options.formats.split(","),
        gram=options.gram,
    )


def compile_ahead(arguments: list[str], jobs: int) -> None:
    """Fill Triton's cache in several processes, each of which calls some cases. Compiling takes most of the time."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    processes = [subprocess.Popen([*command, "--compile", f"{job}/{jobs}"]) for job in range(jobs)]
    for process in processes:
        process.wait()  # this process repeats the call, and then reports its error


def compile_share(options: argparse.Namespace) -> None:
    """The work of one process of compile_ahead: call every ``jobs``-th of the first shape's Triton cases."""
    job, jobs = (int(number) for number in options.compile.split("/"))
    # Without block Hessians: their two kernels compile fast, and each process would allocate their activations. With
    # a Gram matrix, its methods use the kernels of the other cases.
    settings = dataclasses.replace(settings_of(options), block_hessians=False, gram=False)
    ours, peers = cases_of(options.shapes[0], settings)
    for case in [case for case in (*ours, *available(peers)) if case.backend == "triton"][job::jobs]:
        try:
            case.call()
            if case.warm_up is not None:
                case.warm_up()
        except Exception:
            if case.kind != "peer":  # a peer that cannot run is reported by the measurement
                raise


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default="main", help="main, rows, qwen3_4b, or ROWSxCOLUMNS; several by commas")
    parser.add_argument("--backends", help="triton,reference; default: triton on a GPU, else reference")
    parser.add_argument("--block-sizes", default="16,32")
    parser.add_argument("--formats", default=",".join(FORMATS), help="some of the known formats, by commas")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--no-peers", action="store_true", help="leave out the other tools")
    parser.add_argument("--block-hessians", action="store_true", help=f"also time block Hessians of {TOKENS} tokens")
    parser.add_argument("--gram", action="store_true", help="time every method and output error on one Gram matrix")
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
    if not set(options.formats.split(",")) <= set(FORMATS):
        parser.error(f"--formats {options.formats}: known formats: {', '.join(FORMATS)}")
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
        if options.out:  # checked before anything is measured
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
    settings = settings_of(options)
    clock = Clock(settings.device)
    bandwidth = clock.bandwidth()
    lines: list[BenchRow] = []
    try:
        for shape in dict.fromkeys(options.shapes):
            found = run_shape(shape, clock, bandwidth, settings)
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
        what = f"{line.tool} {line.operation} {line.format} {line.block_size or ''} {line.global_scale} {line.backend}"
        if line.note:
            print(f"{line.rows:6d}x{line.columns:<5d} {what:55s} {line.note}", flush=True)
            continue
        times = f"{line.gpu_us_median or line.call_us_median:10.1f} µs"
        ratio = f"{line.ratio_to_copy:7.2f} × copy" if line.ratio_to_copy else ""
        error = f"  output error {line.output_error:.3f} %" if line.output_error is not None else ""
        print(
            f"{line.rows:6d}x{line.columns:<5d} {what:55s} {times} {ratio}  call {line.call_us_median:.1f}{error}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
