"""Which parts of a document make an instance: two segments for NSP or SOP, or one.

Two segments are made as in google-research/bert, create_pretraining_data.py; for SOP as in google-research/albert.
Sentences lie end to end in one array of tokens, so that a segment is where it begins and ends there. The random numbers
come from a stream of their own for each document and duplicate (`Uniforms`), where the originals shuffle the documents
and draw from one generator: the distribution is the same, and any document can be made alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bert_fast.data.counters import Uniforms

#: What two segments are to teach: is the second one next (NSP), are they in order (SOP), or there is one segment.
OBJECTIVES = ("nsp", "sop", "none")

#: How many documents are drawn to find another one than the present.
TRIES = 10


class Documents(Protocol):
    """What segments are cut of."""

    def __len__(self) -> int:
        """How many documents there are."""

    def sentences(self, index: int) -> NDArray[np.int64]:
        """(num_sentences + 1,) where each sentence of a document begins, and the last one ends; none is empty."""


class Segment(NamedTuple):
    """A part of the tokens."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many tokens it has."""
        return self.stop - self.start


class Pair(NamedTuple):
    """An instance of two segments; the label is 0 where b follows a, and 1 where it does not."""

    a: Segment
    b: Segment
    label: int


def pairs(
    documents: Documents, index: int, draw: Uniforms, *, max_seq_length: int, short_seq_prob: float, objective: str
) -> Iterator[Pair]:
    """The instances of a document, of at most `max_seq_length` tokens with [CLS] and two [SEP].

    Sentences are collected up to a length, which is the greatest one, or with a probability of `short_seq_prob` a
    random one for the whole document. A random number of them is the first segment.

    - nsp: the second segment is the rest (label 0); or, half of the time and for a sentence alone, sentences of another
      document (label 1), and the rest is put back for the next instance. After ten tries the other document may be
      this one.
    - sop: the second segment is the rest, and half of the time the two change places (label 1). A sentence alone gets
      one of another document and label 1, as in ALBERT's code.

    Args:
        documents: all of them.
        index: of the document.
        draw: at the beginning of the stream of the document.
        max_seq_length: at least 5.
        short_seq_prob: of a random length.
        objective: "nsp" or "sop".
    """
    bounds = documents.sentences(index)
    room = max_seq_length - 3
    target = _target(room, draw, short_seq_prob)
    first, count = 0, len(bounds) - 1
    while first < count:
        last = min(int(np.searchsorted(bounds, bounds[first] + target)), count)
        alone = last - first == 1
        middle = first + (1 if alone else draw.integer(1, last - first - 1))
        a, rest = _segment(bounds, first, middle), _segment(bounds, middle, last)
        label = int(alone or draw.take(1)[0] < 0.5)
        if label and (alone or objective == "nsp"):
            b, first = _random_segment(documents, index, target - a.size, draw), middle
        else:
            (a, b), first = (rest, a) if label else (a, rest), last
        yield Pair(*truncated(a, b, room, draw), label)


def full_sentences(
    documents: Documents, index: int, draw: Uniforms, *, max_seq_length: int, short_seq_prob: float
) -> Iterator[Segment]:
    """The instances of a document as one segment each, of at most `max_seq_length` tokens with [CLS] and [SEP].

    As many whole sentences as fit (RoBERTa's DOC-SENTENCES, Liu et al., 2019), or as fit into a shorter random length,
    as in `pairs`. A sentence that is too long for any instance is cut; no token is lost, and none is there twice.
    """
    bounds = documents.sentences(index)
    room = max_seq_length - 2
    target = _target(room, draw, short_seq_prob)
    start = int(bounds[0])
    while start < bounds[-1]:
        after = int(np.searchsorted(bounds, start + target, side="right"))
        stop = int(bounds[after - 1])
        if stop <= start:
            stop = min(int(bounds[after]), start + room)
        yield Segment(start, stop)
        start = stop


def truncated(a: Segment, b: Segment, room: int, draw: Uniforms) -> tuple[Segment, Segment]:
    """Both segments with `room` tokens together.

    One token after the other goes from the longer segment, the second one if they are equally long, from its front or
    its back by chance.
    """
    excess = a.size + b.size - room
    if excess <= 0:
        return a, b
    steps, lead = np.arange(excess), abs(a.size - b.size)
    of_a = np.where(steps < lead, a.size > b.size, (steps - lead) % 2 == 1)
    in_front = draw.take(excess) < 0.5
    return _cut(a, in_front[of_a]), _cut(b, in_front[~of_a])


def _cut(segment: Segment, in_front: NDArray[np.bool_]) -> Segment:
    front = int(in_front.sum())
    return Segment(segment.start + front, segment.stop - (len(in_front) - front))


def _target(room: int, draw: Uniforms, short_seq_prob: float) -> int:
    return draw.integer(2, room) if draw.take(1)[0] < short_seq_prob else room


def _segment(bounds: NDArray[np.int64], first: int, last: int) -> Segment:
    return Segment(int(bounds[first]), int(bounds[last]))


def _random_segment(documents: Documents, index: int, target: int, draw: Uniforms) -> Segment:
    """Sentences of another document, from a random one on, of `target` tokens or a little more, at least one."""
    for _ in range(TRIES):
        other = draw.integer(0, len(documents) - 1)
        if other != index:
            break
    bounds = documents.sentences(other)
    first = draw.integer(0, len(bounds) - 2)
    last = min(int(np.searchsorted(bounds, bounds[first] + max(target, 1))), len(bounds) - 1)
    return _segment(bounds, first, last)
