"""From any number of texts to few runs of the model: bounded chunks, tokenised ahead, batched by tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

#: Texts of the first chunk; small, because nothing runs while it is tokenised. Every chunk is `CHUNK_GROWTH` times as
#: many as the one before, up to `MAX_CHUNK_TEXTS`.
FIRST_CHUNK_TEXTS = 64
CHUNK_GROWTH = 4
MAX_CHUNK_TEXTS = 4096

#: Characters after which a chunk is full: the tokenizers library holds about 100 bytes for a token.
MAX_CHUNK_CHARACTERS = 2**20

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists that are bounded, whatever the number and length of the texts.

    Raises:
        ValueError: an element is not a text; the message gives its index and type.
    """
    chunk: list[str] = []
    size, num_characters = FIRST_CHUNK_TEXTS, 0
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"sentences[{index}] is a {type(text).__name__}, expected a str")
        chunk.append(text)
        num_characters += len(text)
        if len(chunk) == size or num_characters >= MAX_CHUNK_CHARACTERS:
            yield chunk
            chunk, num_characters, size = [], 0, min(CHUNK_GROWTH * size, MAX_CHUNK_TEXTS)
    if chunk:
        yield chunk


def map_ahead(function: Callable[[Item], Result], items: Iterator[Item]) -> Iterator[Result]:
    """`map(function, items)`, where a thread computes the next result while the caller works with the present one.

    `items` is read in the caller's thread. One item alone is computed there too. The thread ends with this iterator,
    also when that is closed early or raises; at most one call of `function` is waited for.
    """
    first, second = next(items, None), next(items, None)
    if first is None:
        return
    if second is None:
        yield function(first)
        return
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bert_fast")
    try:
        following = pool.submit(function, first)
        for item in chain([second], items):
            present, following = following, pool.submit(function, item)
            yield present.result()
        yield following.result()
    finally:
        pool.shutdown(cancel_futures=True)


def plan_batches(lengths: NDArray[np.int64], token_budget: int) -> list[NDArray[np.int64]]:
    """Which texts to run together: the fewest batches of `token_budget` tokens, longest texts first, evenly filled.

    Args:
        lengths: (num_texts,) tokens of each text.
        token_budget: tokens of a batch, which may exceed it by less than one text.

    Returns:
        Indices of the texts of each batch. One batch alone keeps the order given.
    """
    num_batches = -(-int(lengths.sum()) // token_budget)
    if num_batches <= 1:
        return [np.arange(len(lengths))]
    order = np.argsort(-lengths, kind="stable")
    ends = lengths[order].cumsum()
    cuts = np.searchsorted(ends, np.arange(1, num_batches) * (ends[-1] / num_batches)) + 1
    return [batch for batch in np.split(order, cuts) if len(batch)]


class RowBuffer:
    """Rows of float32 collected into one array, which grows in place: at most an eighth more than the rows is held.

    Args:
        num_rows: how many to expect; 0 where that is not known.
        width: of a row.
    """

    def __init__(self, num_rows: int, width: int) -> None:
        self._array = np.empty((num_rows, width), np.float32)
        self._num_rows = 0

    def __len__(self) -> int:
        return self._num_rows

    def append(self, rows: NDArray[np.float32]) -> None:
        """Add (n, width)."""
        start, self._num_rows = self._num_rows, self._num_rows + len(rows)
        if self._num_rows > len(self._array):
            self._array.resize((self._num_rows + self._num_rows // 8, self._array.shape[1]), refcheck=False)
        self._array[start : self._num_rows] = rows

    def array(self) -> NDArray[np.float32]:
        """(num_rows, width): what was collected; nothing may be added afterwards."""
        self._array.resize((self._num_rows, self._array.shape[1]), refcheck=False)
        return self._array
