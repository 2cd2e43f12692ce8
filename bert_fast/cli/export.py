"""The command that makes a folder to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli._app import command


@command()
def export(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A folder that was trained, a checkpoint-N in it, or any checkpoint."),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to make.")],
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, float16.", show_default="as they are")
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            "--max_shard_size", help="Cut the weights into files of so much, as 500MB.", show_default="one file"
        ),
    ] = None,
) -> None:
    """Write a clean folder to publish: weights, tokenizer and card, without what only training needs.

    transformers loads it, and sentence-transformers where it makes vectors.
    """
    from bert_fast.recipes.export import export

    folder = export(source, output, dtype=dtype, max_shard_size=max_shard_size)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        print(f"{path.stat().st_size:>13,}  {path.relative_to(folder)}")
    print(f"written: {output}")
