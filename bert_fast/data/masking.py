"""Masked language modelling: which tokens are to be predicted, and what the model sees in their place.

Pure functions of numbers of [0, 1). Words are known by their ids, so that any tokenizer will do: tokens of one word
have the same id, words that follow each other different ones, and -1 is no word ([CLS], [SEP]).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: `bert_fast.losses.IGNORED_LABEL`, without loading torch, which the processes that make shards do not need.
IGNORED_LABEL = -100

#: What is chosen together. `entity` is `whole_word` over ids in which a name of several words is one.
SCHEMES = ("subword", "whole_word", "ngram", "span", "entity")

#: ALBERT: up to three words, with a probability of 1/n (Lan et al., 2019).
NGRAM_SHARES: NDArray[np.float64] = 1 / np.arange(1, 4, dtype=np.float64)
#: SpanBERT: up to ten words, geometric with p = 0.2 (Joshi et al., 2019).
SPAN_SHARES = 0.2 * 0.8 ** np.arange(10)


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden.

    As in BERT (Devlin et al., 2018; google-research/bert, create_pretraining_data.py): of a text of n tokens, special
    ones included, min(max_predictions, max(1, round(mlm_probability * n))) are chosen among those that are not special;
    80% of them become [MASK], 10% a word drawn from the whole vocabulary, 10% stay. By the scheme these are

    - subword: single tokens;
    - whole_word: all tokens of a word, in a random order of words; one with more tokens than are still to be chosen is
      passed over, so that fewer may be chosen;
    - entity: the same, where the ids make one word of a name;
    - ngram: one to three words in a row, with probabilities 1/n, fewer where that is too many (google-research/albert);
    - span: one to ten words, geometric with p = 0.2, from the word of a random token on; 80/10/10 is drawn once for all
      tokens of spans that touch (facebookresearch/SpanBERT, which cuts the last word where the tokens are used up; here
      it is left out).

    Words in a row never have a special token between them.

    Attributes:
        vocab_size: of the words that replace a token.
        mask_token_id: of [MASK].
        special_token_ids: never chosen: [CLS], [SEP], [PAD].
        scheme: one of `SCHEMES`.
        mlm_probability: part of the tokens to predict.
        max_predictions: of a text; None for any number.
        masked, replaced: parts of the chosen tokens that become [MASK], and any word.

    Raises:
        ValueError: an argument is impossible.
    """

    vocab_size: int
    mask_token_id: int
    special_token_ids: Sequence[int]
    scheme: str = "subword"
    mlm_probability: float = 0.15
    max_predictions: int | None = None
    masked: float = 0.8
    replaced: float = 0.1
    _special: NDArray[np.int64] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme is {self.scheme!r}, expected one of {', '.join(SCHEMES)}")
        if not 0.0 < self.mlm_probability <= 1.0:
            raise ValueError(f"mlm_probability is {self.mlm_probability}, expected more than 0, at most 1")
        if self.max_predictions is not None and self.max_predictions < 1:
            raise ValueError(f"max_predictions is {self.max_predictions}, expected at least 1")
        if min(self.masked, self.replaced) < 0 or self.masked + self.replaced > 1:
            raise ValueError(f"masked is {self.masked} and replaced {self.replaced}, expected parts of 1")
        for token in (self.mask_token_id, *self.special_token_ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is out of range [0, {self.vocab_size})")
        object.__setattr__(self, "_special", np.array(self.special_token_ids, np.int64))

    @property
    def numbers(self) -> int:
        """How many random numbers a token needs."""
        return 4 if self.scheme in ("ngram", "span") else 3

    @property
    def needs_words(self) -> bool:
        """Whether `hide` needs ids of words."""
        return self.scheme != "subword"

    def hide(
        self,
        ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        draws: NDArray[np.float64],
        word_ids: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Hide tokens of texts that are laid end to end.

        Args:
            ids: (num_tokens,).
            lengths: (batch_size,) tokens of each text.
            draws: (numbers, num_tokens) of [0, 1): the order of choice, what becomes of a token, its replacement, and
                how many words go together.
            word_ids: (num_tokens,), as the module says; `subword` does not look at them.

        Returns:
            (num_tokens,) what the model sees, and (num_tokens,) labels: the token where it is chosen, -100 elsewhere.
        """
        candidates = ~np.isin(ids, self._special)
        counts = self.counts(lengths)
        actions = draws[1]
        if word_ids is None or not self.needs_words:
            chosen = choose(draws[0], candidates, lengths, counts)
        else:
            chosen = self._choose_words(draws, np.where(candidates, word_ids, -1), lengths, counts)
        if self.scheme == "span":
            actions = _of_the_first(actions, chosen, lengths)
        hidden = np.where(chosen & (actions < self.masked), self.mask_token_id, ids)
        replaced = chosen & (actions >= self.masked) & (actions < self.masked + self.replaced)
        hidden = np.where(replaced, (draws[2] * self.vocab_size).astype(np.int64), hidden)
        return hidden, np.where(chosen, ids, IGNORED_LABEL)

    def counts(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many tokens of each text to predict; halves are rounded to even, as Python does."""
        counts = np.maximum(1, np.rint(lengths * self.mlm_probability)).astype(np.int64)
        return counts if self.max_predictions is None else np.minimum(counts, self.max_predictions)

    def _choose_words(
        self,
        draws: NDArray[np.float64],
        word_ids: NDArray[np.int64],
        lengths: NDArray[np.int64],
        counts: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        chosen = np.zeros(len(word_ids), bool)
        ends = lengths.cumsum()
        for start, stop, count in zip((ends - lengths).tolist(), ends.tolist(), counts.tolist(), strict=True):
            words = WordSpans(word_ids[start:stop])
            scores = draws[0, start:stop]
            if self.scheme == "span":
                picked = choose_spans(scores, draws[3, start:stop], words, count)
            elif self.scheme == "ngram":
                picked = choose_ngrams(scores, draws[3, start:stop], words, count)
            else:
                picked = choose_ngrams(scores, None, words, count)
            for word in picked:
                chosen[start + words.starts[word] : start + words.ends[word]] = True
        return chosen


class WordSpans:
    """Where the words of one text are.

    Args:
        word_ids: (num_tokens,).

    Attributes:
        starts, ends: (num_words,) the tokens of each word.
        lasts: (num_words,) the number after that of the last word which follows it without a special token between.
        tokens: (num_tokens,) the word of each token, -1 for none.
    """

    def __init__(self, word_ids: NDArray[np.int64]) -> None:
        begins = np.diff(word_ids, prepend=-1) != 0
        is_start = begins & (word_ids >= 0)
        starts = np.flatnonzero(is_start)
        cuts = np.append(np.flatnonzero(begins), len(word_ids))
        ends = cuts[np.searchsorted(cuts, starts, side="right")]
        gaps = np.flatnonzero(ends[:-1] != starts[1:]) + 1
        gaps = np.append(gaps, len(starts))
        self.starts: list[int] = starts.tolist()
        self.ends: list[int] = ends.tolist()
        self.lasts: list[int] = gaps[np.searchsorted(gaps, np.arange(len(starts)), side="right")].tolist()
        self.tokens = np.where(word_ids >= 0, is_start.cumsum() - 1, -1)


def choose_ngrams(
    scores: NDArray[np.float64], draws: NDArray[np.float64] | None, words: WordSpans, count: int
) -> list[int]:
    """Words in a row that have at most `count` tokens together, from google-research/albert.

    Args:
        scores: (num_tokens,) the lowest first token comes first.
        draws: (num_tokens,) how many words from there; None for one.
        words: of the text.
        count: of tokens.

    Returns:
        Numbers of the chosen words.
    """
    starts, ends = words.starts, words.ends
    if not starts:
        return []
    wanted = [1] * len(starts) if draws is None else _lengths(draws[starts], NGRAM_SHARES)
    chosen: dict[int, None] = {}
    for first in np.argsort(scores[starts], kind="stable").tolist():
        if not count:
            break
        last = min(first + wanted[first], words.lasts[first])
        while last > first and ends[last - 1] - starts[first] > count:
            last -= 1
        if last > first and not any(word in chosen for word in range(first, last)):
            chosen.update(dict.fromkeys(range(first, last)))
            count -= ends[last - 1] - starts[first]
    return list(chosen)


def choose_spans(scores: NDArray[np.float64], draws: NDArray[np.float64], words: WordSpans, count: int) -> list[int]:
    """The same with spans, which may go over words that are chosen already, from facebookresearch/SpanBERT."""
    chosen: dict[int, None] = {}
    wanted = _lengths(draws, SPAN_SHARES)
    owners = words.tokens.tolist()
    for token in np.argsort(scores, kind="stable").tolist():
        first = owners[token]
        if not count:
            break
        if first < 0 or first in chosen:
            continue
        for word in range(first, min(first + wanted[token], words.lasts[first])):
            if word not in chosen:
                size = words.ends[word] - words.starts[word]
                if size > count:
                    break
                chosen[word] = None
                count -= size
    return list(chosen)


def choose(
    scores: NDArray[np.float64], candidates: NDArray[np.bool_], lengths: NDArray[np.int64], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The candidates with the lowest scores of each text, single tokens.

    Args:
        scores: (num_tokens,) below 1.
        candidates: (num_tokens,) which tokens may be chosen.
        lengths: (batch_size,) tokens of each text.
        counts: (batch_size,) how many to choose; all candidates where there are fewer.

    Returns:
        (num_tokens,) bool.
    """
    texts = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(2 * texts + np.where(candidates, scores, 1.5), kind="stable")
    ranks = np.arange(len(texts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chosen = np.zeros(len(texts), bool)
    chosen[order] = ranks < np.repeat(counts, lengths)
    return chosen & candidates


def _lengths(draws: NDArray[np.float64], shares: NDArray[Any]) -> list[int]:
    """1 to len(shares), with these probabilities."""
    cumulative = shares.cumsum() / shares.sum()
    return np.minimum(np.searchsorted(cumulative, draws, side="right") + 1, len(shares)).tolist()


def _of_the_first(
    numbers: NDArray[np.float64], chosen: NDArray[np.bool_], lengths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Of each run of chosen tokens in a text the number of its first token, for all of the run."""
    before = np.concatenate([[False], chosen[:-1]])
    texts = (lengths.cumsum() - lengths)[lengths > 0]
    before[texts] = False
    first = chosen & ~before
    return (
        np.where(chosen, numbers[np.flatnonzero(first)][np.maximum(first.cumsum() - 1, 0)], 1.0)
        if first.any()
        else numbers
    )
