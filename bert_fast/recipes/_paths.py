"""What a transfer came to: its paths side by side, as a table and as a page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.benchmarking import markdown_table
from bert_fast.recipes._page import element, figure, page, table


@dataclass(frozen=True)
class PathResult:
    """One way from the checkpoint to the task.

    Attributes:
        stages: of `ADAPTING`, that it went through before fine-tuning.
        scores: of each seed, the main metric on the validation examples, or else on the test ones.
        perplexities: stage -> perplexity of the text held out, before and after it.
        seconds: of all its stages, one fine-tuning among them.
    """

    stages: tuple[str, ...]
    scores: list[float]
    perplexities: dict[str, tuple[float, float]]
    seconds: float

    @property
    def name(self) -> str:
        """As `domain, task, finetune`."""
        return ", ".join((*self.stages, "finetune"))

    @property
    def mean(self) -> float:
        """Of the scores."""
        return float(np.mean(self.scores))


@dataclass(frozen=True)
class TransferResult:
    """What came of a transfer: the whole path, those that leave stages out, and where the model is."""

    metric: str
    paths: list[PathResult]
    folder: Path

    def __str__(self) -> str:
        return f"{transfer_table(self)}\n\nthe model of the whole path is {self.folder}"


def transfer_table(result: TransferResult) -> str:
    """A Markdown table, a line for each path, the whole one first."""
    return markdown_table(_lines(result))


def transfer_page(result: TransferResult) -> str:
    """The same as a page that needs nothing else, with the score of every seed."""
    lines = _lines(result)

    def draw(axes: Any) -> None:
        paths = result.paths[::-1]
        for place, path in enumerate(paths):
            axes.plot(path.scores, [place] * len(path.scores), "o", color="#2563eb", alpha=0.5)
            axes.plot([path.mean], [place], "|", color="#2563eb", markersize=14)
        axes.set_yticks(range(len(paths)), [path.name for path in paths])
        axes.set_ylim(-0.6, len(paths) - 0.4)
        axes.set_xlabel(result.metric)

    return page(
        "Transfer",
        element("h1", "Transfer"),
        element("p", "Each path from the checkpoint to the task; spread is the standard deviation over the seeds."),
        table(list(lines[0]), [list(line.values()) for line in lines]),
        element("h2", "Every seed, and their mean"),
        figure("", draw, size=(8.0, 0.8 + 0.45 * len(result.paths))),
    )


def _lines(result: TransferResult) -> list[dict[str, str]]:
    """Column -> what stands there, of each path."""
    whole, lines = result.paths[0], []
    for path in result.paths:
        line = {"path": path.name, result.metric: f"{path.mean:.4f}"}
        if len(whole.scores) > 1:
            line |= {"spread": f"{np.std(path.scores, ddof=1):.4f}", "seeds": str(len(path.scores))}
        line["against the whole"] = "" if path is whole else f"{path.mean - whole.mean:+.4f}"
        for name in whole.stages:
            change = path.perplexities.get(name)
            line[f"{name} perplexity"] = " to ".join(map(_rounded, change)) if change else "-"
        line["seconds"] = f"{path.seconds:.1f}"
        lines.append(line)
    return lines


def _rounded(perplexity: float) -> str:
    return f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.1f}"
