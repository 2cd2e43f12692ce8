"""What a caller passes to a forward: checked once, before anything runs, with the index and value of what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.checks import ids_in_range
from bert_fast.config import BertConfig
from bert_fast.ragged import Padding, Ragged, check_mask, pack


class TableSizes(NamedTuple):
    """What ids are checked against, where the tables and not a config say it: somebody may have put in longer ones."""

    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int
    embedding_size: int

    @classmethod
    def of(cls, embeddings: Any) -> TableSizes:
        """Of a module with the names of a Hugging Face checkpoint."""
        types, positions = embeddings.token_type_embeddings.weight, embeddings.position_embeddings.weight
        return cls(embeddings.word_embeddings.weight.shape[0], types.shape[0], *positions.shape)


@dataclass
class BertInputs:
    """The arguments of a forward, as transformers names them.

    Attributes:
        input_ids: (batch_size, seq_len) int64 or int32.
        attention_mask: (batch_size, seq_len) bool, int or float, non-zero where a token is. Left padding, holes and
            rows without a token are legal.
        token_type_ids: (batch_size, seq_len), (1, seq_len) or (seq_len,); zeros when not given.
        position_ids: any of the same shapes; the column's number when not given.
        inputs_embeds: (batch_size, seq_len, embedding_size), word vectors instead of `input_ids`; BERT's are as wide as
            hidden_size.
        output_attentions, output_hidden_states: also return these, per layer.
        cu_seq_lens_q: (num_sequences + 1,) int32: `input_ids` is packed, (1, num_tokens), and sequence i is columns
            cu_seq_lens_q[i] to cu_seq_lens_q[i + 1]. `position_ids` then count from 0 in each when not given.
        cu_seq_lens_k, max_length_q, max_length_k: what transformers' collators pass beside it; they must agree with
            `cu_seq_lens_q`, which alone is read.
    """

    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None

    def checked(self, config: BertConfig | TableSizes) -> Batch:
        """The batch they describe; ValueError for what cannot be one."""
        tokens, types, positions = self.placed(config)
        for name, ids, size in (
            ("input_ids", None if self.input_ids is None else tokens, config.vocab_size),
            ("token_type_ids", types, config.type_vocab_size),
            ("position_ids", positions, config.max_position_embeddings),
        ):
            if ids is not None:
                ids_in_range(name, ids, size)
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        cu_seqlens, longest = self.cu_seq_lens_q, shape[1]
        if cu_seqlens is not None:
            lengths = _packed_lengths(cu_seqlens, shape)
            cu_seqlens, longest = cu_seqlens.to(torch.int32), max(lengths, default=0)
            if positions is None:
                columns = [torch.arange(n, device=device) for n in lengths]
                positions = torch.cat(columns)[None] if columns else torch.zeros_like(tokens)
                _check_length(longest, config)
        keep = None if self.attention_mask is None else self.attention_mask != 0
        return Batch(tokens, keep, types, positions, cu_seqlens, longest)

    def placed(self, config: BertConfig | TableSizes) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The tokens, token types and positions, each (batch_size, seq_len), checked in all but their values.

        Tokens are word vectors if such were given; types and positions are None if not given.

        Raises:
            ValueError: shapes, dtypes or devices do not match, or a sequence is too long.
        """
        tokens = self.inputs_embeds if self.input_ids is None else self.input_ids
        if tokens is None or (self.input_ids is not None and self.inputs_embeds is not None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if self.inputs_embeds is None:
            _check_form("input_ids", tokens, None)
        elif tokens.dim() != 3 or tokens.shape[2] != config.embedding_size:
            wanted = f"(batch_size, seq_len, {config.embedding_size})"
            raise ValueError(f"inputs_embeds has shape {tuple(tokens.shape)}, expected {wanted}")
        shape, device = (tokens.shape[0], tokens.shape[1]), tokens.device
        types = _rows("token_type_ids", self.token_type_ids, shape)
        positions = _rows("position_ids", self.position_ids, shape)
        for name in ("attention_mask", "token_type_ids", "position_ids", "cu_seq_lens_q"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.device != device:
                raise ValueError(f"{name} is on {tensor.device} but the tokens are on {device}")
        if self.attention_mask is not None:
            if self.cu_seq_lens_q is not None:
                raise ValueError("attention_mask and cu_seq_lens_q are both given, expected one of them")
            check_mask(self.attention_mask, *shape)
        if positions is None and self.cu_seq_lens_q is None:
            _check_length(shape[1], config)
        return tokens, types, positions


@dataclass(frozen=True)
class Batch:
    """A checked batch.

    Attributes:
        tokens: `input_ids` (batch_size, seq_len), or word vectors (batch_size, seq_len, embedding_size).
        mask: (batch_size, seq_len) bool, True where a token is; None keeps them all.
        types, positions: the caller's ids, (batch_size, seq_len), or None for the defaults.
        cu_seqlens: where the sequences of a packed batch (1, num_tokens) start; None for a padded one.
        max_seqlen: the longest sequence of a packed batch, else seq_len.
    """

    tokens: Tensor
    mask: Tensor | None
    types: Tensor | None
    positions: Tensor | None
    cu_seqlens: Tensor | None
    max_seqlen: int

    @property
    def input_ids(self) -> Tensor:
        """(batch_size, seq_len)."""
        return self.tokens

    @property
    def inputs_embeds(self) -> Tensor | None:
        """(batch_size, seq_len, embedding_size), or None when the tokens came as ids."""
        return self.tokens if self.tokens.is_floating_point() else None

    @property
    def token_type_ids(self) -> Tensor:
        """(batch_size, seq_len)."""
        if self.types is not None:
            return self.types
        return torch.zeros(self.tokens.shape[:2], dtype=torch.int64, device=self.tokens.device)

    @property
    def position_ids(self) -> Tensor:
        """(batch_size or 1, seq_len)."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]

    @property
    def keep(self) -> Tensor:
        """(batch_size, seq_len) bool, True where a token is."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)

    @property
    def attends(self) -> Tensor:
        """(batch_size, 1 or queries, keys) bool: which key a query may see."""
        if self.cu_seqlens is None:
            return self.keep[:, None, :]
        lengths = self.cu_seqlens.diff()
        sequence = torch.arange(lengths.shape[0], device=lengths.device).repeat_interleave(lengths)
        return (sequence[:, None] == sequence)[None]

    def first_tokens(self, hidden: Tensor) -> Tensor:
        """The first token kept of each sequence, (num_sequences, hidden_size); zeros for a sequence without tokens."""
        batch_size, seq_len, hidden_size = hidden.shape
        if self.cu_seqlens is not None:
            starts, empty = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff() == 0
        else:
            first = self.keep.int().argmax(1) if seq_len else torch.zeros_like(self.keep[:, 0:0].sum(1))
            starts = torch.arange(batch_size, device=hidden.device) * seq_len + first
            empty = ~self.keep.any(1)
        rows = torch.cat([hidden.flatten(0, 1), hidden.new_zeros((1, hidden_size))])
        return rows[starts.masked_fill(empty, rows.shape[0] - 1)]

    def to_ragged(self) -> tuple[Ragged, Padding]:
        """The batch of ids without its padding, and the way back."""
        if self.cu_seqlens is None:
            return pack(self.tokens, self.mask, self.types, self.positions)
        ragged = Ragged(self.tokens[0], self.position_ids[0], self.token_type_ids[0], self.cu_seqlens, self.max_seqlen)
        return ragged, Padding(1, self.tokens.shape[1], None)


def _rows(name: str, ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The ids as (batch_size, seq_len); one row of them serves every row of the batch."""
    if ids is None:
        return None
    if ids.shape in (shape[1:], (1, shape[1])):
        ids = ids.expand(shape)
    _check_form(name, ids, shape)
    return ids


def _check_form(name: str, ids: Tensor, shape: tuple[int, int] | None) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} is {ids.dtype}, expected int64 or int32")
    if ids.dim() != 2 or (shape is not None and ids.shape != shape):
        raise ValueError(f"{name} has shape {tuple(ids.shape)}, expected {shape or '(batch_size, seq_len)'}")


def _check_length(longest: int, config: BertConfig | TableSizes) -> None:
    if longest > config.max_position_embeddings:
        raise ValueError(
            f"a sequence has {longest} tokens, more than max_position_embeddings {config.max_position_embeddings}"
        )


@torch.compiler.disable
def _packed_lengths(cu_seqlens: Tensor, shape: tuple[int, int]) -> list[int]:
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        raise ValueError(f"cu_seq_lens_q is {got}, expected int32 (num_sequences + 1,)")
    if shape[0] != 1:
        raise ValueError(f"a packed batch has shape (1, num_tokens), got {shape}")
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != shape[1]:
        raise ValueError(f"cu_seq_lens_q runs from {offsets[0]} to {offsets[-1]}, expected 0 to {shape[1]} tokens")
    lengths = [end - start for start, end in pairwise(offsets)]
    if lengths and min(lengths) < 0:
        raise ValueError(f"cu_seq_lens_q falls at index {lengths.index(min(lengths)) + 1}, expected it never to")
    return lengths
