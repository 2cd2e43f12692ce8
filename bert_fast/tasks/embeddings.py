"""Vectors of texts, trained on pairs, triplets or scored pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bert_fast.data.examples import SentencesExample
from bert_fast.sentence_embedding import SCORED, EmbeddingSettings
from bert_fast.tasks._task import Features, Output, Prediction, Task, check_examples
from bert_fast.tasks.metrics import METRICS
from bert_fast.tokenization import Tokenizer

#: Anchors that are compared with all candidates at once when ranks are counted.
RANKED_TOGETHER = 1024


@dataclass
class SentenceEmbeddings(Task):
    """Vectors of texts; `SentencesExample`.

    What the loss contrasts is one batch of one process: with "multiple_negatives_ranking" every batch should have as
    many examples as memory allows, and with several processes each has negatives of its own.

    Attributes:
        loss: one of `bert_fast.sentence_embedding.LOSSES`; None for "cosine_similarity" where examples have scores and
            "multiple_negatives_ranking" where they have none.
        pooling_mode, normalize, max_seq_length, scale, margin, symmetric: as in `EmbeddingSettings`.
        metric: which one says what is best; None for "spearman" with scores, else "mrr".
    """

    loss: str | None = None
    pooling_mode: str = "mean"
    normalize: bool = True
    max_seq_length: int = 128
    scale: float = 20.0
    margin: float = 1.0
    symmetric: bool = False
    metric: str | None = None

    kind: ClassVar[str] = "embeddings"
    head: ClassVar[str] = "sentence_embedding"
    packs: ClassVar[bool] = False  # an example has several texts

    def __post_init__(self) -> None:
        self.settings()

    def settings(self) -> EmbeddingSettings:
        """What the head is told; ValueError for options that are impossible."""
        names = ("pooling_mode", "normalize", "max_seq_length", "scale", "margin", "symmetric")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.loss is not None:
            given["loss"] = self.loss
        return EmbeddingSettings(**given)

    @property
    def main_metric(self) -> str:
        """See `Task`."""
        return self.metric or ("spearman" if self.loss in SCORED else "mrr")

    def metric_for(self, examples: Sequence[Any]) -> str:
        """See `Task`: examples with scores have other metrics, whatever the loss."""
        return self.metric or ("mrr" if any(example.score is None for example in examples) else "spearman")

    def learn(self, examples: Sequence[Any]) -> None:
        """See `Task`: whether there are scores, and with them the loss."""
        _checked(examples)
        scored = examples[0].score is not None
        if self.loss is None:
            self.loss = "cosine_similarity" if scored else "multiple_negatives_ranking"
        for example in examples:
            if (example.score is not None) != scored:
                has, others = ("a", "none") if not scored else ("no", "one")
                raise ValueError(f"example {example.id} has {has} score, but the first one has {others}")
            if self.loss == "cosine_similarity" and not -1 <= (example.score or 0) <= 1:
                raise ValueError(
                    f"example {example.id} has the score {example.score}, expected from -1 to 1 as a cosine"
                )
        name, num_texts = f"the loss {self.loss!r}", len(examples[0].texts)
        if scored != (self.loss in SCORED):
            raise ValueError(
                f"{name} needs {'no scores' if scored else 'scores'}, but example {examples[0].id} has "
                f"{'one' if scored else 'none'}"
            )
        if self.loss == "triplet" and num_texts < 3:
            raise ValueError(f"{name} needs a negative, but example {examples[0].id} has {num_texts} texts")
        if scored and num_texts > 2:
            raise ValueError(f"{name} compares two texts, but example {examples[0].id} has {num_texts}")

    def config(self) -> dict[str, Any]:
        """See `Task`."""
        return self.settings().to_config()

    def features(self, examples: Sequence[Any], tokenizer: Tokenizer, *, labelled: bool) -> Features:
        """See `Task`. The texts of an example are one after another; `position_ids` are 0 where one begins."""
        if not examples:
            return Features([], np.zeros(0, np.int64))
        _checked(examples)
        tokens = tokenizer([text for example in examples for text in example.texts], self.max_seq_length)
        num_texts = len(examples[0].texts)
        ends = tokens.lengths.cumsum()
        positions = np.arange(len(tokens.input_ids)) - np.repeat(ends - tokens.lengths, tokens.lengths)
        cuts = ends[num_texts - 1 : -1 : num_texts]
        inputs: list[dict[str, Any]] = [
            {"input_ids": ids, "position_ids": places}
            for ids, places in zip(np.split(tokens.input_ids, cuts), np.split(positions, cuts), strict=True)
        ]
        if labelled:
            for feature, example in zip(inputs, examples, strict=True):
                feature["labels"] = 1.0 if example.score is None else float(example.score)
        truncated = tokens.truncated.reshape(-1, num_texts).any(1)
        return Features(inputs, np.arange(len(examples)), num_truncated=int(truncated.sum()))

    def collator(self, config: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """See `Task`."""
        return SentencesCollator(super().collator(config))

    @torch.inference_mode()
    def outputs(self, model: nn.Module, batch: Mapping[str, Any]) -> list[Output]:
        """See `Task`: (num_texts, hidden_size) of each example."""
        vectors = model(**batch).sentence_embedding.float().cpu().numpy()
        return [(example,) for example in np.split(vectors, len(batch["text_ids"]))]

    def predictions(self, examples: Sequence[Any], features: Features, outputs: Sequence[Output]) -> list[Prediction]:
        """See `Task`.

        Each has the cosine of its first two texts, `similarity`; with negatives the cosine of the nearest of them,
        `similarity_to_negative`; and without a score the `rank` of its positive, from 1, among all positives and
        negatives of the file, those that are right for the same anchor left out.
        """
        if not examples:
            return []
        vectors = np.stack([output[0] for output in outputs])
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=2, keepdims=True), 1e-12)
        near = np.einsum("ed,ecd->ec", vectors[:, 0], vectors[:, 1:])
        said: list[Prediction] = [
            {"id": example.id, "similarity": float(cosine)}
            for example, cosine in zip(examples, near[:, 0], strict=True)
        ]
        if near.shape[1] > 1:
            for prediction, cosine in zip(said, near[:, 1:].max(1), strict=True):
                prediction["similarity_to_negative"] = float(cosine)
        if all(example.score is None for example in examples):
            for prediction, rank in zip(said, _ranks(examples, vectors), strict=True):
                prediction["rank"] = int(rank)
        return said

    def metrics(self, examples: Sequence[Any], predictions: Sequence[Prediction]) -> dict[str, float]:
        """See `Task`.

        With scores Pearson's and Spearman's correlation of the cosines; without them the share of anchors whose
        positive is the first ("accuracy@1") and the mean of 1 / rank ("mrr"), and with negatives the share of examples
        whose positive is nearer than all of their own negatives ("triplet_accuracy").
        """
        similarity = np.array([prediction["similarity"] for prediction in predictions])
        if all(example.score is not None for example in examples):
            scores = [example.score for example in examples]
            return {name: METRICS[name](scores, similarity) for name in ("pearson", "spearman")}
        if without := [p["id"] for p in predictions if "rank" not in p]:
            raise ValueError(f"some examples have a score and some have none, such as {without[0]}")
        ranks = np.array([prediction["rank"] for prediction in predictions])
        metrics = {"accuracy@1": float((ranks == 1).mean()), "mrr": float((1 / ranks).mean())}
        if "similarity_to_negative" in predictions[0]:
            negative = np.array([prediction["similarity_to_negative"] for prediction in predictions])
            metrics["triplet_accuracy"] = float((similarity > negative).mean())
        return metrics


@dataclass(frozen=True)
class SentencesCollator:
    """Features of several examples -> one batch without padding, each text a sequence of its own.

    Attributes:
        pack: makes a batch of texts, as `training.batches.PackingCollator` does.
    """

    pack: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pack.

        Args:
            features: `input_ids` of the texts of an example, one after another; `position_ids`, 0 where one begins; and
                perhaps `labels`.

        Returns:
            What `pack` gives for the texts; text_ids (num_examples, texts of each) int64, equal for texts of equal
            tokens; labels (num_examples,) float32 where there are any.

        Raises:
            ValueError: an example has another number of texts than the first one.
        """
        texts: list[NDArray[np.int64]] = []
        for index, feature in enumerate(features):
            starts = np.flatnonzero(np.asarray(feature["position_ids"]) == 0)
            texts += np.split(np.asarray(feature["input_ids"]), starts[1:])
            if len(starts) * (index + 1) != len(texts):
                raise ValueError(f"feature {index} has {len(starts)} texts, not as many as those before it")
        numbers: dict[bytes, int] = {}
        text_ids = [numbers.setdefault(text.tobytes(), len(numbers)) for text in texts]
        batch = self.pack([{"input_ids": text} for text in texts])
        batch["text_ids"] = torch.tensor(text_ids).view(len(features), -1)
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([float(feature["labels"]) for feature in features])
        return batch


def _checked(examples: Sequence[Any]) -> None:
    """ValueError for the first example that is not of this kind, or has another number of texts than the first one."""
    check_examples(examples, SentencesExample)
    for example in examples:
        if len(example.texts) < 2:
            raise ValueError(f"example {example.id} is a single text, expected two texts or more")
        if len(example.texts) != len(examples[0].texts):
            raise ValueError(
                f"example {example.id} has {len(example.texts)} texts, but the first one has {len(examples[0].texts)}"
            )


def _ranks(examples: Sequence[SentencesExample], vectors: NDArray[np.float32]) -> NDArray[np.int64]:
    """(num_examples,), one more than how many texts that are not right are at least as near as the positive.

    vectors (num_examples, num_texts, dimension), of length 1. A text that several examples have is one candidate.
    """
    numbers: dict[str, int] = {}
    places: list[tuple[int, int]] = []
    right: dict[str, set[int]] = {}
    for index, example in enumerate(examples):
        for place, text in enumerate(example.texts[1:], 1):
            if numbers.setdefault(text, len(numbers)) == len(places):
                places.append((index, place))
        right.setdefault(example.texts[0], set()).add(numbers[example.texts[1]])
    candidates = vectors[tuple(np.array(places).T)]
    ranks = np.empty(len(examples), np.int64)
    for start in range(0, len(examples), RANKED_TOGETHER):
        stop = min(start + RANKED_TOGETHER, len(examples))
        cosines = vectors[start:stop, 0] @ candidates.T
        for row, index in enumerate(range(start, stop)):
            anchor, positive = examples[index].texts[0], cosines[row, numbers[examples[index].texts[1]]]
            cosines[row, [*right[anchor], *([numbers[anchor]] if anchor in numbers else [])]] = -np.inf
            ranks[index] = 1 + (cosines[row] >= positive).sum()
    return ranks
