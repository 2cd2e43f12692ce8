"""The losses of the heads: sums over what has a label, divided by how much that is, or by what the caller says."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.checks import ids_in_range
from bert_fast.outputs import Encoded

#: The label of what is not to be predicted.
IGNORED_LABEL = -100


def divisor_of(num_items_in_batch: Tensor | float | None) -> float | None:
    """What the sum of the losses is divided by, as a number; None for the number of labels."""
    return None if num_items_in_batch is None else float(num_items_in_batch)


def cross_entropy(logits: Tensor, labels: Tensor, divisor: float | None = None, name: str = "labels") -> Tensor:
    """Sum over the labels that are not -100, over `divisor` or their number; 0 if there are none.

    logits (..., classes), labels (...).
    """
    if labels.numel() * logits.shape[-1] != logits.numel():
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, but the logits have {tuple(logits.shape)}")
    ids_in_range(name, labels, logits.shape[-1], ignored=IGNORED_LABEL)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    count = (labels != IGNORED_LABEL).sum().clamp(min=1) if divisor is None else divisor
    return F.cross_entropy(logits, labels, reduction="sum") / count


def token_loss(logits: Tensor, labels: Tensor, encoded: Encoded, divisor: float | None = None) -> Tensor:
    """Cross-entropy over the tokens there are; logits (batch_size, seq_len, classes), labels (batch_size, seq_len)."""
    if encoded.keep is not None and labels.shape == encoded.keep.shape:
        labels = labels.masked_fill(~encoded.keep, IGNORED_LABEL)
    return cross_entropy(logits, labels, divisor)


def span_loss(logits: Tensor, positions: Tensor, keep: Tensor | None, divisor: float | None = None) -> Tensor:
    """Cross-entropy over the positions of the text; a target outside it is ignored.

    logits (batch_size, seq_len), positions (batch_size,), keep (batch_size, seq_len) bool.
    """
    if positions.numel() != logits.shape[0]:
        raise ValueError(f"there are {positions.numel()} start_positions or end_positions for {logits.shape[0]} texts")
    ignored = seq_len = logits.shape[1]
    positions = positions.reshape(-1).clamp(0, seq_len)
    if keep is not None:
        inside = F.pad(keep, (0, 1)).gather(1, positions[:, None]).squeeze(1)
        positions = positions.masked_fill(~inside, ignored)
        logits = logits.masked_fill(~keep, torch.finfo(logits.dtype).min)
    count = (positions != ignored).sum().clamp(min=1) if divisor is None else divisor
    return F.cross_entropy(logits, positions, ignore_index=ignored, reduction="sum") / count
