"""Frames → figures. `FIGURES` lists all of them, with title, caption, data, drawing function and size.

A figure is drawn at its final size in a two-column paper, as PDF and PNG, beside the CSV file of its data. Colour and
hatch or marker identify the method, so that figures can be read without colour. The caption names the subject. Needs
matplotlib without a window or pyplot, and no torch.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    Locator,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from experiments.reporting import figure_data
from experiments.reporting.figure_data import Sources
from experiments.reporting.labels import FORMATS, METHODS
from experiments.reporting.speed import GRAM_PEERS

STYLE = Path(__file__).with_name("paper.mplstyle")
FOLDER = Path("results/figures")
PICTURES = ("pdf", "png")
NARROW, WIDE = 3.4, 7.0  # inches: one column, two columns


class _Styles(dict[str, str]):
    """Name of a format or method → its style. A name without an own style gets the next spare one."""

    def __init__(self, own: dict[str, str], spare: Sequence[str]) -> None:
        super().__init__(own)
        self.spare = itertools.cycle(spare)

    def __missing__(self, name: str) -> str:
        self[name] = next(self.spare)
        return self[name]


COLOR = _Styles(
    {"naive": "#E69F00", "sse": "#0072B2", "hessian": "#009E73", "nvfp4": "#0072B2", "mxfp4": "#D55E00"}
    | {"joint": "#56B4E9", "gptq": "#CC79A7", "descent": "#D55E00", "other": "#666666"},
    ("#56B4E9", "#000000", "#F0E442"),
)
MARKER = _Styles(
    {"naive": "o", "sse": "s", "hessian": "^", "nvfp4": "o", "mxfp4": "s"}
    | {"joint": "v", "gptq": "D", "descent": "P", "other": "X"},
    "DPX*",
)
HATCH = _Styles({"naive": "", "sse": "//////", "hessian": "xxxxxx"}, ("......", "++++++", "oooooo"))
LINE = _Styles({"naive": ":", "sse": "--", "hessian": "-", "nvfp4": "-", "mxfp4": "--"}, ("-.", ":"))
GREY = "#666666"
BETTER_OR_WORSE = "RdBu"  # diverging: blue is better than naive, red is worse


@dataclass(frozen=True)
class Plot:
    """A figure of the paper. `data` returns an empty frame if records are absent, and `needs` names these records."""

    name: str
    title: str
    caption: str
    needs: str
    data: Callable[[Sources], pd.DataFrame]
    draw: Callable[[Figure, pd.DataFrame], None]
    width: float
    height: float

    def figure(self, frame: pd.DataFrame) -> Figure:
        with matplotlib.style.context(STYLE):
            figure = Figure(figsize=(self.width, self.height))
            self.draw(figure, frame)
            return figure

    def pictures(self, frame: pd.DataFrame) -> dict[str, bytes]:
        """File name → bytes, the same for the same frame."""
        files = {}
        with matplotlib.style.context(STYLE):
            figure = self.figure(frame)
            for kind, metadata in (("pdf", {"CreationDate": None, "Producer": None}), ("png", {"Software": None})):
                out = io.BytesIO()
                figure.savefig(out, format=kind, metadata=metadata)
                files[f"{self.name}.{kind}"] = out.getvalue()
        return files

    def text(self, frame: pd.DataFrame) -> str:
        """The caption and the sources of the numbers."""
        return f"{self.caption} {stands_on(frame)}"

    def markdown(self, frame: pd.DataFrame, folder: str = "") -> str:
        return f"![{self.title}]({folder}{self.name}.png)\n\n{self.text(frame)}\n"


def make_frames(sources: Sources) -> dict[str, pd.DataFrame]:
    """Name → data of every figure; empty where its records are absent."""
    return {plot.name: plot.data(sources) for plot in FIGURES}


def frame_csv(frame: pd.DataFrame) -> str:
    # Ten digits, because the last ones of a float64 may differ between machines.
    return frame.to_csv(index=False, lineterminator="\n", float_format="%.10g")


def figures_page(frames: dict[str, pd.DataFrame]) -> str:
    """All figures with captions, as a Markdown page beside the pictures. Figures without data name what they need."""
    parts = [
        "# Figures\n\nWritten by `python experiments/report.py`, with the data of each in the CSV file of its name.\n"
    ]
    for plot in FIGURES:
        frame = frames[plot.name]
        shown = plot.markdown(frame) if len(frame) else f"Not drawn: {plot.needs}.\n"
        parts.append(f"## {plot.title}\n\n{shown}")
    return "\n".join(parts)


def stands_on(frame: pd.DataFrame) -> str:
    """The common sources of a frame's lines, in sentences: model, layer, text, matrix, device, commits."""

    def all_of(name: str) -> list[Any]:
        return list(frame[name].dropna().unique()) if name in frame else []

    def only(name: str) -> Any:
        values = all_of(name)
        return values[0] if len(values) == 1 else None

    layer = [f"layer {only('layer_index')}"] if only("layer_index") is not None else []
    layer += [str(only("layer_module"))] if only("layer_module") is not None else []
    size = [f"block size {only('block_size')}"] if only("block_size") is not None else []
    calibration = [f"{only('tokens_calibration'):,.0f} calibration tokens"] if only("tokens_calibration") else []
    heldout = [f"{only('tokens_heldout'):,.0f} held out"] if only("tokens_heldout") else []
    measured = [str(only("model")), " ".join(layer), *size, f"text {only('data')}", *calibration, *heldout]
    sentences = []
    if only("model") is not None:
        sentences += [f"{', '.join(part for part in measured if part)}.", *all_of("model_origin")]
    if only("rows") is not None:
        sentences.append(f"Timed on a {only('rows')} × {only('columns')} {only('dtype')} matrix, {only('device')}.")
    elif only("device") is not None:
        sentences.append(f"Timed on {only('dtype')} matrices of {only('columns')} columns, {only('device')}.")
    names = ("commit", "commit_error", "commit_timing")
    commits = dict.fromkeys(str(value)[:10] for name in names for value in all_of(name))
    if commits:
        sentences.append(f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}.")
    return " ".join(sentences)


def draw_output_error(figure: Figure, frame: pd.DataFrame) -> None:
    panels = _panels(figure, frame, "block_size", sharey=True)
    for axes, (size, part) in panels:
        for method, place, rows in _bars(axes, part):
            axes.bar(place, 100 * rows["output_error"], _bar_width(part), **_filled(method))
            axes.plot(
                place, 100 * rows["output_error_heldout"], ls="", marker="D", ms=3, mfc="white", mec="black", mew=0.7
            )
        axes.set_title(f"block size {size}")
    figure.axes[0].set_ylabel("output error, %")
    held_out = Line2D([], [], ls="", marker="D", ms=3, mfc="white", mec="black", mew=0.7, label="held out")
    _legend(figure, [*_method_patches(frame), *([held_out] if frame["output_error_heldout"].notna().any() else [])])


def draw_block_size(figure: Figure, frame: pd.DataFrame) -> None:
    modules = list(frame["layer_module"].unique())
    for axes, (fmt, part) in _panels(figure, frame, "format", sharey=True):
        methods = part["method"].nunique()
        for nth, (method, rows) in enumerate(_by(part, "method")):
            offset = (nth - (methods - 1) / 2) * 0.75 / methods
            table = rows.pivot(index="layer_module", columns="block_size", values="output_error_heldout").reindex(
                modules
            )
            place = [index + offset for index in range(len(modules))]
            axes.vlines(place, 100 * table.min(axis=1), 100 * table.max(axis=1), color=COLOR[method], lw=1)
            for size, fill in zip(table.columns, ("full", "none"), strict=False):
                axes.plot(place, 100 * table[size], ls="", marker=MARKER[method], color=COLOR[method], ms=3.8,
                          mfc=COLOR[method] if fill == "full" else "white", mew=0.8)  # fmt: skip
        axes.set_xticks(range(len(modules)), [name.rpartition(".")[2].removesuffix("_proj") for name in modules])
        axes.tick_params(axis="x", length=0)
        axes.set_title(FORMATS.get(fmt, fmt))
    figure.axes[0].set_ylabel("output error, held out, %")
    figure.axes[0].set_ylim(bottom=0)
    _legend(figure, [*_method_markers(frame), *_size_markers(frame)])


def draw_weight_and_output_error(figure: Figure, frame: pd.DataFrame) -> None:
    axes = figure.subplots()
    _trails(axes, frame, 100 * frame["weight_error"])
    axes.grid(True, axis="x")
    axes.set(xlabel="weight error, %", ylabel="output error, %")
    _legend(figure, _method_markers(frame), [*_size_markers(frame), *_format_lines(frame)])


def draw_scale_shift(figure: Figure, frame: pd.DataFrame) -> None:
    _histograms(figure, frame, "shift", "scale index, optimal − naive")


def draw_candidates(figure: Figure, frame: pd.DataFrame) -> None:
    _histograms(figure, frame, "candidates", "scales evaluated")


def draw_one_block(figure: Figure, frame: pd.DataFrame) -> None:
    labels = {"sse": "squared error", "hessian": "r H rᵀ"}
    inside = frame.loc[frame["in_window"], "code"]
    near = (inside.min() - 6, inside.max() + 6)
    panels = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1.4))
    for axes, limits in zip(panels, ((frame["code"].min(), frame["code"].max()), near), strict=True):
        for height, (objective, part) in zip((0.95, 0.85), _by(frame, "objective"), strict=True):
            color = COLOR[objective]
            window = part.loc[part["in_window"], "code"]
            ends = (window.min() - 0.5, window.max() + 0.5)
            axes.axvspan(*ends, color=color, alpha=0.1, lw=0)
            axes.plot(
                ends, (height, height), color=color, lw=4, solid_capstyle="butt", transform=axes.get_xaxis_transform()
            )
            if axes is panels[1]:
                axes.text(
                    ends[1] + 0.3,
                    height,
                    f"window of {labels[objective]}",
                    va="center",
                    transform=axes.get_xaxis_transform(),
                )
            close = {"marker": MARKER[objective], "ms": 2.6} if axes is panels[1] else {}
            axes.plot(part["code"], part["error_to_least"], LINE[objective], color=color, **close)
            if axes is panels[1]:
                best = part.sort_values("error_to_least")["code"].iloc[0]
                axes.plot(best, 1, "*", ms=9, mfc=color, mec="black", mew=0.5, zorder=5)
        for code in frame.loc[frame["chosen_by"].str.contains("naive"), "code"].unique():
            axes.axvline(code, color=COLOR["naive"], ls=LINE["naive"])
        axes.set(xlabel="scale code", yscale="log", xlim=limits, ylim=(0.7, 6 * frame["error_to_least"].max()))
    panels[0].set(title="all scales", ylabel="error / least error")
    panels[1].set(title="around the windows")
    _legend(
        figure,
        [
            *(
                Line2D([], [], color=COLOR[name], ls=LINE[name], marker=MARKER[name], ms=3, label=label)
                for name, label in labels.items()
            ),
            Line2D([], [], ls="", marker="*", ms=7, mfc="white", mec="black", mew=0.5, label="optimum"),
            Line2D([], [], color=COLOR["naive"], ls=LINE["naive"], label="naive scale"),
        ],
    )


def draw_layers(figure: Figure, frame: pd.DataFrame) -> None:
    formats, methods = list(frame["format"].unique()), list(frame["method"].unique())
    modules, indices = list(frame["layer_module"].unique()), sorted(frame["layer_index"].unique())
    grid = figure.subplots(len(formats), len(methods), sharex=True, sharey=True, squeeze=False)
    percent = ScalarMappable(_around_zero(100 * frame["reduction"]), cmap=BETTER_OR_WORSE)
    for row, fmt in zip(grid, formats, strict=True):
        for axes, method in zip(row, methods, strict=True):
            part = frame[(frame["format"] == fmt) & (frame["method"] == method)]
            table = part.pivot(index="layer_module", columns="layer_index", values="reduction").reindex(
                modules, columns=indices
            )
            axes.imshow(100 * table.to_numpy(dtype=float), aspect="auto", norm=percent.norm, cmap=percent.cmap)
            axes.grid(False)
            axes.set_title(f"{FORMATS.get(fmt, fmt)}, {METHODS.get(method, method)}")
            axes.set_yticks(range(len(modules)), [name.rpartition(".")[2].removesuffix("_proj") for name in modules])
            step = max(1, round(len(indices) / 6))
            axes.set_xticks(range(0, len(indices), step), indices[::step])
            axes.spines[:].set_visible(False)
            axes.tick_params(length=0)
    for axes in grid[-1]:
        axes.set_xlabel("decoder layer")
    bar = figure.colorbar(percent, ax=grid, label="output error below naive's, %", aspect=30, pad=0.01)
    bar.ax.axhline(0, color="black", lw=0.8)
    colors = matplotlib.colormaps[BETTER_OR_WORSE]
    bar.ax.set_title("better", fontsize="medium", color=colors(0.9))
    bar.ax.set_xlabel("worse", fontsize="medium", color=colors(0.1))


def _around_zero(values: pd.Series) -> TwoSlopeNorm:
    """A norm with white at zero and the strongest colours at the least and the largest value. Without negative values,
    it is symmetric."""
    most = max(values.max(), 1.0)
    return TwoSlopeNorm(0, vmin=values.min() if values.min() < 0 else -most, vmax=most)


def draw_calibration_size(figure: Figure, frame: pd.DataFrame) -> None:
    styles: dict[str, dict[str, Any]] = {
        "output_error_heldout": {"color": COLOR["hessian"], "marker": MARKER["hessian"], "label": "Hessian, held out"},
        "output_error": {"color": GREY, "ls": "--", "label": "Hessian, calibration tokens"},
    }
    for axes, (fmt, part) in _panels(figure, frame, "format"):
        hessian = part[part["method"] == "hessian"]
        for column, style in styles.items():
            spread = 100 * hessian.groupby("tokens_calibration")[column].agg(["mean", "min", "max"])
            axes.fill_between(spread.index, spread["min"], spread["max"], color=style["color"], alpha=0.2, lw=0)
            axes.plot(spread.index, spread["mean"], **style)
        for value in part.loc[part["method"] == "sse", "output_error_heldout"]:
            axes.axhline(100 * value, color=COLOR["sse"], ls=LINE["naive"])
        axes.set(xscale="log", xlabel="calibration tokens", title=FORMATS.get(fmt, fmt))
    figure.axes[0].set_ylabel("output error, %")
    handles = [Line2D([], [], **style) for style in styles.values()]
    if (frame["method"] == "sse").any():
        handles.append(Line2D([], [], color=COLOR["sse"], ls=LINE["naive"], label="SSE, held out"))
    _legend(figure, handles)


def draw_global_scale(figure: Figure, frame: pd.DataFrame) -> None:
    for axes, (name, part) in _panels(figure, frame, "format", sharey=True):
        for method, lines in _by(part, "method"):
            for scale, line, fill in (("none", "-", "full"), ("amax", "--", "none")):
                rows = lines[lines["global_scale"] == scale]
                axes.plot(rows["weight_std"], 100 * rows["weight_error"], line, color=COLOR[method],
                          marker=MARKER[method], mfc=COLOR[method] if fill == "full" else "white", ms=3)  # fmt: skip
        axes.set(title=FORMATS.get(name, name), xscale="log", yscale="log", xlabel="standard deviation of the weight")
        _plain_ticks(axes.yaxis, FixedLocator([8, 10, 15, 20, 30, 50, 100]))
    figure.axes[0].set_ylabel("weight error, %")
    styles = [
        Line2D([], [], color=GREY, ls=line, marker="o", mfc=fill, ms=3, label=label)
        for line, fill, label in (("-", GREY, "filled: no global scale"), ("--", "white", "open, dashed: from amax"))
    ]
    figure.legend(handles=styles, loc="outside lower center", ncols=len(styles))
    _legend(figure, _method_markers(frame))


def draw_gram_time(figure: Figure, frame: pd.DataFrame) -> None:
    axes = figure.subplots()
    own, peers = frame[frame["tool"] == "quantkit"], frame[frame["tool"] != "quantkit"]
    axes.plot(own["ms_median"], 100 * own["output_error"], color=GREY, lw=0.7, zorder=1)
    for line in own.to_dict("records"):
        axes.plot(line["ms_median"], 100 * line["output_error"], MARKER[line["method"]], color=COLOR[line["method"]])
    for number, line in enumerate(peers.to_dict("records")):
        at = (line["ms_median"], 100 * line["output_error"])
        axes.plot(*at, MARKER["other"], color=COLOR["other"])
        method = line["method"].replace("gptq", "GPTQ").replace("_", " ")
        label = f"{GRAM_PEERS.get(line['tool'], line['tool'])} {method}"
        above = 5 if number == 1 else 0  # its label would touch the next one's
        axes.annotate(label, at, xytext=(6, above), textcoords="offset points", va="center")
    axes.set(xscale="log", xlabel="GPU time, ms", ylabel="output error, %", xlim=(None, 30 * frame["ms_median"].max()))
    _legend(figure, _method_markers(own))


def draw_layer_calibration(figure: Figure, frame: pd.DataFrame) -> None:
    for axes, (layer, part) in _panels(figure, frame, "layer_index"):
        for (fmt, name), rows in part.groupby(["format", "method"], sort=False):
            spread = 100 * rows.groupby("tokens_calibration")["output_error_heldout"].agg(["mean", "min", "max"])
            style: dict[str, Any] = {"color": COLOR[str(name)], "ls": LINE[str(fmt)]}
            axes.fill_between(spread.index, spread["min"], spread["max"], color=style["color"], alpha=0.2, lw=0)
            axes.plot(spread.index, spread["mean"], marker=MARKER[str(name)], ms=3, **style)
        axes.axvline(part["in_features"].iloc[0], color=GREY, ls=":")
        axes.set(xscale="log", xlabel="calibration tokens", title=f"layer {layer}")
    figure.axes[0].set_ylabel("output error, held out, %")
    bound = Line2D([], [], color=GREY, ls=":", label="as many as channels")
    _legend(figure, [*_method_markers(frame), bound])


def draw_scale_grids(figure: Figure, frame: pd.DataFrame) -> None:
    grids = list(dict.fromkeys(frame["scales"]))
    for axes, (elements, part) in _panels(figure, frame, "elements", sharey=True):
        for method, rows in _by(part, "method"):
            place = [grids.index(name) for name in rows["scales"]]
            axes.plot(
                place, 100 * rows["output_error_heldout"], ls="", marker=MARKER[method], color=COLOR[method], ms=4
            )
        axes.set_xticks(range(len(grids)), grids)
        axes.set(title=elements, xlim=(-0.5, len(grids) - 0.5))
    figure.axes[0].set_ylabel("output error, held out, %")
    figure.axes[0].set_ylim(bottom=0)
    _legend(figure, _method_markers(frame))


def draw_speed_up(figure: Figure, frame: pd.DataFrame) -> None:
    for axes, (size, part) in _panels(figure, frame, "block_size", sharey=True):
        for method, place, rows in _bars(axes, part):
            spread = [rows["speed_up"] - rows["low"], rows["high"] - rows["speed_up"]]
            axes.bar(
                place, rows["speed_up"], _bar_width(part), yerr=spread, error_kw={"elinewidth": 0.8}, **_filled(method)
            )
            for x, high, value in zip(place, rows["high"], rows["speed_up"], strict=True):
                axes.annotate(
                    f"{value:.0f}" if value >= 10 else f"{value:.1f}",
                    (x, high),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    va="bottom",
                )
        axes.set(title=f"block size {size}", yscale="log")
    figure.axes[0].set_ylim(min(1, frame["low"].min() / 2), frame["high"].max() * 2)
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    figure.axes[0].set_ylabel("PyTorch time / Triton time")
    _legend(figure, _method_patches(frame))


def draw_time_error(figure: Figure, frame: pd.DataFrame) -> None:
    axes = figure.subplots()
    floor = frame["floor_us"].dropna()
    if len(floor):
        axes.axvspan(floor.min() * 0.98, floor.max() * 1.02, color=GREY, alpha=0.35, lw=0)
    axes.hlines(100 * frame["output_error"], frame["us_20"], frame["us_80"], color=GREY, lw=0.8)
    _trails(axes, frame, frame["us_median"])
    axes.grid(True, axis="x")
    axes.set(xscale="log", xlabel="time on the GPU, µs", ylabel="output error, %")
    _plain_ticks(axes.xaxis, LogLocator(subs=(1, 2, 5)))
    floors = [Patch(color=GREY, alpha=0.35, lw=0, label="memory floor")] if len(floor) else []
    _legend(figure, [*_method_markers(frame), *floors], [*_size_markers(frame), *_format_lines(frame)])


OF_OPERATION: dict[str, dict[str, Any]] = {
    "dequantize": {"color": "#CC79A7", "marker": "v"},
    "copy": {"color": GREY, "ls": "--"},
}


def draw_scaling(figure: Figure, frame: pd.DataFrame) -> None:
    kernels = frame[frame["format"].notna()]
    for axes, (name, part) in _panels(figure, kernels, "format", sharey=True):
        for operation, rows in _by(pd.concat([frame[frame["operation"] == "copy"], part]), "operation"):
            style = OF_OPERATION.get(operation) or {"color": COLOR[operation], "marker": MARKER[operation]}
            axes.plot(rows["rows"], rows["us_per_mb"], ms=3, lw=0.9, **style)
            if operation != "copy":
                further = rows.dropna(subset=["us_per_further_mb"])
                axes.plot(further["rows"], further["us_per_further_mb"], ":", lw=0.9, color=style["color"])
        axes.set(title=FORMATS.get(name, name), xscale="log", yscale="log", xlabel="rows of the weight")
        _plain_ticks(axes.xaxis, FixedLocator([256, 1024, 4096, 16384, 65536]), ",.0f")
        _plain_ticks(axes.yaxis, LogLocator(subs=(1, 2, 5)))
    figure.axes[0].set_ylabel("µs per MB read and written")
    methods = kernels[kernels["operation"].isin(METHODS)].rename(columns={"operation": "method"})
    others = [Line2D([], [], ms=3, lw=0.9, label=name, **style) for name, style in OF_OPERATION.items()]
    lines = [
        Line2D([], [], marker="o", ms=3, lw=0.9, color=GREY, label="marks: a call's time over all its MB"),
        Line2D([], [], ls=":", lw=0.9, color=GREY, label="dotted: time added by doubling the rows, over the MB added"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=2)
    _legend(figure, [*_method_markers(methods), *others])


GROUP, GAP = 0.87, 0.03  # widths of a format's group of bars and of the gap between bars; formats are 1 apart


def draw_kl_bits(figure: Figure, frame: pd.DataFrame) -> None:
    axes = _kl_points(figure, frame, "bits_per_weight")
    axes.set(xlabel="bits per quantized weight, scales included", ylabel="KL, nats a token")


def draw_kl_time(figure: Figure, frame: pd.DataFrame) -> None:
    axes = _kl_points(figure, frame, "quantize_s")
    axes.set(xscale="log", xlabel="time to quantize, s", ylabel="KL, nats a token")


LEGEND_COLUMNS = 4  # of a narrow figure


def _kl_points(figure: Figure, frame: pd.DataFrame, x: str) -> Axes:
    """KL with its interval over `x`; colour and marker by method, filled for block size 16."""
    axes = figure.subplots()
    for line in frame.to_dict("records"):
        color, fill = COLOR[line["method"]], line["block_size"] == frame["block_size"].min()
        spread = [[line["kl_mean"] - line["kl_low"]], [line["kl_high"] - line["kl_mean"]]]
        style: dict[str, Any] = {"marker": MARKER[line["method"]], "color": color, "mfc": color if fill else "white"}
        bars = None if pd.isna(spread[0][0]) else spread
        axes.errorbar(line[x], line["kl_mean"], yerr=bars, ls="", elinewidth=0.8, capsize=1.5, **style)
    axes.set_yscale("log")
    methods = _method_markers(frame)
    _legend(figure, methods[:LEGEND_COLUMNS], [*methods[LEGEND_COLUMNS:], *_size_markers(frame)])
    return axes


def draw_kl_position(figure: Figure, frame: pd.DataFrame) -> None:
    axes = figure.subplots()
    handles = []
    for label, part in frame.groupby("name", sort=False):
        method = part["method"].iloc[0]
        (line,) = axes.plot(part["position"] + 1, part["kl_mean"], marker=MARKER[method], ms=3, lw=0.9)
        handles.append(Line2D([], [], color=line.get_color(), marker=MARKER[method], ms=3, label=str(label)))
    axes.set(xscale="log", yscale="log", xlabel="tokens before the prediction", ylabel="KL, nats a token")
    figure.legend(handles=handles, loc="outside lower center", fontsize=7)


def draw_kl_layers(figure: Figure, frame: pd.DataFrame) -> None:
    axes = figure.subplots()
    lines = []
    for name, part in frame.groupby("layer_module", sort=False):
        dashes = "--" if "self_attn" in str(name) else "-"  # there are more modules than colours
        label = name or "whole layer"
        lines += axes.plot(part["layer_index"], part["kl_mean"], dashes, marker=".", lw=0.9, label=label)
    axes.set(yscale="log", xlabel="decoder layer", ylabel="KL of this layer alone, nats a token")
    figure.legend(handles=lines, loc="outside right upper", fontsize=7)


def _plain_ticks(axis: Axis, at: Locator, form: str = "g") -> None:
    """Ticks of a logarithmic axis only at these places, labelled with numbers instead of powers."""
    axis.set_major_locator(at)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))


def _panels(
    figure: Figure, frame: pd.DataFrame, by: str, **options: Any
) -> Iterator[tuple[Axes, tuple[Any, pd.DataFrame]]]:
    parts = list(_by(frame, by))
    row = figure.subplots(1, len(parts), squeeze=False, **options)[0]
    return zip(row, parts, strict=True)


def _by(frame: pd.DataFrame, column: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """(value, rows) for each value of the column, in the order of their first occurrence."""
    return iter(frame.groupby(column, sort=False))


def _bars(axes: Axes, frame: pd.DataFrame) -> Iterator[tuple[str, list[float], pd.DataFrame]]:
    """(method, positions, rows) of grouped bars, one group per format."""
    formats, methods = list(frame["format"].unique()), list(frame["method"].unique())
    axes.set_xticks(range(len(formats)), [FORMATS.get(name, name) for name in formats])
    axes.tick_params(axis="x", length=0)
    for index, method in enumerate(methods):
        rows = frame[frame["method"] == method]
        shift = (index - (len(methods) - 1) / 2) * (_bar_width(frame) + GAP)
        yield method, [formats.index(name) + shift for name in rows["format"]], rows


def _bar_width(frame: pd.DataFrame) -> float:
    return GROUP / frame["method"].nunique() - GAP


def _trails(axes: Axes, frame: pd.DataFrame, x: pd.Series) -> None:
    """Output error over `x`: a marker per method, and a thin line through the methods of one format and block size."""
    sizes = sorted(frame["block_size"].unique())
    for (fmt, size), part in frame.groupby(["format", "block_size"], sort=False):
        axes.plot(x[part.index], 100 * part["output_error"], LINE[str(fmt)], color=GREY, lw=0.7, zorder=1)
        for at, error, method in zip(x[part.index], part["output_error"], part["method"], strict=True):
            axes.plot(at, 100 * error, MARKER[method], color=COLOR[method], ms=4.5, mew=0.9,
                      mfc=COLOR[method] if size == sizes[0] else "white")  # fmt: skip


def _histograms(figure: Figure, frame: pd.DataFrame, value: str, label: str) -> None:
    """Panels with one column per format and one row per block size; the methods' bars are side by side."""
    formats, sizes = list(frame["format"].unique()), list(frame["block_size"].unique())
    spans = [frame.loc[frame["format"] == name, value] for name in formats]
    widths = [span.max() - span.min() + 8 for span in spans]
    grid = figure.subplots(len(sizes), len(formats), sharex="col", sharey="col", squeeze=False, width_ratios=widths)
    methods = list(frame["method"].unique())
    width = 0.9 / len(methods)
    behind = {"facecolor": "white", "lw": 0, "pad": 1}
    for axes_row, size in zip(grid, sizes, strict=True):
        for axes, fmt in zip(axes_row, formats, strict=True):
            part = frame[(frame["format"] == fmt) & (frame["block_size"] == size)]
            for index, method in enumerate(methods):
                rows = part[part["method"] == method]
                place = rows[value] + (index - (len(methods) - 1) / 2) * width
                axes.bar(place, rows["share"], width, **_outlined(method))
            axes.text(0.98, 0.97, f"block {size}", transform=axes.transAxes, ha="right", va="top", bbox=behind)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes, fmt in zip(grid[0], formats, strict=True):
        axes.set_title(FORMATS.get(fmt, fmt))
    figure.supylabel("share of blocks")
    figure.supxlabel(label)
    _legend(figure, [Patch(**_outlined(name), label=METHODS.get(name, name)) for name in methods])


def _filled(method: str) -> dict[str, Any]:
    return {"facecolor": COLOR[method], "hatch": HATCH[method], "edgecolor": "white", "lw": 0.4}


def _outlined(method: str) -> dict[str, Any]:
    """Bar style without a hatch, for narrow bars: those of hessian are open."""
    return {"facecolor": "white" if method == "hessian" else COLOR[method], "edgecolor": COLOR[method], "lw": 0.6}


def _method_patches(frame: pd.DataFrame) -> list[Patch]:
    return [Patch(**_filled(name), label=METHODS.get(name, name)) for name in frame["method"].unique()]


def _method_markers(frame: pd.DataFrame) -> list[Line2D]:
    return [
        Line2D([], [], ls="", marker=MARKER[name], color=COLOR[name], label=METHODS.get(name, name))
        for name in frame["method"].unique()
    ]


def _size_markers(frame: pd.DataFrame) -> list[Line2D]:
    sizes = sorted(frame["block_size"].unique())
    return [
        Line2D([], [], ls="", marker="o", color=GREY, mfc=fill, label=f"block {size}")
        for size, fill in zip(sizes, (GREY, "white"), strict=False)
    ]


def _format_lines(frame: pd.DataFrame) -> list[Line2D]:
    return [
        Line2D([], [], ls=LINE[name], color=GREY, lw=0.7, label=FORMATS.get(name, name))
        for name in frame["format"].unique()
    ]


def _legend(figure: Figure, *rows: list[Any]) -> None:
    """A legend above the panels, in these rows."""
    columns = max(map(len, rows))
    nothing = Line2D([], [], ls="", label="")
    padded = [[*row, *[nothing] * (columns - len(row))] for row in rows]
    # matplotlib fills a legend column by column.
    figure.legend(handles=[row[i] for i in range(columns) for row in padded], loc="outside upper center", ncols=columns)


def _experiment(name: str) -> str:
    return (
        f"results/records/{name}.jsonl has no such runs; run `python experiments/run.py -m experiment={name}` and "
        f"`python experiments/report.py --collect {name} --from results/runs/{name}`"
    )


EVALUATIONS_MISSING = (
    "results/records/model.jsonl has no such evaluations; run "
    "`python experiments/evaluate.py model.path=FOLDER{extra}` and "
    "`python experiments/report.py --collect model --from results/runs/model`"
)
TIMES_MISSING = (
    "no device has timed all compared settings; run `python experiments/run.py -m experiment=timing` on a GPU and "
    "`python experiments/report.py --collect timing --from results/runs/timing`, or put a benchmark in results/bench"
)

FIGURES = (
    Plot(
        "output_error",
        "Output error by format and method",
        "Relative output error ‖XW_qᵀ − XWᵀ‖ / ‖XWᵀ‖ on the calibration tokens (bars) and on tokens held out (marks).",
        _experiment("main"),
        figure_data.output_error,
        draw_output_error,
        NARROW,
        2.0,
    ),
    Plot(
        "weight_and_output_error",
        "Weight error and output error",
        "The least weight error is not the least output error: Hessian scales have more weight error and less output "
        "error. Thin lines join the methods of one format and block size: solid NVFP4, dashed MXFP4.",
        _experiment("main"),
        figure_data.weight_and_output_error,
        draw_weight_and_output_error,
        NARROW,
        2.4,
    ),
    Plot(
        "block_size",
        "Error against block size",
        "Output error on held-out tokens at block size 16 (filled) and 32 (open), for the linear modules of one "
        "decoder layer.",
        _experiment("block_size"),
        figure_data.block_size,
        draw_block_size,
        WIDE,
        2.2,
    ),
    Plot(
        "scale_shift",
        "How far the optimal scale lies from the naive one",
        "Share of blocks by the index of the chosen scale minus the index of the naive scale. A step of the index is "
        "one E4M3 value for NVFP4 and a factor of two for MXFP4.",
        _experiment("scale_distance"),
        figure_data.scale_shift,
        draw_scale_shift,
        NARROW,
        2.6,
    ),
    Plot(
        "candidates",
        "Scales evaluated for a block",
        "Share of blocks by the number of scales that the exact search evaluated. Exhaustive search would evaluate all "
        "126 positive E4M3 scales for NVFP4, all 255 UE8M0 scales for MXFP4.",
        _experiment("scale_distance"),
        figure_data.candidates,
        draw_candidates,
        NARROW,
        2.6,
    ),
    Plot(
        "one_block",
        "The error of one block at every scale, with the proven windows",
        "Squared error and Hessian error r H rᵀ of one block at every scale, each over its least value. The "
        "bars and bands are the windows that provably hold the optima (stars). This block's Hessian optimum lies "
        "outside the window of the squared error, so each objective needs its own window.",
        "results/records/one_block.json is not there; run `python experiments/one_block.py`",
        figure_data.one_block,
        draw_one_block,
        WIDE,
        2.3,
    ),
    Plot(
        "layers",
        "Output error saved in every layer and module",
        "Share of the naive scales' output error, on held-out tokens, that the searched scales remove. Blue: less "
        "error than naive; red: more. The two sides of the colour bar have different lengths.",
        _experiment("layers"),
        figure_data.layers,
        draw_layers,
        WIDE,
        3.0,
    ),
    Plot(
        "calibration_size",
        "Calibration tokens and output error",
        "Output error of Hessian scales by the number of calibration tokens: mean over the seeds, band from the least "
        "to the largest. Dotted: SSE scales, which need no tokens, on the held-out tokens of the seed that has them.",
        _experiment("calibration_size"),
        figure_data.calibration_size,
        draw_calibration_size,
        WIDE,
        2.1,
    ),
    Plot(
        "global_scale",
        "NVFP4 with and without a global scale",
        "Weight error of NVFP4 with and without a global scale, by the standard deviation of a Gaussian weight. "
        "Without one, block scales fall among E4M3's subnormals on the left, and saturate on the right.",
        _experiment("global_scale"),
        figure_data.global_scale,
        draw_global_scale,
        NARROW,
        2.3,
    ),
    Plot(
        "time_error",
        "Time and output error",
        "Output error over the median time of the Triton kernels, with bars from the 20 % to the 80 % point. Memory "
        "floor: the time in which the device copies the bytes that must be read and written. Times and errors "
        "come from different matrices. Thin lines: solid NVFP4, dashed MXFP4.",
        TIMES_MISSING,
        figure_data.time_error,
        draw_time_error,
        NARROW,
        2.5,
    ),
    Plot(
        "gram_time",
        "Time and output error of all methods and of other tools' GPTQ",
        "Output error over the median GPU time of the Triton kernels and of other tools' GPTQ, for one weight and the "
        "Gram matrix of synthetic activations, under which the error is measured. Block Hessians and the Gram matrix "
        "are given.",
        "results/bench has no timings on a Gram matrix; run `python experiments/bench.py --gram --formats nvfp4 "
        "--block-sizes 16 --out results/bench/NAME.csv` on a GPU",
        figure_data.gram_time,
        draw_gram_time,
        WIDE,
        2.6,
    ),
    Plot(
        "layer_calibration",
        "Held-out error of whole-layer methods against calibration tokens",
        "Output error on held-out tokens by the number of calibration tokens: mean over the seeds, band from the least "
        "to the largest. Dotted: as many tokens as the layer has input channels.",
        _experiment("layer_calibration"),
        figure_data.layer_calibration,
        draw_layer_calibration,
        WIDE,
        2.1,
    ),
    Plot(
        "scale_grids",
        "Scale grids, elements and methods",
        "Output error on held-out tokens by the grid of the block scales, for E2M1 and for INT4 elements. E4M3 has a "
        "global scale.",
        _experiment("scale_grids"),
        figure_data.scale_grids,
        draw_scale_grids,
        WIDE,
        2.1,
    ),
    Plot(
        "speed_up",
        "Triton speed-up",
        "Median time of the PyTorch reference over the median time of Triton, for whole calls on the same device. "
        "Error bars pair the 20 % point of one with the 80 % point of the other.",
        TIMES_MISSING,
        figure_data.speed_up,
        draw_speed_up,
        NARROW,
        2.2,
    ),
    Plot(
        "scaling",
        "Time against the size of the weight",
        "Median GPU time per byte that must be read and written, at block size 16. PyTorch's copy of the weight is "
        "slower in a CUDA graph if it reads and writes more than 1 GB. Each time includes at least one launch "
        "(`launch` in the data). The time of Hessian includes the factorization, which does not grow with the rows. "
        "Dotted: the time that doubling the rows adds, over the bytes that it adds.",
        "results/bench has no timings of three or more numbers of rows; run `python experiments/bench.py --shapes rows "
        "--out results/bench/NAME.csv` on a GPU",
        figure_data.scaling,
        draw_scaling,
        WIDE,
        2.4,
    ),
    Plot(
        "kl_bits",
        "KL against bits",
        "KL of the model with all linear layers quantized to the model itself, over the bits of a quantized weight. "
        "Bars: 95 % interval over sequences; over several calibration seeds, the least and the largest.",
        EVALUATIONS_MISSING.format(extra=""),
        figure_data.kl_bits,
        draw_kl_bits,
        NARROW,
        2.5,
    ),
    Plot(
        "kl_time",
        "KL against time",
        "KL over the time that quantizing the whole model took, calibration included. Bars as in the figure of bits.",
        EVALUATIONS_MISSING.format(extra=""),
        figure_data.kl_time,
        draw_kl_time,
        NARROW,
        2.5,
    ),
    Plot(
        "kl_position",
        "KL by position",
        "Mean KL by the number of tokens before the predicted one, in groups that double, of the five models with the "
        "least KL.",
        EVALUATIONS_MISSING.format(extra=""),
        figure_data.kl_position,
        draw_kl_position,
        WIDE,
        3.2,
    ),
    Plot(
        "kl_layers",
        "Which layers cost most",
        "KL with one layer quantized at a time, the rest in the model's own precision.",
        EVALUATIONS_MISSING.format(extra=" evaluate.layers=true"),
        figure_data.kl_layers,
        draw_kl_layers,
        WIDE,
        2.4,
    ),
)
