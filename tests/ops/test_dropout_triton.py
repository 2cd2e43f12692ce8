"""The mask of the Triton kernels is the definition's, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from implementations import DEVICE

from bert_fast.kernels.dropout import dropout_arguments, dropped_out, kept
from bert_fast.ops import _dropout


@triton.jit(do_not_specialize=["seed", "threshold", "first_row", "first_column", "plane"])
def _tile_kernel(
    out_ptr, seed, threshold, first_row, first_column, plane, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows = tl.arange(0, BLOCK_M)[:, None]
    mask = kept(seed, threshold, first_row + rows, first_column, plane, BLOCK_N)
    tl.store(out_ptr + rows * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], mask)


@triton.jit(do_not_specialize=["seed", "threshold", "first_row", "first_column"])
def _rows_kernel(
    out_ptr, seed, threshold, scale, first_row, first_column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    rows, columns = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    ones = tl.full((BLOCK_M, BLOCK_N), 1.0, tl.float32)
    values = dropped_out(ones, first_row + rows, first_column + columns, seed, threshold, scale)
    tl.store(out_ptr + rows * BLOCK_N + columns, values)


PLACES = {
    "the first, with the smallest block": (0, 0, 0, 4, 16),
    "one row": (5, 32, 0, 1, 64),
    "another plane, far along the row": (3, 4096, 11, 8, 128),
    "rows past 2^32": (2**32 - 2, 16, 1, 4, 32),
}
DROPOUT = [(1e-9, 0), (0.1, -(2**63)), (0.5, 0x123456789ABCDEF), (1.0, -3)]


@pytest.mark.parametrize(("dropout_p", "seed"), DROPOUT)
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_the_mask_is_that_of_the_definition(place: tuple[int, ...], dropout_p: float, seed: int) -> None:
    first_row, first_column, plane, rows, columns = place
    numbers = torch.arange(first_row, first_row + rows)
    number, threshold, scale = dropout_arguments(dropout_p, torch.tensor(seed))

    tile = torch.empty(rows, columns, dtype=torch.bool, device=DEVICE)
    _tile_kernel[(1,)](tile, number, threshold, first_row, first_column, plane, BLOCK_M=rows, BLOCK_N=columns)
    random = _dropout.random_bytes(torch.tensor(seed), numbers, first_column + columns, plane)[:, first_column:]
    assert torch.equal(tile.cpu(), random >= _dropout.threshold(dropout_p))

    values = torch.empty(rows, columns, device=DEVICE)
    _rows_kernel[(1,)](values, number, threshold, scale, first_row, first_column, BLOCK_M=rows, BLOCK_N=columns)
    ones = torch.ones(rows, first_column + columns)
    expected = _dropout.dropout(ones, dropout_p, torch.tensor(seed), numbers)[:, first_column:]
    assert torch.equal(values.cpu(), expected)


@pytest.mark.parametrize("dropout_p", [0.001, 0.1, 0.25, 0.5, 0.9999, 1.0])
def test_threshold_and_scale_are_those_of_the_definition(dropout_p: float) -> None:
    _, threshold, scale = dropout_arguments(dropout_p, torch.tensor(1))
    assert (threshold, scale) == (_dropout.threshold(dropout_p), _dropout.kept_scale(dropout_p))


def test_nothing_is_dropped_without_dropout() -> None:
    assert dropout_arguments(0.0, None) == (None, None, 1.0)


def test_dropout_without_a_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 without a seed"):
        dropout_arguments(0.1, None)
