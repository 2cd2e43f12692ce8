"""A corpus as tokens on the disk: written once, sentence after sentence, then read in any order.

Three files of numbers: the tokens, where each sentence ends, and how many sentences there are up to the end of each
document. What is written is committed in parts, by a small file that says how long the three are. After a crash what is
beyond that is cut off, and the text before it is passed over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from bert_fast.data.encoding import Encoded, Encoder
from bert_fast.data.workers import map_in_order
from bert_fast.disk import sync, written_at_once

#: name -> type of its numbers.
_FILES: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "sentences": np.dtype("<i8"),
    "documents": np.dtype("<i8"),
}
_STATE = "tokens.json"

#: Sentences, or characters, that are tokenized at a time.
CHUNK, CHUNK_CHARACTERS = 2048, 1 << 20


@dataclass
class Counts:
    """What a corpus holds.

    Attributes:
        events: sentences and ends of documents that were read.
        documents, sentences, tokens: those that have tokens.
        empty_documents, empty_sentences: those of which no token is left; they are left out.
        unknown: tokens that are [UNK].
        finished: whether the text is at its end.
    """

    events: int = 0
    documents: int = 0
    sentences: int = 0
    tokens: int = 0
    empty_documents: int = 0
    empty_sentences: int = 0
    unknown: int = 0
    finished: bool = False


class Corpus:
    """The documents of a folder that `write_corpus` wrote.

    Attributes:
        counts: what there is.
        tokens: (num_tokens,) int32, as `Encoded` has them, mapped into memory.
    """

    def __init__(self, folder: Path) -> None:
        self.counts = _read_counts(folder)
        self.tokens: NDArray[np.int32] = _mapped(folder, "tokens", self.counts.tokens)
        self._sentences = _mapped(folder, "sentences", self.counts.sentences + 1)
        self._documents = _mapped(folder, "documents", self.counts.documents + 1)

    def __len__(self) -> int:
        return self.counts.documents

    def sentences(self, index: int) -> NDArray[np.int64]:
        """See `segments.Documents`."""
        return self._sentences[self._documents[index] : self._documents[index + 1] + 1]

    def parts(self, num_tokens: int) -> list[tuple[int, int]]:
        """Documents (first, last + 1) that have about `num_tokens` tokens together, one at least."""
        parts, first = [], 0
        while first < len(self):
            low, high = first + 1, len(self)
            while low < high:  # the first document at whose end there are enough
                middle = (low + high) // 2
                if self._end(middle) - self._end(first) >= num_tokens:
                    high = middle
                else:
                    low = middle + 1
            parts.append((first, low))
            first = low
        return parts

    def num_tokens(self, first: int, last: int) -> int:
        """Of these documents, `last` not included."""
        return self._end(last) - self._end(first)

    def _end(self, count: int) -> int:
        """How many tokens the first documents have."""
        return int(self._sentences[self._documents[count]])


def write_corpus(
    folder: Path,
    sentences: Iterable[str],
    encoder: Callable[[], Encoder],
    unk_token_id: int,
    *,
    num_workers: int,
    part: int,
) -> Generator[int, None, None]:
    """Tokenize a text, or go on where that was interrupted; yields how many sentences were read, now and then.

    Args:
        folder: which is there; only this process writes into it.
        sentences: an empty string is the end of a document.
        encoder: makes one, in each worker.
        unk_token_id: of [UNK], to be counted.
        num_workers: processes.
        part: tokens after which what was written is committed.

    Raises:
        OSError: a file cannot be written; what was committed stays.
        What reading the sentences raises.
    """
    counts = _read_counts(folder)
    if counts.finished:
        return
    events = islice(sentences, counts.events, None)
    with (
        closing(map_in_order(_encode, _chunks(events), num_workers, encoder)) as results,
        _opened(folder, "tokens", counts.tokens) as tokens,
        _opened(folder, "sentences", counts.sentences + 1) as ends,
        _opened(folder, "documents", counts.documents + 1) as documents,
    ):
        files = (tokens, ends, documents)
        # Sentences of a document that was cut through by a commit.
        open_sentences = counts.sentences - int(_mapped(folder, "documents", counts.documents + 1)[-1])
        committed = counts.tokens
        for chunk, encoded in results:
            open_sentences = _append(chunk, encoded, counts, open_sentences, files)
            counts.unknown += int(np.isin(encoded.tokens, (unk_token_id, -1 - unk_token_id)).sum())
            counts.events += len(chunk)
            if counts.tokens - committed >= part:
                _commit(folder, files, counts)
                committed = counts.tokens
            yield len(chunk)
        counts.finished = True
        _commit(folder, files, counts)


def _append(
    chunk: list[str], encoded: Encoded, counts: Counts, open_sentences: int, files: tuple[IO[bytes], ...]
) -> int:
    """Write a chunk; returns how many sentences its last document has, if that goes on."""
    ends, documents = [], []
    for sentence, length in zip(chunk, encoded.lengths.tolist(), strict=True):
        if length:
            counts.tokens += length
            counts.sentences += 1
            open_sentences += 1
            ends.append(counts.tokens)
        elif sentence:
            counts.empty_sentences += 1
        elif open_sentences:
            counts.documents += 1
            documents.append(counts.sentences)
            open_sentences = 0
        else:
            counts.empty_documents += 1
    for file, numbers, kind in zip(files, (encoded.tokens, ends, documents), _FILES.values(), strict=True):
        file.write(np.asarray(numbers, kind).tobytes())
    return open_sentences


def _chunks(events: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for event in events:
        chunk.append(event)
        characters += len(event)
        if len(chunk) == CHUNK or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encode(encoder: Encoder, chunk: list[str]) -> Encoded:
    return encoder(chunk)


def _read_counts(folder: Path) -> Counts:
    path = folder / _STATE
    return Counts(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Counts()


def _commit(folder: Path, files: tuple[IO[bytes], ...], counts: Counts) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    with written_at_once(folder / _STATE) as state:
        state.write(json.dumps(asdict(counts)).encode())
    sync(folder)


def _opened(folder: Path, name: str, size: int) -> IO[bytes]:
    """A file to append to, cut to `size` numbers. A new one of 1 is 0, where the first sentence or document begins."""
    path, kind = folder / f"{name}.bin", _FILES[name]
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size * kind.itemsize)
    file.seek(0, 2)
    return file


def _mapped(folder: Path, name: str, size: int) -> NDArray[Any]:
    if not size:
        return np.zeros(0, _FILES[name])
    mapped = np.memmap(folder / f"{name}.bin", _FILES[name], "r", shape=(size,))
    return mapped.view(np.ndarray)  # whose slices cost a third
