"""Options that say how labelled files are read, which several commands share, and what is made of them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

FILES = "Files and their columns (found by their usual names if not given)"

TestFile = Annotated[
    str | None,
    typer.Option("--test_file", help="Predicted at the end, and scored if labelled.", rich_help_panel=FILES),
]
DataDir = Annotated[
    str | None,
    typer.Option(
        "--data_dir", help="Folder of a data set as it is handed out, in place of files.", rich_help_panel=FILES
    ),
]
TextColumn = Annotated[str | None, typer.Option("--text_column", help="Of the (first) text.", rich_help_panel=FILES)]
PairColumn = Annotated[
    str | None,
    typer.Option("--text_pair_column", help="Of the second text.", rich_help_panel=FILES),
]
LabelColumn = Annotated[str | None, typer.Option("--label_column", help="Of the label.", rich_help_panel=FILES)]
Column = Annotated[
    list[str] | None,
    typer.Option(
        "--column",
        metavar="ROLE=NAME",
        help="Any other column, as words=tokens; may be given several times.",
        rich_help_panel=FILES,
    ),
]
ReadOption = Annotated[
    list[str] | None,
    typer.Option(
        "--read_option",
        metavar="NAME=VALUE",
        help="How files are read: label_delimiter=;  iob1=true  max_score=5. May be given several times.",
        rich_help_panel=FILES,
    ),
]


def read_columns(
    text: str | None, text_pair: str | None, label: str | None, others: list[str] | None
) -> dict[str, str]:
    """Role -> column, from the options above."""
    named = {"text": text, "text_pair": text_pair, "label": label}
    return {role: name for role, name in named.items() if name is not None} | read_pairs(
        "--column", others, "ROLE=NAME"
    )


def read_pairs(flag: str, given: list[str] | None, form: str = "NAME=VALUE") -> dict[str, str]:
    """What stands before and after the equals sign, several times."""
    pairs = {}
    for word in given or ():
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ValueError(f"{flag} is {word!r}, expected {form}")
        pairs[name] = value
    return pairs


def read_options(flag: str, given: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE, several times, the values as `read_value` takes them."""
    return {name.replace("-", "_"): read_value(value) for name, value in read_pairs(flag, given).items()}


def read_value(text: str) -> Any:
    """As JSON writes it, or else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
