"""Text for pre-training: files and folders, plain or JSON lines, compressed or not -> documents of sentences.

A plain file has one sentence a line and a blank line between documents, as google-research/bert takes it. A file of
JSON lines (`.jsonl`) has one document a line, whose text has one sentence a line; its blank lines mean nothing. Lines
that hold several sentences can be split by a simple rule (`split_sentences`).
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bert_fast.lines import decoded, json_text

_CLOSING = "\"')\\]\u201d\u2019\u00bb\u300d\u300f\uff09"  # and below: quotes and brackets, ideographic ones too
_OPENING = "\"'(\\[\u201c\u2018\u00ab"
#: The end of a sentence: a mark and what closes with it, before a space and no lower-case letter; or a Chinese or
#: Japanese mark. "Dr. Smith" is cut, too: the rule knows no words.
_END = re.compile(
    f"([.!?\u2026][{_CLOSING}]*)\\s+(?=[{_OPENING}]*[^\\W_a-z\u00df-\u00ff])|([\u3002\uff01\uff1f][{_CLOSING}]*)"
)


def find_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files among the inputs, in their order, and in the place of a folder all files below it, sorted by path.

    Hidden files and folders below a folder are left out.

    Raises:
        ValueError: an input does not exist, or a folder holds no file.
    """
    files: list[Path] = []
    for given in map(Path, inputs):
        if given.is_dir():
            below = sorted(path for path in given.rglob("*") if path.is_file() and not _is_hidden(path, given))
            if not below:
                raise ValueError(f"the folder {given} holds no file to read text from")
            files += below
        elif given.exists():
            files.append(given)
        else:
            raise ValueError(f"there is no file or folder {given} to read text from")
    return files


def read_sentences(path: str | Path, *, text_field: str | None = None, split_sentences: bool = False) -> Iterator[str]:
    """The sentences of a file, stripped, and an empty string at the end of each document; one line in memory.

    Args:
        path: UTF-8; `.gz`, `.bz2`, `.xz`, `.zst` (this one needs pyarrow) are decompressed. What is left of the name
            decides: `.jsonl` is JSON lines, anything else plain text.
        text_field: key of the text in JSON lines; "text" when not given. Given, it makes any file JSON lines.
        split_sentences: cut lines after what looks like the end of a sentence.

    Yields:
        An empty document (a JSON line without text, a file without any) is an empty string alone.

    Raises:
        ValueError: a line is not UTF-8, or not a JSON object with such a text (the message gives file and line); the
            file cannot be decompressed.
        OSError: the file cannot be read.
        ModuleNotFoundError: a `.zst` file without pyarrow.
    """
    path = Path(path)
    opener = _OPENERS.get(path.suffix.lower())
    as_json = text_field is not None or (path.with_suffix("") if opener else path).suffix.lower() == ".jsonl"
    try:
        with opener(path) if opener else path.open("rb") as file:
            lines = decoded(file, str(path))
            for line in _json_lines(lines, text_field or "text") if as_json else _plain_lines(lines):
                if line and split_sentences:
                    yield from filter(None, map(str.strip, _END.sub("\\1\\2\n", line).split("\n")))
                else:
                    yield line
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} cannot be decompressed: {error}") from error
    except OSError as error:
        if opener and error.errno is None:  # what bz2 and pyarrow raise for bytes that are not theirs
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
        raise


def read_documents(
    inputs: Sequence[str | Path], *, text_field: str | None = None, split_sentences: bool = False
) -> Iterator[list[str]]:
    """The documents of files and folders, each its sentences; an empty list is an empty document. One in memory.

    Args:
        inputs: as `find_files` takes them.
        text_field, split_sentences: as `read_sentences` takes them.

    Raises:
        ValueError, OSError, ModuleNotFoundError: as `find_files` and `read_sentences` do.
    """
    document: list[str] = []
    for path in find_files(inputs):
        for sentence in read_sentences(path, text_field=text_field, split_sentences=split_sentences):
            if sentence:
                document.append(sentence)
            else:
                yield document
                document = []


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _plain_lines(lines: Iterator[tuple[str, str]]) -> Iterator[str]:
    """Lines that are not blank, and one empty one at the end of each document."""
    last = None
    for _, line in lines:
        line = line.strip()
        if line or last:
            yield line
            last = line
    if last != "":
        yield ""


def _json_lines(lines: Iterator[tuple[str, str]], field: str) -> Iterator[str]:
    """The same of one document a line; a lone surrogate, which UTF-8 cannot hold, becomes U+FFFD."""
    anything = False
    for where, line in lines:
        if line.strip():
            text = json_text(line, field, where).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            yield from filter(None, map(str.strip, text.split("\n")))
            yield ""
            anything = True
    if not anything:
        yield ""


def _open_zst(path: Path) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
