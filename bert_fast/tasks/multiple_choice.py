"""Which of several texts, or pairs of texts, is right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from bert_fast.data.examples import ChoiceExample
from bert_fast.tasks._batches import PaddingCollator, encode, softmax
from bert_fast.tasks._task import Features, Output, Prediction, Task, check_examples
from bert_fast.tasks.metrics import METRICS
from bert_fast.tokenization import Tokenizer


@dataclass
class MultipleChoice(Task):
    """Choices as SWAG's (Devlin et al., 2018, section 4.4): a score for each pair, and a softmax over the choices.

    Attributes:
        max_seq_length: tokens of a choice, special tokens included; a pair loses tokens of its longer text.
    """

    kind: ClassVar[str] = "multiple_choice"
    head: ClassVar[str] = "multiple_choice"
    packs: ClassVar[bool] = False  # the head takes (batch_size, num_choices, seq_len), and packs them itself

    max_seq_length: int = 128

    @property
    def main_metric(self) -> str:
        """Accuracy."""
        return "accuracy"

    def learn(self, examples: Sequence[Any]) -> None:
        """See `Task`."""
        check_examples(examples, ChoiceExample, "label")

    def config(self) -> dict[str, Any]:
        """See `Task`; a score for each choice."""
        return {"id2label": {0: "LABEL_0"}}

    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """See `Task`; one feature an example, whose `input_ids` are (num_choices, num_tokens of each)."""
        _check_choices(examples)
        pairs = [choice if choice[1] is not None else choice[0] for example in examples for choice in example.choices]
        choices, truncated = encode(pairs, tokenizer, self.max_seq_length)
        num_choices = len(examples[0].choices) if examples else 1
        inputs: list[dict[str, Any]] = []
        for start, example in zip(range(0, len(choices), num_choices), examples, strict=True):
            own = choices[start : start + num_choices]
            inputs.append({name: [choice[name] for choice in own] for name in own[0]})
            if labelled:
                inputs[-1]["labels"] = _label(example)
        cut = truncated.reshape(-1, num_choices).any(axis=1)
        return Features(inputs, np.arange(len(inputs)), num_truncated=int(cut.sum()))

    def collator(self, config: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """See `Task`."""
        return ChoicesCollator(config.pad_token_id)

    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """See `Task`; (num_choices,) each."""
        return [(logits,) for logits in model(**batch).logits.float().cpu().numpy()]

    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """See `Task`; `label`, the number of a choice, and `probabilities` of all."""
        return [
            {"id": example.id, "label": int(logits.argmax()), "probabilities": softmax(logits).tolist()}
            for example, (logits,) in zip(examples, outputs, strict=True)
        ]

    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See `Task`."""
        references = [_label(example) for example in examples]
        return {"accuracy": METRICS["accuracy"](references, [prediction["label"] for prediction in predictions])}


class ChoicesCollator:
    """Features of several examples -> a padded batch: `input_ids` (batch_size, num_choices, longest).

    Args:
        pad_token_id: what `input_ids` are padded with.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad = PaddingCollator(pad_token_id)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pad."""
        per_token = [name for name in features[0] if name != "labels"]
        choices = [
            dict(zip(per_token, values, strict=True))
            for feature in features
            for values in zip(*(feature[name] for name in per_token), strict=True)
        ]
        batch = {name: padded.unflatten(0, (len(features), -1)) for name, padded in self.pad(choices).items()}
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([feature["labels"] for feature in features])
        return batch


def _check_choices(examples: Sequence[ChoiceExample]) -> None:
    for example in examples:
        if len(example.choices) != len(examples[0].choices) or len(example.choices) < 2:
            expected = max(len(examples[0].choices), 2)
            raise ValueError(f"example {example.id} has {len(example.choices)} choices, expected {expected}")
        if len({pair is None for _, pair in example.choices}) > 1:
            raise ValueError(f"example {example.id} has single texts and pairs among its choices")


def _label(example: ChoiceExample) -> int:
    if example.label is None or not 0 <= example.label < len(example.choices):
        last = len(example.choices) - 1
        raise ValueError(f"example {example.id} has the label {example.label!r}, expected one from 0 to {last}")
    return example.label
