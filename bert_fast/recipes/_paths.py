"""What a transfer came to: its paths side by side, as a table and as a page."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bert_fast.benchmarking import markdown_table


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
    whole, lines = result.paths[0], []
    for path in result.paths:
        spread = float(np.std(path.scores, ddof=1)) if len(path.scores) > 1 else None
        line = {"path": path.name, result.metric: f"{path.mean:.4f}"}
        if len(whole.scores) > 1:
            line |= {"spread": f"{spread:.4f}", "seeds": str(len(path.scores))}
        line["against the whole"] = "" if path is whole else f"{path.mean - whole.mean:+.4f}"
        for name in whole.stages:
            change = path.perplexities.get(name)
            line[f"{name} perplexity"] = f"{change[0]:.1f} to {change[1]:.1f}" if change else "-"
        line["seconds"] = f"{path.seconds:.1f}"
        lines.append(line)
    return markdown_table(lines)


def transfer_page(result: TransferResult) -> str:
    """The same as a page that needs nothing else."""
    header, _, *rows = [
        [html.escape(cell.strip()) for cell in line.strip("| ").split("|")]
        for line in transfer_table(result).splitlines()
    ]
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    low, high = (f(score for path in result.paths for score in path.scores) for f in (min, max))
    span = (high - low) or 1.0
    bars = "".join(
        f'<div class="bar"><span>{html.escape(path.name)}</span><i>'
        + "".join(f'<b style="left:{(score - low) / span * 100:.1f}%"></b>' for score in path.scores)
        + f"</i><span>{path.mean:.4f}</span></div>\n"
        for path in result.paths
    )
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Transfer</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
.bar {{ display: grid; grid-template-columns: 14rem 1fr 4rem; gap: 1rem; align-items: center }}
.bar i {{ position: relative; height: 2px; background: #ccc; margin: 0 8px }}
.bar b {{ position: absolute; width: 12px; height: 12px; margin: -5px 0 0 -6px; border-radius: 6px;
  background: #2563eb99 }}
</style>
<h1>Transfer</h1>
<p>Each path from the checkpoint to the task, scored by {html.escape(result.metric)}.</p>
<table><tr>{"".join(f"<th>{cell}</th>" for cell in header)}</tr>
{body}</table>
<h2>Every seed</h2>
<p>From {low:.4f}, at the left, to {high:.4f}.</p>
{bars}</html>
"""
