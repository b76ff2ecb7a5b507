"""Generates the documentation's tables from the library's description of the formats and from the records.

Each function returns Markdown. `write` puts it into files that the pages include. Needs no torch.
"""

from __future__ import annotations

import csv
import re
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from quantkit.bounds import has_windows, sse_window_factors
from quantkit.formats import FORMATS, BlockFormat, ElementGrid, ScaleGrid

ROOT = Path(__file__).resolve().parent.parent


def write(folder: Path) -> None:
    """Write every generated text to a file in `folder`. Unchanged files are kept, so Sphinx does not reread them."""
    texts = {
        "formats": formats_table(),
        "elements": elements_table(FORMATS["nvfp4"].element),
        "int4": elements_table(FORMATS["nvint4"].element),
        "ties": ties_table(FORMATS["nvfp4"].element),
        "scale_grids": scale_grids_table(),
        "e4m3": fractional_scales_table(FORMATS["nvfp4"].scale),
        "windows": windows_table(),
        "results": results(ROOT),
    }
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def formats_table() -> str:
    return markdown_table(
        ("Format", "Elements", "Scales", "Block sizes", "Bits per weight", "Global scale", "Naive scale rules"),
        (
            (
                f"`{fmt.name}`",
                fmt.element.name.upper(),
                fmt.scale.name.upper(),
                ", ".join(map(str, fmt.block_sizes)),
                ", ".join(f"{fmt.bits_per_weight(size):g}" for size in fmt.block_sizes),
                f"`{fmt.default_global_scale}`" + ("" if fmt.two_level else " (it has no other)"),
                ", ".join(f"`{rule}`" for rule in fmt.scale_rules),
            )
            for fmt in FORMATS.values()
        ),
    )


def elements_table(grid: ElementGrid) -> str:
    width = grid.bits - 1
    return markdown_table(
        ("Code", *(f"`{code:0{width}b}`" for code in range(grid.max_code + 1))),
        (("Magnitude", *(f"{value:g}" for value in grid.magnitudes)),),
    )


def ties_table(grid: ElementGrid) -> str:
    """The midpoints of neighbouring levels and the level with the even code, to which they are rounded."""
    ties = []
    for code in range(grid.max_code):
        even = code if code % 2 == 0 else code + 1
        ties.append(((grid.value(code) + grid.value(code + 1)) / 2, grid.value(even)))
    return markdown_table(
        ("Midpoint", *(f"{tie:g}" for tie, _ in ties)), (("is rounded to", *(f"{value:g}" for _, value in ties)),)
    )


def scale_grids_table() -> str:
    grids = dict.fromkeys(fmt.scale for fmt in FORMATS.values())
    return markdown_table(
        ("Grid", "Exponent bits", "Mantissa bits", "Bias", "Codes", "Smallest scale", "Largest scale"),
        (
            (
                grid.name.upper(),
                grid.exponent_bits,
                grid.mantissa_bits,
                grid.bias,
                f"{grid.min_code} … {grid.max_code}",
                _power(grid.min_value),
                _power(grid.max_value) if grid.is_power_of_two else f"{grid.max_value:g}",
            )
            for grid in grids
        ),
    )


def fractional_scales_table(grid: ScaleGrid) -> str:
    """Every positive value of a grid with a mantissa, in units of the smallest: a row per binade, subnormals first."""
    steps = 1 << grid.mantissa_bits
    rows = []
    for start in range(0, grid.max_code + 1, steps):
        codes = range(start, start + steps)
        cells = [f"{grid.value(c) / grid.min_value:.0f}" if grid.min_code <= c <= grid.max_code else "–" for c in codes]
        rows.append((f"{start} … {start + steps - 1}", *cells))
    return markdown_table(("Codes", *(f"+{step}" for step in range(steps))), rows)


def windows_table() -> str:
    rows: list[tuple[object, ...]] = []
    for fmt in FORMATS.values():
        for size in fmt.block_sizes:
            number = fmt.scale.max_code - fmt.scale.min_code + 1
            if not has_windows(fmt.element):
                rows.append((f"`{fmt.name}`", size, "–", "–", "–", number, number))
                continue
            lower, upper = sse_window_factors(fmt.element, size)
            rows.append(
                (
                    f"`{fmt.name}`",
                    size,
                    f"{lower:.4f}",
                    f"{upper:.4f}",
                    f"{upper / lower:.2f}",
                    most_candidates(fmt, size),
                    number,
                )
            )
    return markdown_table(
        ("Format", "Block size", "Above … × amax", "Below … × amax", "Ratio", "Most scales inside", "Of all"), rows
    )


def most_candidates(fmt: BlockFormat, block_size: int) -> int:
    """The largest number of scales in an open window, at any position among the scales with a half and a double.

    The number is largest when a scale lies just inside the lower end.
    """
    lower, upper = sse_window_factors(fmt.element, block_size)
    grid = fmt.scale
    values = [grid.value(code) for code in range(grid.last_code_without_half + 1, grid.max_code + 1)]
    ratio = upper / lower
    return max(
        sum(first <= value < first * ratio for value in values) for first in values if first * ratio <= grid.max_value
    )


def results(root: Path) -> str:
    """All existing figures with their captions, and a list of the CSV files."""
    text = ""
    page = root / "results" / "figures" / "README.md"
    if page.exists():
        figures = re.sub(r"^#", "##", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
        # The page's links are relative to its own folder.
        text = re.sub(r"(!\[[^\]]*\]\()", r"\1/../results/figures/", figures)
    files = [path for folder in ("", "published") for path in sorted((root / "results" / folder).glob("*.csv"))]
    listed = markdown_table(("File", "Rows", "Columns"), (_csv_row(root, path) for path in files))
    return f"{text}\n\n## Files\n\n{listed}"


def _csv_row(root: Path, path: Path) -> tuple[str, int, int]:
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return f"`{path.relative_to(root).as_posix()}`", len(rows), len(header)


def _power(value: float) -> str:
    """A power of two as a TeX formula."""
    exponent = (struct.unpack("<q", struct.pack("<d", value))[0] >> 52) - 1023
    assert value == 2.0**exponent, value
    return f"$2^{{{exponent}}}$"


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
