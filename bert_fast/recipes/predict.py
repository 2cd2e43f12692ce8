"""What a fine-tuned model says of a file, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast import engine
from bert_fast.batching import plan_batches
from bert_fast.data.catalogue import read
from bert_fast.embedder import token_budget
from bert_fast.folders import read_json, resolve
from bert_fast.heads import Head
from bert_fast.loading import from_pretrained, parse_device
from bert_fast.recipes._runs import RESULTS_FILE
from bert_fast.recipes._splits import (
    Split,
    beside,
    check_format,
    judged,
    make_split,
    reading,
    task_of,
    write_predictions,
)
from bert_fast.recipes.submission import check_benchmark, write_submission
from bert_fast.tasks._task import Features, Output, Prediction, Task
from bert_fast.tasks.classification import Classification
from bert_fast.tasks.registry import load_task
from bert_fast.terminal import progress_bar
from bert_fast.tokenization import Tokenizer

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


def run(
    model: nn.Module,
    task: Task,
    features: Features,
    *,
    batch_tokens: int | None = None,
    progress: bool | None = None,
    collate: Collate | None = None,
) -> list[Output]:
    """What the model says of each feature, in their order.

    Features run longest first, in batches of about the same number of tokens, without padding.

    Args:
        model: of the task's head; it is put into evaluation mode, and left there.
        task: what made the features.
        features: with labels or without.
        batch_tokens: tokens of a batch, about; None for what suits the device.
        progress: show a bar; None shows one on a terminal, for work of more than two seconds.
        collate: makes batches; None for the task's own collator.
    """
    inputs, targets = features.inputs, {"labels", *getattr(model, "other_labels", ())}
    if not inputs:
        return []
    device = next(model.parameters()).device
    collate = collate or task.collator(model.config)
    lengths = np.array([_num_tokens(feature["input_ids"]) for feature in inputs])
    outputs: list[Output | None] = [None] * len(inputs)
    model.eval()
    with torch.inference_mode(), progress_bar(total=len(inputs), what="asking the model", show=progress) as bar:
        for numbers in plan_batches(lengths, batch_tokens or token_budget(device)):
            chosen = [inputs[number] for number in numbers]
            batch = collate([{name: f[name] for name in f if name not in targets} for f in chosen])
            said = task.outputs(model, {name: _moved(value, device) for name, value in batch.items()})
            for number, output in zip(numbers, said, strict=True):
                outputs[number] = output
            bar.update(len(numbers))
    return outputs  # type: ignore[return-value]


def _num_tokens(input_ids: Any) -> int:
    """Of one text, or of all of several."""
    return len(input_ids) if np.ndim(input_ids[0]) == 0 else sum(map(len, input_ids))


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class FineTuned:
    """A model that `finetune` left, and what belongs to it.

    Attributes:
        folder: where it is.
        model: ready to run.
        tokenizer, task: its own.
        data: the data set or kind of task whose files it reads, by name.
        columns, read_options: how these files are read, as `finetune` was told.
    """

    folder: Path
    model: Head
    tokenizer: Tokenizer
    task: Task
    data: str
    columns: dict[str, str]
    read_options: dict[str, Any]


def load(
    path_or_id: str | Path, *, device: torch.device | str | None = None, precision: str | None = None
) -> FineTuned:
    """A fine-tuned model from the folder that `finetune` left.

    Args:
        path_or_id: a folder or a Hub id.
        device: where it runs; None for a GPU if there is one.
        precision: what it computes in, as for `Embedder`; None for that of its weights.

    Raises:
        ValueError: it is not such a folder, or its files are damaged; the message names what.
    """
    device = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    engine.check_precision(precision, device)
    folder = resolve(path_or_id)
    task = load_task(folder)
    model: Any = from_pretrained(folder, task.head, device=device)
    engine.set_precision(model.bert, precision, model.bert.engine)
    results = read_json(folder / RESULTS_FILE) if (folder / RESULTS_FILE).is_file() else {}
    settings = results.get("settings", {})
    told = settings.get("columns", {}), settings.get("read_options", {})
    return FineTuned(folder, model, read_tokenizer(folder), task, results.get("task", task.kind), *told)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, which cuts texts where the task says, and not where its files do."""
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.model_max_length = None
    return tokenizer


def of_data(tuned: FineTuned, name: str) -> FineTuned:
    """The same model for the files of another data set, as `ax` for one of `mnli`; classes are scored by its metrics.

    Raises:
        ValueError: there is no such data set, it is of another kind, or has labels that the model has not.
    """
    task = task_of(name, {})
    if task.kind != tuned.task.kind:
        raise ValueError(f"{name} is {task.kind}, but the model is for {tuned.task.kind}")
    ours, theirs = (getattr(each, "labels", None) or () for each in (tuned.task, task))
    if unknown := [label for label in theirs if label not in ours]:
        raise ValueError(f"{name} has the label {unknown[0]!r}, which the model has not: {', '.join(ours)}")
    metrics = {"metric_names": task.metric_names} if isinstance(task, Classification) else {}
    told: Any = tuned.task
    return replace(tuned, data=name, columns={}, read_options={}, task=replace(told, **metrics))


def read_split(
    tuned: FineTuned, file: str | Path, split: str = "test", columns: Mapping[str, str] | None = None, *, labelled: bool
) -> Split:
    """A file, or a split of a data set's folder, as the model's task takes it."""
    options = reading(tuned.task, tuned.read_options)
    columns = {**tuned.columns, **(columns or {})}
    found = read(tuned.data, file, split=split, columns=columns, labelled=labelled, **options)
    return make_split(split, found, tuned.task, tuned.tokenizer)


def said_of(tuned: FineTuned, split: Split, progress: bool | None = None) -> tuple[list[Prediction], dict[str, float]]:
    """What the model says of each example of a split; and its scores, if that has labels."""
    return judged(tuned.task, split, run(tuned.model, tuned.task, split.features, progress=progress))


def evaluate(
    tuned: FineTuned,
    file: str | Path,
    *,
    split: str = "validation",
    columns: Mapping[str, str] | None = None,
    output: str | Path | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, float], Split]:
    """The metrics of a model on a file with labels.

    Args:
        tuned: from `load`.
        file: as the task's data set or kind is read, or the folder of the data set.
        split: which part of a folder; also what goes by a name of its own in what is written.
        columns: role -> column, where the file's differ from those of training.
        output: a file for the predictions, each beside its example: `.jsonl`, `.csv` or `.tsv`.
        progress: as in `run`.

    Returns:
        The metrics, `loss` among them where the task has one, and what was read.

    Raises:
        ValueError: the file cannot be read, or an example has no label or one that training did not have.
    """
    if output is not None:
        check_format(Path(output))
    part = read_split(tuned, file, split, columns, labelled=True)
    if not part.labelled:
        raise ValueError(f"{file} has examples without labels, which cannot be scored: use predict")
    predictions, metrics = said_of(tuned, part, progress)
    if output is not None:
        write_predictions(Path(output), beside(part.examples, predictions))
    return metrics, part


def predict(
    tuned: FineTuned,
    file: str | Path,
    output: str | Path,
    *,
    split: str = "test",
    columns: Mapping[str, str] | None = None,
    submission: str | Path | None = None,
    progress: bool | None = None,
) -> tuple[Split, list[Path]]:
    """Write what a model says of each example of a file, which needs no labels.

    Args:
        tuned, file, split, columns, progress: as in `evaluate`.
        output: `.jsonl`, or `.csv` or `.tsv`, a line for each example.
        submission: a folder for the files that the benchmark of the model's data set takes; see `submission`.

    Returns:
        What was read, and the files of the submission.

    Raises:
        ValueError: the file cannot be read, or `output` has another ending; there is no such benchmark.
    """
    check_format(Path(output))
    if submission is not None:
        check_benchmark(tuned.data)
    part = read_split(tuned, file, split, columns, labelled=False)
    predictions, _ = said_of(tuned, part, progress)
    write_predictions(Path(output), predictions)
    if submission is None:
        return part, []
    benchmark = f"{tuned.data}_mismatched" if split.endswith("_mismatched") else tuned.data
    return part, write_submission(benchmark, beside(part.examples, predictions), submission)
