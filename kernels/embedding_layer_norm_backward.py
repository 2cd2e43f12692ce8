"""The gradient of dropout(LayerNorm(word + position + token type)) in Triton, with the same bits every time.

The gradient of the sum of the three vectors comes first, in float32. Then the three tables are one: the tokens' ids are
sorted, and each row of the table adds up its tokens, in their order. A row with many tokens would keep one program busy
for long ([CLS], token types), so these are cut into pieces of `_PIECE` tokens that are added up before.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.residual_layer_norm_backward import layer_norm_backward

_PIECE = 128
_BLOCK_C = 512  # channels of a program


@triton.jit
def _sum_of_rows(rows_ptr, order_ptr, first, last, num_tokens, channels, num_channels, BLOCK_T: tl.constexpr):
    """The sum of rows `first` to `last`, float32 (1, BLOCK_C): as they lie, or of tokens, as `order_ptr` has them."""
    total = tl.zeros((BLOCK_T, channels.shape[1]), tl.float32)
    for start in range(first, last, BLOCK_T):
        places = (start + tl.arange(0, BLOCK_T))[:, None]
        inside = places < last
        if order_ptr is None:
            rows = places.to(tl.int64)
        else:
            rows = tl.load(order_ptr + places, mask=inside, other=0) % num_tokens
        total += tl.load(rows_ptr + rows * num_channels + channels, mask=inside & (channels < num_channels), other=0.0)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit(do_not_specialize=["num_tokens", "table_rows"])
def _pieces_kernel(
    dhidden_ptr,
    order_ptr,
    bounds_ptr,
    first_pieces_ptr,
    row_of_piece_ptr,
    pieces_ptr,
    num_tokens,
    table_rows,
    HIDDEN_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_piece_ptr + piece)
    if row < table_rows:  # there are fewer pieces than programs
        channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
        first = tl.load(bounds_ptr + row) + (piece - tl.load(first_pieces_ptr + row)) * PIECE
        last = tl.minimum(first + PIECE, tl.load(bounds_ptr + row + 1))
        total = _sum_of_rows(dhidden_ptr, order_ptr, first, last, num_tokens, channels, HIDDEN_SIZE, BLOCK_T)
        tl.store(pieces_ptr + piece * HIDDEN_SIZE + channels, total, mask=channels < HIDDEN_SIZE)


@triton.jit(do_not_specialize=["num_tokens", "padding_idx"])
def _tables_kernel(
    dhidden_ptr,
    order_ptr,
    bounds_ptr,
    first_pieces_ptr,
    pieces_ptr,
    tables_ptr,
    num_tokens,
    padding_idx,
    HIDDEN_SIZE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    first, last = tl.load(bounds_ptr + row), tl.load(bounds_ptr + row + 1)
    last = tl.where(row == padding_idx, first, last)
    if last - first <= PIECE:
        total = _sum_of_rows(dhidden_ptr, order_ptr, first, last, num_tokens, channels, HIDDEN_SIZE, BLOCK_T)
    else:
        first_piece = tl.load(first_pieces_ptr + row)
        last_piece = first_piece + tl.cdiv(last - first, PIECE)
        total = _sum_of_rows(pieces_ptr, None, first_piece, last_piece, num_tokens, channels, HIDDEN_SIZE, BLOCK_T)
    tl.store(tables_ptr + row * HIDDEN_SIZE + channels, total, mask=channels < HIDDEN_SIZE)


def sum_by_id(dhidden: Tensor, ids: Tensor, table_rows: int, padding_idx: int | None, dtype: torch.dtype) -> Tensor:
    """Row i of the result is the sum of the tokens whose id is i.

    Args:
        dhidden: (num_tokens, hidden_size), float32, contiguous.
        ids: (a multiple of num_tokens,) int32: the ids of all tokens, and again, 0 to table_rows - 1.
        table_rows: rows of the result.
        padding_idx: the row that stays zero.
        dtype: of the result, rounded once.
    """
    num_tokens, hidden_size = dhidden.shape
    tables = dhidden.new_empty((table_rows, hidden_size), dtype=dtype)
    in_order, order = torch.sort(ids, stable=True)
    numbers = torch.arange(table_rows + 1, dtype=ids.dtype, device=ids.device)
    bounds = torch.searchsorted(in_order, numbers)  # row i has the places bounds[i] to bounds[i + 1] of the order
    counts = bounds.diff()
    num_pieces = torch.where(counts > _PIECE, (counts + _PIECE - 1) // _PIECE, 0)
    last_pieces = num_pieces.cumsum(0)
    first_pieces = last_pieces - num_pieces
    most_pieces = 2 * ids.numel() // _PIECE  # more than _PIECE tokens are in fewer than 2 tokens / _PIECE pieces
    pieces = dhidden.new_empty((most_pieces, hidden_size))
    row_of_piece = torch.searchsorted(last_pieces, torch.arange(most_pieces, device=ids.device), right=True)
    grid = triton.cdiv(hidden_size, _BLOCK_C)
    constants = {"HIDDEN_SIZE": hidden_size, "PIECE": _PIECE, "BLOCK_T": 8, "BLOCK_C": _BLOCK_C}
    with torch.cuda.device_of(dhidden):
        if most_pieces:
            _pieces_kernel[(most_pieces, grid)](
                dhidden, order, bounds, first_pieces, row_of_piece, pieces, num_tokens, table_rows, **constants
            )
        _tables_kernel[(table_rows, grid)](
            dhidden,
            order,
            bounds,
            first_pieces,
            pieces,
            tables,
            num_tokens,
            -1 if padding_idx is None else padding_idx,
            **constants,
        )
    return tables


def embedding_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    vocab_rows: int,
    position_rows: int,
    token_type_rows: int,
    dropout_p: float,
    seed: Tensor | None,
    padding_idx: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of `embedding_layer_norm_train`'s result, computed in float32; the same bits every time.

    Args:
        grad: (..., hidden_size), the gradient of the result, in its dtype, any strides.
        input_ids, position_ids, token_type_ids: the forward's.
        normalized, rstd: as the forward returned them.
        weight: (hidden_size,).
        vocab_rows, position_rows, token_type_rows: rows of the tables.
        dropout_p, seed: the forward's.
        padding_idx: the row of the word table that gets no gradient, or None.

    Returns:
        dword, dposition, dtoken_type: (rows, hidden_size), dense, in grad's dtype; slices of one tensor.
        dweight, dlayer_norm_bias: (hidden_size,), weight's dtype.
    """
    sizes = [vocab_rows, position_rows, token_type_rows]
    dhidden = normalized.new_empty((rstd.numel(), normalized.shape[-1]), dtype=torch.float32)
    dweight, dlayer_norm_bias = layer_norm_backward(
        grad, normalized, rstd, weight, dropout_p, seed, dhidden, None, drops_result=True
    ).unbind()
    if grad.numel() == 0:
        tables = grad.new_zeros((sum(sizes), grad.shape[-1]))
    else:
        all_ids = (input_ids, position_ids + vocab_rows, token_type_ids + (vocab_rows + position_rows))
        ids = torch.cat([ids.reshape(-1).to(torch.int32) for ids in all_ids])
        tables = sum_by_id(dhidden, ids, sum(sizes), padding_idx, grad.dtype)
    dword, dposition, dtoken_type = tables.split(sizes)
    return dword, dposition, dtoken_type, dweight, dlayer_norm_bias
