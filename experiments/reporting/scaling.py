"""The benchmark as tables: how linearly the time grows with the size of the weight."""

from __future__ import annotations

from typing import Any

import pandas as pd

from experiments.reporting.labels import NONE
from experiments.reporting.speed import CASE, MATRIX, case_labels, in_order, machine_note
from experiments.reporting.table import Table

LINEAR_BYTES = 16 << 20  # for weights of at least this size, time should grow linearly


def scaling_tables(bench: pd.DataFrame) -> list[Table]:
    """How linearly GPU time grows with the rows of the weight, from LINEAR_BYTES on: one table for each device, width
    and dtype with at least two doublings of the rows."""
    timed = bench.dropna(subset=["gpu_us_median"]).drop_duplicates([*MATRIX, *CASE], keep="last")
    groups = timed.groupby(["device", "columns", "dtype"], sort=False)
    found = (_scaling_table(f"{same[1]:.0f}, {same[2]}", here) for same, here in groups)
    return [table for table in found if table is not None]


def _scaling_table(matrix: str, here: pd.DataFrame) -> Table | None:
    """The table of one matrix, named by columns and dtype; None with less than two doublings. here: its lines."""
    copies = here[here["operation"] == "copy"]
    large = copies.loc[copies["bytes"] >= 2 * LINEAR_BYTES, "rows"]
    ours = (here["tool"] == "quantkit") & (here["backend"] == "triton") & (here["operation"] != "block_hessians")
    cases = here[here["rows"].isin(large) & (ours | here.index.isin(copies.index))]
    spreads = [_spread(times) for _, times in cases.groupby(list(CASE), dropna=False)]
    found = pd.DataFrame([spread for spread in spreads if spread["doublings"] > 1])
    if found.empty:
        return None
    shown = found[found["global_scale"].ne("amax") | found["operation"].eq("amax")]
    lines = [_scaling_line(line, found) for _, line in in_order(shown).iterrows()]
    launches = here.loc[here["operation"] == "launch", "gpu_us_median"]
    notes = _scaling_notes(machine_note(cases), found["doublings"].max(), launches)
    rows = f"{large.min():,.0f} to {large.max():,.0f} rows"
    return Table(f"{rows} × {matrix}", notes, pd.DataFrame(lines))


def _scaling_line(line: pd.Series, found: pd.DataFrame) -> dict[str, str]:
    """The table's row of one case. found: the spreads of all cases, which include the same case with amax."""
    case = found[found["operation"].eq(line["operation"]) & found["format"].eq(line["format"])]
    amax = case.loc[case["block_size"].eq(line["block_size"]) & case["global_scale"].eq("amax"), "further"]
    return {
        **case_labels(line),
        "Each further MB, µs": f"{line['least']:.3f} to {line['most']:.3f}",
        "Most / least": f"{line['further']:.2f}",
        "Most / least, with amax": f"{amax.iloc[0]:.2f}" if len(amax) else NONE,
        "All MB, most / least": f"{line['whole']:.2f}",
    }


def _scaling_notes(machine: str, doublings: int, launches: pd.Series) -> tuple[str, ...]:
    least = f"; a launch alone takes {launches.median():.1f} µs" if len(launches) else ""
    return (
        machine,
        "Each further MB: the GPU time that doubling the rows adds, over the bytes that it adds; the least and the "
        f"most of the {doublings} doublings",
        "With amax: plus the pass over the weight that finds its largest magnitude",
        f"All MB: GPU time of a call over all bytes that it reads and writes{least}",
    )


def _spread(times: pd.DataFrame) -> dict[str, Any]:
    """The settings of one case, and the variation of its time per megabyte over the numbers of rows."""
    further = us_per_further_mb(times).dropna()
    whole = times["gpu_us_median"] / times["bytes"]
    return {
        **times.iloc[0][list(CASE)],
        "doublings": len(further),
        "least": further.min(),
        "most": further.max(),
        "further": further.max() / further.min(),
        "whole": whole.max() / whole.min(),
    }


def us_per_further_mb(times: pd.DataFrame, column: str = "gpu_us_median") -> pd.Series:
    """The time that doubling the rows adds, over the megabytes that it adds to read and write.

    times: one case at several numbers of rows. NaN where half the number of rows was not timed.
    """
    halves = times.set_index("rows")[[column, "bytes"]].reindex(times["rows"] / 2).set_index(times.index)
    further = times["bytes"] - halves["bytes"]
    return (times[column] - halves[column]) / (further.where(further > 0) / 1e6)
