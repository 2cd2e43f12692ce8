"""A results file as a table and a plot, next to it and in the README.

python -m benchmarks.report benchmarks/results/<device>/encoder.json [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TypedDict, cast

import matplotlib
from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.peak import Peak
from bert_fast.benchmarking import Row, format_table, has_line_per_contender
from bert_fast.folders import read_json

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

#: Of the bars.
BERT_FAST_COLOR, PEER_COLORS = "#2a6fb0", colormaps["Set2"]


class Result(TypedDict):
    """What `benchmarks.run` writes."""

    command: str
    date: str  # UTC, ISO 8601
    commit: str | None  # None outside a git checkout
    dirty: bool | None  # whether tracked or new files differed from the commit
    device: str
    threads: int
    versions: dict[str, str | None]  # None where a package is not installed
    load_average: dict[str, list[float]]  # "before" and "after" the run: over 1, 5 and 15 minutes
    peak: Peak
    rows: list[Row]


def save(result: Result, path: Path) -> None:
    """Write the results file, with its table (`.md`) and plot (`.svg`) next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "bert_fast"}):  # this and no date: the same figures, the same file
        plot(result["rows"]).savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    path.with_suffix(".md").write_text(markdown(result, path.with_suffix(".svg").name), encoding="utf-8")


def read(path: Path) -> Result:
    """A results file; ValueError, naming the file, when it is not one."""
    values = read_json(path)
    if missing := Result.__required_keys__ - values.keys():
        raise ValueError(f"{path} is not a benchmark result: it has no {', '.join(sorted(missing))}")
    return cast(Result, values)


def markdown(result: Result, plot_path: str) -> str:
    """What was measured where, by which command; the table; and the plot."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    peaks = ", ".join(f"{i['dtype']} {i['gops']:.0f} ({i['instruction']})" for i in result["peak"]["instructions"])
    baseline = next(iter(result["rows"][0]["contenders"]))
    commit = f"commit {result['commit'][:12]}" if result["commit"] else "no commit"
    return f"""\
{result["device"]}, {result["threads"]} threads, {commit}{" with changes" if result["dirty"] else ""}, \
load average {result["load_average"]["before"][0]:.1f} before the run; {versions}.
What the machine can do, in 10^9 operations per second: {peaks}; memory copy {result["peak"]["copy_gbs"]:.0f} GB/s.

    {result["command"]}

{format_table(result["rows"])}

{_legend(result["rows"])}

![Speed relative to {baseline}]({plot_path})
"""


def _legend(rows: list[Row]) -> str:
    """What the columns of the table mean."""
    baseline = next(iter(rows[0]["contenders"]))
    with_peers = has_line_per_contender(rows)
    to_best = "\nto best: the time of the fastest other contender over bert_fast's;" if with_peers else ""
    precision = " in float32,\nwhich is what it runs in where a row is int8" if with_peers else ""
    return (
        f"Medians of interleaved rounds, in milliseconds; ratio: the time of {baseline} over this one's;{to_best}\n"
        f"GFLOP/s: work on real tokens only; error: relative, against the answer of {baseline}{precision}."
    )


def splice(text: str, table: str) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: a marker is missing or there twice, or the end comes first.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{marker} is there {text.count(marker)} times, expected once")
    head, rest = text.split(BEGIN)
    if END not in rest:
        raise ValueError(f"{END} comes before {BEGIN}")
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n\n{table}\n{END}{tail}"


def plot(rows: list[Row]) -> Figure:
    """Bars of the ratios to the first contender, one group per row; a contender that a row has not leaves a gap."""
    baseline = next(iter(rows[0]["contenders"]))
    names = list(dict.fromkeys(name for row in rows for name in list(row["contenders"])[1:]))
    names.sort(key="bert_fast".__eq__)  # which is last
    labels = [f"{row['model']}  {row['case']}  {row['dtype']}" for row in rows]
    height = 0.8 / len(names)
    figure = Figure(figsize=(7, 0.8 + (0.1 + 0.22 * len(names)) * len(rows)))
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for index, name in enumerate(names):
        there = [(place, row["contenders"][name]) for place, row in enumerate(rows) if name in row["contenders"]]
        places = [place + (index + 0.5) * height - 0.4 for place, _ in there]
        color = BERT_FAST_COLOR if name == "bert_fast" else PEER_COLORS(index)
        bars = axes.barh(places, [measured["ratio"] for _, measured in there], height, label=name, color=color)
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # under the label, over the line at 1
        axes.bar_label(bars, fmt="%.2fx", padding=3, fontsize=8, bbox=white)
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(f"speed relative to {baseline} (1 = as fast)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(names) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=min(3, len(names)))
    return figure


def main() -> None:
    """Make the table and the plot of a results file anew, and put the table into a README."""
    parser = argparse.ArgumentParser(description="The table and the plot of a results file.")
    parser.add_argument("result", type=Path, help="benchmarks/results/<device>/encoder.json")
    parser.add_argument("--readme", type=Path, help=f"file to put the table into, between {BEGIN} and {END}")
    options = parser.parse_args()
    try:
        result = read(options.result)
        save(result, options.result)
        if options.readme:
            plot_path = os.path.relpath(options.result.with_suffix(".svg"), options.readme.parent)
            text = splice(options.readme.read_text(encoding="utf-8"), markdown(result, plot_path))
            options.readme.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(format_table(result["rows"]))


if __name__ == "__main__":
    main()
