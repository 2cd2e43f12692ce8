"""Texts to choose from: SWAG's csv, and any file of rows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bert_fast.data.columns import Cells, find_columns, layouts_of, parts
from bert_fast.data.dataset import Columns, Request
from bert_fast.data.examples import ChoiceExample, Examples
from bert_fast.data.tables import Table, open_table

#: What may stand before the choices, by the columns of known data sets.
BEFORE: tuple[Columns, ...] = (
    {"context": "sent1", "start": "sent2"},
    {"context": "context", "start": "question"},
    {"context": "context"},
    {"context": "question"},
    {},
)
NUMBERED = re.compile(r"(ending|choice|option|answer)_?\d+")
TARGETS = ("label",)


def read_choices(request: Request) -> Examples:
    """The questions of a file, as pairs (context, start and choice): SWAG's `sent1`, and `sent2` before each ending.

    Args:
        request: roles are `context`, `start` (what each choice goes on from), `choices` (a list, or several columns:
            `ending0,ending1`), `label` (number of the right one, from 0), `id`.

    Raises:
        ValueError: a column is missing, there are less than two choices, or the label is none of them.
    """
    table = open_table(request.path)
    layouts, targets = layouts_of(request.dataset, "label") if request.dataset else (_layouts(table), TARGETS)
    columns = find_columns(table, request, layouts, "label", targets)
    cells = Cells(table, columns, () if request.labelled else ("label",))
    examples = []
    for number, name, row in cells.rows():
        context = cells.text(row, "context", number) if "context" in cells else None
        start = cells.text(row, "start", number) if "start" in cells else ""
        texts = [f"{start} {choice}" if start else choice for choice in _choices(cells, row, number)]
        pairs = tuple((text, None) if context is None else (context, text) for text in texts)
        label = _label(cells, row, number, len(pairs))
        if label is None and request.labelled:
            raise cells.wrong("label", number, None, "the number of a choice")
        examples.append(ChoiceExample(name, pairs, label))
    return Examples(tuple(examples), dict(table.skipped))


def _layouts(table: Table) -> tuple[Columns, ...]:
    numbered = ",".join(column for column in table.columns if NUMBERED.fullmatch(column))
    choices = next((name for name in ("choices", "endings") if name in table.columns), numbered or "choices")
    return tuple({**before, "choices": choices} for before in BEFORE)


def _choices(cells: Cells, row: Mapping[str, Any], number: int) -> tuple[str, ...]:
    columns = parts(cells.table, cells.columns["choices"])
    if len(columns) == 1:
        choices = cells.texts(row, "choices", number, cut=False)
    else:
        choices = tuple(Cells(cells.table, {"choice": column}).text(row, "choice", number) for column in columns)
    if len(choices) < 2:
        raise ValueError(f"{cells.table.where(number)} has {len(choices)} choices, expected two or more")
    return choices


def _label(cells: Cells, row: Mapping[str, Any], number: int, num_choices: int) -> int | None:
    value = cells.get(row, "label", number)
    if value in (None, "", -1, "-1"):
        return None
    text = str(value)
    if not text.isdecimal() or int(text) >= num_choices:
        raise cells.wrong("label", number, value, f"the number of a choice, 0 to {num_choices - 1}")
    return int(text)
