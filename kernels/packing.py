"""Padded batches to packed ones and back in Triton, without asking the device anything on the way.

The rows of a batch (batch_size, seq_len) are cut into blocks of columns, numbered row by row. `inspect` reports for a
block how many tokens the mask keeps and how many ids are outside their tables; `pack` adds up the counts before it
to the place of its first token, or counts by itself where that is quick; `unpack` takes rows back to where their tokens
were.
"""

# mypy: allow-untyped-defs

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

#: A mask of so many places is read whole by every program of `pack`, which then needs no counts.
FEW_PLACES = 256

_MAX_BLOCK = 1024  # columns a program
_TILE = 2048  # elements a program of `unpack`; 16 for each of its 128 threads, two 16-byte loads of a 16-bit dtype
_MAX_BLOCK_N = 2048  # channels of them


class Ids(NamedTuple):
    """What there is of a padded batch, on one device.

    Attributes:
        input_ids: (batch_size, seq_len) int64 or int32, any strides, as all of these.
        attention_mask: (batch_size, seq_len), any dtype, non-zero where a token is; None keeps them all.
        token_type_ids: (batch_size, seq_len) int64 or int32; zeros when not given.
        position_ids: the same; the column's number when not given.
        vocab_size, type_vocab_size, max_position_embeddings: rows of the tables.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    token_type_ids: Tensor | None
    position_ids: Tensor | None
    vocab_size: int
    type_vocab_size: int
    max_position_embeddings: int

    def arguments(self):
        """The tensors with their strides, then the sizes, as the kernels take them."""
        tensors = (self.input_ids, self.attention_mask, self.token_type_ids, self.position_ids)
        for tensor in tensors:
            yield tensor
            yield from (0, 0) if tensor is None else tensor.stride()
        yield from (self.vocab_size, self.type_vocab_size, self.max_position_embeddings)


def blocks(seq_len: int) -> tuple[int, int]:
    """The columns of a block, a power of 2, and the blocks of a row."""
    block = min(max(triton.next_power_of_2(seq_len), 16), _MAX_BLOCK)
    return block, triton.cdiv(seq_len, block)


@triton.jit
def _load(ptr, batch, columns, stride_row, stride_column, inside):
    """Elements of one row of a (batch_size, seq_len) tensor: (BLOCK,)."""
    return tl.load(ptr + batch * stride_row + columns.to(tl.int64) * stride_column, mask=inside, other=0)


@triton.jit
def _count_outside(ids, size, inside):
    return tl.sum((((ids < 0) | (ids >= size)) & inside).to(tl.int32), axis=0)


# Sizes differ from call to call: Triton shall not compile for those that are divisible by 16.
_VARYING = ["seq_len", "stride_ids_row", "stride_mask_row", "stride_types_row", "stride_positions_row"]


@triton.jit(do_not_specialize=_VARYING)
def _inspect_kernel(
    ids_ptr,
    stride_ids_row,
    stride_ids,
    mask_ptr,
    stride_mask_row,
    stride_mask,
    types_ptr,
    stride_types_row,
    stride_types,
    positions_ptr,
    stride_positions_row,
    stride_positions,
    vocab_size,
    type_vocab_size,
    max_position_embeddings,
    report_ptr,
    seq_len,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_a_row = tl.cdiv(seq_len, BLOCK)
    batch = (program // blocks_a_row).to(tl.int64)
    columns = program % blocks_a_row * BLOCK + tl.arange(0, BLOCK)
    inside = columns < seq_len
    kept = inside
    if mask_ptr is not None:
        kept &= _load(mask_ptr, batch, columns, stride_mask_row, stride_mask, inside) != 0
    outside = _count_outside(_load(ids_ptr, batch, columns, stride_ids_row, stride_ids, inside), vocab_size, inside)
    if types_ptr is not None:
        types = _load(types_ptr, batch, columns, stride_types_row, stride_types, inside)
        outside += _count_outside(types, type_vocab_size, inside)
    if positions_ptr is not None:
        positions = _load(positions_ptr, batch, columns, stride_positions_row, stride_positions, inside)
        outside += _count_outside(positions, max_position_embeddings, inside)
    tl.store(report_ptr + program, tl.sum(kept.to(tl.int32), axis=0))
    tl.store(report_ptr + tl.num_programs(0) + program, outside)


@triton.jit
def _sum(counts_ptr, first, end, BLOCK: tl.constexpr):
    """counts[first] + ... + counts[end - 1]."""
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(first, end, BLOCK):
        places = start + tl.arange(0, BLOCK)
        total += tl.load(counts_ptr + places, mask=places < end, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _clamp(ids, size):
    return tl.minimum(tl.maximum(ids, 0), size - 1).to(tl.int32)


@triton.jit(do_not_specialize=[*_VARYING, "batch_size", "padded_batch_size", "capacity"])
def _pack_kernel(
    ids_ptr,
    stride_ids_row,
    stride_ids,
    mask_ptr,
    stride_mask_row,
    stride_mask,
    types_ptr,
    stride_types_row,
    stride_types,
    positions_ptr,
    stride_positions_row,
    stride_positions,
    vocab_size,
    type_vocab_size,
    max_position_embeddings,
    counts_ptr,
    report_ptr,
    ids_out_ptr,
    types_out_ptr,
    positions_out_ptr,
    cu_seqlens_ptr,
    index_ptr,
    inverse_ptr,
    seq_len,
    batch_size,
    padded_batch_size,
    capacity,
    BLOCK: tl.constexpr,
    FEW: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_a_row = tl.cdiv(seq_len, BLOCK)
    batch = (program // blocks_a_row).to(tl.int64)
    block = program % blocks_a_row
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < seq_len
    kept = inside
    first_place = batch * seq_len + block * BLOCK
    length = seq_len
    if mask_ptr is None:
        start = first_place.to(tl.int32)
    else:
        kept &= _load(mask_ptr, batch, columns, stride_mask_row, stride_mask, inside) != 0
        if counts_ptr is None:
            places = tl.arange(0, FEW)
            row = places // seq_len
            there = row < batch_size
            marks = _load(mask_ptr, row.to(tl.int64), places % seq_len, stride_mask_row, stride_mask, there) != 0
            start = tl.sum((marks & (places < first_place)).to(tl.int32), axis=0)
            length = tl.sum((marks & (row == batch)).to(tl.int32), axis=0)
        else:
            start = _sum(counts_ptr, 0, program, BLOCK)
            length = _sum(counts_ptr, program - block, program - block + blocks_a_row, BLOCK)
    rows = start + tl.cumsum(kept.to(tl.int32), axis=0) - 1
    # Whatever becomes of the mask between the two kernels, no row is written that is not there.
    written = kept & (rows < capacity)

    ids = _load(ids_ptr, batch, columns, stride_ids_row, stride_ids, inside)
    tl.store(ids_out_ptr + rows, _clamp(ids, vocab_size), mask=written)
    if types_ptr is None:
        types = columns * 0
    else:
        types = _load(types_ptr, batch, columns, stride_types_row, stride_types, inside)
    tl.store(types_out_ptr + rows, _clamp(types, type_vocab_size), mask=written)
    if positions_ptr is None:
        positions = columns
    else:
        positions = _load(positions_ptr, batch, columns, stride_positions_row, stride_positions, inside)
    tl.store(positions_out_ptr + rows, _clamp(positions, max_position_embeddings), mask=written)

    if report_ptr is not None:
        outside = _count_outside(ids, vocab_size, inside)
        outside += _count_outside(types, type_vocab_size, inside)
        outside += _count_outside(positions, max_position_embeddings, inside)
        tl.store(report_ptr + program, tl.sum(kept.to(tl.int32), axis=0))
        tl.store(report_ptr + tl.num_programs(0) + program, outside)
    places = batch * seq_len + columns
    if index_ptr is not None:
        tl.store(index_ptr + rows, places, mask=written)
    if inverse_ptr is not None:
        tl.store(inverse_ptr + places, tl.where(written, rows, -1), mask=inside)
        if block == 0:
            tl.store(inverse_ptr + batch_size.to(tl.int64) * seq_len + batch, tl.where(length > 0, start, -1))
    if cu_seqlens_ptr is not None:
        if block == 0:
            tl.store(cu_seqlens_ptr + batch, start)
        if program == tl.num_programs(0) - 1:
            end = start + tl.sum(kept.to(tl.int32), axis=0)
            for first in range(batch_size, padded_batch_size + 1, BLOCK):
                after = first + tl.arange(0, BLOCK)
                tl.store(cu_seqlens_ptr + after, end + after * 0, mask=after <= padded_batch_size)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def _unpack_kernel(
    rows_ptr,
    inverse_ptr,
    out_ptr,
    num_rows,
    num_places,
    stride_row,
    hidden_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    places = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_place = places < num_places
    row = tl.load(inverse_ptr + places, mask=is_place, other=-1).to(tl.int64)
    in_channels = channels[None, :] < hidden_size
    is_token = ((row >= 0) & (row < num_rows))[:, None] & in_channels
    x = tl.load(rows_ptr + row[:, None] * stride_row + channels[None, :], mask=is_token, other=0.0)
    tl.store(out_ptr + places[:, None] * hidden_size + channels[None, :], x, mask=is_place[:, None] & in_channels)


def inspect(ids: Ids) -> Tensor:
    """Count the tokens, and the ids that are outside their tables, hidden tokens' ids included.

    Returns:
        (2, num_blocks) int32 on the device, `num_blocks` as `blocks` cuts a row, times batch_size: the tokens that the
        mask keeps in each block, and the ids outside.
    """
    batch_size, seq_len = ids.input_ids.shape
    block, blocks_a_row = blocks(seq_len)
    num_blocks = batch_size * blocks_a_row
    report = torch.empty((2, num_blocks), dtype=torch.int32, device=ids.input_ids.device)
    if num_blocks:
        with torch.cuda.device_of(report):
            _inspect_kernel[(num_blocks,)](*ids.arguments(), report, seq_len, BLOCK=block)
    return report


def pack(
    ids: Ids,
    report: Tensor | None,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor | None = None,
    index: Tensor | None = None,
    inverse: Tensor | None = None,
) -> Tensor:
    """Write the tokens that the mask keeps one after another; an id outside its table is brought inside.

    Args:
        ids: the padded batch.
        report: of `inspect`; None where it is not needed, that is, without a mask or of at most `FEW_PLACES` places.
        input_ids, token_type_ids, position_ids: (capacity,) int32: where the tokens go. What is past their number is
            left as it is.
        cu_seqlens: (at least batch_size + 1,) int32, if wanted: where the sequences start, filled to its end with the
            number of tokens.
        index: (capacity,) int64, if wanted: where each token was, batch * seq_len + column.
        inverse: (batch_size * seq_len + batch_size,) int32, if wanted: the row of each place of the batch, -1 where no
            token is; then the row of the first token of each sequence, -1 for one without.

    Returns:
        The report given, or what `inspect` would have reported.
    """
    batch_size, seq_len = ids.input_ids.shape
    block, blocks_a_row = blocks(seq_len)
    num_blocks = batch_size * blocks_a_row
    counts, made = report, None
    if report is None:
        report = made = torch.empty((2, num_blocks), dtype=torch.int32, device=input_ids.device)
    if num_blocks == 0:
        for places, nothing in ((cu_seqlens, 0), (inverse, -1)):
            if places is not None:
                places.fill_(nothing)
        return report
    with torch.cuda.device_of(input_ids):
        _pack_kernel[(num_blocks,)](
            *ids.arguments(),
            counts,
            made,
            input_ids,
            token_type_ids,
            position_ids,
            cu_seqlens,
            index,
            inverse,
            seq_len,
            batch_size,
            0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
            input_ids.shape[0],
            BLOCK=block,
            FEW=FEW_PLACES,
        )
    return report


def unpack(rows: Tensor, inverse: Tensor, out: Tensor) -> None:
    """Copy rows to where `inverse` says, and zeros to the rest, in out's dtype.

    Args:
        rows: (num_rows, hidden_size), floating point, unit column stride.
        inverse: (num_places,) int32, the row of each place or -1.
        out: (num_places, hidden_size), contiguous.
    """
    num_places, hidden_size = out.shape
    if out.numel() == 0:
        return
    block_n = min(triton.next_power_of_2(hidden_size), _MAX_BLOCK_N)
    block_m = _TILE // block_n
    with torch.cuda.device_of(out):
        _unpack_kernel[(triton.cdiv(num_places, block_m), triton.cdiv(hidden_size, block_n))](
            rows,
            inverse,
            out,
            rows.shape[0],
            num_places,
            rows.stride(0),
            hidden_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
