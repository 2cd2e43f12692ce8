"""A tokenized corpus to instances with their masks, some at a time, as columns of numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bert_fast.data.corpus import Corpus
from bert_fast.data.counters import Uniforms
from bert_fast.data.encoding import WORDS, TokenizerVocabulary
from bert_fast.data.masking import SCHEMES, Masking
from bert_fast.data.segments import OBJECTIVES, Segment, full_sentences, pairs

MASKINGS = ("static", "dynamic")

#: Instances that are shuffled and written together.
BATCH = 1024


@dataclass(frozen=True)
class Options:
    """What decides what pre-training data is made of a text; the names and defaults are Google's where it has them.

    Attributes:
        objective: "nsp" (is the second segment next?), "sop" (are the two in order?), "none" (one segment).
        masking: "static" hides tokens here, once for each duplicate; "dynamic" leaves it to training, each epoch anew.
        scheme: what is hidden together, one of `masking.SCHEMES`.
        max_seq_length: of an instance, in tokens, with [CLS] and [SEP].
        max_predictions_per_seq: tokens to predict, at most.
        mlm_probability: part of the tokens to predict.
        dupe_factor: how often the text is gone through, with other segments and other masks.
        short_seq_prob: of a document whose instances are shorter.
        seed: of everything random.
        words: what a word is, one of `encoding.WORDS`.
        text_field, split_sentences: how text is read, see `text.read_sentences`.
        shard_tokens: of the text, that make a shard.

    Raises:
        ValueError: an option is impossible, or two do not go together.
    """

    objective: str = "nsp"
    masking: str = "static"
    scheme: str = "subword"
    max_seq_length: int = 128
    max_predictions_per_seq: int = 20
    mlm_probability: float = 0.15
    dupe_factor: int = 10
    short_seq_prob: float = 0.1
    seed: int = 12345
    words: str = "tokenizer"
    text_field: str | None = None
    split_sentences: bool = False
    shard_tokens: int = 1 << 23

    def __post_init__(self) -> None:
        for name, known in (("objective", OBJECTIVES), ("masking", MASKINGS), ("scheme", SCHEMES), ("words", WORDS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        for name, low, high in (
            ("max_seq_length", 5, 2**15 - 1),
            ("max_predictions_per_seq", 1, 2**15 - 1),
            ("dupe_factor", 1, 2**31),
            ("seed", 0, 2**64),
            ("shard_tokens", 1, 2**62),
        ):
            if not low <= (number := getattr(self, name)) <= high:
                raise ValueError(f"{name} is {number}, expected {low} to {high}")
        if not 0 <= self.short_seq_prob <= 1:
            raise ValueError(f"short_seq_prob is {self.short_seq_prob}, expected 0 to 1")
        if not 0 < self.mlm_probability <= 1:
            raise ValueError(f"mlm_probability is {self.mlm_probability}, expected more than 0, at most 1")
        if self.words == "spaces" and not self.marks_words:
            raise ValueError("words is spaces, which static masks of the scheme subword do not ask for")

    @property
    def marks_words(self) -> bool:
        """Whether it matters here or in training where words begin."""
        return self.masking == "dynamic" or self.scheme != "subword"


class Instances(NamedTuple):
    """Instances as columns.

    Attributes:
        lengths: (num_instances,) int64, tokens of each.
        per_token: name -> (num_tokens,), one instance after another.
        per_instance: name -> (num_instances,).
    """

    lengths: NDArray[np.int64]
    per_token: dict[str, NDArray[Any]]
    per_instance: dict[str, NDArray[Any]]


class _Instance(NamedTuple):
    segments: tuple[Segment, ...]
    label: int
    draws: NDArray[np.float64]


class Maker:
    """Makes the instances of any documents of a corpus.

    Args:
        folder: of the corpus.
        options: what is made.
        vocabulary: of its tokens.
    """

    def __init__(self, folder: Path, options: Options, vocabulary: TokenizerVocabulary) -> None:
        self.corpus, self.options, self.vocabulary = Corpus(folder), options, vocabulary
        self.masking = Masking(
            vocab_size=vocabulary.size,
            mask_token_id=vocabulary.ids["mask_token"],
            special_token_ids=vocabulary.special_token_ids,
            scheme=options.scheme,
            mlm_probability=options.mlm_probability,
            max_predictions=options.max_predictions_per_seq,
        )

    def columns(self, dupe: int, first: int, last: int) -> Iterator[Instances]:
        """All instances of documents `first` to `last - 1` in a duplicate, `BATCH` at a time, shuffled among these."""
        order = Uniforms(self.options.seed, 1)
        order.go_to(first, dupe)
        instances = self._instances(dupe, first, last)
        while batch := list(islice(instances, BATCH)):
            yield self._columns([batch[place] for place in np.argsort(order.take(len(batch)), kind="stable")])

    def _instances(self, dupe: int, first: int, last: int) -> Iterator[_Instance]:
        options, draw = self.options, Uniforms(self.options.seed)
        numbers = self.masking.numbers if options.masking == "static" else 0
        for index in range(first, last):
            draw.go_to(index, dupe)
            for segments, label in self._cut(index, draw):
                size = sum(segment.size for segment in segments) + len(segments) + 1
                yield _Instance(segments, label, draw.take(numbers * size).reshape(numbers, size))

    def _cut(self, index: int, draw: Uniforms) -> Iterator[tuple[tuple[Segment, ...], int]]:
        """The segments of each instance of a document, and the label."""
        options, most, short = self.options, self.options.max_seq_length, self.options.short_seq_prob
        if options.objective == "none":
            for segment in full_sentences(self.corpus, index, draw, max_seq_length=most, short_seq_prob=short):
                yield (segment,), 0
        else:
            cut = partial(pairs, max_seq_length=most, short_seq_prob=short, objective=options.objective)
            for pair in cut(self.corpus, index, draw):
                yield (pair.a, pair.b), pair.label

    def _columns(self, instances: list[_Instance]) -> Instances:
        ids, options = self.vocabulary.ids, self.options
        cls, sep = (np.array([ids[role]], np.int32) for role in ("cls_token", "sep_token"))
        parts = []
        for instance in instances:
            parts.append(cls)
            for segment in instance.segments:
                parts += [self.corpus.tokens[segment.start : segment.stop], sep]
        marked = np.concatenate(parts)
        sizes = np.array([[segment.size for segment in instance.segments] for instance in instances]) + 1
        sizes[:, 0] += 1  # with [SEP], and the first one with [CLS]
        lengths, ends = sizes.sum(1), sizes.ravel().cumsum()
        special = np.zeros(len(marked), bool)
        special[ends - 1] = special[lengths.cumsum() - lengths] = True

        tokens = np.where(marked < 0, -1 - marked, marked)
        types = np.repeat(np.tile(np.arange(sizes.shape[1], dtype=np.int8), len(instances)), sizes.ravel())
        per_token = {"input_ids": tokens, "token_type_ids": types}
        words = _word_ids(marked, special, lengths) if options.marks_words else None
        if options.masking == "static":
            draws = np.concatenate([instance.draws for instance in instances], axis=1)
            hidden, labels = self.masking.hide(tokens, lengths, draws, words)
            per_token |= {"input_ids": hidden.astype(np.int32), "labels": labels.astype(np.int32)}
        elif words is not None:
            per_token["word_ids"] = words.astype(np.int16)
        if options.objective == "none":
            return Instances(lengths, per_token, {})
        label = np.array([instance.label for instance in instances], np.int8)
        return Instances(lengths, per_token, {"next_sentence_label": label})


def _word_ids(marked: NDArray[np.int32], special: NDArray[np.bool_], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Numbers of the words of each instance from 0 on, -1 for special tokens; a segment begins with a word."""
    begins = (marked >= 0) & ~special
    begins[1:] |= special[:-1] & ~special[1:]
    words = begins.cumsum()
    before = np.concatenate([[0], words])[lengths.cumsum() - lengths]
    return np.where(special, -1, words - 1 - np.repeat(before, lengths))
