"""What `bert-fast tune` measured on a GPU: for a product's shape, the way to run it. Read here, never measured.

A table is a JSON file named after its GPU; the one in the user's cache stands above the one in the package. It maps
a `key`, which holds a bucket of rows and never their number, to the launcher's configuration, or to null for the way
that runs where there is no entry.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

#: Most rows of each bucket, powers of two. A call is looked up in the smallest that holds it; beyond the last, there.
BUCKETS = tuple(2**i for i in range(4, 17))


def bucket(num_rows: int) -> int:
    """The bucket of so many rows."""
    return min(max(1 << (num_rows - 1).bit_length(), BUCKETS[0]), BUCKETS[-1])


def key(op: str, dtype: torch.dtype, in_features: int, out_features: int, rows: int) -> str:
    """Name of an entry: `rows` is a bucket."""
    return f"{op} {str(dtype).removeprefix('torch.')} {in_features} to {out_features}, {rows} rows"


def file_name(gpu: str) -> str:
    """File name of the table of a GPU, whose name is as torch gives it."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where `bert-fast tune` writes: a folder in XDG_CACHE_HOME, ~/.cache by default; relative without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "bert_fast" / "tuned"


def package_folder() -> Path:
    """Where tables that come with the package lie."""
    return Path(__file__).parent / "tables"


@functools.cache
def table(gpu: str) -> dict[str, Any]:
    """The entries for a GPU, of both files; empty where it was never measured.

    Raises:
        ValueError: a file is not what `bert-fast tune` writes.
    """
    entries: dict[str, Any] = {}
    for folder in (package_folder(), user_folder()):
        path = folder / file_name(gpu)
        if os.path.isfile(path):  # False, too, where the user has no home or may not look into it
            entries |= read(path)
    return entries


def read(path: Path) -> dict[str, Any]:
    """The entries of one file.

    Raises:
        ValueError: it is not what `bert-fast tune` writes.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
        return {name: entry["config"] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a table of bert-fast tune ({error!r}); delete it or measure again") from error
