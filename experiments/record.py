"""One run, one record: the fields of `RunRecord`, in order, are the columns of the CSV.

A record is a JSON object in its run's folder, written last and atomically, so a record that exists is complete.
Errors are fractions (0.0945 is 9.45 %), times are milliseconds unless the name says otherwise. Imports no torch: the
report reads records without it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from experiments.files import parse_json, sealed, unsealed, write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEMA_VERSION = 1
RECORD_NAME = "record.json"
BLOCKS_NAME = "blocks.parquet"
WEIGHTS_NAME = "weights.safetensors"
# Fields that older records lack.
LATER_FIELDS = ("weight_std", "scale_shifts", "candidate_counts", "verified_wrong_codes")
# Fields of few runs. A record without a value leaves them out, and so does a CSV without any.
SPARSE_FIELDS = (
    "method_settings",
    "hessian_weighting",
    "hessian_groups",
    "hessian_samples",
    "hessian_matmul",
    "objective",
    "verified_to_hessian",
)
STATUSES = ("ok", "unsupported", "failed")

# Distributions over a run's blocks: name → (counts, edges), with one more edge than counts.
Histograms = Mapping[str, tuple[Sequence[int], Sequence[float]]]


class RecordError(ValueError):
    """A file that is not a record of this version."""


@dataclass(frozen=True)
class Record:
    """What the records of every kind have in common: one JSON object, of which each field is a column of the CSV."""

    VERSION: ClassVar[int]
    LATER: ClassVar[tuple[str, ...]] = ()  # fields that older records lack
    SPARSE: ClassVar[tuple[str, ...]] = ()  # fields of few runs, left out where they are None

    run_id: str
    sweep: str
    status: str  # ok, unsupported or failed
    reason: str | None  # why it is not ok, in one line

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise RecordError(f"Record status {self.status!r} is none of {', '.join(STATUSES)}.")

    def to_dict(self) -> dict[str, Any]:
        """Field name → plain value, in column order. NaN and infinity become None: JSON has neither.

        SPARSE fields that are None are left out.
        """
        values = dataclasses.asdict(self)
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
            if not (v is None and k in self.SPARSE)
        }

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of its fields, in order."""
        return tuple(f.name for f in dataclasses.fields(cls))

    @classmethod
    def known(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the values that are fields."""
        return {name: value for name, value in values.items() if name in cls.fields()}

    @classmethod
    def from_dict(cls, values: Any, where: str = "record") -> Self:
        if not isinstance(values, dict):
            raise RecordError(f"{where}: expected a JSON object, found {type(values).__name__}.")
        version = values.get("schema_version")
        if version != cls.VERSION:
            raise RecordError(
                f"{where}: schema_version {version!r}, but this code reads {cls.VERSION}; "
                "delete it or run it again with force=true."
            )
        unknown = sorted(values.keys() - set(cls.fields()))
        missing = sorted(set(cls.fields()) - values.keys() - {*cls.LATER, *cls.SPARSE})
        if unknown or missing:
            parts = [f"unknown fields {', '.join(unknown)}"] if unknown else []
            parts += [f"missing fields {', '.join(missing)}"] if missing else []
            raise RecordError(f"{where}: {'; '.join(parts)}.")
        wrong = [name for name, value in values.items() if not isinstance(value, _types(cast(Any, cls), name))]
        if wrong:
            raise RecordError(f"{where}: {wrong[0]} is {values[wrong[0]]!r:.40}, which has the wrong type.")
        return cls(**values)

    def to_json(self, indent: int | None = None) -> str:
        """One line by default, as in a `.jsonl` file. Its last key is a checksum, by which damage is found."""
        return json.dumps(sealed(self.to_dict()), indent=indent, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "record") -> Self:
        try:
            values = parse_json(text)
        except ValueError as error:
            raise RecordError(f"{where}: not JSON ({error}).") from None
        try:
            values = unsealed(values)
        except ValueError as error:
            raise RecordError(f"{where}: damaged, {error}; delete it or run it again.") from None
        return cls.from_dict(values, where)

    def write(self, run_dir: Path | str) -> Path:
        """Write `run_dir/record.json` atomically and return its path."""
        path = Path(run_dir) / RECORD_NAME
        write_atomically(path, self.to_json(indent=2) + "\n")
        return path


@dataclass(frozen=True)
class RunRecord(Record):
    VERSION: ClassVar[int] = SCHEMA_VERSION
    LATER: ClassVar[tuple[str, ...]] = LATER_FIELDS
    SPARSE: ClassVar[tuple[str, ...]] = SPARSE_FIELDS

    format: str
    block_size: int
    method: str
    backend: str  # the one that ran
    requested_backend: str
    device: str
    device_name: str | None = None
    global_scale: str | float | None = None  # the configured rule or number; the format's default where it is null
    scale_rule: str | None = None
    method_settings: dict[str, Any] | None = None  # None for a method without settings
    # For a method with loss-weighted Hessians; None if all tokens have the same weight.
    hessian_weighting: str | None = None
    hessian_groups: int | None = None
    hessian_samples: int | None = None
    hessian_matmul: str | None = None  # None: float32

    model: str | None = None
    model_revision: str | None = None
    model_origin: str | None = None
    tokenizer: str | None = None
    data: str | None = None
    data_hash: str | None = None
    data_split: str | None = None
    substituted: bool | None = None  # an offline twin replaced the configured model or text
    layer_index: int | None = None
    layer_module: str | None = None
    out_features: int | None = None
    in_features: int | None = None
    weight_dtype: str | None = None
    weight_std: float | None = None
    seq_len: int | None = None
    sequences: int | None = None
    tokens_calibration: int | None = None
    tokens_heldout: int | None = None
    heldout: float | None = None
    seed: int | None = None

    weight_error: float | None = None
    output_error: float | None = None  # on the calibration tokens
    output_error_heldout: float | None = None
    bits_per_weight: float | None = None
    scales_moved: float | None = None  # share of blocks whose scale differs from the naive one
    candidates_mean: float | None = None  # scales evaluated per block
    candidates_max: int | None = None
    objective: list[float] | None = None  # of descent: after gptq and after each sweep
    # With record.blocks=true: number of blocks by shift of the scale's index from naive, and by candidates.
    scale_shifts: dict[str, int] | None = None
    candidate_counts: dict[str, int] | None = None

    time_ms_median: float | None = None
    time_ms_p20: float | None = None
    time_ms_p80: float | None = None
    time_iterations: int | None = None
    time_timer: str | None = None
    time_device: str | None = None

    verified_blocks: int | None = None  # with verify=true; by the method's own objective, squared error for naive
    verified_violations: int | None = None
    verified_worst_excess: float | None = None
    verified_wrong_codes: int | None = None
    # With verify=true, for a method of the whole layer, whose blocks cannot be judged one by one: its squared output
    # error on the calibration tokens over that of method hessian.
    verified_to_hessian: float | None = None

    commit: str | None = None
    dirty: bool | None = None
    versions: dict[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    started_at: str | None = None  # UTC, ISO 8601
    duration_s: float | None = None
    schema_version: int = SCHEMA_VERSION


FIELDS: tuple[str, ...] = RunRecord.fields()


@functools.cache
def _types(kind: Any, name: str) -> tuple[type, ...]:
    """What the annotation of a field allows, in JSON: a whole number is a float, too."""
    known = {
        "str": (str,),
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "None": (type(None),),
    }
    words = [word.strip() for word in str(next(f.type for f in dataclasses.fields(kind) if f.name == name)).split("|")]
    return tuple(t for word in words for t in known.get(word, (list,) if word.startswith("list[") else (dict,)))


R = TypeVar("R", bound=Record)


def read_record(path: Path | str) -> RunRecord:
    """Raises RecordError for a file that is no record of this version."""
    return read_record_of(RunRecord, path)


def read_record_of(kind: type[R], path: Path | str) -> R:
    """Like read_record, for a record of another kind."""
    path = Path(path)
    return kind.from_json(_text(path), where=str(path))


def read_records(folder: Path | str, damaged: list[str] | None = None) -> list[RunRecord]:
    """Every `*/record.json` and every line of every `*.jsonl` in `folder`, by file name. A missing folder has none.

    damaged: a list that collects the errors of damaged files. Without it, the first one raises RecordError.
    """
    return read_records_of(RunRecord, folder, damaged)


def read_records_of(kind: type[R], folder: Path | str, damaged: list[str] | None = None) -> list[R]:
    """Like read_records, for records of another kind."""
    records = []
    for where, text in _record_texts(Path(folder)):
        try:
            records.append(kind.from_json(text(), where))
        except RecordError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
    return records


def _record_texts(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """(location, function that reads its text) of each record."""
    for path in sorted(folder.glob(f"*/{RECORD_NAME}")):
        yield str(path), functools.partial(_text, path)
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(_text(path).splitlines(), start=1):
            if line.strip():
                yield f"{path}:{number}", functools.partial(str, line)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecordError(f"{path}: not UTF-8 text.") from None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror}).") from None
