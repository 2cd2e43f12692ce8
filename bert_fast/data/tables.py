"""Rows of csv, tsv, jsonl, json and parquet files, each with the place it stands at, for what is said of it.

Text files are UTF-8, with or without a byte order mark, with any line ends, and may be compressed (`.gz`). A tsv has no
quotes, as in GLUE: each tab separates, each line is a row. A csv has them, and its texts may hold line breaks.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from bert_fast.lines import decoded, json_object, json_value
from bert_fast.terminal import progress_bar

FORMATS = ("csv", "tsv", "jsonl", "json", "parquet")
WRONG_NUMBER_OF_COLUMNS = "a row with a wrong number of columns"

csv.field_size_limit(2**31 - 1)  # of characters; the default, 131,072, is a limit of old times


@dataclass
class Table:
    """The rows of a file.

    Attributes:
        path: of the file.
        unit: what its rows are counted in: "line", "record" or "row".
        columns: names, as its header has them; of records all that any of them has, and a record may lack some.
        rows: (number, column -> value), numbers from 1; read as they are taken.
        skipped: reason -> rows left out, complete when the rows are taken.
    """

    path: Path
    unit: str
    columns: tuple[str, ...]
    rows: Iterator[tuple[int, Mapping[str, Any]]]
    skipped: Counter[str] = field(default_factory=Counter)

    def where(self, number: int) -> str:
        """How an error names a row."""
        return f"{self.path}, {self.unit} {number}"


def format_of(path: Path) -> str:
    """One of `FORMATS`, by the end of the name.

    Raises:
        ValueError: it is another.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    name = {"ndjson": "jsonl"}.get(suffix, suffix)
    if name not in FORMATS:
        raise ValueError(f"{path} ends in none of {', '.join(f'.{name}' for name in FORMATS)} (or these and .gz)")
    return name


def open_table(
    path: Path, file_format: str | None = None, *, header: Sequence[str] | None = None, skip_ragged: bool = False
) -> Table:
    """Open a file of rows.

    Args:
        path: of the file.
        file_format: one of `FORMATS`; by the end of the name when not given.
        header: the columns of a csv or tsv that has no line of their names.
        skip_ragged: whether rows with a wrong number of columns are counted and left out.

    Raises:
        ValueError: the file is empty or not what it should be; the message has the number of the line. While rows are
            taken, too.
        OSError: it cannot be read.
    """
    file_format = file_format or format_of(path)
    if file_format in ("csv", "tsv"):
        return _open_cells(path, _csv(path) if file_format == "csv" else _tsv(path), header, skip_ragged)
    if file_format == "parquet":
        return _open_parquet(path)
    unit, read = ("line", _jsonl) if file_format == "jsonl" else ("record", _json)
    records = list(_shown(path, unit, read(path)))  # any of them may have a column that those before it have not
    if not records:
        raise ValueError(f"{path} is empty")
    columns = dict.fromkeys(name for _, record in records for name in record)
    return Table(path, unit, tuple(columns), iter(records))


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a text file, with their ends (`\\n`, `\\r\\n`).

    Raises:
        ValueError: a line is not UTF-8, with its number; the file is not the gzip file that its name says.
        OSError: it cannot be read.
    """
    try:
        with _open(path) as file:
            for _, line in decoded(file, str(path), keep_ends=True):
                yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from error


def load_json(path: Path) -> Any:
    """What a JSON file holds; ValueError, naming the file, where it is not JSON."""
    text = "".join(read_lines(path))
    if not text.strip():
        raise ValueError(f"{path} is empty")
    return json_value(text, str(path))


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else open(path, "rb")


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(read_lines(path), strict=True)
    number = 1  # that of the first line of a row
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {number} is not csv: {error}") from error


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(read_lines(path), 1):
        stripped = line.rstrip("\r\n")
        if stripped:
            yield number, stripped.split("\t")


def _open_cells(
    path: Path, cells: Iterator[tuple[int, list[str]]], header: Sequence[str] | None, skip_ragged: bool
) -> Table:
    if header is None:
        _, header = next(cells, (0, []))
        if not header:
            raise ValueError(f"{path} is empty")
    _refuse_twice(path, header)
    table = Table(path, "line", tuple(header), iter(()))
    table.rows = _shown(path, "line", _rows(table, cells, skip_ragged))
    return table


def _shown(path: Path, unit: str, rows: Iterable[Any], total: int | None = None) -> Iterator[Any]:
    """The rows, with a bar while they are taken."""
    return iter(progress_bar(rows, total=total, what=f"reading {path.name}", unit=f" {unit}s"))


def _refuse_twice(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, times in Counter(columns).items() if name and times > 1]
    if twice:
        raise ValueError(f"{path} has two columns {twice[0]!r}")


def _rows(
    table: Table, cells: Iterable[tuple[int, list[str]]], skip_ragged: bool
) -> Iterator[tuple[int, Mapping[str, str]]]:
    columns, width = table.columns, len(table.columns)
    for number, row in cells:
        if len(row) == width:
            yield number, dict(zip(columns, row))  # noqa: B905 (the lengths were just compared)
        elif skip_ragged:
            table.skipped[WRONG_NUMBER_OF_COLUMNS] += 1
        else:
            raise ValueError(f"{table.where(number)} has {len(row)} columns, expected {width}: {', '.join(columns)}")


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield number, json_object(json_value(line, where), where)


def _json(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    value = load_json(path)
    if isinstance(value, dict) and "data" in value:
        value = value["data"]
    if not isinstance(value, list):
        raise ValueError(f'{path} holds a {type(value).__name__}, expected a list of objects or {{"data": [...]}}')
    yield from ((number, json_object(record, f"{path}, record {number}")) for number, record in enumerate(value, 1))


def _open_parquet(path: Path) -> Table:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    with open(path, "rb"):  # says what is wrong with a path better than Arrow does
        pass
    try:
        file = ParquetFile(path)
        columns, num_rows = tuple(file.schema_arrow.names), file.metadata.num_rows
    except (ArrowException, OSError) as error:  # the latter where the end of the file is not what it was
        raise ValueError(f"{path} is not a Parquet file: {error}") from error
    _refuse_twice(path, columns)
    return Table(path, "row", columns, _shown(path, "row", enumerate(_parquet_rows(path, file), 1), num_rows))


def _parquet_rows(path: Path, file: Any) -> Iterator[Mapping[str, Any]]:
    from pyarrow import ArrowException

    try:
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:  # a page that is not what it was
        raise ValueError(f"{path} cannot be read: {error}") from error
