"""Dropout in Triton: the mask of bert_fast/ops/_dropout.py, made again wherever it is needed and never stored."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def random_words(seed, rows, blocks, plane):
    """The four words of Philox4x32 that decide about 16 columns: byte c % 4 of word c % 16 // 4 about column c.

    seed: int64, or int32 where it fits. rows, blocks: integers, of shapes that broadcast. plane: a number.
    """
    rows = rows.to(tl.int64)
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    return tl.philox(seed, blocks.to(tl.uint32), low, high, tl.full((1, 1), plane, tl.uint32), 7)


@triton.jit
def dropped_out(values, rows, columns, seed, threshold, scale):
    """Dropout of values, float32 (BLOCK_M, BLOCK_N), of plane 0; all as they are if there is no seed.

    rows (BLOCK_M, 1), columns (1, BLOCK_N): numbers of the elements. seed, threshold, scale: of `dropout_arguments`.
    Each element asks for its words. The compiler sees which of a thread's columns, loaded 16 bytes at a time, ask for
    the same ones: so words are computed once for 8 neighbours (4 of float32), and no thread waits for another's.
    """
    if seed is None:
        return values
    else:
        w0, w1, w2, w3 = random_words(seed, rows, columns // 16, 0)
        first, second = tl.where((columns & 4) == 0, w0, w1), tl.where((columns & 4) == 0, w2, w3)
        word = tl.where((columns & 8) == 0, first, second)
        decision = (word >> (8 * (columns & 3)).to(tl.uint32)) & 255
        return tl.where(decision.to(tl.int32) >= threshold, values * scale, 0.0)


@triton.jit
def kept(seed, threshold, rows, first_column, plane, BLOCK_N: tl.constexpr):
    """Which elements of a tile stay, bool (BLOCK_M, BLOCK_N), whatever threads will want them: words are computed once.

    seed, threshold: of `dropout_arguments`. rows (BLOCK_M, 1): their numbers, int32 or int64.
    first_column: a multiple of 16. plane: attention's head. BLOCK_N: a power of two, 16 or more.
    """
    blocks = first_column // 16 + tl.arange(0, BLOCK_N // 16)[None, :]
    w0, w1, w2, w3 = random_words(seed, rows, blocks, plane)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(w0.shape[0], BLOCK_N // 16, 4, 1)
    decisions = (words >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, None, :]) & 255
    return decisions.reshape(w0.shape[0], BLOCK_N).to(tl.int32) >= threshold


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> tuple[int | None, int | None, float]:
    """The seed as a number, the bytes below which elements are dropped, and what kept values are multiplied by.

    A kernel gets None for the first two where nothing is dropped; it should not be compiled for their values.

    Args:
        dropout_p: 0 to 1.
        seed: int64 scalar on the CPU; not read where dropout_p is 0.

    Raises:
        ValueError: dropout_p is not 0 and there is no seed.
    """
    if dropout_p == 0:
        return None, None, 1.0
    if seed is None:
        raise ValueError(f"dropout_p is {dropout_p} without a seed")
    dropped = 256 if dropout_p == 1 else min(max(round(256 * dropout_p), 1), 255)
    return int(seed), dropped, 256 / (256 - dropped) if dropped < 256 else 0.0
