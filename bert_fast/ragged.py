"""Batches without padding: the tokens of all sequences one after another, and the way from and to a padded batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ragged:
    """A batch of token sequences laid end to end.

    Attributes:
        input_ids, position_ids, token_type_ids: (num_tokens,) integers.
        cu_seqlens: (batch_size + 1,) int32; sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: length of the longest sequence, in tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_lengths(cls, input_ids: Tensor, lengths: Tensor, token_type_ids: Tensor | None = None) -> Ragged:
        """Sequences of the given lengths, each with positions from 0.

        Args:
            input_ids: (num_tokens,) integers.
            lengths: (batch_size,) integers that sum to num_tokens.
            token_type_ids: (num_tokens,); zeros when not given.

        Raises:
            ValueError: a length is negative, or they do not sum to the number of tokens.
        """
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"lengths holds {int(lengths.min())}, expected no negative length")
        if int(lengths.sum()) != input_ids.shape[0]:
            raise ValueError(f"lengths sum to {int(lengths.sum())}, but input_ids has {input_ids.shape[0]} tokens")
        cu_seqlens = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=input_ids.device)
        cu_seqlens[1:] = lengths.cumsum(0)
        starts = cu_seqlens[:-1].repeat_interleave(lengths)
        return cls(
            input_ids=input_ids,
            position_ids=torch.arange(input_ids.shape[0], device=input_ids.device) - starts,
            token_type_ids=torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids,
            cu_seqlens=cu_seqlens,
            max_seqlen=int(lengths.max()) if lengths.numel() else 0,
        )

    def first(self) -> tuple[Tensor, Tensor]:
        """Of each sequence, (batch_size,): the number of its first token, int64, and whether it has none.

        There must be a token; an empty sequence is given some other's.
        """
        return self.cu_seqlens[:-1].long().clamp(max=self.input_ids.shape[0] - 1), self.cu_seqlens.diff() == 0


@dataclass(frozen=True)
class Padding:
    """Where the rows of a ragged batch stand in the caller's padded one.

    Attributes:
        batch_size, seq_len: the caller's shape.
        indices: (num_tokens,) positions in the flattened batch, rising; None when there is no padding at all.
    """

    batch_size: int
    seq_len: int
    indices: Tensor | None

    def pack(self, padded: Tensor) -> Tensor:
        """(batch_size, seq_len, ...) -> (num_tokens, ...)."""
        flat = padded.reshape(self.batch_size * self.seq_len, *padded.shape[2:])
        return flat if self.indices is None else flat[self.indices]

    def pad(self, rows: Tensor) -> Tensor:
        """(num_tokens, ...) -> (batch_size, seq_len, ...), zeros where there is no token."""
        shape = (self.batch_size, self.seq_len, *rows.shape[1:])
        if self.indices is None:
            return rows.view(shape)
        flat = rows.new_zeros((self.batch_size * self.seq_len, *rows.shape[1:]))
        return flat.index_copy(0, self.indices, rows).view(shape)


def check_mask(attention_mask: Tensor, batch_size: int, seq_len: int) -> None:
    """ValueError for a mask that is not (batch_size, seq_len)."""
    if attention_mask.shape != (batch_size, seq_len):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, expected {(batch_size, seq_len)} as input_ids has"
        )


@torch.compiler.disable
def pack(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> tuple[Ragged, Padding]:
    """Take the padding out of a batch. Any mask is legal: left padding, holes, rows without a token.

    Args:
        input_ids: (batch_size, seq_len) integers.
        attention_mask: (batch_size, seq_len) bool, int or float, non-zero where a token is; None keeps them all.
        token_type_ids: (batch_size, seq_len); zeros when not given.
        position_ids: (batch_size, seq_len) or (1, seq_len); the column's number when not given.

    Raises:
        ValueError: the shapes do not match.
    """
    batch_size, seq_len = input_ids.shape
    device = input_ids.device
    if attention_mask is not None:
        check_mask(attention_mask, batch_size, seq_len)
    keep = None if attention_mask is None else attention_mask != 0
    if keep is None or bool(keep.all()):
        cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_len
        padding, max_seqlen = Padding(batch_size, seq_len, None), seq_len
    else:
        lengths = keep.sum(1)
        cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32, device=device)
        cu_seqlens[1:] = lengths.cumsum(0)
        padding = Padding(batch_size, seq_len, keep.flatten().nonzero().squeeze(1))
        max_seqlen = int(lengths.max())
    rows = padding.pack(input_ids)
    if position_ids is None:
        position_ids = torch.arange(seq_len, device=device)[None]
    return (
        Ragged(
            input_ids=rows,
            position_ids=padding.pack(position_ids.expand(batch_size, seq_len)),
            token_type_ids=torch.zeros_like(rows) if token_type_ids is None else padding.pack(token_type_ids),
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        ),
        padding,
    )
