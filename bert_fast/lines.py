"""Lines of UTF-8, plain or JSON, with the file and the number of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any


def decoded(lines: Iterable[bytes], name: str, *, keep_ends: bool = False) -> Iterator[tuple[str, str]]:
    """(where, line) of each line, without its end; a byte order mark at the beginning is left out.

    Args:
        lines: a file opened for reading bytes; lines end in LF or CR LF.
        name: of the file, for `where`, which reads "corpus.txt, line 3".
        keep_ends: whether lines keep their ends.

    Raises:
        ValueError: a line is not UTF-8; the message says which.
    """
    for number, line in enumerate(lines, 1):
        where = f"{name}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8: {error}") from error
        yield where, text if keep_ends else text.rstrip("\r\n")


def json_value(text: str, where: str) -> Any:
    """What JSON says; ValueError, whose message starts with `where`, if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def json_object(value: Any, where: str) -> dict[str, Any]:
    """The value itself; ValueError, whose message starts with `where`, if it is no object."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a JSON {type(value).__name__}, expected an object")
    return value


def json_text(line: str, field: str, where: str) -> str:
    """The string that an object on a line of JSON has under a key.

    Raises:
        ValueError: the line is not an object, or it has no such string; the message starts with `where`.
    """
    record = json_object(json_value(line, where), where)
    if field not in record:
        raise ValueError(f"{where} has no field {field!r}; it has: {', '.join(record)}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field {field!r} is a {type(record[field]).__name__}, expected a string")
    return record[field]
