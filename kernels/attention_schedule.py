"""Which tile of queries each program of attention takes: those that there are, of the longest sequences first.

Without a schedule there is a program for every tile that the longest sequence has, in every sequence: in a batch of
mixed lengths most of them find nothing to do, and one that starts late with a long sequence keeps the GPU waiting.
"""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def clamped(start, end, num_tokens, max_seqlen):
    """First row and length of sequences, so that wrong offsets reach no row that is not there."""
    start = tl.minimum(tl.maximum(start, 0), num_tokens)
    end = tl.minimum(tl.maximum(end, start), num_tokens)  # not below the start, or their difference could overflow
    return start, tl.minimum(end - start, max_seqlen)


@triton.jit
def bounds(start_ptr, step, num_tokens, max_seqlen):
    """First row (int64) and length of a sequence whose start and end are at `start_ptr` and `step` further."""
    start, seq_len = clamped(tl.load(start_ptr), tl.load(start_ptr + step), num_tokens, max_seqlen)
    return start.to(tl.int64), seq_len


@triton.jit
def place(cu_seqlens_ptr, schedule_ptr, tile, num_tokens, num_tiles, max_seqlen, BLOCK_M: tl.constexpr):
    """Where a tile of queries (or of keys) lies; `num_tiles` is as `grid` gives it.

    Returns:
        Index of its sequence's batch, where it is padded; the sequence's first row there; that row counted over all
        batches; the sequence's length; and the tile's first row, counted in the sequence. Those of rows are int64.
    """
    batch = (tile // num_tiles).to(tl.int64)
    first = tile % num_tiles * BLOCK_M
    if schedule_ptr is not None:
        start, seq_len = bounds(schedule_ptr + tile, num_tiles, num_tokens, max_seqlen)
        first = tl.load(schedule_ptr + 2 * num_tiles + tile)
        token = start
    elif cu_seqlens_ptr is not None:
        start, seq_len = bounds(cu_seqlens_ptr + batch, 1, num_tokens, max_seqlen)
        token = start
    else:
        start, seq_len = batch * 0, num_tokens
        token = batch * num_tokens
    return batch, start, token, seq_len, first


@triton.jit(do_not_specialize=["batch_size", "num_tokens", "max_seqlen", "size"])
def _schedule_kernel(
    cu_seqlens_ptr, schedule_ptr, batch_size, num_tokens, max_seqlen, size, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sequence: counts the tiles of all sequences before it, and writes its own after them."""
    sequence = tl.program_id(0)
    start, seq_len = bounds(cu_seqlens_ptr + sequence, 1, num_tokens, max_seqlen)
    block = tl.arange(0, BLOCK)
    sequences_before = tl.zeros((BLOCK,), tl.int32)
    tiles_before = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, batch_size, BLOCK):
        others = first + block
        is_other = others < batch_size
        other_start = tl.load(cu_seqlens_ptr + others, mask=is_other, other=0)
        other_end = tl.load(cu_seqlens_ptr + others + 1, mask=is_other, other=0)
        _, other_len = clamped(other_start, other_end, num_tokens, max_seqlen)
        before = is_other & ((other_len > seq_len) | ((other_len == seq_len) & (others < sequence)))
        sequences_before += before.to(tl.int32)
        tiles_before += tl.where(before, (other_len + BLOCK_M - 1) // BLOCK_M, 0)
    first_tile = tl.sum(tiles_before)
    end_tile = first_tile + (seq_len + BLOCK_M - 1) // BLOCK_M
    is_last = tl.sum(sequences_before) == batch_size - 1
    for first in range(first_tile, tl.where(is_last, size, end_tile), BLOCK):
        tiles = first + block
        is_tile = tiles < end_tile  # past it, only after the last sequence: tiles without queries
        rows, inside = schedule_ptr + tiles, tiles < tl.where(is_last, size, tl.minimum(end_tile, size))
        tl.store(rows, tl.where(is_tile, start, 0).to(tl.int32), mask=inside)
        tl.store(rows + size, tl.where(is_tile, start + seq_len, 0).to(tl.int32), mask=inside)
        tl.store(rows + 2 * size, tl.where(is_tile, (tiles - first_tile) * BLOCK_M, 0), mask=inside)


def schedule_size(batch_size: int, num_tokens: int, max_seqlen: int, block_m: int) -> int:
    """The most tiles of `block_m` queries that sequences can have, by their number and that of their tokens."""
    return min(batch_size * triton.cdiv(max_seqlen, block_m), num_tokens // block_m + batch_size)


def grid(schedule: Tensor | None, batch_size: int, num_tokens: int, max_seqlen: int, block_m: int) -> tuple[int, int]:
    """How many tiles of `block_m` rows all sequences have at most, and the `num_tiles` that `place` wants.

    Raises:
        ValueError: `schedule` was made for other sizes.
    """
    num_tiles = triton.cdiv(max_seqlen, block_m)
    if schedule is None:
        return batch_size * num_tiles, num_tiles
    size = schedule_size(batch_size, num_tokens, max_seqlen, block_m)
    if schedule.shape != (3, size):
        raise ValueError(f"attention: schedule has shape {tuple(schedule.shape)}, expected (3, {size})")
    return size, size


def attention_schedule(cu_seqlens: Tensor, num_tokens: int, max_seqlen: int, block_m: int) -> Tensor:
    """The tiles of `block_m` queries of all sequences, those of the longest first; waits for nothing.

    Args:
        cu_seqlens: (batch_size + 1,) int32; batch_size is at least 1.
        num_tokens: rows that there are; what `cu_seqlens` says past them is left out.
        max_seqlen: at least the longest sequence, in tokens.
        block_m: queries of a tile.

    Returns:
        (3, schedule_size(...)) int32: for each tile the first row of its sequence, the row after its last, and the
        tile's first query, counted in the sequence. Zeros past the tiles that there are.
    """
    batch_size = cu_seqlens.shape[0] - 1
    size = schedule_size(batch_size, num_tokens, max_seqlen, block_m)
    schedule = torch.empty((3, size), dtype=torch.int32, device=cu_seqlens.device)
    with torch.cuda.device_of(cu_seqlens):
        _schedule_kernel[(batch_size,)](
            cu_seqlens.contiguous(), schedule, batch_size, num_tokens, max_seqlen, size, BLOCK_M=block_m, BLOCK=256
        )
    return schedule
