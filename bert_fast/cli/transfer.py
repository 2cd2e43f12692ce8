"""The command that takes a checkpoint to a task by way of text of its domain."""

from __future__ import annotations

from typing import Annotated

import typer

from bert_fast.cli._app import command


@command()
def transfer(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file of stages; the guide has one.")],
) -> None:
    """Run the stages of a recipe: text of the domain, text of the task, fine-tuning; compare with and without each.

    The same command again goes on where it was interrupted, and runs only what has changed.
    """
    from bert_fast.recipes.transfer import read_recipe
    from bert_fast.recipes.transfer import transfer as run

    print(run(read_recipe(recipe)))
