"""`bert-fast data tasks` and `show`: which data sets are known, and what is in a file."""

from __future__ import annotations

from typing import Annotated

import typer

from bert_fast.cli._app import DATA, command
from bert_fast.cli._files import read_pairs


@command(into=DATA)
def tasks(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="All about one of them, as its files.")] = None,
) -> None:
    """List the data sets that are known by name: kind of task, metrics, labels."""
    from bert_fast.data.describe import describe_dataset, list_datasets

    print(list_datasets() if name is None else describe_dataset(name))


@command(into=DATA)
def show(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK",
            help="A data set (bert-fast data tasks), or for any file: classification, tokens, question_answering, "
            "multiple_choice, embeddings.",
        ),
    ],
    file: Annotated[str, typer.Argument(metavar="FILE", help="csv, tsv, jsonl, json, parquet, CoNLL; or a folder.")],
    split: Annotated[str, typer.Option(help="Which part of a data set's folder.")] = "train",
    column: Annotated[
        list[str] | None,
        typer.Option(metavar="ROLE=NAME", help="Which column is the text, text_pair, label, ...; may be repeated."),
    ] = None,
    problem: Annotated[
        str | None,
        typer.Option(help="Of classification: single, multi or regression.", show_default="as the labels look"),
    ] = None,
    label_delimiter: Annotated[str | None, typer.Option(help="Between several labels.", show_default="|")] = None,
    iob1: Annotated[
        bool | None, typer.Option("--iob1/--no-iob1", help="Tags are IOB1.", show_default="for files eng.*")
    ] = None,
    max_score: Annotated[
        float | None, typer.Option(help="Of embeddings: the score of equal texts, as 5.", show_default="1")
    ] = None,
    examples: Annotated[int, typer.Option("--examples", "-n", min=0, help="How many are printed.")] = 3,
) -> None:
    """Read a file as training would; print its first examples, how often each label comes, and what was left out."""
    from bert_fast import terminal
    from bert_fast.data.catalogue import read
    from bert_fast.data.describe import describe_examples

    found = read(
        task,
        file,
        split=split,
        columns=read_pairs("--column", column, "ROLE=NAME"),
        problem=problem,
        label_delimiter=label_delimiter,
        iob1=iob1,
        max_score=max_score,
    )
    text = describe_examples(found, examples)
    width = terminal.columns()
    for line in text.splitlines():
        print(terminal.fitted(line, width))
