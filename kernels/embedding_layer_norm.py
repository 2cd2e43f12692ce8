"""LayerNorm(word + position + token type) in Triton: each program gathers and normalises a few whole rows."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements a program at least; 8 for each of its 128 threads, one 16-byte load of a 16-bit dtype
_MAX_BLOCK_N = 8192  # channels of a row held in registers


@triton.jit
def _hidden(word_rows, position_rows, token_type_rows, stride_word, stride_position, stride_type, channels, inside):
    """word + token type + position in float32, zero where not `inside`: (BLOCK_M, BLOCK_N)."""
    word = tl.load(word_rows + channels * stride_word, mask=inside, other=0.0).to(tl.float32)
    position = tl.load(position_rows + channels * stride_position, mask=inside, other=0.0).to(tl.float32)
    token_type = tl.load(token_type_rows + channels * stride_type, mask=inside, other=0.0).to(tl.float32)
    return word + token_type + position


@triton.jit
def _embedding_layer_norm_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    layer_norm_bias_ptr,
    out_ptr,
    num_rows,
    stride_word_row,
    stride_word,
    stride_position_row,
    stride_position,
    stride_type_row,
    stride_type,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    word_rows = word_ptr + tl.load(input_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_word_row
    position_rows = (
        position_ptr + tl.load(position_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_position_row
    )
    token_type_rows = (
        token_type_ptr + tl.load(token_type_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_type_row
    )
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]

    # Three passes over the row. Where it fits in one block they read the same tile, which then stays in registers.
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        inside = in_rows & (start + block < HIDDEN_SIZE)
        hidden = _hidden(
            word_rows, position_rows, token_type_rows, stride_word, stride_position, stride_type, start + block, inside
        )
        total += tl.sum(hidden, axis=1, keep_dims=True)
    mean = total / HIDDEN_SIZE

    total = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        inside = in_rows & (start + block < HIDDEN_SIZE)
        hidden = _hidden(
            word_rows, position_rows, token_type_rows, stride_word, stride_position, stride_type, start + block, inside
        )
        centred = tl.where(inside, hidden - mean, 0.0)
        total += tl.sum(centred * centred, axis=1, keep_dims=True)
    rstd = tl.rsqrt(total / HIDDEN_SIZE + eps)

    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = in_rows & (channels < HIDDEN_SIZE)
        hidden = _hidden(
            word_rows, position_rows, token_type_rows, stride_word, stride_position, stride_type, channels, inside
        )
        weight = tl.load(weight_ptr + channels, mask=channels < HIDDEN_SIZE, other=0.0).to(tl.float32)
        bias = tl.load(layer_norm_bias_ptr + channels, mask=channels < HIDDEN_SIZE, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * HIDDEN_SIZE + channels, (hidden - mean) * rstd * weight + bias, mask=inside)


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
) -> Tensor:
    """LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]), computed in float32.

    Args:
        input_ids, position_ids, token_type_ids: one shape (...), int64 or int32, inside their tables.
        word_embeddings, position_embeddings, token_type_embeddings: (rows, hidden_size), float32, float16 or bfloat16,
            any strides.
        weight, layer_norm_bias: (hidden_size,), the tables' dtype.
        eps: added to the variance.
        dropout_p: 0.

    Returns:
        (..., hidden_size), contiguous, in the tables' dtype.

    Raises:
        ValueError: dropout_p is not 0.
    """
    if dropout_p > 0:
        raise ValueError(f"embedding_layer_norm: dropout_p is {dropout_p}, the Triton kernel has no dropout")
    hidden_size = word_embeddings.shape[1]
    out = word_embeddings.new_empty((*input_ids.shape, hidden_size))
    if out.numel() == 0:
        return out
    num_rows = input_ids.numel()
    block_n = min(triton.next_power_of_2(hidden_size), _MAX_BLOCK_N)
    block_m = max(1, _TILE // block_n)
    with torch.cuda.device_of(out):
        _embedding_layer_norm_kernel[(triton.cdiv(num_rows, block_m),)](
            input_ids.contiguous(),
            position_ids.contiguous(),
            token_type_ids.contiguous(),
            word_embeddings,
            position_embeddings,
            token_type_embeddings,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            num_rows,
            *word_embeddings.stride(),
            *position_embeddings.stride(),
            *token_type_embeddings.stride(),
            eps,
            HIDDEN_SIZE=hidden_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=8 if block_n > 2048 else 4,
        )
    return out
