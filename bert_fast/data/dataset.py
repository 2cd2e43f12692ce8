"""What is known of a data set, and what a reader is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: role -> column. The roles of each kind are those of its reader.
Columns = Mapping[str, str]


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set.

    Attributes:
        name: as `run_glue.py` spells it.
        kind: of task, as `bert_fast.tasks` names it.
        title: what it asks, in a few words.
        labels: names in the order of their ids; empty where there are none, or numbers.
        metrics: official ones, by the names of `bert_fast.tasks.metrics`; checkpoints are chosen by the first.
        splits: split -> names of its files, in the order in which they are looked for in the data set's folder.
        columns: role -> column, for each layout it is handed around in; the first whose texts a file has is its own.
        options: of the task, where they are not its defaults.
    """

    name: str
    kind: str
    title: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]]
    columns: tuple[Columns, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What a reader is asked for.

    Attributes:
        path: a file, or what stands for one.
        split: of a data set.
        columns: role -> column, as the caller says it.
        labelled: True: an example without a label is an error; False: labels are not read; None: they are where there
            are some.
        dataset: None for files of a kind.
    """

    path: Path
    split: str = "train"
    columns: Columns = field(default_factory=dict)
    labelled: bool | None = None
    dataset: Dataset | None = None
