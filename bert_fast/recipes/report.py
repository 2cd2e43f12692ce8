"""A page about a fine-tuned model: what was run, its scores beside the published ones, curves, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_fast.data.catalogue import DATASETS
from bert_fast.disk import text_written_at_once
from bert_fast.folders import read_json
from bert_fast.lines import decoded, json_value
from bert_fast.recipes._findings import Section, findings
from bert_fast.recipes._page import Markup, card, element, figure, joined, number, page, table
from bert_fast.recipes._runs import RESULTS_FILE
from bert_fast.recipes.submission import read_predictions

REPORT_FILE = "report.html"

#: What a folder's `results.json` must have.
RESULTS = ("task", "kind", "model", "settings", "labels", "main_metric", "metrics", "train", "versions")

#: Data set, split -> metric -> score of BERT-base on it: Devlin et al. (2018), section 4 and 5, GLUE's validation as
#: google-research/bert and transformers publish it; IMDB as commonly found with 512 tokens.
PUBLISHED: dict[tuple[str, str], dict[str, str]] = {
    ("mnli", "validation"): {"accuracy": "0.839"},
    ("mnli", "validation_mismatched"): {"accuracy": "0.843"},
    ("qqp", "validation"): {"accuracy": "0.904", "f1": "0.872"},
    ("qnli", "validation"): {"accuracy": "0.907"},
    ("sst2", "validation"): {"accuracy": "0.925"},
    ("cola", "validation"): {"mcc": "0.594"},
    ("stsb", "validation"): {"pearson": "0.886", "spearman": "0.885"},
    ("mrpc", "validation"): {"f1": "0.889", "accuracy": "0.841"},
    ("rte", "validation"): {"accuracy": "0.657 to 0.693"},
    ("squad", "validation"): {"exact_match": "0.812", "f1": "0.885"},
    ("swag", "validation"): {"accuracy": "0.816"},
    ("conll2003", "validation"): {"f1": "0.94 to 0.95"},
    ("conll2003", "test"): {"f1": "0.924"},
    ("imdb", "test"): {"accuracy": "0.93 to 0.94"},
}

#: What the curves show, one plot each: title, names in `metrics.jsonl`.
CURVES = (
    ("Loss", ("loss", "eval_loss")),
    ("Learning rate", ("learning_rate",)),
    ("Tokens per second", ("tokens_per_second",)),
)


def write_report(folder: str | Path) -> Path:
    """Write `report.html` into the folder that `finetune` left; it is one file and needs no network.

    Read are `results.json`, `metrics.jsonl` if it is there, and every `predictions_<split>.jsonl`.

    Raises:
        ValueError: one of them is not what it should be; the message names the file and what is missing or wrong.
    """
    folder = Path(folder)
    results = _results(folder)
    metrics: Mapping[str, Mapping[str, float]] = results["metrics"]
    predictions = {path.stem.removeprefix("predictions_"): path for path in sorted(folder.glob("predictions_*.jsonl"))}
    body: list[Any] = [_head(results)]
    for split in dict.fromkeys([*metrics, *predictions]):
        if split in metrics:
            body += [element("h2", f"Scores: {split}"), _scores(results, split)]
    body += [element("h2", "The run"), _run(results)]
    curves = _curves(_measurements(folder), results["main_metric"])
    if curves:
        body += [element("h2", "Curves"), element("div", *curves, class_="plots")]
    for split, path in predictions.items():
        lines = read_predictions(path)
        sections = [
            element("section", element("h3", section.title), section.content, class_="all" if section.wide else "part")
            for section in _found(path, results, lines)
        ]
        body += [element("h2", f"Predictions: {split}"), element("div", *sections, class_="pair")]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    body.append(element("p", versions, class_="soft"))
    with text_written_at_once(folder / REPORT_FILE) as file:
        file.write(page(_title(results), *body))
    return folder / REPORT_FILE


def _results(folder: Path) -> dict[str, Any]:
    path = folder / RESULTS_FILE
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS_FILE}: it is not a folder that bert-fast finetune left")
    results = read_json(path)
    if missing := [name for name in RESULTS if name not in results]:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return results


def _found(path: Path, results: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    try:
        return findings(results["kind"], lines, results["labels"])
    except KeyError as error:
        raise ValueError(f"{path} has predictions without {error}, which those of {results['kind']} have") from error


def _title(results: Mapping[str, Any]) -> str:
    return f"{results['model']}, fine-tuned for {results['task'].replace('_', ' ')}"


def _head(results: Mapping[str, Any]) -> Markup:
    asked = [element("p", DATASETS[results["task"]].title, class_="soft")] if results["task"] in DATASETS else []
    return joined([element("h1", _title(results)), *asked])


def _scores(results: Mapping[str, Any], split: str) -> Markup:
    published = PUBLISHED.get((results["task"], split), {})
    cards = []
    for name, value in results["metrics"][split].items():
        note = f"published, BERT-base: {published[name]}" if name in published else ""
        cards.append(card(name.replace("_", " "), value, note, main=name == results["main_metric"]))
    return element("div", *cards, class_="cards")


def _run(results: Mapping[str, Any]) -> Markup:
    settings, train = results["settings"], results["train"]
    rows = [("model", results["model"]), ("task", results["task"]), ("kind of task", results["kind"])]
    for name in ("train_file", "validation_file", "test_file", "data_dir"):
        if settings.get(name):
            rows.append((name.replace("_", " "), settings[name]))
    if results["labels"]:
        rows.append(("labels", ", ".join(results["labels"])))
    rows += [
        ("examples", number(train["examples"])),
        ("steps", number(train["steps"])),
        ("seconds of training", f"{train['seconds']:,.1f}"),
        ("tokens per second", f"{train['tokens_per_second']:,.0f}"),
        ("examples that were cut", number(train["num_truncated"])),
    ]
    rows += [(f"left out: {reason}", number(count)) for reason, count in train["skipped"].items()]
    told = {**settings.get("task_options", {}), **settings.get("arguments", {})}
    options = [(name.replace("_", " "), _option(value)) for name, value in told.items()]
    tables = [table([], rows), *([table([], options)] if options else [])]
    return element("div", *tables, class_="pair")


def _option(value: Any) -> str:
    """Numbers in as few digits as they need."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _measurements(folder: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; none where it is not there."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    with path.open("rb") as file:
        for where, text in decoded(file, str(path)):
            line = json_value(text, where)
            if not isinstance(line, dict) or "step" not in line:
                raise ValueError(f"{where} is no measurement of a step")
            lines.append(line)
    return lines


def _curves(lines: Sequence[Mapping[str, Any]], main_metric: str) -> list[Markup]:
    drawn = []
    for title, names in (*CURVES, (f"Evaluation: {main_metric}", (f"eval_{main_metric}",))):
        series = {name: [(line["step"], line[name]) for line in lines if line.get(name) is not None] for name in names}
        there = {name: points for name, points in series.items() if points}
        if there:
            drawn.append(figure(title, lambda axes, there=there: _draw(axes, there)))  # type: ignore[misc]
    return drawn


def _draw(axes: Any, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 40 else None, markersize=3)
    axes.set(xlabel="step")
    if len(series) > 1:
        axes.legend()
