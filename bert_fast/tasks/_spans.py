"""Windows over a long context, and the search for the best part of it, as Google's `run_squad.py` does both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from bert_fast.tokenization import Tokenizer


class Frame(NamedTuple):
    """The special tokens around and between two texts, as the tokenizer puts them, and the token types of all.

    Attributes:
        before, between, after: ids, (num_tokens,) each; BERT's are [CLS], [SEP], [SEP].
        types: token types of these three, and of the first and the second text: five numbers or arrays.
    """

    before: NDArray[np.int64]
    between: NDArray[np.int64]
    after: NDArray[np.int64]
    types: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], int, int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Frame:
        """Found out from a pair of texts."""
        encoding = tokenizer.backend.encode("a", "a")
        ids, types = np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.int64)
        first, second = ([i for i, text in enumerate(encoding.sequence_ids) if text == which] for which in (0, 1))
        parts = slice(0, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, len(ids))
        kinds = types[parts[0]], types[parts[1]], types[parts[2]], int(types[first[0]]), int(types[second[0]])
        return cls(ids[parts[0]], ids[parts[1]], ids[parts[2]], kinds)

    @property
    def num_special(self) -> int:
        """How many special tokens a pair has."""
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: NDArray[np.int64], second: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """`input_ids` and `token_type_ids` of two texts without special tokens."""
        before, between, after, first_type, second_type = self.types
        types = [before, np.full(len(first), first_type), between, np.full(len(second), second_type), after]
        return {
            "input_ids": np.concatenate([self.before, first, self.between, second, self.after]),
            "token_type_ids": np.concatenate(types),
        }


class Window(NamedTuple):
    """A part of a context that is a feature together with the question.

    Attributes:
        column: number of its first token in the feature.
        first: number of its first token in the context.
        offsets: (num_tokens, 2), the characters of the context that each of its tokens is of.
    """

    column: int
    first: int
    offsets: NDArray[np.int64]


def window_bounds(num_tokens: int, room: int, doc_stride: int) -> list[tuple[int, int]]:
    """First token and last token + 1 of each window: of `room` tokens, each beginning `doc_stride` after the last one.

    A context without tokens has one window, which is empty.
    """
    step = min(room, doc_stride)
    bounds = [(0, min(room, num_tokens))]
    while bounds[-1][1] < num_tokens:
        start = bounds[-1][0] + step
        bounds.append((start, min(start + room, num_tokens)))
    return bounds


def max_context(windows: Sequence[Window]) -> list[NDArray[np.bool_]]:
    """For each token of each window of a context, (num_tokens,): does no other window see more of what is around it?

    A window's score for a token is the smaller number of tokens to the left and right of it, plus a hundredth of the
    window's length; of equal ones the first counts.
    """
    num_tokens = max(window.first + len(window.offsets) for window in windows)
    scores = np.full((len(windows), num_tokens), -1.0)
    for score, window in zip(scores, windows, strict=True):
        length = len(window.offsets)
        left = np.arange(length)
        score[window.first : window.first + length] = np.minimum(left, left[::-1]) + 0.01 * length
    best = scores.argmax(axis=0)
    return [best[window.first : window.first + len(window.offsets)] == number for number, window in enumerate(windows)]


class Span(NamedTuple):
    """A candidate for the answer: characters `start` to `end` of the context, None for "there is no answer"."""

    start: int | None
    end: int | None
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        """Sum of its two logits."""
        return self.start_logit + self.end_logit

    def text(self, context: str) -> str:
        """ "" for "there is no answer"."""
        return context[self.start : self.end] if self.start is not None else ""


def null_span(outputs: Sequence[Sequence[NDArray[np.float32]]]) -> Span:
    """ "There is no answer", which is [CLS]: of the windows of a context, the one that finds it the least likely."""
    start, end = min(((float(start[0]), float(end[0])) for start, end in outputs), key=sum)
    return Span(None, None, start, end)


def best_spans(
    context: str,
    windows: Sequence[Window],
    outputs: Sequence[Sequence[NDArray[np.float32]]],
    *,
    n_best_size: int,
    max_answer_length: int,
    null: Span | None = None,
) -> list[Span]:
    """The likeliest answers of different texts, the best one first.

    Of each window, its `n_best_size` likeliest starts and ends are combined; a start counts only where its token has
    its `max_context` in this window.

    Args:
        context: the text.
        windows: of the context.
        outputs: logits of the start and the end, (num_tokens,) each, of every window's feature.
        n_best_size: how many are returned.
        max_answer_length: tokens of an answer.
        null: "there is no answer", if that is a candidate. It is among those returned, as one more where it is not
            likely enough.
    """
    spans: list[Span] = []
    for window, sees_most, (start, end) in zip(windows, max_context(windows), outputs, strict=True):
        inside, may_start = np.zeros((2, len(start)), np.bool_)
        inside[window.column : window.column + len(sees_most)] = True
        may_start[window.column : window.column + len(sees_most)] = sees_most
        starts, ends = (np.argsort(-logits, kind="stable")[:n_best_size] for logits in (start, end))
        length = ends - starts[:, None] + 1
        fits = may_start[starts][:, None] & inside[ends] & (length >= 1) & (length <= max_answer_length)
        for row, column in np.argwhere(fits):
            first, last = starts[row], ends[column]
            begin, stop = window.offsets[first - window.column, 0], window.offsets[last - window.column, 1]
            spans.append(Span(int(begin), int(stop), float(start[first]), float(end[last])))
    candidates = sorted([*spans, *([null] if null else [])], key=lambda span: -span.score)
    different: dict[str, Span] = {}
    for span in candidates:
        if len(different) == n_best_size:
            break
        different.setdefault(span.text(context), span)
    if null is not None:
        different.setdefault("", null)
    return list(different.values())
