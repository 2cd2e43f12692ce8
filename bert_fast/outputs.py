"""What a forward returns: the fields of transformers' outputs, by name, by index, or as a tuple."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Fields that are None are absent: indexing and `to_tuple` skip them, as in transformers."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """Name and value of every field that is present, in order."""
        return ((f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) is not None)

    def to_tuple(self) -> tuple[Any, ...]:
        """The values of the fields that are present, in order."""
        return tuple(value for _, value in self.items())

    def __getitem__(self, key: int | slice | str) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())


@dataclass
class BaseModelOutputWithPooling(ModelOutput):
    """`last_hidden_state` (batch_size, seq_len, hidden_size); `pooler_output` (batch_size, hidden_size)."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class PreTrainingOutput(ModelOutput):
    """`prediction_logits` (batch_size, seq_len, vocab_size); `seq_relationship_logits` (batch_size, 2)."""

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class LogitsOutput(ModelOutput):
    """`logits`: (batch_size, seq_len, classes) per token, (batch_size, classes) per text or set of choices."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """`start_logits` and `end_logits`: (batch_size, seq_len)."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None
    end_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SentenceEmbeddingOutput(ModelOutput):
    """`sentence_embedding`: (num_sequences, hidden_size)."""

    loss: Tensor | None = None
    sentence_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(frozen=True)
class Encoded:
    """What the encoder hands to a head.

    Attributes:
        rows: (..., hidden_size), one row per token; which leading shape is the encoder's business.
        pad: brings anything per row, (..., features), to the caller's (batch_size, seq_len, features).
        keep: (batch_size, seq_len) bool, True where a token is; None where all are.
        first: (batch_size, hidden_size), the row of the first token kept of each sequence, zeros for one without
            tokens; None where nobody asked for it.
        pooler_output: (batch_size, hidden_size), or None without a pooler.
        cu_seqlens: (num_texts + 1,), where the texts of a packed batch start; None for a padded one.
        hidden_states, attentions: as asked for, in the caller's shape.
    """

    rows: Tensor
    pad: Callable[[Tensor], Tensor]
    keep: Tensor | None = None
    first: Tensor | None = None
    pooler_output: Tensor | None = None
    cu_seqlens: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
