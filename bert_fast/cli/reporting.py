"""Commands about what a fine-tuned model said: a page to look at, files to submit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli._app import command


@command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that bert-fast finetune left.")],
) -> None:
    """Write report.html: scores beside published ones, curves, confusions, the worst errors."""
    from bert_fast.recipes.report import write_report

    print(write_report(folder))


@command()
def submission(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", help="A .jsonl that finetune, evaluate or predict left."),
    ],
    task_name: Annotated[
        str,
        typer.Option(
            "--task_name",
            help="Whose file to write: cola, sst2, mrpc, stsb, qqp, mnli, mnli_mismatched, ax, qnli, rte, wnli, squad, "
            "squad_v2, conll2003, swag, imdb.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder for it; it is made.")],
) -> None:
    """Write predictions as the file that a benchmark, or its script, takes."""
    from bert_fast.recipes.submission import read_predictions, write_submission

    for path in write_submission(task_name, read_predictions(predictions), output_dir):
        print(path)
