"""How well a vocabulary fits a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import tokenizers
from tokenizers.models import WordPiece

from bert_fast.batching import chunks
from bert_fast.tokenization import TokenBatch, Tokenizer
from bert_fast.vocabulary.extension import changes, costly_words, extended, plan
from bert_fast.vocabulary.words import count_words

#: Lengths in characters at which the rows of the table of lengths begin; the last one has no end.
LENGTHS = (1, 2, 4, 6, 8, 10, 13, 17)


@dataclass(frozen=True)
class WordCounts:
    """What a tokenizer makes of some words, each as often as it is in the text.

    Attributes:
        num_words, num_distinct: how many, and how many different ones.
        num_whole: those that are one token.
        num_pieces: tokens of all of them, [UNK] included.
        num_unknown: those that are [UNK].
    """

    num_words: int
    num_distinct: int
    num_whole: int
    num_pieces: int
    num_unknown: int


@dataclass(frozen=True)
class CostlyWord:
    """A word, how often it is there, and its pieces."""

    word: str
    count: int
    pieces: tuple[str, ...]

    @property
    def saved(self) -> int:
        """Tokens that a token of its own would save."""
        return self.count * (len(self.pieces) - 1)


@dataclass(frozen=True)
class Step:
    """Tokens of the text, special ones around each line left out, after a step of the ladder for unknown words."""

    name: str
    num_tokens: int
    num_unknown: int


@dataclass(frozen=True)
class Report:
    """What `measure` found.

    Attributes:
        num_lines: of the text.
        all: all its words.
        by_length: (first and last number of characters, None for no end) -> the words of that length.
        costly: words that cost most, most first.
        saved: tokens that the words of `costly` would save together if they were in the vocabulary.
        unknown: words that are [UNK], and how often, most frequent first.
        steps: of the ladder, each on top of those before.
    """

    num_lines: int
    all: WordCounts
    by_length: dict[tuple[int, int | None], WordCounts]
    costly: tuple[CostlyWord, ...]
    saved: int
    unknown: tuple[tuple[str, int], ...]
    steps: tuple[Step, ...]


def measure(
    tokenizer: Tokenizer, texts: Iterable[str], *, entities: Mapping[str, str] | None = None, num_words: int = 20
) -> Report:
    """Read a text and count what a tokenizer makes of its words.

    Args:
        tokenizer: WordPiece; its limit of tokens does not matter here.
        texts: lines. Memory grows with the number of different words only.
        entities: mention -> replacement, for the last step of the ladder.
        num_words: how many words to list.

    Raises:
        ValueError: there is no word in the texts, or the tokenizer is not WordPiece.
    """
    backend = tokenizer.backend
    model = backend.model
    if not isinstance(model, WordPiece):
        raise ValueError(f"the tokenizer is a {type(model).__name__}, expected WordPiece")
    ladder = _LadderCounts(backend, entities)
    counts = count_words(ladder.watch(texts), backend)
    if not counts:
        raise ValueError("there is no word in the text")
    pieces = {word: tuple(token.value for token in model.tokenize(word)) for word in counts}
    costly = costly_words(counts, backend, num_words)
    unknown = [(word, count) for word, count in counts.items() if pieces[word] == (model.unk_token,)]
    by_length = {}
    for first, last in zip(LENGTHS, [*(length - 1 for length in LENGTHS[1:]), None], strict=True):
        words = [word for word in counts if len(word) >= first and (last is None or len(word) <= last)]
        if words:
            by_length[first, last] = _sum(words, counts, pieces, model.unk_token)
    return Report(
        ladder.num_lines,
        _sum(counts, counts, pieces, model.unk_token),
        by_length,
        tuple(CostlyWord(word, counts[word], pieces[word]) for word in costly),
        _saved(counts, backend, costly, pieces),
        tuple(sorted(unknown, key=lambda item: (-item[1], item[0]))[:num_words]),
        ladder.steps(),
    )


def _sum(
    words: Iterable[str], counts: Mapping[str, int], pieces: Mapping[str, tuple[str, ...]], unk_token: str
) -> WordCounts:
    words = list(words)
    unknown = [word for word in words if pieces[word] == (unk_token,)]
    whole = [word for word in words if pieces[word] == (word,)]
    return WordCounts(
        sum(counts[word] for word in words),
        len(words),
        sum(counts[word] for word in whole),
        sum(counts[word] * len(pieces[word]) for word in words),
        sum(counts[word] for word in unknown),
    )


def _saved(
    counts: Mapping[str, int],
    backend: tokenizers.Tokenizer,
    words: list[str],
    pieces: Mapping[str, tuple[str, ...]],
) -> int:
    """Tokens that these words save, themselves and as the beginnings of others."""
    new = list(plan(backend, words).pieces)
    others = changes(counts, backend, extended(backend, new), new)
    saved = sum(counts[word] * (len(pieces[word]) - 1) for word in new)
    return saved + sum(change.count * (len(change.before) - len(change.after)) for change in others)


class _LadderCounts:
    """Tokens and [UNK]s of a text after each step of the ladder; only lines with an [UNK] are tokenised again."""

    def __init__(self, backend: tokenizers.Tokenizer, entities: Mapping[str, str] | None) -> None:
        self._plain = Tokenizer(backend)
        self._names = ["sub-words", "characters", *(["entities"] if entities else [])]
        self._further = [Tokenizer(backend, unknown="characters")]
        if entities:
            self._further.append(Tokenizer(backend, unknown="characters", entities=entities))
        self._counts = np.zeros((len(self._names), 2), np.int64)
        self.num_lines = 0

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, counted on their way."""
        for chunk in chunks(texts):
            self.num_lines += len(chunk)
            batch = self._plain(chunk)
            ends = batch.lengths.cumsum()
            places = np.flatnonzero(batch.input_ids == batch.unk_token_id)
            unknown = np.unique(np.searchsorted(ends, places, side="right"))
            before = batch.select(unknown)
            self._counts += self._numbers(batch)
            for step, tokenizer in enumerate(self._further, 1):
                after = tokenizer([chunk[index] for index in unknown])
                self._counts[step] += self._numbers(after) - self._numbers(before)
            yield from chunk

    def _numbers(self, batch: TokenBatch) -> np.ndarray:
        special = self._plain.backend.num_special_tokens_to_add(False) * len(batch.lengths)
        return np.array([len(batch.input_ids) - special, batch.num_unknown])

    def steps(self) -> tuple[Step, ...]:
        """What was counted so far."""
        return tuple(
            Step(name, int(tokens), int(unknown))
            for name, (tokens, unknown) in zip(self._names, self._counts, strict=True)
        )
