"""What is in a batch, found out while it is made: which examples, how many tokens and labels, and are these legal?"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.benchmarking import useful_flops
from bert_fast.checks import ids_in_range
from bert_fast.heads import Head
from bert_fast.losses import IGNORED_LABEL
from bert_fast.training.batches import INDEX, WORD_IDS
from bert_fast.training.masking import MaskingCollator

#: Under this name the facts travel in a batch until the trainer takes them out.
FACTS = "bert_fast_facts"

#: How many examples at most are read for the digest of a data set.
FINGERPRINTED = 10_000

#: What transformers' collators and ours read beside what the model takes.
_FOR_COLLATORS = frozenset({"label", "label_ids", "special_tokens_mask", WORD_IDS})


@dataclass(frozen=True)
class Facts:
    """About one batch, as the process that made it saw it.

    Attributes:
        indexes: numbers of its examples in the data set; empty for a stream.
        lengths: tokens of each sequence.
        num_labels: what the loss is the mean over: labels that are not ignored, or examples.
        num_pairs: what the second loss is the mean over: pairs, for ELECTRA's pre-training tokens; 0 for other heads.
    """

    indexes: tuple[int, ...]
    lengths: tuple[int, ...]
    num_labels: int
    num_pairs: int = 0

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(self.lengths)

    def __str__(self) -> str:
        of_which = f"examples {', '.join(map(str, self.indexes))}" if self.indexes else "examples of a stream"
        longest = max(self.lengths, default=0)
        return f"{len(self.lengths)} sequences, {self.num_tokens} tokens, the longest {longest}; {of_which}"


class Inspector:
    """Looks at batches for one model: its targets, and how many classes they have.

    Args:
        model: ours or a transformers one; of another one than a BERT no label is out of range.
    """

    def __init__(self, model: nn.Module) -> None:
        names = [kind.__name__ for kind in type(model).__mro__]
        known = next((name for name in names if name.startswith(("BertFor", "Electra"))), "")
        #: By BERT's name where it has the same targets, which the discriminator's are not.
        self.head = known if known == "ElectraForPreTraining" else known.replace("ElectraFor", "BertFor")
        self.config: Any = getattr(model, "config", None)
        self.hides_labels = isinstance(model, Head)

    def facts(self, batch: Mapping[str, Any], indexes: tuple[int, ...] = ()) -> Facts:
        """What is in a batch.

        Raises:
            ValueError: a label is out of range; the message has it, and the examples of the batch.
        """
        try:
            self._check(batch)
        except ValueError as error:
            whose = f"of the examples {', '.join(map(str, indexes))}" if indexes else "of a stream"
            raise ValueError(f"{error}, in a batch {whose}") from error
        lengths = _lengths(batch)
        if self.head == "ElectraPretraining":
            num_pairs = sum(lengths)
        else:
            num_pairs = len(batch["next_sentence_label"]) if "next_sentence_label" in batch else 0
        return Facts(indexes, lengths, self._num_labels(batch), num_pairs)

    def _num_labels(self, batch: Mapping[str, Any]) -> int:
        if "labels" in batch:
            labels, mask = batch["labels"], batch.get("attention_mask")
            if self.hides_labels and mask is not None and mask.shape == labels.shape:
                labels = labels.masked_fill(mask == 0, IGNORED_LABEL)
            return _count(labels)
        if "start_positions" in batch:  # one past the text is ignored
            packed = batch.get("cu_seq_lens_q")
            ends = batch["input_ids"].shape[-1] if packed is None else packed.diff()
            return int((batch["start_positions"] < ends).sum())
        return len(_lengths(batch))

    def _check(self, batch: Mapping[str, Any]) -> None:
        targets = (("labels", self._num_classes(batch), IGNORED_LABEL), ("next_sentence_label", 2, None))
        for name, classes, ignored in targets:
            labels = batch.get(name)
            if classes is not None and isinstance(labels, Tensor) and not labels.is_floating_point():
                ids_in_range(name, labels, classes, ignored)

    def _num_classes(self, batch: Mapping[str, Any]) -> int | None:
        """Of `labels`; None where they are not the number of a class."""
        config = self.config
        if self.head in ("BertForMaskedLM", "BertForPreTraining", "ElectraPretraining"):
            return int(config.vocab_size)
        if self.head == "BertForNextSentencePrediction":
            return 2
        if self.head == "BertForMultipleChoice":
            return int(batch["input_ids"].shape[1])
        if self.head == "BertForTokenClassification":
            return int(config.num_labels)
        if self.head == "BertForSequenceClassification":
            guessed = config.problem_type is None and config.num_labels > 1
            return int(config.num_labels) if guessed or config.problem_type == "single_label_classification" else None
        return None


class InspectingCollator:
    """Collates as another one does, and puts the `Facts` beside what the model takes.

    It runs where batches are made, on the CPU and often in a worker, so that nothing waits for a GPU.

    Args:
        collate: features of examples -> a batch.
        columns: names of features that are kept; None keeps all.
        inspector: of the model.
        seeds: what the random numbers that `collate` draws come from, together with the indexes of the examples: the
            same batch then is the same in a resumed run and with any number of workers. None leaves the generators be.
    """

    def __init__(
        self,
        collate: Callable[[list[Any]], Mapping[str, Any]],
        columns: Sequence[str] | None,
        inspector: Inspector,
        seeds: tuple[int | Tensor, ...] | None = None,
    ) -> None:
        self.collate, self.inspector, self.seeds = collate, inspector, seeds
        self.columns = None if columns is None else frozenset(columns) | _FOR_COLLATORS
        self.wants_index = isinstance(collate, MaskingCollator)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate; ValueError for a label that is out of range."""
        indexes = tuple(int(feature[INDEX]) for feature in features if INDEX in feature)
        selected = [self._selected(feature) for feature in features]
        if self.seeds is None or not indexes:
            batch = dict(self.collate(selected))
        else:
            with _seeded(*map(int, self.seeds), *indexes):
                batch = dict(self.collate(selected))
        return {**batch, FACTS: self.inspector.facts(batch, indexes)}

    def _selected(self, feature: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: v for name, v in feature.items() if self.columns is None or name in self.columns}
        kept.pop(INDEX, None)
        return {**kept, INDEX: feature[INDEX]} if self.wants_index and INDEX in feature else kept


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Within it Python, NumPy and torch (CPU) draw from these numbers; outside as if nothing had been drawn."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest())
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def step_flops(config: Any, lengths: Sequence[int]) -> int:
    """Useful floating-point operations of a training step on these lengths: three times those of a forward pass.

    One for the forward pass, one each for the gradients of activations and weights. 0 where the model is not a BERT's
    shape.
    """
    if not all(hasattr(config, name) for name in ("hidden_size", "intermediate_size", "num_hidden_layers")):
        return 0
    return 3 * useful_flops(config, lengths)


def dataset_digest(dataset: Any) -> str:
    """A digest of how many examples a data set has and of what they are, of `FINGERPRINTED` of them evenly spread."""
    digest = hashlib.blake2b(str(len(dataset)).encode(), digest_size=16)
    for index in np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), FINGERPRINTED)).astype(np.int64)):
        _feed(digest, dataset[int(index)])
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    """Digest nested dictionaries and lists of tensors, arrays, numbers and strings."""
    if isinstance(value, Mapping):
        for name in sorted(value):
            digest.update(f"{name}:".encode())
            _feed(digest, value[name])
        return
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    if isinstance(array, np.ndarray) and array.dtype != object:
        digest.update(f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    else:
        digest.update(f"{array!r};".encode())


def _lengths(batch: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens of each sequence of a packed or a padded batch; sequences of several choices are one after another."""
    if "cu_seq_lens_q" in batch:
        return tuple(end - start for start, end in pairwise(batch["cu_seq_lens_q"].tolist()))
    if isinstance(mask := batch.get("attention_mask"), Tensor):
        return tuple((mask != 0).flatten(0, -2).sum(1).tolist())
    ids = batch["input_ids"].flatten(0, -2)
    return (ids.shape[1],) * ids.shape[0]


def _count(labels: Tensor) -> int:
    """Labels that are not ignored; the examples, for labels that are numbers."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        return labels.shape[0]
    return int((labels != IGNORED_LABEL).sum())
