"""How many blocks of a quantized checkpoint are not optimal for the weights that it was made from?

    python experiments/judge.py FOLDER ORIGINAL [--csv FILE]

FOLDER: NVFP4 or MXFP4 weights of quantkit, compressed-tensors (llm-compressor, AutoRound), ModelOpt, gpt-oss. ORIGINAL:
the unquantized checkpoint's folder, or a name of conf/model. Prints a line for each weight, and their sum.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.config import CacheConfig, ModelConfig, ModelSource
from experiments.files import SourceError, write_atomically
from experiments.model.evaluate_settings import original_model

if TYPE_CHECKING:
    from experiments.model.judge import Judged


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        return judge(arguments.folder, arguments.original, arguments.csv)
    except (SourceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", help="a checkpoint of FP4 codes")
    parser.add_argument("original", help="the unquantized checkpoint's folder, or a name of conf/model")
    parser.add_argument("--csv", type=Path, help="also write a row for each weight here")
    return parser.parse_args(argv)


def judge(folder: str, original: str, csv: Path | None) -> int:
    """The exit status. Raises SourceError for folders that cannot be compared."""
    from experiments.model.judge import judge_model

    quantized = ModelConfig(name=Path(folder).expanduser().resolve().name, source=ModelSource.hub, path=folder)
    rows = []
    for row in judge_model(quantized, original_model(original), CacheConfig().folder):
        rows.append(row)
        print(described(row), flush=True)
    print(summary(rows))
    if csv is not None:
        write_atomically(csv, table(rows))
    return 0


def described(row: Judged) -> str:
    return (
        f"{row.name}: {row.not_optimal:,} of {row.blocks:,} blocks not optimal, {row.wrong_codes:,} codes not nearest; "
        f"weight error {100 * row.weight_error:.3f} %, least {100 * row.least_error:.3f} %"
    )


def summary(rows: Sequence[Judged]) -> str:
    blocks, wrong = sum(row.blocks for row in rows), sum(row.not_optimal for row in rows)
    share = f" ({100 * wrong / blocks:.2f} %)" if blocks else ""
    return f"\n{len(rows)} weights: {wrong:,} of {blocks:,} blocks are not optimal by squared error{share}."


def table(rows: Sequence[Judged]) -> str:
    """CSV, a row for each weight."""
    names = list(asdict(rows[0])) if rows else []
    lines = [names, *([str(value) for value in asdict(row).values()] for row in rows)]
    return "".join(",".join(line) + "\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
