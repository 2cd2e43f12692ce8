"""Options of how models are trained, which several commands share, and the flags of `TrainingArguments` besides."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

TRAINING = "How it is trained"


def training_option(name: str, help: str, **options: Any) -> Any:
    """An option among those of how a model is trained."""
    return typer.Option(name, help=help, rich_help_panel=TRAINING, **options)


Checkpoint = Annotated[
    str, typer.Option("--model_name_or_path", help="What to start from: a folder, a Hub id, or demo.")
]
OutputDir = Annotated[Path, typer.Option("--output_dir", help="Where the model and all about it goes.")]
NumTrainEpochs = Annotated[float, training_option("--num_train_epochs", "Times through the training data.")]
LearningRate = Annotated[float, training_option("--learning_rate", "The highest; published: 2e-5, 3e-5, 5e-5.")]
TrainBatchSize = Annotated[
    int, training_option("--per_device_train_batch_size", "Examples of a batch, packed without padding.", min=1)
]
MaxTrainSamples = Annotated[
    int | None, training_option("--max_train_samples", "Use so many training examples only.", min=1)
]
MaxEvalSamples = Annotated[int | None, training_option("--max_eval_samples", "The same of validation and test.", min=1)]
Resume = Annotated[
    str | None,
    training_option(
        "--resume_from_checkpoint", "true goes on where the last whole checkpoint was saved, if there is one."
    ),
]
Plain = Annotated[bool, training_option("--plain", "Plain PyTorch with padding, to compare with.")]


def training_arguments(context: typer.Context, **named: Any) -> dict[str, Any]:
    """What was given of `TrainingArguments`: by options of the command, None for not given, and by other flags."""
    return {name: value for name, value in named.items() if value is not None} | training_options(context.args)


def training_options(extra: Sequence[str]) -> dict[str, Any]:
    """What was given of `TrainingArguments`, by name, from the flags that a command does not know itself.

    Args:
        extra: as they were typed, `--weight_decay 0.1` or `--weight-decay=0.1`.

    Raises:
        ValueError: a flag is none of `TrainingArguments`, or its value is not of its type; the message names it.
    """
    from transformers import HfArgumentParser

    from bert_fast.training import TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    arguments: Any = TrainingArguments
    parser = Parser(arguments, add_help=False, allow_abbrev=False)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
    given, unknown = parser.parse_known_args([_spelled(word) for word in extra])
    if unknown:
        flags = [option for action in parser._actions for option in action.option_strings]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{unknown[0]} is no option of this command nor one of TrainingArguments{hint}")
    return vars(given)


def resume(word: str | None) -> bool | str:
    """`--resume_from_checkpoint`: whether, or from which checkpoint."""
    return {None: False, "true": True, "false": False}.get(word if word is None else word.lower(), word or False)


def _spelled(word: str) -> str:
    """A flag with underscores, as `TrainingArguments` spells it."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return f"--{flag[2:].replace('-', '_')}{equals}{value}"


def print_once(result: object) -> None:
    """Print, in the first of the processes that torchrun started, or in the only one."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(result)
