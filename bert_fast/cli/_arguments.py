"""Flags of `bert_fast.training.TrainingArguments`, which the commands that train take besides their own."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from typing import Any, NoReturn


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
