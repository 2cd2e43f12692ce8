"""Whether a person is looking, and what they see: the one progress bar, and how wide a line may be. Free of torch."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: Seconds of work after which a bar appears that nobody asked for.
DELAY = 2.0


def is_watched() -> bool:
    """Whether stderr, where bars are drawn, is a terminal; of the processes that torchrun starts, that of the first."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("LOCAL_RANK", "0") == "0"


def columns() -> int | None:
    """The width of the terminal that stdout is; None where it is a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns  # 80 for a terminal that does not say, and what COLUMNS says before that


def fitted(line: str, width: int | None) -> str:
    """A line, cut to so many columns if they are given."""
    return line if width is None or len(line) <= width else f"{line[: width - 1]}…"


def progress_bar(
    items: Iterable[Item] | None = None,
    *,
    total: int | None = None,
    what: str | None = None,
    unit: str = " texts",
    show: bool | None = None,
    **options: Any,
) -> tqdm[Item]:
    """A bar on stderr; inside another one it goes when it is done.

    Args:
        items: what to iterate over; None for a bar that is told by `update`, within `with`.
        total: how many there will be; None for as many as `items` has, or nobody knows.
        what: is done, as "counting words".
        unit: what is counted, with the space before it.
        show: None shows one on a terminal, for work of more than `DELAY` seconds.
        options: others of tqdm.
    """
    wanted, delay = (is_watched(), DELAY) if show is None else (show, 0.0)
    if wanted and _has_no_width():
        options |= {"ncols": 80, "nrows": 24}  # tqdm would show nothing
    return tqdm(items, total=total, desc=what, unit=unit, disable=not wanted, delay=delay, leave=None, **options)


def _has_no_width() -> bool:
    """Whether stderr is a terminal that does not say how wide it is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns == 0
    except OSError:  # no terminal
        return False
