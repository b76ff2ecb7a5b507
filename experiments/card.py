"""Put evaluations into the model card of an export.

    python experiments/card.py FOLDER RECORD [RECORD ...]

FOLDER: an export of quantize_model.py. RECORD: a folder of evaluate.py, or its record.json. The table replaces what the
card's section Evaluation told before; all else stays.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's folder first on the path, where `config` or `files` would shadow other packages' modules.
    sys.path.pop(0)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.evaluation_record import EvaluationRecord
from experiments.files import write_atomically
from experiments.record import RECORD_NAME, RecordError, read_record_of
from experiments.sources.exported import CARD_NAME


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        path = update(arguments.folder, arguments.records)
    except (RecordError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="an export of quantize_model.py")
    parser.add_argument("records", type=Path, nargs="+", help="folders of evaluate.py, or their record.json")
    return parser.parse_args(argv)


def update(folder: Path, records: list[Path]) -> Path:
    """The changed card. Raises RecordError, ValueError or OSError for what is no card or no evaluation."""
    from experiments.model.card import with_evaluations

    paths = [path / RECORD_NAME if path.is_dir() else path for path in records]
    found = [read_record_of(EvaluationRecord, path) for path in paths]
    card = folder / CARD_NAME
    try:
        text = with_evaluations(card.read_text(encoding="utf-8"), found)
    except ValueError as error:
        raise ValueError(f"{card}: {error}") from None
    write_atomically(card, text)
    return card


if __name__ == "__main__":
    sys.exit(main())
