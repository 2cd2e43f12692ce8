"""Texts and pairs of texts with the name of a class, several, or a number: any file of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bert_fast.data.columns import Cells, as_list, find_columns, layouts_of, parts
from bert_fast.data.dataset import Columns, Dataset, Request
from bert_fast.data.examples import Examples, TextExample
from bert_fast.data.tables import Table

LAYOUTS: tuple[Columns, ...] = (
    {"text": "text", "text_pair": "text_pair"},
    {"text": "text"},
    {"text": "sentence1", "text_pair": "sentence2"},
    {"text": "premise", "text_pair": "hypothesis"},
    {"text": "question1", "text_pair": "question2"},
    {"text": "question", "text_pair": "sentence"},
    {"text": "sentence"},
)
TARGETS = ("label", "labels", "score")
PROBLEMS = ("single", "multi", "regression")
NO_LABEL = "no label"


def read_texts(
    table: Table,
    request: Request,
    *,
    problem: str | None = None,
    label_delimiter: str = "|",
    no_label: str | int = "auto",
    aliases: Mapping[str, str | None] | None = None,
    use_ids: bool = True,
) -> Examples:
    """The texts of a file.

    Args:
        table: the file.
        request: roles are `text`, `text_pair`, `label`, `id`. A label of several columns (`toxic,rude`) takes the names
            of those that hold 1.
        problem: "single", "multi" or "regression"; when not given: "multi" for lists, for a column `labels` and for
            several columns, "regression" for a column `score` and for numbers of which one has a fraction.
        label_delimiter: between the labels of a text that has several.
        no_label: the label that says that there is none; where labels are wanted, such texts are counted and left out.
            "none": there is no such label. "auto": -1, as in Hugging Face's test sets, if all labels of the file are;
            in a file of no data set -1 beside other classes may be either, and is refused.
        aliases: label in the file -> name of the class, or None for a label that says that there is none.
        use_ids: whether a column of ids counts.

    Raises:
        ValueError: a column or a label is missing, or not what it should be.
    """
    if problem not in (None, *PROBLEMS):
        raise ValueError(f"problem is {problem!r}, expected one of: {', '.join(PROBLEMS)}")
    dataset = request.dataset
    layouts, targets = layouts_of(dataset, "label") if dataset else (LAYOUTS, TARGETS)
    if dataset is not None:
        its_problem = dataset.options.get("problem", "single")
        if problem not in (None, its_problem):
            raise ValueError(f"problem is {problem!r}, but {dataset.name} is {its_problem!r}")
        problem = its_problem
    columns = find_columns(table, request, layouts, "label", targets)
    cells = Cells(table, columns, () if request.labelled else ("label",))
    column = cells.columns.get("label")
    several = parts(table, column) if column else []
    rows = []
    for number, name, row in cells.rows(use_ids):
        text = cells.text(row, "text", number)
        pair = cells.text(row, "text_pair", number) if "text_pair" in cells else None
        value = _chosen(table, number, row, several) if len(several) > 1 else cells.listed(row, "label", number)
        rows.append((number, name, text, pair, value))
    if problem is None:
        problem = "multi" if len(several) > 1 else _infer(column, [row[4] for row in rows])
    # What Hugging Face's exports give a test set.
    none: tuple[str, ...] = ("-1",) if dataset and no_label != "none" else ()
    if no_label == "auto" and not dataset:
        none = _found_none(cells, problem, [(row[0], row[4]) for row in rows])
    elif no_label not in ("auto", "none"):
        aliases = {**(aliases or {}), _plain(no_label): None}
    labels = _Labels(cells, problem, label_delimiter, dataset, none, aliases or {})
    examples = []
    for number, name, text, pair, value in rows:
        label = labels.read(value, number)
        if label is None and request.labelled:
            if _plain(value) in labels.aliases:
                table.skipped[NO_LABEL] += 1
                continue
            raise cells.wrong("label", number, value, "a label")
        examples.append(TextExample(name, text, pair, label))
    return Examples(tuple(examples), dict(table.skipped))


def _found_none(cells: Cells, problem: str, values: Sequence[tuple[int, Any]]) -> tuple[str, ...]:
    """-1 if all labels are; ValueError if some are, beside other classes."""
    known = [(number, value) for number, value in values if value not in (None, "")]
    marked = [(number, value) for number, value in known if _plain(value) == "-1"]
    if marked and len(marked) == len(known) and problem != "multi":
        return ("-1",)
    if marked and problem == "single":
        number, value = marked[0]
        raise cells.wrong(
            "label",
            number,
            value,
            "the name of a class: -1 often says that there is no label, but others are there. Say no_label=-1 if it "
            "does (as a read_option), no_label=none if it is a class",
        )
    return ()


def _chosen(table: Table, number: int, row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    chosen = []
    for column in columns:
        value = Cells(table, {"label": column}).get(row, "label", number)
        if str(value) not in ("0", "1", "0.0", "1.0", "False", "True"):
            raise ValueError(f"{table.where(number)}: column {column!r} is {value!r}, expected 0 or 1")
        if str(value) in ("1", "1.0", "True"):
            chosen.append(column)
    return chosen


def _infer(column: str | None, values: Sequence[Any]) -> str:
    """What problem the labels of a file are."""
    known = [value for value in values if value not in (None, "")]
    if column == "labels" or any(isinstance(as_list(value), list) for value in known):
        return "multi"
    if column == "score":
        return "regression"
    numbers = [_number(value) for value in known]
    if numbers and None not in numbers and any(number != int(number) for number in numbers if number is not None):
        return "regression"
    return "single"


def _number(value: Any) -> float | None:
    """A finite number, from a number or a text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _plain(value: Any) -> str:
    """A label as text, whole numbers without a fraction."""
    number = _number(value)
    return str(int(number)) if number is not None and number.is_integer() else str(value)


class _Labels:
    """Reads labels of one problem."""

    def __init__(
        self,
        cells: Cells,
        problem: str,
        delimiter: str,
        dataset: Dataset | None,
        none: Sequence[str],
        aliases: Mapping[str, str | None],
    ) -> None:
        self.cells, self.problem, self.delimiter, self.aliases = cells, problem, delimiter, aliases
        self.names = dataset.labels if dataset else ()
        self.none = none

    def read(self, value: Any, number: int) -> str | float | tuple[str, ...] | None:
        if value is None or _plain(value) in self.none or (value == "" and self.problem != "multi"):
            return None
        if self.aliases.get(_plain(value), "") is None:
            return None
        if self.problem == "regression":
            score = _number(value)
            if score is None:
                raise self.cells.wrong("label", number, value, "a number")
            return score
        if self.problem == "multi":
            items = as_list(value)
            if isinstance(items, str):
                items = [item.strip() for item in items.split(self.delimiter) if item.strip()]
            if not isinstance(items, list):
                raise self.cells.wrong("label", number, value, "a list of labels")
            return tuple(self._name(item, number) for item in items)
        return self._name(value, number) if not self.names else self._known(value, number)

    def _name(self, value: Any, number: int) -> str:
        """The name of a class in a file of no data set: texts as they are, whole numbers without a fraction."""
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, float) and value.is_integer():
            return str(int(value))
        if isinstance(value, (str, int)):
            return str(value)
        raise self.cells.wrong("label", number, value, "the name of a class")

    def _known(self, value: Any, number: int) -> str | None:
        """The name of a class of a data set, from the name, another name of it, or its number."""
        text = str(value)
        if text in self.names:
            return text
        if text in self.aliases:
            return self.aliases[text]
        if text.isdecimal() and int(text) < len(self.names):
            return self.names[int(text)]
        raise self.cells.wrong("label", number, value, f"one of: {', '.join(self.names)}")
