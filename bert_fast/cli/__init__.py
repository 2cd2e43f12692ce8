"""The command `bert-fast`: parses, calls the library, prints. Heavy imports happen inside the command that needs them.

A module holds the commands of one subject, and registers them when it is imported, in the order of `--help`.
"""

from __future__ import annotations

from bert_fast.cli import (
    data,
    data_tasks,
    distill,
    export,
    fill,
    finetune,
    inference,
    pretrain,
    reporting,
    search_hparams,
    transfer,
    vocab,
)
from bert_fast.cli._app import app

__all__ = [
    "app",
    "data",
    "data_tasks",
    "distill",
    "export",
    "fill",
    "finetune",
    "inference",
    "pretrain",
    "reporting",
    "search_hparams",
    "transfer",
    "vocab",
]
