"""A class, several classes or a number for a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import nn

from bert_fast.data.examples import TextExample
from bert_fast.tasks._batches import encode, in_order, label_number, softmax
from bert_fast.tasks._task import Features, Output, Prediction, Task, check_examples
from bert_fast.tasks.metrics import METRICS
from bert_fast.tokenization import Tokenizer

#: `problem` -> what `config.json` calls it, what the label of an example is, and the metrics if none are named.
PROBLEMS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "single": ("single_label_classification", "the name of a class", ("accuracy", "macro_f1")),
    "multi": ("multi_label_classification", "the names of classes", ("micro_f1", "macro_f1")),
    "regression": ("regression", "a number", ("pearson", "spearman")),
}


@dataclass
class Classification(Task):
    """Labels of texts (Devlin et al., 2018, section 4.1): a classifier over the pooled first token.

    Attributes:
        labels: names of the classes, by number; None takes them from the training examples.
        problem: "single" for one class a text, "multi" for any number of classes, "regression" for a number; None goes
            by the labels of the training examples.
        max_seq_length: tokens of a text or a pair, special tokens included; a pair loses tokens of its longer text.
        metric_names: of `bert_fast.tasks.metrics.METRICS`, the main one first; none takes those of the problem.
    """

    kind: ClassVar[str] = "classification"
    head: ClassVar[str] = "sequence_classification"

    labels: tuple[str, ...] | None = None
    problem: str | None = None
    max_seq_length: int = 128
    metric_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.problem not in (None, *PROBLEMS):
            raise ValueError(f"problem is {self.problem!r}, expected one of {', '.join(PROBLEMS)}")
        if unknown := [name for name in self.metric_names if name not in METRICS]:
            raise ValueError(f"metric_names has {', '.join(unknown)}, expected some of {', '.join(METRICS)}")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError(f"labels has a name twice: {', '.join(self.labels)}")

    @property
    def main_metric(self) -> str:
        """See `Task`."""
        return self._metrics[0]

    @property
    def _metrics(self) -> tuple[str, ...]:
        return self.metric_names or PROBLEMS[self._problem][2]

    @property
    def _problem(self) -> str:
        if self.problem is None:
            raise ValueError("the task does not know its labels yet: give it labels and problem, or let it learn them")
        return self.problem

    @property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels or ())}

    def learn(self, examples: Sequence[Any]) -> None:
        """See `Task`."""
        check_examples(examples, TextExample, "label")
        if self.problem is None:
            label = examples[0].label
            self.problem = "single" if isinstance(label, str) else "multi" if isinstance(label, tuple) else "regression"
        if self.problem != "regression" and self.labels is None:
            self.labels = in_order(label for example in examples for label in self._names(example))
            if len(self.labels) < 2 and self.problem == "single":
                raise ValueError(f"all {len(examples)} training examples have the label {self.labels[0]!r}")

    def _names(self, example: TextExample) -> tuple[str, ...]:
        """The classes of an example; ValueError for a label of another kind."""
        names: Any = (example.label,) if self._problem == "single" else example.label
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise self._wrong(example)
        return names

    def _wrong(self, example: TextExample) -> ValueError:
        expected = PROBLEMS[self._problem][1]
        return ValueError(f"example {example.id} has the label {example.label!r}, expected {expected}")

    def _target(self, example: TextExample) -> Any:
        """The label as the loss takes it: a number, or (num_labels,) float32 of zeros and ones."""
        if self._problem == "regression":
            try:
                number = float(example.label)  # type: ignore[arg-type]
            except (TypeError, ValueError):
                raise self._wrong(example) from None
            if not np.isfinite(number):
                raise self._wrong(example)
            return np.float32(number)
        known = self._numbers
        numbers = [label_number(name, known, example.id) for name in self._names(example)]
        if self._problem == "single":
            return numbers[0]
        several = np.zeros(len(known), np.float32)
        several[numbers] = 1
        return several

    def config(self) -> dict[str, Any]:
        """See `Task`."""
        names = ("LABEL_0",) if self._problem == "regression" else self.labels or ()
        return {"id2label": dict(enumerate(names)), "problem_type": PROBLEMS[self._problem][0]}

    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """See `Task`."""
        pairs = [example.text_pair is not None for example in examples]
        if any(pairs) and not all(pairs):
            alone = examples[pairs.index(False)].id
            raise ValueError(f"example {alone} is a single text, but others are pairs")
        texts = [(e.text, e.text_pair) for e in examples] if any(pairs) else [e.text for e in examples]
        inputs, truncated = encode(texts, tokenizer, self.max_seq_length)
        if labelled:
            for feature, example in zip(inputs, examples, strict=True):
                feature["labels"] = self._target(example)
        return Features(inputs, np.arange(len(inputs)), num_truncated=int(truncated.sum()))

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """See `Task`; (num_labels,) each."""
        return [(logits,) for logits in model(**batch).logits.float().cpu().numpy()]

    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """See `Task`; `label` as an example has it, and `probabilities` by class."""
        return [{"id": example.id, **self._said(logits)} for example, (logits,) in zip(examples, outputs, strict=True)]

    def _said(self, logits: Any) -> dict[str, Any]:
        if self._problem == "regression":
            return {"label": float(logits[0])}
        assert self.labels is not None
        if self._problem == "single":
            probabilities = softmax(logits)
            label: Any = self.labels[int(logits.argmax())]
        else:
            probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
            label = [name for name, logit in zip(self.labels, logits, strict=True) if logit > 0]
        return {"label": label, "probabilities": dict(zip(self.labels, probabilities.tolist(), strict=True))}

    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See `Task`."""
        references = np.array([self._target(example) for example in examples])
        said = [TextExample(p["id"], "", label=_frozen(p["label"])) for p in predictions]
        answers = np.array([self._target(example) for example in said])
        return {name: METRICS[name](references, answers) for name in self._metrics}


def _frozen(label: Any) -> Any:
    return tuple(label) if isinstance(label, list) else label
