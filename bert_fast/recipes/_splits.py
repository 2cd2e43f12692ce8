"""The files of a run as examples and as features, and what is written about them."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.data.catalogue import DATASETS
from bert_fast.data.examples import ChoiceExample, Example, Examples, QuestionExample, TextExample, TokensExample
from bert_fast.disk import text_written_at_once
from bert_fast.tasks._task import Features, Prediction, Task
from bert_fast.tasks.registry import TASKS, make_task
from bert_fast.tokenization import Tokenizer

#: The files that predictions go to, by their endings.
FORMATS = (".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Split:
    """A part of the data, ready for the model.

    Attributes:
        name: train, validation, test or what the data set calls it.
        examples: what the file had.
        features: the same as the model takes it.
        skipped: reason -> how many examples were left out for it.
        labelled: whether the examples have labels, so that there are scores.
    """

    name: str
    examples: Sequence[Any]
    features: Features
    skipped: Mapping[str, int]
    labelled: bool


def task_of(name: str, options: Mapping[str, Any]) -> Task:
    """The task of a data set or of a kind, with these options in place of its own; ValueError for an unknown name."""
    if name in TASKS:
        return make_task(name, **options)
    if name not in DATASETS:
        raise ValueError(
            f"the task is {name!r}, expected a data set ({', '.join(DATASETS)}) or a kind ({', '.join(TASKS)})"
        )
    dataset = DATASETS[name]
    known = dict(dataset.options)
    if dataset.kind == "classification":
        known["metric_names"] = dataset.metrics
    if dataset.labels:
        known["labels"] = dataset.labels
    return make_task(dataset.kind, **{**known, **options})


def reading(task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for the reader of files: those given, and what a task knows of its labels."""
    problem = getattr(task, "problem", None)
    return {**({} if problem is None else {"problem": problem}), **options}


def sampled(found: Examples, most: int | None, seed: int) -> Examples:
    """At most so many of the examples, in their order, chosen by the seed: a file may have its classes one by one."""
    if most is None or most >= len(found.examples):
        return found
    if most < 1:
        raise ValueError(f"the number of samples is {most}, expected at least 1")
    chosen = np.sort(np.random.default_rng(seed).permutation(len(found.examples))[:most])
    return Examples(tuple(found.examples[index] for index in chosen), found.skipped)


def make_split(name: str, found: Examples, task: Task, tokenizer: Tokenizer) -> Split:
    """Tokenize the examples, with labels where all of them have one."""
    labelled = all(map(is_labelled, found.examples))
    features = task.features(found.examples, tokenizer, labelled=labelled)
    return Split(name, found.examples, features, found.skipped, labelled)


def is_labelled(example: Example) -> bool:
    """Whether it is known what is to be said of it."""
    if isinstance(example, TextExample | ChoiceExample):
        return example.label is not None
    if isinstance(example, TokensExample):
        return example.tags is not None
    return not isinstance(example, QuestionExample) or bool(example.answers) or example.is_impossible


def beside(examples: Iterable[Any], predictions: Iterable[Prediction]) -> list[Prediction]:
    """The predictions, each with its example."""
    return [{**said, "example": dataclasses.asdict(e)} for e, said in zip(examples, predictions, strict=True)]


def write_predictions(path: Path, lines: Sequence[Prediction]) -> None:
    """Write predictions as JSON lines, or as a table by the ending `.csv` or `.tsv`; ValueError for another one."""
    check_format(path)
    with text_written_at_once(path) as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            return
        rows = [_flat(line) for line in lines]
        names = list(dict.fromkeys(name for row in rows for name in row))
        table = csv.DictWriter(file, names, delimiter="," if path.suffix == ".csv" else "\t", lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def check_format(path: Path) -> None:
    """ValueError for a file whose ending is none of `FORMATS`."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path} ends in {path.suffix or 'nothing'}, expected one of {', '.join(FORMATS)}")


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A column for each value: those of a dictionary are named with their keys, lists are joined or written as JSON."""
    row: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            row |= {f"{name}.{key}": inner for key, inner in value.items()}
        elif isinstance(value, list | tuple):
            row[name] = " ".join(value) if all(isinstance(v, str) for v in value) else json.dumps(value)
        else:
            row[name] = value
    return row
