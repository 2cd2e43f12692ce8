"""What every kind of task has to say."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bert_fast.tokenization import Tokenizer
from bert_fast.training.batches import PackingCollator

#: What the model says of one feature, without padding: (num_labels,) of a text, (num_tokens, num_labels) of tokens,
#: (num_tokens,) and (num_tokens,) of the start and the end of an answer, (num_choices,).
Output = tuple[NDArray[np.float32], ...]

#: What is said of one example, as a line of JSON holds it: the `id` of the example, and what the kind of task says of
#: it, in the form that the example itself would have it, as `label` or `tags`. `predictions_<split>.jsonl` has the
#: example in each line, too: `example`, the fields of its dataclass.
Prediction = dict[str, Any]


@dataclass(frozen=True)
class Features:
    """Examples as the model takes them. An example may give several.

    Attributes:
        inputs: (num_features,) what the task's collator takes: `input_ids`, `token_type_ids`, labels.
        owners: (num_features,) int64, the number of the example that each belongs to, never falling.
        extras: (num_features,) what only the task reads again, as the place of each token in the text.
        num_truncated: examples that lost tokens to `max_seq_length`.
    """

    inputs: list[dict[str, Any]]
    owners: NDArray[np.int64]
    extras: list[Any] = field(default_factory=list)
    num_truncated: int = 0


class Task(ABC):
    """A kind of task. Its options are fields of the dataclass that a subclass is, and are saved with the model.

    Attributes:
        kind: its name.
        head: the name of its head, one of `bert_fast.modules.HEADS`.
        packs: whether a feature is one text, which may as well be padded to the length of others.
    """

    kind: ClassVar[str]
    head: ClassVar[str]
    packs: ClassVar[bool] = True

    @property
    @abstractmethod
    def main_metric(self) -> str:
        """The metric that says which checkpoint is the best; higher is better."""

    def metric_for(self, examples: Sequence[Any]) -> str:
        """The same on these examples, where a kind has other metrics for some."""
        return self.main_metric

    @abstractmethod
    def learn(self, examples: Sequence[Any]) -> None:
        """Take from the training examples what the task must know, the names of the labels, unless it was given.

        Raises:
            ValueError: they are not of this kind, or have no labels; the message names the first such example.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Fields of `BertConfig` that the task decides: `id2label`, `problem_type`."""

    @abstractmethod
    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """Tokenize.

        Args:
            examples: as `bert_fast.data.examples` has them.
            tokenizer: of the model.
            labelled: whether the features have labels, as training and a loss in evaluation need.

        Raises:
            ValueError: a label was not among those of training; the message names it, its example and those known.
        """

    def collator(self, config: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of the inputs of several features; `config` is the model's. Here packed; others override it."""
        return PackingCollator(max_position_embeddings=config.max_position_embeddings)

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """Run the model on a batch without labels; what it says of each feature, in order, on the CPU."""

    @abstractmethod
    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """What is said of each example, in order."""

    @abstractmethod
    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """The official metrics of the task, between 0 and 1 (correlations -1 and 1), over examples with labels."""


def check_examples(examples: Sequence[Any], kind: type[Any], target: str | None = None) -> None:
    """ValueError, naming the first, for training examples of another kind, or without what is to be learnt of them."""
    if not examples:
        raise ValueError("there are no examples")
    for example in examples:
        if not isinstance(example, kind):
            raise ValueError(f"example {example.id} is a {type(example).__name__}, expected a {kind.__name__}")
        if target is not None and getattr(example, target) is None:
            raise ValueError(f"example {example.id} has no {target}, which training needs")
