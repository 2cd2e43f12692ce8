"""The loss of masked language modelling from the tokens that have a label, and no others.

They are gathered before the head's transform, and the last layer computes only what is gathered.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_fast import engine, ops
from bert_fast.checks import ids_in_range
from bert_fast.encoder import encode, first_tokens
from bert_fast.losses import IGNORED_LABEL
from bert_fast.ragged import Padding, Ragged


class Labelled(NamedTuple):
    """Rows of the last layer.

    Attributes:
        rows: (labels, hidden_size), of the tokens that have a label.
        labels: (labels,) int64.
        first: (batch_size, hidden_size), of the first token of each sequence; zeros for one without tokens.
        positions: (labels,) int64, numbers of these tokens in the ragged batch, rising.
    """

    rows: Tensor
    labels: Tensor
    first: Tensor
    positions: Tensor


def encode_labelled(
    bert: Any, packed: engine.Engine | None, config: Any, ragged: Ragged, padding: Padding, labels: Tensor
) -> Labelled:
    """The rows that the loss reads.

    Args:
        bert: a tree with the names of a Hugging Face BERT.
        packed: the engine that serves it, if one does.
        config: has `vocab_size`, `hidden_act` and `num_attention_heads`.
        ragged, padding: the batch, and where its tokens stand in the caller's.
        labels: (batch_size, seq_len), the caller's.

    Raises:
        ValueError: as `labelled`.
    """
    positions, targets = labelled(labels, padding, config.vocab_size)
    if packed is not None or ragged.input_ids.numel() == 0:
        rows = packed.rows(ragged) if packed else encode(bert, ragged, config.hidden_act, config.num_attention_heads)
        return Labelled(rows[positions], targets, first_tokens(rows, ragged), positions)
    if bert.pooler is None:
        rows = encode(bert, ragged, config.hidden_act, config.num_attention_heads, subset=positions)
        return Labelled(rows, targets, rows[:0], positions)
    starts, is_empty = ragged.first()
    rows = encode(bert, ragged, config.hidden_act, config.num_attention_heads, subset=torch.cat([starts, positions]))
    first, rows = rows.split((starts.shape[0], positions.shape[0]))
    return Labelled(rows, targets, first.masked_fill(is_empty[:, None], 0.0), positions)


def labelled(labels: Tensor, padding: Padding, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The tokens of a ragged batch that have a label: their numbers, rising, and their labels, both int64.

    Args:
        labels: (batch_size, seq_len), the caller's, -100 where there is nothing to predict.
        padding: where the tokens stand in the caller's batch; a label where no token stands counts for nothing.
        vocab_size: every other label is below it.

    Raises:
        ValueError: a label is out of range (the message gives its index and value), or the shape is not the batch's.
    """
    expected = (padding.batch_size, padding.seq_len)
    if labels.shape != expected:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, expected {expected} as input_ids has")
    ids_in_range("labels", labels, vocab_size, ignored=IGNORED_LABEL)
    rows = padding.pack(labels)
    positions = (rows != IGNORED_LABEL).nonzero().squeeze(1)
    return positions, rows[positions].long()


def obstacle(decoder: Any) -> str | None:
    """Why the decoder's parameters alone do not say what it does, or None."""
    if type(decoder) is not nn.Linear or decoder.bias is None:
        return f"its decoder is a {type(decoder).__name__}, or has no bias"
    if decoder._forward_hooks or decoder._forward_pre_hooks or "forward" in vars(decoder):
        return "its decoder has a hook"
    return None


def loss(predictions: Any, rows: Labelled, divisor: float | None) -> Tensor:
    """Cross-entropy of the head's predictions, summed and divided by `divisor`, or by the number of labels.

    Args:
        predictions: has `transform` and `decoder`, as the head of a checkpoint.
        rows: the encoder's.
    """
    return decoder_loss(predictions.transform(rows.rows), predictions.decoder, rows.labels, divisor)


def decoder_loss(hidden: Tensor, decoder: Any, labels: Tensor, divisor: float | None) -> Tensor:
    """The same from what the decoder is given, (labels, features); labels (labels,) int64."""
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return ops.masked_lm_loss(hidden, decoder.weight, decoder.bias, labels, divisor=divisor)
