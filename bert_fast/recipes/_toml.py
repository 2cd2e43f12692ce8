"""Files of settings, whose mistakes are named."""

from __future__ import annotations

import dataclasses
import difflib
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a file; ValueError, with the line, for one that is not TOML."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def argument_names() -> list[str]:
    """The names of `TrainingArguments`."""
    from bert_fast.training import TrainingArguments

    return [field.name for field in dataclasses.fields(TrainingArguments) if field.init]


def check_known(names: Collection[str], known: Collection[str], where: str) -> None:
    """ValueError for the first name that is not known, with those that are near it."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{where} has {name!r}, which is no setting there{hint}")
