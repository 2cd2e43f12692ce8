"""The kinds of tasks by name, and the file that keeps a task beside the model that was trained for it."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import Any

from bert_fast.folders import read_json
from bert_fast.tasks._task import Task

TASK_FILE = "task.json"

#: Kind of task -> where its class is; imported when it is wanted.
TASKS = {
    "classification": "bert_fast.tasks.classification:Classification",
    "tokens": "bert_fast.tasks.tokens:TokenClassification",
    "question_answering": "bert_fast.tasks.question_answering:QuestionAnswering",
    "multiple_choice": "bert_fast.tasks.multiple_choice:MultipleChoice",
    "embeddings": "bert_fast.tasks.embeddings:SentenceEmbeddings",
}


def task_class(kind: str) -> Any:
    """The dataclass of a kind of task; ValueError, with the kinds there are, for another name."""
    if kind not in TASKS:
        raise ValueError(f"the kind of task is {kind!r}, expected one of {', '.join(TASKS)}")
    module, _, name = TASKS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def make_task(kind: str, **options: Any) -> Task:
    """A task of a kind, with the options that its class has; lists, as JSON gives them, become tuples.

    Raises:
        ValueError: there is no such kind or option, or an option is impossible; the message has those there are.
    """
    found = task_class(kind)
    known = [field.name for field in dataclasses.fields(found)]
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"{', '.join(unknown)} is no option of {kind}, which takes {', '.join(known)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    task: Task = found(**values)
    return task


def save_task(task: Task, folder: str | Path) -> None:
    """Write `task.json` into a folder that is there."""
    assert dataclasses.is_dataclass(task)
    values = {"kind": task.kind, "options": dataclasses.asdict(task)}
    (Path(folder) / TASK_FILE).write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_task(folder: str | Path) -> Task:
    """The task of a model that `finetune` left; ValueError if the folder has none, or it cannot be read."""
    file = Path(folder) / TASK_FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {TASK_FILE}: it is not a model that was fine-tuned here")
    values = read_json(file)
    if not isinstance(values.get("kind"), str) or not isinstance(values.get("options"), dict):
        raise ValueError(f"{file} does not say what kind of task it is, and its options")
    return make_task(values["kind"], **values["options"])
