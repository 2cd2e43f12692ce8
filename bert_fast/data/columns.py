"""Which column of a file holds what, and values of the kind that is expected there."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from bert_fast.data.dataset import Columns, Dataset, Request
from bert_fast.data.tables import WRONG_NUMBER_OF_COLUMNS, Table

#: Columns that hold the id of an example where they are there and nothing else is said.
IDS = ("id", "idx", "guid")
#: Roles that a file may do without, and that are not filled in where the caller says which columns others have.
OPTIONAL = ("text_pair", "start", "answer_start", "negative")


def layouts_of(dataset: Dataset, target: str) -> tuple[tuple[Columns, ...], tuple[str, ...]]:
    """Role -> column of the inputs of a data set, for each layout, and the columns of its labels."""
    inputs = tuple({role: name for role, name in layout.items() if role != target} for layout in dataset.columns)
    return inputs, tuple(layout[target] for layout in dataset.columns)


def find_columns(
    table: Table, request: Request, layouts: Sequence[Columns], target: str, targets: Sequence[str]
) -> dict[str, str]:
    """Role -> column.

    What the caller says counts. For inputs he says nothing of, the first layout counts that the file has all of.

    Args:
        table: the file.
        request: what the caller says.
        layouts: role -> column of the inputs, as files are known to have them.
        target: the role of the label; it is left out where the file has none, or none is wanted.
        targets: columns that are known to hold it.

    Raises:
        ValueError: a column is missing (the message names it and those present), or there is no such role.
    """
    given = dict(request.columns)
    roles = sorted({role for layout in layouts for role in layout} | {target, "id"})
    for role, column in given.items():
        if role not in roles:
            raise ValueError(f"there is no role {role!r} to give a column to; there are: {', '.join(roles)}")
        for part in parts(table, column) if role != target or request.labelled else ():
            require_column(table, part)
    inputs = {role: column for role, column in given.items() if role not in (target, "id")}
    for layout in layouts:
        wanted = {role: column for role, column in layout.items() if role not in inputs}
        if inputs:
            wanted = {role: column for role, column in wanted.items() if role not in OPTIONAL}
        if all(part in table.columns for column in wanted.values() for part in column.split(",")):
            inputs.update(wanted)
            break
    else:
        _fail(table, layouts)
    found = dict(inputs)
    if "id" in given or any(name in table.columns for name in IDS):
        found["id"] = given.get("id") or next(name for name in IDS if name in table.columns)
    if request.labelled is not False:
        usual = [given[target]] if target in given else targets
        label = next((name for name in usual if all(part in table.columns for part in parts(table, name))), None)
        if label is not None:
            found[target] = label
        elif request.labelled:
            raise ValueError(f"{table.path} has no column {' or '.join(map(repr, usual))}; it has: {_names(table)}")
    return found


def parts(table: Table, column: str) -> list[str]:
    """The columns that `column` names: itself, or several with commas between them."""
    return [column] if column in table.columns else column.split(",")


def require_column(table: Table, column: str) -> None:
    """ValueError, with the columns that there are, if the file has no such column."""
    if column not in table.columns:
        raise ValueError(f"{table.path} has no column {column!r}; it has: {_names(table)}")


def _fail(table: Table, layouts: Sequence[Columns]) -> None:
    if len(layouts) == 1:
        for column in layouts[0].values():
            for part in column.split(","):
                require_column(table, part)
    hint = f"say which column is which, as --column {next(iter(layouts[-1]))}={next(iter(table.columns))}"
    known = " or ".join(", ".join(layout.values()) for layout in layouts)
    raise ValueError(f"{table.path} has no columns {known}; it has: {_names(table)}; {hint}")


def _names(table: Table) -> str:
    return ", ".join(map(repr, table.columns))


class Cells:
    """The values of a row by role, checked; an error names the row and the column.

    Args:
        table: the file.
        columns: role -> column.
        optional: roles whose column a record may lack.
    """

    def __init__(self, table: Table, columns: Mapping[str, str], optional: Collection[str] = ()) -> None:
        self.table, self.columns, self.optional = table, columns, optional

    def __contains__(self, role: str) -> bool:
        return role in self.columns

    def get(self, row: Mapping[str, Any], role: str, number: int) -> Any:
        """The value; None where the file has no such column, or the row has not and may lack it."""
        column = self.columns.get(role)
        if column is None:
            return None
        if column in row:
            return row[column]
        if role in self.optional:
            return None
        names = ", ".join(map(repr, row))
        raise ValueError(f"{self.table.where(number)} has no column {column!r}; it has: {names}")

    def text(self, row: Mapping[str, Any], role: str, number: int) -> str:
        """A value that must be text."""
        value = self.get(row, role, number)
        if not isinstance(value, str):
            raise self.wrong(role, number, value, "text")
        return value

    def listed(self, row: Mapping[str, Any], role: str, number: int) -> Any:
        """The value, or the list that it holds in JSON; a list as Python prints it, which pandas writes, is refused."""
        value = as_list(self.get(row, role, number))
        if isinstance(value, str) and value.startswith(("['", '["')):
            raise self.wrong(role, number, value, 'a list in JSON, as ["one", "two"]')
        return value

    def texts(self, row: Mapping[str, Any], role: str, number: int, *, cut: bool = True) -> tuple[str, ...]:
        """A list of texts, or a text that holds one in JSON, or, if it may be cut, several with spaces between them."""
        value = self.listed(row, role, number)
        if cut and isinstance(value, str):
            return tuple(value.split())
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(role, number, value, "a list of texts")
        return tuple(value)

    def wrong(self, role: str, number: int, value: Any, expected: str) -> ValueError:
        """The error for a value that is not what is expected."""
        shown = "nothing" if value in (None, "") else repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
        return ValueError(f"{self.table.where(number)}: column {self.columns[role]!r} is {shown}, expected {expected}")

    def rows(self, use_ids: bool = True) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
        """(number, id, row); the id is that of the file, or the place of the row in it, from 0.

        Raises:
            ValueError: two rows have one id.
        """
        lines: dict[str, int] = {}
        for place, (number, row) in enumerate(self.table.rows):
            if not use_ids or "id" not in self.columns:
                yield number, str(place + self.table.skipped[WRONG_NUMBER_OF_COLUMNS]), row
                continue
            name = str(self.get(row, "id", number))
            if lines.setdefault(name, number) != number:
                raise ValueError(
                    f"{self.table.where(number)} has the id {name!r}, as {self.table.unit} {lines[name]} has"
                )
            yield number, name, row


def as_list(value: Any) -> Any:
    """The list that a text holds in JSON; any other value as it is."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return parsed if isinstance(parsed, list) else value
    return value
