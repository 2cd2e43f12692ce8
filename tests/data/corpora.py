"""What the tests of pre-training data share: a small text, options that keep a run short, and all bytes of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bert_fast.data.instances import Options

SUBJECTS = ("The ferry", "A cook", "My aunt", "The baker", "Nobody", "The old clock")
VERBS = ("leaves", "remembers", "unfolds", "waterproofs", "sold", "misunderstood")
THINGS = (
    "the harbour",
    "a letter from Port Ellen",
    "two ladders",
    "the umbrellas",
    "bread",
    "the stars over Port Ellen",
)


def text(num_documents: int = 40) -> str:
    """Documents of one to seven sentences."""
    documents = []
    for number in range(num_documents):
        documents.append(
            "\n".join(
                f"{SUBJECTS[(number + line) % 6]} {VERBS[(number * line) % 6]} {THINGS[(3 * number + line) % 6]}."
                for line in range(1 + number % 7)
            )
        )
    return "\n\n".join(documents) + "\n"


def write(folder: Path, num_documents: int = 40) -> Path:
    """The text in a file."""
    path = folder / "corpus.txt"
    path.write_text(text(num_documents))
    return path


def options(**others: Any) -> Options:
    """Short instances in several shards."""
    return Options(**{"max_seq_length": 48, "dupe_factor": 2, "shard_tokens": 300, **others})


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name != ".lock"}
