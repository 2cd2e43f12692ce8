"""GLUE: the files of its distribution, with what is odd about them, and Hugging Face's exports of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bert_fast.data.classification import read_texts
from bert_fast.data.columns import require_column
from bert_fast.data.dataset import Request
from bert_fast.data.examples import Examples
from bert_fast.data.tables import Table, open_table, read_lines

#: CoLA's files, but for its test, have no line of names.
COLA_COLUMNS = ("source", "label", "star", "sentence")
#: The label of a pair on which MNLI's annotators did not agree.
UNDECIDED = "-"
#: MRPC's official file holds training and validation; these, beside it, hold the pairs of ids of GLUE's validation.
MRPC_DEV_IDS = ("dev_ids.tsv", "mrpc_dev_ids.tsv")
MRPC_IDS = ("#1 ID", "#2 ID")


def read_glue(request: Request, **options: Any) -> Examples:
    """One of GLUE's files: roles `text`, `text_pair`, `label`.

    Ids are the places of the rows, from 0, as its submissions count them. QQP has rows that are cut; they are counted
    and left out, and so are MNLI's pairs without a label where labels are wanted.

    Raises:
        ValueError, OSError: as `bert_fast.data.catalogue.read` says.
    """
    assert request.dataset is not None
    name, path = request.dataset.name, request.path
    official = path.name.lower().removesuffix(".gz").endswith((".tsv", ".txt"))
    if official:
        header = COLA_COLUMNS if name == "cola" and not _has_header(path) else None
        table = open_table(path, "tsv", header=header, skip_ragged=name == "qqp")
    else:
        table = open_table(path)
    if name == "mrpc" and path.name.startswith("msr_paraphrase_train"):
        table.rows = _mrpc_split(table, request.split)
    aliases = {UNDECIDED: None} if name == "mnli" else {}
    return read_texts(table, request, aliases=aliases, use_ids=not official, **options)


def _has_header(path: Path) -> bool:
    return "sentence" in next(read_lines(path), "").rstrip("\r\n").split("\t")


def _mrpc_split(table: Table, split: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a split: those of GLUE's validation are known by their ids."""
    found = next((table.path.with_name(name) for name in MRPC_DEV_IDS if table.path.with_name(name).is_file()), None)
    if found is None:
        if split != "train":
            raise ValueError(f"{table.path} holds the split {split!r} only with {' or '.join(MRPC_DEV_IDS)} beside it")
        return table.rows
    for name in MRPC_IDS:
        require_column(table, name)
    ids = {tuple(line.rstrip("\r\n").split("\t")) for line in read_lines(found)}
    wanted = split == "validation"
    return ((number, row) for number, row in table.rows if ((row[MRPC_IDS[0]], row[MRPC_IDS[1]]) in ids) == wanted)
