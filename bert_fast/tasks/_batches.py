"""What the tasks share: texts to features, features to padded batches, and batches apart again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_fast.losses import IGNORED_LABEL
from bert_fast.tokenization import TokenBatch, Tokenizer

#: Texts tokenised at a time: the tokenizers library holds about 100 bytes for a token.
CHUNK = 4096


def encode(
    texts: Iterable[Any], tokenizer: Tokenizer, max_seq_length: int
) -> tuple[list[dict[str, Any]], NDArray[np.bool_]]:
    """Features of texts or pairs of texts, without labels, and whether each lost tokens to `max_seq_length`."""
    features: list[dict[str, Any]] = []
    truncated, rest = [np.zeros(0, np.bool_)], iter(texts)
    while chunk := list(islice(rest, CHUNK)):
        tokens = tokenizer(chunk, max_seq_length)
        features += split_tokens(tokens)
        truncated.append(tokens.truncated)
    return features, np.concatenate(truncated)


def split_tokens(tokens: TokenBatch) -> list[dict[str, Any]]:
    """`input_ids` and `token_type_ids`, (num_tokens,) each, of every text."""
    ends = tokens.lengths.cumsum()
    return [
        {"input_ids": tokens.input_ids[start:end], "token_type_ids": tokens.token_type_ids[start:end]}
        for start, end in zip(ends - tokens.lengths, ends, strict=True)
    ]


def label_number(label: str, numbers: Mapping[str, int], example: str) -> int:
    """The number of a label; ValueError, naming it and its example, if training had none of that name."""
    if label not in numbers:
        known = list(numbers)
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise ValueError(f"example {example} has the label {label!r}, which is none of those of training: {listed}")
    return numbers[label]


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Names of labels, each once: numbers by value, then the others by the alphabet, as transformers' run_glue."""

    def place(label: str) -> tuple[bool, int, str]:
        return (False, int(label), label) if label.isdecimal() else (True, 0, label)

    return tuple(sorted(set(labels), key=place))


class PaddingCollator:
    """Features of several texts -> one padded batch, by transformers' names.

    Integers with one value per token are padded: (batch_size, longest), labels with -100. What has one value per text
    is stacked. `attention_mask` says where the tokens are.

    Args:
        pad_token_id: what `input_ids` are padded with.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.fill = {"input_ids": pad_token_id or 0, "labels": IGNORED_LABEL}

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad."""
        lengths = np.array([len(feature["input_ids"]) for feature in features])
        keep = np.arange(lengths.max(initial=0)) < lengths[:, None]
        batch = {"attention_mask": torch.from_numpy(keep.astype(np.int64))}
        for name in features[0]:
            arrays = [np.asarray(feature[name]) for feature in features]
            if arrays[0].ndim == 1 and arrays[0].dtype.kind == "i":
                padded = np.full(keep.shape, self.fill.get(name, 0), np.int64)
                padded[keep] = np.concatenate(arrays)
            else:
                stacked = np.stack(arrays)
                padded = stacked.astype(np.float32 if stacked.dtype.kind == "f" else np.int64)
            batch[name] = torch.from_numpy(padded)
        return batch


def rows_of_each(values: Tensor, batch: Mapping[str, Any]) -> list[NDArray[np.float32]]:
    """What a model says of the tokens of each text: (1 or batch_size, seq_len, ...) -> (num_tokens, ...) each."""
    rows = values.float().cpu()
    if "cu_seq_lens_q" in batch:
        return [rows[0, start:end].numpy() for start, end in pairwise(batch["cu_seq_lens_q"].tolist())]
    return [row[mask].numpy() for row, mask in zip(rows, batch["attention_mask"].cpu().bool(), strict=True)]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities over the last dimension."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
