"""A results file as tables and plots, next to it and in the README.

python -m benchmarks.report benchmarks/results/<device>/encoder.json [--readme README.md]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TypedDict, cast

import matplotlib

from benchmarks import plots
from benchmarks.peak import Peak
from benchmarks.tables import details, summary
from bert_fast.benchmarking import Row
from bert_fast.folders import read_json

BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"


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
    rows: list[Row]  # forward passes
    sweep: list[Row]  # the same over numbers of texts and their length
    strings: list[Row]  # encode of texts


def save(result: Result, path: Path) -> None:
    """Write the results file, with its tables (`.md`) and plots (`-<name>.svg`) next to it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    with matplotlib.rc_context({"svg.hashsalt": "bert_fast"}):  # this and no date: the same figures, the same file
        for name, figure in plots.figures(result["rows"], result["sweep"], result["peak"]).items():
            figure.savefig(plot_path(path, name), bbox_inches="tight", metadata={"Date": None})
    every_contender = f"\n## Every contender\n\n{details([*result['rows'], *result['strings'], *result['sweep']])}\n"
    path.with_suffix(".md").write_text(markdown(result, path, path.parent) + every_contender, encoding="utf-8")


def plot_path(path: Path, name: str) -> Path:
    """The file of a plot of this results file."""
    return path.with_name(f"{path.stem}-{name}.svg")


def read(path: Path) -> Result:
    """A results file; ValueError, naming the file, when it is not one."""
    values = read_json(path)
    if missing := Result.__required_keys__ - values.keys():
        raise ValueError(f"{path} is not a benchmark result: it has no {', '.join(sorted(missing))}")
    return cast(Result, values)


def markdown(result: Result, path: Path, folder: Path) -> str:
    """What was measured where, by which command; the tables; and the plots.

    Args:
        result: what the results file holds.
        path: where it is, with the plots next to it.
        folder: of the file that the text is for: links are relative to it.
    """
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    peaks = ", ".join(f"{i['dtype']} {i['gops']:.0f} ({i['instruction']})" for i in result["peak"]["instructions"])
    commit = f"commit {result['commit'][:12]}" if result["commit"] else "no commit"
    links = "\n\n".join(
        f"![{title}]({os.path.relpath(plot_path(path, name), folder)})"
        for name, title in plots.TITLES.items()
        if name in plots.figures(result["rows"], result["sweep"], result["peak"])
    )
    return f"""\
{result["device"]}, {result["threads"]} threads, {commit}{" with changes" if result["dirty"] else ""}, \
load average {result["load_average"]["before"][0]:.1f} before the run; {versions}.
What the machine can do, in 10^9 operations per second: {peaks}; memory copy {result["peak"]["copy_gbs"]:.0f} GB/s.

    {result["command"]}

{tables(result)}

{LEGEND}

{links}
"""


LEGEND = """\
Medians of interleaved rounds, each contender in a process of its own; a line is bert_fast's, beside the best of the
others. GFLOP/s: work on real tokens only; of peak: of what the machine reached in this type in the same run. "to" says
how many times as fast bert_fast is; in int8 transformers runs in float32. Errors are relative, of the last hidden state
(of the vectors, for texts), against transformers in float32. MB: the most RAM that the calls held, weights included,
beyond the libraries."""


def tables(result: Result) -> str:
    """The summaries of forward passes and of strings, where they were measured."""
    return "\n\n".join(summary(rows) for rows in (result["rows"], result["strings"]) if rows)


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


def main() -> None:
    """Make the tables and the plots of a results file anew, and put them into a README."""
    parser = argparse.ArgumentParser(description="The tables and the plots of a results file.")
    parser.add_argument("result", type=Path, help="benchmarks/results/<device>/encoder.json")
    parser.add_argument("--readme", type=Path, help=f"file to put them into, between {BEGIN} and {END}")
    options = parser.parse_args()
    try:
        result = read(options.result)
        save(result, options.result)
        if options.readme:
            text = markdown(result, options.result, options.readme.parent)
            text = splice(options.readme.read_text(encoding="utf-8"), text)
            options.readme.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(tables(result))


if __name__ == "__main__":
    main()
