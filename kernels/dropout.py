"""Dropout in Triton: the mask of bert_fast/ops/_dropout.py, made again wherever it is needed and never stored."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import triton
import triton.language as tl
from torch import Tensor

_ROUNDS = tl.constexpr(7)


@triton.jit
def kept(seed, threshold, rows, first_column, plane, BLOCK_N: tl.constexpr):
    """Which elements of rows stay, bool (BLOCK_M, BLOCK_N); a call of Philox4x32 decides about 16 neighbours.

    seed, threshold: as `dropout_arguments` gives them. rows (BLOCK_M, 1): their numbers, int32 or int64.
    first_column: a multiple of 16. plane: attention's head, 0 elsewhere. BLOCK_N: a power of two, 16 or more.
    """
    rows = rows.to(tl.int64)
    blocks = first_column // 16 + tl.arange(0, BLOCK_N // 16)[None, :]
    w0, w1, w2, w3 = tl.philox(
        seed,
        blocks.to(tl.uint32),
        (rows & 0xFFFFFFFF).to(tl.uint32),
        (rows >> 32).to(tl.uint32),
        tl.full((1, 1), plane, tl.uint32),
        _ROUNDS,
    )  # each (BLOCK_M, BLOCK_N // 16), and its four bytes are those of four neighbours
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(w0.shape[0], BLOCK_N // 16, 4, 1)
    decisions = (words >> (8 * tl.arange(0, 4)).to(tl.uint32)[None, None, None, :]) & 255
    return decisions.reshape(w0.shape[0], BLOCK_N).to(tl.int32) >= threshold


def dropout_arguments(dropout_p: float, seed: Tensor | None) -> tuple[int | None, int | None, float]:
    """The seed as a number, the bytes that `kept` compares with, and what kept values are multiplied by.

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
