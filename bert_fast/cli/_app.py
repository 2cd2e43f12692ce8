"""The application, how its commands end, and the options that several of them share.

Exit codes: 0 done, 1 a check failed, 2 bad input (one line on stderr says what), 130 interrupted, 141 nobody reads.
"""

from __future__ import annotations

import functools
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from bert_fast import __version__

SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": lambda token: token.replace("_", "-"),  # --train_file is --train-file
}

#: The panels of `--help`, and the commands in them, in the order in which people need them.
PANELS = {
    "Use a model": ("embed", "search", "fill", "generate"),
    "Fine-tune it on labelled files": ("finetune", "evaluate", "predict", "search-hparams", "report", "submission"),
    "Make it smaller, give it away": ("distill", "export"),
    "From text to a model": ("vocab", "data", "pretrain", "transfer"),
    "Check and measure": ("info", "verify", "bench", "doctor", "tune"),
}


class _Application(TyperGroup):
    """Its commands in the order of `PANELS`; what is wrong with a command line in one line, as every other error."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for names in PANELS.values() for name in names]

    def main(self, *args: Any, **options: Any) -> Any:
        run = partial(super().main, *args, **{**options, "standalone_mode": False})
        if not options.get("standalone_mode", True):
            return run()
        try:
            code = run()
        except Exception as error:
            # click's exceptions, which typer has under names of its own in some versions.
            if not hasattr(error, "format_message"):
                raise
            if type(error).__name__ != "NoArgsIsHelpError":  # the help has been printed
                path = getattr(getattr(error, "ctx", None), "command_path", "bert-fast")
                reason = " ".join(error.format_message().split()).removesuffix(".")
                print(f"bert-fast: {reason}; see {path} --help", file=sys.stderr)
            code = getattr(error, "exit_code", 2)
        sys.exit(code or 0)


def _panel(name: str) -> str:
    return next(panel for panel, names in PANELS.items() if name in names)


app = typer.Typer(
    cls=_Application,
    help="A fast BERT: vectors and search, training from text to a fine-tuned model, and proof that it is right.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings=SETTINGS,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder, a Hub id, or demo (all-MiniLM-L6-v2).")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the checkpoint's own")]
Precision = Annotated[
    str | None,
    typer.Option(
        help="What it computes in: fp32, bf16, int8 (CPU), fp16, fp8 (GPU).", show_default="that of the weights"
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")]
BatchSize = Annotated[int, typer.Option(min=1, help="Below 32: smaller runs of the model; above: larger on a GPU.")]
TextField = Annotated[
    str | None,
    typer.Option(
        help="Key of the text in JSON lines; given, it makes any file such, not only .jsonl.", show_default="text"
    ),
]
Entities = Annotated[Path | None, typer.Option(help="Lines of a mention, a tab, and what to read where it is unknown.")]


def group(name: str, help: str) -> typer.Typer:
    """A command that has commands of its own, as `bert-fast vocab train`."""
    commands = typer.Typer(help=help, no_args_is_help=True, context_settings=SETTINGS)
    app.add_typer(commands, name=name, rich_help_panel=_panel(name))
    return commands


#: Of several modules: text for pre-training, files of tasks.
DATA = group("data", "Make pre-training data of text, look into them, and into the files of tasks.")


class _Command(TyperCommand):
    """A command whose help has the names of its options in full: typer's cuts those that are long."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.table import Table
        from typer import rich_utils

        class Narrowed(Table):
            """Only the last column, what an option is for, gives way."""

            def add_row(self, *cells: Any, **options: Any) -> None:
                super().add_row(*cells, **options)
                for column in self.columns[:-1]:
                    column.no_wrap = True

        rich_utils.Table = Narrowed  # type: ignore[misc]
        rich_utils.RANGE_STRING = ""  # the errors say it; here it takes the room of the names
        super().format_help(ctx, formatter)


def command(
    name: str | None = None, *, into: typer.Typer = app, extra_arguments: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that ends as the exit codes above say, without a traceback where the input is to blame.

    Args:
        name: None for that of the function.
        into: a `group`, or the application itself.
        extra_arguments: whether flags that the function does not name are its business: `typer.Context.args` has them.
    """
    settings = {"ignore_unknown_options": True, "allow_extra_args": True} if extra_arguments else {}

    def register(function: Callable[..., None]) -> Callable[..., None]:
        called = name or function.__name__.replace("_", "-")
        panel = _panel(called) if into is app else None
        return into.command(called, cls=_Command, context_settings=settings, rich_help_panel=panel)(_guarded(function))

    return register


def _guarded(function: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # what a terminal cannot show reads ?, and is no error
            sys.stdout.reconfigure(errors="replace")
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            function(*args, **kwargs)
            if sys.stdout is not None:  # closed by the caller: what is printed goes nowhere
                sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
            raise typer.Exit(128 + signal.SIGPIPE) from None
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        except ModuleNotFoundError as error:
            _fail(f'{error.name} is not installed; it comes with: pip install "bert_fast[demo,train,bench]"')
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except (ValueError, FloatingPointError) as error:  # the latter: a step of training that is not finite
            _fail(str(error))

    return guarded


def _fail(reason: str) -> None:
    print(f"bert-fast: {' '.join(reason.split())}", file=sys.stderr)
    raise typer.Exit(2) from None


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bert-fast {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A fast BERT: vectors and search, training from text to a fine-tuned model, and proof that it is right."""
