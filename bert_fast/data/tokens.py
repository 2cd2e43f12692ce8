"""Words with a tag each: CoNLL's columns, and any file of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bert_fast.data.columns import Cells, find_columns, layouts_of
from bert_fast.data.dataset import Columns, Dataset, Request
from bert_fast.data.examples import Examples, TokensExample
from bert_fast.data.tables import FORMATS, Table, format_of, open_table, read_lines
from bert_fast.terminal import progress_bar

LAYOUTS: tuple[Columns, ...] = ({"words": "tokens"}, {"words": "words"})
TARGETS = ("ner_tags", "tags", "labels")
#: How CoNLL-2003 marks the beginning of a document.
DOCUMENT = "-DOCSTART-"
NO_WORDS = "no words"


def read_tokens(request: Request, *, iob1: bool | None = None) -> Examples:
    """The sentences of a file.

    A file of rows (csv, jsonl, json, parquet, and tsv with a line of names) has a row for each sentence: lists, as JSON
    or with spaces between the words. Any other file is CoNLL's: a line for each word, columns with a tab or spaces
    between them, an empty line after each sentence.

    Args:
        request: roles are `words`, `tags`, `id`; of CoNLL's columns their numbers, the first (0) and the last (-1) when
            not given.
        iob1: whether tags are IOB1 and become IOB2; when not given, CoNLL-2003's and those of files `eng.*` do.

    Raises:
        ValueError: a line has another number of columns than the first, a sentence another number of tags than words,
            or a tag is none of the data set's; the message has the number of the line.
    """
    table = _table(request)
    if iob1 is None:
        iob1 = request.path.name.startswith("eng.") or (request.dataset is not None and table is None)
    return _from_columns(request, iob1) if table is None else _from_table(table, request, iob1)


def iob1_to_iob2(tags: Sequence[str]) -> tuple[str, ...]:
    """The same entities, with B- at the first word of each (IOB2) and not only between two of one type (IOB1)."""
    converted, before = [], "O"
    for tag in tags:
        inside = tag.startswith("I-") and before[:2] in ("B-", "I-") and before[2:] == tag[2:]
        converted.append(f"B-{tag[2:]}" if tag.startswith("I-") and not inside else tag)
        before = tag
    return tuple(converted)


def _table(request: Request) -> Table | None:
    """The file's rows, if it is not CoNLL's."""
    suffix = Path(request.path.name.lower().removesuffix(".gz")).suffix.removeprefix(".")
    if suffix not in (*FORMATS, "ndjson"):
        return None
    if format_of(request.path) == "tsv":
        names = next(read_lines(request.path), "").rstrip("\r\n").split("\t")
        words = (*(layout["words"] for layout in LAYOUTS), request.columns.get("words", ""))
        if not any(name and name in names for name in words):
            return None
    return open_table(request.path)


def _from_table(table: Table, request: Request, iob1: bool) -> Examples:
    layouts, targets = layouts_of(request.dataset, "tags") if request.dataset else (LAYOUTS, TARGETS)
    columns = find_columns(table, request, layouts, "tags", (*targets, *TARGETS))
    cells = Cells(table, columns, () if request.labelled else ("tags",))
    examples = []
    for number, name, row in cells.rows():
        words = cells.texts(row, "words", number)
        tags = _listed(cells, row, number, request.dataset)
        if tags is None and request.labelled:
            raise cells.wrong("tags", number, None, "a list of tags")
        if tags is not None and len(tags) != len(words):
            raise ValueError(f"{table.where(number)} has {len(words)} words and {len(tags)} tags")
        if not words:
            table.skipped[NO_WORDS] += 1
            continue
        examples.append(_example(name, words, tags, iob1, request.dataset, table.where(number)))
    return Examples(tuple(examples), dict(table.skipped))


def _listed(cells: Cells, row: Any, number: int, dataset: Dataset | None) -> tuple[str, ...] | None:
    """The tags of a row, as texts; a data set's may be numbers of its labels."""
    value = cells.listed(row, "tags", number)
    if value is None:
        return None
    if isinstance(value, str):
        return tuple(value.split())
    names = dataset.labels if dataset else ()
    tags = []
    for tag in value if isinstance(value, list) else [None]:
        if isinstance(tag, int) and not isinstance(tag, bool):
            tags.append(names[tag] if 0 <= tag < len(names) else str(tag))
        elif isinstance(tag, str):
            tags.append(tag)
        else:
            raise cells.wrong("tags", number, value, "a list of tags")
    return tuple(tags)


def _from_columns(request: Request, iob1: bool) -> Examples:
    examples: list[TokensExample] = []
    for first, rows in _sentences(request.path):
        where = f"{request.path}, line {first}"
        width = len(rows[0])
        words = tuple(row[_column(request, "words", 0, width)] for row in rows)
        tags = None
        if request.labelled is not False and (width > 1 or request.labelled):
            if width < 2:
                raise ValueError(f"{where} has one column, expected a word and its tag")
            tags = tuple(row[_column(request, "tags", -1, width)] for row in rows)
        examples.append(_example(str(len(examples)), words, tags, iob1, request.dataset, where))
    return Examples(tuple(examples), {})


def _sentences(path: Path) -> Iterator[tuple[int, list[list[str]]]]:
    """(number of its first line, its lines cut in columns) of each sentence."""
    first = 0
    rows: list[list[str]] = []
    separator, width = "", 0
    number = 0
    lines = progress_bar(read_lines(path), what=f"reading {path.name}", unit=" lines")
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        if not line.strip() or line.startswith(DOCUMENT):
            if rows:
                yield first, rows
            rows = []
            continue
        if not width:
            separator = "\t" if "\t" in line else " "
        row = line.split("\t") if separator == "\t" else [part for part in line.split(" ") if part]
        width = width or len(row)
        if len(row) != width:
            raise ValueError(
                f"{path}, line {number} has {len(row)} columns, expected {width} as the lines before it have"
            )
        first = first if rows else number
        rows.append(row)
    if rows:
        yield first, rows
    if not number:
        raise ValueError(f"{path} is empty")


def _column(request: Request, role: str, usual: int, width: int) -> int:
    given = request.columns.get(role, str(usual))
    try:
        column = int(given)
    except ValueError:
        raise ValueError(f"{request.path} has columns without names; {role}={given!r} should be a number") from None
    if not -width <= column < width:
        raise ValueError(f"{request.path} has no column {column} for {role}; it has {width}, from 0")
    return column


def _example(
    name: str, words: tuple[str, ...], tags: tuple[str, ...] | None, iob1: bool, dataset: Dataset | None, where: str
) -> TokensExample:
    if tags is not None and iob1:
        tags = iob1_to_iob2(tags)
    for tag in tags or () if dataset else ():
        if dataset and tag not in dataset.labels:
            raise ValueError(f"{where}: the tag {tag!r} is none of: {', '.join(dataset.labels)}")
    return TokensExample(name, words, tags)
