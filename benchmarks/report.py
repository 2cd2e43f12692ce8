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
from matplotlib.figure import Figure

from benchmarks.peak import Peak
from bert_fast.benchmarking import Row, format_table
from bert_fast.folders import read_json

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

#: Of the bars, counted from the last contender, which is bert_fast.
COLORS = ("#b8b8b8", "#2a6fb0")


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
    commit = f"commit {result['commit'][:12]}" if result["commit"] else "no commit"
    return f"""\
{result["device"]}, {result["threads"]} threads, {commit}{" with changes" if result["dirty"] else ""}, \
load average {result["load_average"]["before"][0]:.1f} before the run; {versions}.
What the machine can do, in 10^9 operations per second: {peaks}; memory copy {result["peak"]["copy_gbs"]:.0f} GB/s.

    {result["command"]}

{format_table(result["rows"])}

Medians of interleaved rounds, in milliseconds; ratio: transformers' time over this one's; GFLOP/s: work on real
tokens only; error: relative, against transformers' answer.

![Speed relative to transformers]({plot_path})
"""


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
    """Bars of the ratios to transformers, one group per row."""
    names = list(rows[0]["contenders"])[1:]
    labels = [f"{row['model']}  {row['case']}  {row['dtype']}" for row in rows]
    height = 0.8 / len(names)
    figure = Figure(figsize=(7, 0.8 + (0.1 + 0.22 * len(names)) * len(rows)))
    axes = figure.subplots()
    axes.axvline(1, color="black", linewidth=1)
    for index, name in enumerate(names):
        ratios = [row["contenders"][name]["ratio"] for row in rows]
        places = [place + (index + 0.5) * height - 0.4 for place in range(len(rows))]
        bars = axes.barh(places, ratios, height, label=name, color=COLORS[index - len(names)])
        white = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # under the label, over the line at 1
        axes.bar_label(bars, fmt="%.2fx", padding=3, fontsize=8, bbox=white)
    axes.set_yticks(range(len(rows)), labels)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel("speed relative to transformers with SDPA (1 = as fast)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(names) > 1:
        axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names))
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
