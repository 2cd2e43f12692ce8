"""Fine-tuning: a checkpoint and labelled files in; a model, its scores and its predictions out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_fast import disk
from bert_fast.data.catalogue import read, splits_in
from bert_fast.data.examples import Examples
from bert_fast.families import model_class
from bert_fast.folders import copy_tokenizer, resolve
from bert_fast.heads import Head
from bert_fast.loading import build, read_config, read_state_dict, replaced
from bert_fast.recipes._runs import RESULTS_FILE, training_arguments, versions
from bert_fast.recipes._splits import Split, beside, make_split, reading, sampled, task_of, write_predictions
from bert_fast.recipes.card import write_card
from bert_fast.recipes.predict import Collate, read_tokenizer
from bert_fast.recipes.report import write_report
from bert_fast.saving import save_pretrained
from bert_fast.tasks._batches import PaddingCollator
from bert_fast.tasks._task import Task
from bert_fast.tasks.registry import TASK_FILE, save_task
from bert_fast.tokenization import Tokenizer

#: Characters of a line that every terminal shows.
WIDTH = 80


@dataclass
class FinetuneSettings:
    """What a run is told.

    Attributes:
        model_name_or_path: the checkpoint to start from: a folder, a Hub id or `demo`.
        task: a data set of `bert_fast.data.catalogue.DATASETS`, or a kind of `bert_fast.tasks.registry.TASKS`.
        output_dir: the folder of the run, and of the model it leaves.
        train_file, validation_file, test_file: what is learnt from; what says which checkpoint is the best; what is
            predicted at the end, and scored if it has labels.
        data_dir: the folder of a data set as it is handed around, in place of these files.
        columns: role -> column of the files, as `text` -> `sentence`.
        read_options: of the reader, as `label_delimiter`, `iob1`, `max_score`; see `bert_fast.data.catalogue.read`.
        task_options: of the task's class, in place of the data set's and its defaults.
        arguments: of `bert_fast.training.TrainingArguments`, by name. With validation examples the model is by default
            evaluated and saved after every epoch, and the best one kept. Batches are `per_device_train_batch_size`
            examples without padding, or made by tokens with `max_tokens_per_batch`.
        max_train_samples, max_eval_samples: at most so many examples, drawn by the seed; None for all.
        early_stopping_patience: end after so many evaluations that were no better; None never does.
        resume: go on from the last whole checkpoint of the folder, or from the one that is named.
        plain: run the plain modules on padded batches, for comparison.
    """

    model_name_or_path: str
    task: str
    output_dir: str
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    data_dir: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    read_options: dict[str, Any] = field(default_factory=dict)
    task_options: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    early_stopping_patience: int | None = None
    resume: bool | str = False
    plain: bool = False


@dataclass(frozen=True)
class FinetuneResult:
    """What came of a run.

    Attributes:
        output_dir: where the model is.
        metrics: split -> metric -> value, of the model that was kept; `loss` beside them, where the task has one.
        main_metric: the one that the task goes by.
        seconds: of training, evaluations on the way included.
        train: what else is known of the training: `seconds`, `steps`, `examples`, `tokens_per_second`, `skipped`,
            `num_truncated`.
    """

    output_dir: Path
    metrics: dict[str, dict[str, float]]
    main_metric: str
    seconds: float
    train: dict[str, Any]

    def __str__(self) -> str:
        train = self.train
        cut = f" ({train['num_truncated']} of them cut)" if train["num_truncated"] else ""
        skipped = "".join(f"; {count} skipped: {reason}" for reason, count in train["skipped"].items())
        speed = f"{train['tokens_per_second']:,.0f} tokens/s"
        done = f"{train['steps']} steps on {train['examples']} examples{cut} in {self.seconds:.1f} s ({speed}){skipped}"
        return "\n".join([done, *([table(self.metrics)] if self.metrics else []), f"written: {self.output_dir}"])


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """A line for each split, a column for each metric; the other way round where that is wider than `WIDTH`."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["", *names]]
    rows += [[split, *(f"{values[n]:.4f}" if n in values else "" for n in names)] for split, values in metrics.items()]
    if max(map(len, metrics)) + sum(2 + max(6, len(name)) for name in names) > WIDTH:
        rows = list(map(list, zip(*rows, strict=True)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(row).rstrip() for row in aligned)


def finetune(settings: FinetuneSettings) -> FinetuneResult:
    """Fine-tune a checkpoint.

    It leaves in `output_dir` the model and its tokenizer, as transformers loads them; `task.json`, with which
    `bert_fast.recipes.predict` runs it; `results.json`, `predictions_<split>.jsonl`, `metrics.jsonl`, a report, a model
    card and the checkpoints. With torchrun all processes call it, share the work and get the result.

    Raises:
        ValueError: the settings, the files or the checkpoint are not right; the message names what.
        CheckpointError: `resume` names a checkpoint that is not whole.
    """
    import transformers
    from transformers import EarlyStoppingCallback

    from bert_fast.recipes._task_trainer import TaskTrainer

    task = task_of(settings.task, settings.task_options)
    output_dir = Path(settings.output_dir)
    check_output_dir(output_dir, settings.resume)
    args = arguments_of(settings)
    folder = resolve(settings.model_name_or_path)
    config, tokenizer = read_config(folder), read_tokenizer(folder)
    _check_tokenizer(folder, tokenizer, config)
    _check_length(task, config)
    sources = sources_of(settings)
    found = _read(settings, task, "train", sources.pop("train"), args.seed)
    task.learn(found.examples)
    _keep_order(task, config)
    splits = {"train": make_split("train", found, task, tokenizer)}
    for name, source in sources.items():
        splits[name] = make_split(name, _read(settings, task, name, source, args.seed), task, tokenizer)
    held_out, main_metric = choose_by(splits, task, args, settings.arguments)

    transformers.set_seed(args.seed)
    model: Any = _model(folder, config, task, settings.plain)
    collate: Collate = task.collator(model.config)
    if settings.plain and task.packs:
        collate = PaddingCollator(model.config.pad_token_id)
    trainer = TaskTrainer(model, args, task=task, train=splits["train"], validation=held_out, collate=collate)
    if settings.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))

    train = train_on(splits["train"], trainer, settings.resume)

    metrics: dict[str, dict[str, float]] = {}
    for name, split in splits.items():
        if name == "train":
            continue
        predictions, scores = trainer.judged(split)
        if split.labelled:
            metrics[name] = scores
        if trainer.is_world_process_zero():
            write_predictions(output_dir / f"predictions_{name}.jsonl", beside(split.examples, predictions))
    if trainer.is_world_process_zero():
        save_model(output_dir, trainer.model, folder, task)
        write_results(output_dir, settings, task, main_metric, metrics, train)
        write_report(output_dir)
        write_card(output_dir)
    trainer.accelerator.wait_for_everyone()
    return FinetuneResult(output_dir, metrics, main_metric, train["seconds"], train)


def check_output_dir(output_dir: Path, resume: bool | str) -> None:
    """ValueError for the folder of a run that has ended."""
    if (output_dir / TASK_FILE).exists() and not resume:
        raise ValueError(f"{output_dir} holds a model that was fine-tuned before: choose another output_dir")


def arguments_of(settings: FinetuneSettings) -> Any:
    """`TrainingArguments`: what was given, then what suits fine-tuning."""
    given = settings.arguments
    has_validation = any(split.startswith("validation") for split in sources_of(settings))
    evaluates = given.get("eval_strategy", "epoch" if has_validation else "no")
    suited: dict[str, Any] = {
        "eval_strategy": evaluates,
        "save_strategy": evaluates if has_validation else "epoch",
        "logging_steps": 0.05,
    }
    if "eval_steps" in given:
        suited["save_steps"] = given["eval_steps"]
    saves = given.get("save_strategy", suited["save_strategy"])
    suited["load_best_model_at_end"] = has_validation and "no" not in (str(evaluates), str(saves))
    return training_arguments(settings.output_dir, suited, given)


def sources_of(settings: FinetuneSettings) -> dict[str, str]:
    """Split -> its file, or the folder that it is in."""
    files = {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}
    sources = {split: file for split, file in files.items() if file is not None}
    if settings.data_dir is not None:
        sources = dict.fromkeys(splits_in(settings.task, settings.data_dir), settings.data_dir) | sources
    if "train" not in sources:
        where = "" if settings.data_dir is None else f", {settings.data_dir} has none"
        raise ValueError(f"there are no training examples{where}: give a train_file")
    return sources


def _read(settings: FinetuneSettings, task: Task, split: str, source: str, seed: int) -> Examples:
    """The examples of a split, with their labels; those of a test file may have none."""
    options = reading(task, settings.read_options)
    labelled = None if split.startswith("test") else True
    found = read(settings.task, source, split=split, columns=settings.columns, labelled=labelled, **options)
    return sampled(found, settings.max_train_samples if split == "train" else settings.max_eval_samples, seed)


def _check_tokenizer(folder: Path, tokenizer: Tokenizer, config: Any) -> None:
    vocab = tokenizer.backend.get_vocab(with_added_tokens=True)
    token = max(vocab, key=lambda token: vocab[token])
    if vocab[token] >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} does not fit its model: {token!r} has the id {vocab[token]}, but the table of "
            f"embeddings has {config.vocab_size} rows"
        )


def _check_length(task: Task, config: Any) -> None:
    length = getattr(task, "max_seq_length", None)
    if length is not None and not 2 < length <= config.max_position_embeddings:
        most = config.max_position_embeddings
        raise ValueError(f"max_seq_length is {length}, expected from 3 to {most}, the positions of the model")


def _keep_order(task: Any, config: Any) -> None:
    """Number the labels as the checkpoint does, where it was trained on the same ones."""
    before = tuple(config.id2label[number] for number in sorted(config.id2label))
    if getattr(task, "labels", None) and sorted(before) == sorted(task.labels):
        task.labels = before


def _model(folder: Path, config: Any, task: Task, plain: bool) -> Head:
    fields = replaced(config, task.config())
    kind = model_class(fields, task.head, plain=plain)
    model: Head = build(kind, fields, read_state_dict(folder), dtype="float32", new_classifier=True)
    return model


def choose_by(splits: Mapping[str, Split], task: Task, args: Any, given: Mapping[str, Any]) -> tuple[Split | None, str]:
    """What says which checkpoint is the best: the validation examples, if there are any, and the metric of them.

    The metric goes into `args`, unless another one was given.

    Raises:
        ValueError: they have no labels.
    """
    held_out = next((split for name, split in splits.items() if name.startswith("validation")), None)
    if held_out is None:
        return None, task.main_metric
    if not held_out.labelled:
        raise ValueError("the validation file has examples without labels, and cannot say which checkpoint is the best")
    main_metric = task.metric_for(held_out.examples)
    if "metric_for_best_model" not in given:
        args.metric_for_best_model, args.greater_is_better = main_metric, True
    return held_out, main_metric


def train_on(split: Split, trainer: Any, resume: bool | str) -> dict[str, Any]:
    """Train, and say what `FinetuneResult.train` has."""
    start = time.perf_counter()
    trainer.train(resume or None)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "examples": len(split.examples),
        "tokens_per_second": trainer.throughput.total_tokens / (seconds - trainer.seconds_evaluating),
        "skipped": dict(split.skipped),
        "num_truncated": split.features.num_truncated,
    }


def save_model(output_dir: Path, model: Any, source: Path, task: Task) -> None:
    """The model, its tokenizer and its task, so that the folder is a checkpoint of its own."""
    copy_tokenizer(source, output_dir)
    save_task(task, output_dir)
    save_pretrained(model, output_dir)


def write_results(
    output_dir: Path,
    settings: FinetuneSettings,
    task: Task,
    main_metric: str,
    metrics: Mapping[str, Any],
    train: Mapping[str, Any],
) -> None:
    """Write `results.json`, which the report and the model card are made of."""
    results = {
        "task": settings.task,
        "kind": task.kind,
        "model": settings.model_name_or_path,
        "settings": dataclasses.asdict(settings),
        "labels": list(getattr(task, "labels", None) or ()),
        "main_metric": main_metric,
        "metrics": metrics,
        "train": train,
        "versions": versions(),
    }
    disk.write_json(output_dir / RESULTS_FILE, results)
