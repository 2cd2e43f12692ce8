"""The plots of a results file: speed against every peer, throughput over sizes of batches, and the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.cases import SWEEP
from benchmarks.peak import Peak, best
from benchmarks.peers import CONTENDERS
from benchmarks.tables import SUBJECT, best_peer
from bert_fast.benchmarking import Row

#: Colours that people with colour blindness can tell apart (Okabe and Ito), in the order of `CONTENDERS`.
COLORS = dict(
    zip(
        CONTENDERS,
        ("#7f7f7f", "#b8b8b8", "#cc79a7", "#f0e442", "#e69f00", "#56b4e9", "#d55e00", "#009e73", "#1f4e9c"),
        strict=True,
    )
)
CASE_MARKERS = ("o", "s", "^", "D", "v", "P")


def figures(rows: Sequence[Row], sweep: Sequence[Row], peak: Peak) -> dict[str, Figure]:
    """Those of `report.TITLES` that the rows have the figures for."""
    made = {}
    if any(len(row["contenders"]) > 1 for row in rows):
        made["ratios"] = ratios(rows)
    if sweep:
        made["throughput"] = throughput(sweep)
    if rows:
        made["roofline"] = roofline(rows, peak)
    return made


def ratios(rows: Sequence[Row]) -> Figure:
    """For each model and dtype a panel, for each case a group of bars: the time of a contender over bert_fast's."""
    rows = [row for row in rows if len(row["contenders"]) > 1]
    figure, panels = _grid(rows, width=5.6, height=2.7)
    for axes, shown in panels:
        names = [name for name in CONTENDERS if name != SUBJECT and any(name in row["contenders"] for row in shown)]
        width = 0.84 / len(names)
        for index, name in enumerate(names):
            there = [(place, row["contenders"]) for place, row in enumerate(shown) if name in row["contenders"]]
            values = [measured[name]["median_ms"] / measured[SUBJECT]["median_ms"] for _, measured in there]
            places = [place + (index + 0.5) * width - 0.42 for place, _ in there]
            bars = axes.bar(places, values, width, color=COLORS[name])
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7, rotation=90)
        axes.axhline(1, color=COLORS[SUBJECT], linewidth=1.2)
        axes.set_xticks(range(len(shown)), [row["case"] for row in shown])
        axes.tick_params(axis="x", length=0)
        axes.margins(x=0.02, y=0.22)
        axes.set_ylim(bottom=0)
    present = [name for name in CONTENDERS if name != SUBJECT and any(name in row["contenders"] for row in rows)]
    handles = [Line2D([], [], marker="s", linestyle="", color=COLORS[name], label=name) for name in present]
    handles.append(Line2D([], [], color=COLORS[SUBJECT], label=f"{SUBJECT} = 1"))
    _finish(figure, handles, "", f"speed of {SUBJECT} relative to each")
    return figure


def throughput(rows: Sequence[Row]) -> Figure:
    """Useful GFLOP/s of every contender: a column for each series of `cases.SWEEP`, a line of panels for each dtype."""
    by_case = {(row["dtype"], row["case"]): row["contenders"] for row in rows}
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure = Figure(figsize=(11.2, 0.8 + 2.7 * len(dtypes)), layout="constrained")
    grid = figure.subplots(len(dtypes), len(SWEEP), squeeze=False)
    for (line, dtype), (column, (title, cases)) in product(enumerate(dtypes), enumerate(SWEEP.items())):
        axes = grid[line][column]
        sizes = [int(case.split("x")[column]) for case in cases]
        for name in by_case[dtype, cases[0]]:
            values = [by_case[dtype, case][name]["gflops"] for case in cases]
            emphasis = {"linewidth": 2.4, "zorder": 3} if name == SUBJECT else {"linewidth": 1.3}
            axes.plot(sizes, values, color=COLORS[name], marker="o", markersize=4, **emphasis)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_ylim(bottom=0)
        axes.set_title(f"{dtype}, {title}", fontsize=10)
        _plain(axes)
    present = [name for name in CONTENDERS if any(name in row["contenders"] for row in rows)]
    handles = [Line2D([], [], marker="o", color=COLORS[name], label=name) for name in present]
    _finish(figure, handles, "", "useful GFLOP/s")
    return figure


def roofline(rows: Sequence[Row], peak: Peak) -> Figure:
    """For each model and dtype a panel: useful GFLOP/s over FLOP per byte (`useful_bytes`), under the two roofs."""
    figure, panels = _grid(rows, width=5.6, height=2.9)
    cases = list(dict.fromkeys(_kind(row["case"]) for row in rows))
    markers = dict(zip(cases, cycle(CASE_MARKERS), strict=False))
    baseline = next(iter(rows[0]["contenders"]))
    shown_colors = {baseline: COLORS[baseline], "best peer": "#e69f00", SUBJECT: COLORS[SUBJECT]}
    for axes, shown in panels:
        intensities = [row["flops"] / row["bytes"] for row in shown]
        roof = best(peak, shown[0]["dtype"])
        x = np.geomspace(min(intensities) / 2, max(intensities) * 2, 100)
        if roof:
            axes.plot(x, np.minimum(roof, x * peak["copy_gbs"]), color="black", linewidth=1)
        for row, intensity in zip(shown, intensities, strict=True):
            for name, color in shown_colors.items():
                shown_name = best_peer(row) if name == "best peer" else name
                if shown_name not in row["contenders"]:
                    continue
                measured = row["contenders"][shown_name]
                axes.plot(intensity, measured["gflops"], marker=markers[_kind(row["case"])], color=color, linestyle="")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _plain_log(axes)
    handles = [Line2D([], [], marker="o", linestyle="", color=c, label=name) for name, c in shown_colors.items()]
    handles += [
        Line2D([], [], marker=marker, linestyle="", color="black", markerfacecolor="white", label=case)
        for case, marker in markers.items()
    ]
    handles.append(Line2D([], [], color="black", label="memory copy, then arithmetic"))
    _finish(figure, handles, "FLOP per byte of weights and activations", "useful GFLOP/s")
    return figure


def _kind(case: str) -> str:
    """The batch without its size, where models differ only in that: "32x128" and "16x128" are "full batch"."""
    if case.startswith("mix"):
        return "mixed lengths"
    if case.startswith("squad"):
        return "questions with passages"
    batch_size, seq_len = case.split("x")
    return f"1 text of {seq_len}" if batch_size == "1" else f"full batch of {seq_len}"


def _grid(rows: Sequence[Row], width: float, height: float) -> tuple[Figure, list[tuple[Axes, list[Row]]]]:
    """A panel for each model (columns) and dtype (lines) that has rows, with a title, and those rows."""
    models, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("model", "dtype"))
    figure = Figure(figsize=(width * len(models), 0.8 + height * len(dtypes)), layout="constrained")
    grid = figure.subplots(len(dtypes), len(models), squeeze=False)
    panels = []
    for (line, dtype), (column, model) in product(enumerate(dtypes), enumerate(models)):
        axes = grid[line][column]
        shown = [row for row in rows if (row["model"], row["dtype"]) == (model, dtype)]
        if not shown:
            axes.set_visible(False)
            continue
        axes.set_title(f"{model}, {dtype}", fontsize=10)
        _plain(axes)
        panels.append((axes, shown))
    return figure, panels


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    axes.set_axisbelow(True)


def _plain_log(axes: Axes) -> None:
    """Numbers as they are, instead of powers of ten."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def _finish(figure: Figure, handles: list[Line2D], below: str, beside: str) -> None:
    """The legend above the panels, and what the axes of all of them show."""
    figure.legend(handles=handles, loc="outside upper center", ncols=min(5, len(handles)), frameon=False, fontsize=9)
    figure.supxlabel(below, fontsize=9)
    figure.supylabel(beside, fontsize=9)
