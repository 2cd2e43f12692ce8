"""The command that looks for good hyperparameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bert_fast.cli._app import command
from bert_fast.cli._arguments import Checkpoint, MaxEvalSamples, MaxTrainSamples, training_arguments
from bert_fast.cli._files import (
    Column,
    DataDir,
    LabelColumn,
    PairColumn,
    ReadOption,
    TextColumn,
    read_columns,
    read_options,
    read_pairs,
    read_value,
)

SEARCH = "What is searched"


@command("search-hparams", extra_arguments=True)
def search_hparams(
    context: typer.Context,
    model_name_or_path: Checkpoint,
    task_name: Annotated[
        str, typer.Option("--task_name", help="A data set or a kind of task, as bert-fast finetune takes it.")
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Where the trials and the best model go.")],
    train_file: Annotated[str | None, typer.Option("--train_file", help="What is learnt from.")] = None,
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="What says which trial is the best.")
    ] = None,
    data_dir: DataDir = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    column: Column = None,
    read_option: ReadOption = None,
    task_option: Annotated[
        list[str] | None,
        typer.Option(
            "--task_option", metavar="NAME=VALUE", help="Of the task, as max_seq_length=64; may be given several times."
        ),
    ] = None,
    max_train_samples: MaxTrainSamples = None,
    max_eval_samples: MaxEvalSamples = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="NAME=VALUES",
            help="Values to try, as learning_rate=5e-5,3e-5; or, with --trials, a range to draw from, as "
            "learning_rate=1e-5..1e-4:log. May be given several times.",
            show_default="the published grid: batches of 16, 32; learning rates 5e-5, 3e-5, 2e-5; 2, 3, 4 epochs",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    space_file: Annotated[
        str | None,
        typer.Option(
            "--space_file",
            help="The same in TOML: name = [values], or name = { low = 1e-5, high = 1e-4, log = true }.",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(
            "--trials",
            min=1,
            help="Draw so many points, each by what the ones before have scored (optuna's TPE).",
            show_default="try every point",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    seeds: Annotated[
        str,
        typer.Option(
            "--seeds", help="Each point is trained with each, and judged by the mean.", rich_help_panel=SEARCH
        ),
    ] = "42",
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="That says which trial is the best; higher is better.",
            show_default="the task's first",
            rich_help_panel=SEARCH,
        ),
    ] = None,
    search_seed: Annotated[
        int, typer.Option("--search_seed", min=0, help="Of the points that are drawn.", rich_help_panel=SEARCH)
    ] = 0,
    keep_all: Annotated[
        bool, typer.Option("--keep_all", help="Keep the weights of all trials.", rich_help_panel=SEARCH)
    ] = False,
) -> None:
    """Fine-tune at many points of a space of hyperparameters; print a line for each, and keep the best model.

    The same command again goes on with a search that was interrupted. Any option of TrainingArguments may follow, and
    is the same in all trials.
    """
    arguments = training_arguments(context)
    space = _space(vary, space_file)

    from bert_fast.recipes.finetune import FinetuneSettings
    from bert_fast.recipes.search import SearchSettings, search
    from bert_fast.recipes.spaces import PUBLISHED

    base = FinetuneSettings(
        model_name_or_path=model_name_or_path,
        task=task_name,
        output_dir=str(output_dir),
        train_file=train_file,
        validation_file=validation_file,
        data_dir=data_dir,
        columns=read_columns(text_column, text_pair_column, label_column, column),
        read_options=read_options("--read_option", read_option),
        task_options=read_options("--task_option", task_option),
        arguments=arguments,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
    )
    settings = SearchSettings(
        base=base,
        space=space or dict(PUBLISHED),
        trials=trials,
        seeds=tuple(_integers("--seeds", seeds)),
        metric=metric,
        seed=search_seed,
        keep_all=keep_all,
    )
    print(search(settings))


def _space(vary: list[str] | None, space_file: str | None) -> dict[str, Any]:
    from bert_fast.recipes.spaces import read_space

    space: dict[str, Any] = {} if space_file is None else read_space(space_file)
    return space | {name: _values(name, text) for name, text in read_pairs("--vary", vary).items()}


def _values(name: str, text: str) -> Any:
    """`a,b,c`, or `low..high`, or `low..high:log`."""
    from bert_fast.recipes.spaces import Range

    low, dots, rest = text.partition("..")
    if not dots:
        return [read_value(word) for word in text.split(",")]
    high, colon, kind = rest.partition(":")
    numbers = [read_value(low), read_value(high)]
    if (colon and kind != "log") or not all(isinstance(number, int | float) for number in numbers):
        raise ValueError(f"--vary {name} is {text!r}, expected values as 1,2,3 or a range as 1e-5..1e-4:log")
    return Range(numbers[0], numbers[1], log=kind == "log")


def _integers(flag: str, text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise ValueError(f"{flag} is {text!r}, expected numbers, as 1,2,3")
    return [int(word) for word in words]
