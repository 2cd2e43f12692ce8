"""A results file as tables and plots, next to it and in the README.

python -m benchmarks.report benchmarks/results/<device>/encoder.json [--readme README.md]

takes train.json too, which has a place of its own in the README, and draws the plots that a machine without matplotlib
could not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict, cast

from benchmarks.peak import Peak
from benchmarks.tables import TrainRow, details, kernel_table, on_gpu, summary, training_table
from bert_fast.benchmarking import Row
from bert_fast.folders import read_json

#: Where a README holds the tables of `benchmarks.run`, and those of `benchmarks.train`.
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
TRAINING = "<!-- training:begin -->", "<!-- training:end -->"


class Measurement(TypedDict):
    """What every results file has."""

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


class Result(Measurement, total=False):
    """What `benchmarks.run` and `benchmarks.train` write; older files lack some of it."""

    kernels: list[Row]  # kernels alone
    train: list[TrainRow]  # steps of training, by `benchmarks.train`
    left_out: list[str]  # what was to be measured and was not, with the reason


def write(result: Result, path: Path) -> None:
    """Write the results file alone, whole or not at all: whoever is killed meanwhile leaves the one before."""
    write_whole(json.dumps(result, indent=2) + "\n", path)


def write_whole(text: str, path: Path) -> None:
    """A file that is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def save(result: Result, path: Path) -> None:
    """Write the results file, with its tables (`.md`) and plots (`-<name>.svg`) next to it.

    Without matplotlib there are no plots; stderr says how to get them.
    """
    write(result, path)
    if titles(result) and find_spec("matplotlib") is None:
        print(f"no plots, for want of matplotlib; where it is: python -m benchmarks.report {path}", file=sys.stderr)
    elif titles(result):
        draw(result, path)
    rows = [*result["rows"], *result["strings"], *result["sweep"]]
    every_contender = f"\n## Every contender\n\n{details(rows)}\n" if rows else ""
    write_whole(markdown(result, path, path.parent) + every_contender, path.with_suffix(".md"))


def draw(result: Result, path: Path) -> None:
    """The plots of a results file, next to it; ImportError without matplotlib."""
    import matplotlib

    from benchmarks import plots

    with matplotlib.rc_context({"svg.hashsalt": "bert_fast"}):  # this and no date: the same figures, the same file
        for name, figure in plots.figures(result["rows"], result["sweep"], result["peak"]).items():
            figure.savefig(plot_path(path, name), bbox_inches="tight", metadata={"Date": None})


#: Plot -> what a reader without pictures is told. The names are those of `plots.figures`.
TITLES = {
    "ratios": "Speed of bert_fast relative to every contender",
    "throughput": "Useful GFLOP/s over the number of texts and their length",
    "roofline": "Useful GFLOP/s over arithmetic intensity, under what the machine can do",
}


def titles(result: Result) -> dict[str, str]:
    """Those of `TITLES` that the result has the figures for."""
    rows = result["rows"]
    there = {
        "ratios": any(len(row["contenders"]) > 1 for row in rows),
        "throughput": bool(result["sweep"]),
        "roofline": bool(rows),
    }
    return {name: title for name, title in TITLES.items() if there[name]}


def plot_path(path: Path, name: str) -> Path:
    """The file of a plot of this results file."""
    return path.with_name(f"{path.stem}-{name}.svg")


def read(path: Path) -> Result:
    """A results file; ValueError, naming the file, when it is not one."""
    values = read_json(path)
    if missing := Measurement.__required_keys__ - values.keys():
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
        f"![{title}]({os.path.relpath(plot_path(path, name), folder)})" for name, title in titles(result).items()
    )
    left_out = "".join(f"- {' '.join(reason.split())}\n" for reason in result.get("left_out", []))
    return f"""\
{result["device"]}, {result["threads"]} threads, {commit}{" with changes" if result["dirty"] else ""}, \
load average {result["load_average"]["before"][0]:.1f} before the run; {versions}.
What the machine can do, in 10^9 operations per second: {peaks}; memory copy {result["peak"]["copy_gbs"]:.0f} GB/s.

    {result["command"]}

{tables(result)}

{legend(result)}
{links and f"{links}{chr(10)}"}{left_out and f"Left out:{chr(10) * 2}{left_out}"}"""


LEGEND = """\
Medians of interleaved rounds, each contender in a process of its own; a line is bert_fast's, beside the best of the
others. GFLOP/s: work on real tokens only; of peak: of what the machine reached in this type in the same run. "to" says
how many times as fast bert_fast is; in int8 transformers runs in float32. Errors are relative, of the last hidden state
(of the vectors, for texts), against transformers in float32. MB: the most RAM that the calls held, weights included,
beyond the libraries.
"""

GPU_LEGEND = """\
Medians of interleaved rounds by the GPU's own clock, calls back to back, each contender in a process of its own; a line
is bert_fast's, beside the best of the others. TFLOP/s: work on real tokens only; of peak: of what a matrix product
reached in this type in the same run. "to" says how many times as fast bert_fast is; in fp8 transformers runs in
bfloat16. Errors are relative, of the last hidden state, against transformers in float32. MB: the most that the calls
took from the GPU, weights included. host, latency: microseconds of one call to an idle GPU, until it returns, and
until its answer is there.
"""

KERNEL_LEGEND = """\
Kernels alone, on inputs several times the cache, two sets in turn. TB/s: bytes that must be read and written; of copy:
of what a copy reached in the same run. limit: what would take longest, the products at the rate of a matrix product or
the bytes at that of a copy, in time; of limit: how much of the time that is. "ratio" is to torch.
"""


TRAINING_LEGEND = """\
Medians of interleaved rounds, each contender in a process of its own, of whole training steps with dropout: forward,
backward, clipping, fused AdamW, freeing the gradients; a step's time is the mean over several, whose texts are the same
for all. fill: share of real tokens in what the collator makes; grouped batches are those of transformers'
`group_by_length`. GFLOP/s: three forward passes over real tokens, for the head of masked language modelling over the
predicted ones alone, whatever a contender computes (bert_fast takes the loss of those alone, by `loss_only`, leaves out
of its last layer what no head reads, and runs within `kept_memory`, as its trainer does); of peak: of what the machine
reached in the contender's type in the same run. "to" says how many times as fast a contender is as the faster of
transformers with and without torch.compile, on padded and on grouped batches. MB: the most that a step on the largest
batch held beyond the model, its gradients and the optimiser; of its MB: of those of that peer on padded batches. error:
of the first batch's loss and norm of the gradient without dropout, against transformers in float32, root mean square
(torch.compile's before it compiles).
"""


def legend(result: Result) -> str:
    """What the tables mean."""
    rows = [*result["rows"], *result["strings"]]
    said = (
        (GPU_LEGEND if on_gpu(rows[0]) else LEGEND) if rows else "",
        KERNEL_LEGEND if result.get("kernels") else "",
        TRAINING_LEGEND if result.get("train") else "",
    )
    return "\n".join(filter(None, said))


def tables(result: Result) -> str:
    """The summaries of forward passes and of strings, the kernels and training, where they were measured."""
    made = [summary(rows) for rows in (result["rows"], result["strings"]) if rows]
    if kernels := result.get("kernels"):
        made.append(kernel_table(kernels, result["peak"]))
    if train := result.get("train"):
        made.append(training_table(train))
    return "\n\n".join(made)


def splice(text: str, table: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with what stands between the two markers replaced.

    Raises:
        ValueError: a marker is missing or there twice, or the end comes first.
    """
    begin, end = markers
    for marker in markers:
        if text.count(marker) != 1:
            raise ValueError(f"{marker} is there {text.count(marker)} times, expected once")
    head, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{end} comes before {begin}")
    tail = rest.split(end)[1]
    return f"{head}{begin}\n\n{table}\n{end}{tail}"


def main() -> None:
    """Make the tables and the plots of a results file anew, and put them into a README."""
    parser = argparse.ArgumentParser(description="The tables and the plots of a results file.")
    parser.add_argument("result", type=Path, help="benchmarks/results/<device>/encoder.json")
    parser.add_argument(
        "--readme", type=Path, help=f"file to put them into, between {BEGIN} and {END}, or {TRAINING[0]} ..."
    )
    options = parser.parse_args()
    try:
        result = read(options.result)
        save(result, options.result)
        if options.readme:
            text = markdown(result, options.result, options.readme.parent)
            markers = TRAINING if result.get("train") else (BEGIN, END)
            text = splice(options.readme.read_text(encoding="utf-8"), text, markers)
            options.readme.write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(tables(result))


if __name__ == "__main__":
    main()
