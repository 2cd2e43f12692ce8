"""A tag for each word: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bert_fast.data.examples import TokensExample
from bert_fast.losses import IGNORED_LABEL
from bert_fast.tasks._batches import CHUNK, in_order, label_number, rows_of_each, split_tokens
from bert_fast.tasks._task import Features, Output, Prediction, Task, check_examples
from bert_fast.tasks.metrics import accuracy, entity_scores, entity_scores_by_type
from bert_fast.tokenization import Tokenizer

#: The tag of words that are part of no entity, and of those that `max_seq_length` cut off.
OUTSIDE = "O"

#: How the tags of entities begin, in IOB, IOBES and BILOU.
ENTITY = ("B-", "I-", "E-", "L-", "S-", "U-")


@dataclass
class TokenClassification(Task):
    """Tags of words (Devlin et al., 2018, section 5.3): the first sub-word of a word has its tag.

    Attributes:
        labels: the tags, by number; None takes them from the training examples.
        max_seq_length: tokens of a text, special tokens included; words beyond it are tagged O, and counted.
        label_all_tokens: in training, give the other sub-words a tag, too: that of the word, I-X after B-X.
        return_entity_level_metrics: add precision, recall and F1 of each type of entity, as `PER_f1`.
    """

    kind: ClassVar[str] = "tokens"
    head: ClassVar[str] = "token_classification"

    labels: tuple[str, ...] | None = None
    max_seq_length: int = 128
    label_all_tokens: bool = False
    return_entity_level_metrics: bool = False

    @property
    def main_metric(self) -> str:
        """F1 of entities; accuracy for tags that are not those of entities."""
        return "f1" if self._has_entities else "accuracy"

    @property
    def _tags(self) -> tuple[str, ...]:
        if self.labels is None:
            raise ValueError("the task does not know its labels yet: give them, or let it learn them")
        return self.labels

    @property
    def _has_entities(self) -> bool:
        return all(tag == OUTSIDE or tag[:2] in ENTITY for tag in self._tags)

    def learn(self, examples: Sequence[Any]) -> None:
        """See `Task`."""
        check_examples(examples, TokensExample, "tags")
        if self.labels is None:
            self.labels = in_order(tag for example in examples for tag in example.tags)

    def config(self) -> dict[str, Any]:
        """See `Task`."""
        return {"id2label": dict(enumerate(self._tags))}

    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """See `Task`.

        The extra of each is the place of the first sub-word of each word, (num_words,), -1 for none, and the number of
        words that were cut off.
        """
        inputs: list[dict[str, Any]] = []
        extras: list[Any] = []
        num_truncated, numbers = 0, {tag: number for number, tag in enumerate(self._tags)}
        within = [numbers.get(f"I-{tag[2:]}", n) if tag.startswith("B-") else n for n, tag in enumerate(self._tags)]
        for start in range(0, len(examples), CHUNK):
            chunk = examples[start : start + CHUNK]
            tokens, words = tokenizer.encode_words([example.words for example in chunk], self.max_seq_length)
            num_truncated += tokens.num_truncated
            owners = np.split(words, tokens.lengths.cumsum()[:-1])
            for example, feature, owner, cut in zip(chunk, split_tokens(tokens), owners, tokens.truncated, strict=True):
                first = _first_of_each(owner, len(example.words))
                if labelled:
                    tags = np.array([label_number(tag, numbers, example.id) for tag in example.tags], np.int64)
                    feature["labels"] = self._targets(tags, owner, first, within)
                inputs.append(feature)
                extras.append((first, len(first) - 1 - int(owner.max()) if cut else 0))
        return Features(inputs, np.arange(len(inputs)), extras, num_truncated)

    def _targets(
        self, tags: NDArray[np.int64], owner: NDArray[np.int64], first: NDArray[np.int64], within: Sequence[int]
    ) -> NDArray[np.int64]:
        """The label of each token, -100 for none."""
        targets = np.full(len(owner), IGNORED_LABEL, np.int64)
        if self.label_all_tokens:
            inside = owner >= 0
            targets[inside] = np.array(within)[tags[owner[inside]]]
        there = first >= 0
        targets[first[there]] = tags[there]
        return targets

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """See `Task`; (num_tokens, num_labels) each."""
        return [(rows,) for rows in rows_of_each(model(**batch).logits, batch)]

    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """See `Task`; `tags`, one a word, and where words were cut off `num_words_cut`."""
        said: list[Prediction] = []
        for example, (first, num_cut), (logits,) in zip(examples, features.extras, outputs, strict=True):
            best = logits.argmax(axis=1)
            tags = [self._tags[best[place]] if place >= 0 else OUTSIDE for place in first]
            said.append({"id": example.id, "tags": tags, **({"num_words_cut": num_cut} if num_cut else {})})
        return said

    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See `Task`; of entities, or the accuracy for other tags."""
        references, answers = [list(example.tags) for example in examples], [p["tags"] for p in predictions]
        if self._has_entities:
            scores = entity_scores(references, answers)
            by_type = entity_scores_by_type(references, answers) if self.return_entity_level_metrics else {}
            for kind, of_kind in by_type.items():
                scores |= {f"{kind}_{name}": of_kind[name] for name in ("precision", "recall", "f1")}
            return scores
        return {"accuracy": accuracy([*chain(*references)], [*chain(*answers)])}


def _first_of_each(owner: NDArray[np.int64], num_words: int) -> NDArray[np.int64]:
    """Number of the first token of each word, -1 for a word that has none; `owner` is the word of each token or -1."""
    first = np.full(num_words, -1, np.int64)
    places = np.arange(len(owner))[::-1]
    words = owner[::-1]
    first[words[words >= 0]] = places[words >= 0]  # the last one written is the first token
    return first
