"""LayerNorm(word + position + token type) in Triton: each program gathers and normalises a few whole rows."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.dropout import dropout_arguments
from bert_fast.kernels.quantize import check_codes
from bert_fast.kernels.residual_layer_norm import store_for_training, store_normalised
from bert_fast.kernels.rows import blocks


@triton.jit
def _gathered(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    stride_word_row,
    stride_word,
    stride_position_row,
    stride_position,
    stride_type_row,
    stride_type,
    rows,
    in_rows,
    block,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """word + token type + position, in parts as of `store_codes`."""
    word_rows = word_ptr + tl.load(input_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_word_row
    position_rows = (
        position_ptr + tl.load(position_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_position_row
    )
    token_type_rows = (
        token_type_ptr + tl.load(token_type_ids_ptr + rows, mask=in_rows, other=0).to(tl.int64) * stride_type_row
    )
    parts = ()
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = in_rows & (channels < HIDDEN_SIZE)
        word = tl.load(word_rows + channels * stride_word, mask=inside, other=0.0).to(tl.float32)
        position = tl.load(position_rows + channels * stride_position, mask=inside, other=0.0).to(tl.float32)
        token_type = tl.load(token_type_rows + channels * stride_type, mask=inside, other=0.0).to(tl.float32)
        parts = parts + (word + token_type + position,)
    return parts


@triton.jit(do_not_specialize=["num_rows"])
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
    codes_ptr,
    scales_ptr,
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
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    parts = _gathered(
        input_ids_ptr,
        position_ids_ptr,
        token_type_ids_ptr,
        word_ptr,
        position_ptr,
        token_type_ptr,
        stride_word_row,
        stride_word,
        stride_position_row,
        stride_position,
        stride_type_row,
        stride_type,
        rows,
        in_rows,
        block,
        HIDDEN_SIZE,
        BLOCK_N,
    )
    store_normalised(
        parts,
        weight_ptr,
        layer_norm_bias_ptr,
        out_ptr,
        codes_ptr,
        scales_ptr,
        rows,
        in_rows,
        block,
        eps,
        HIDDEN_SIZE,
        BLOCK_N,
    )


@triton.jit(do_not_specialize=["num_rows", "seed", "threshold"])
def _embedding_layer_norm_train_kernel(
    input_ids_ptr,
    position_ids_ptr,
    token_type_ids_ptr,
    word_ptr,
    position_ptr,
    token_type_ptr,
    weight_ptr,
    layer_norm_bias_ptr,
    out_ptr,
    normalized_ptr,
    rstd_ptr,
    num_rows,
    stride_word_row,
    stride_word,
    stride_position_row,
    stride_position,
    stride_type_row,
    stride_type,
    eps,
    seed,
    threshold,
    scale,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    parts = _gathered(
        input_ids_ptr,
        position_ids_ptr,
        token_type_ids_ptr,
        word_ptr,
        position_ptr,
        token_type_ptr,
        stride_word_row,
        stride_word,
        stride_position_row,
        stride_position,
        stride_type_row,
        stride_type,
        rows,
        in_rows,
        block,
        HIDDEN_SIZE,
        BLOCK_N,
    )
    store_for_training(
        parts,
        weight_ptr,
        layer_norm_bias_ptr,
        out_ptr,
        normalized_ptr,
        rstd_ptr,
        rows,
        in_rows,
        block,
        eps,
        seed,
        threshold,
        scale,
        HIDDEN_SIZE,
        BLOCK_N,
    )


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
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids]), computed in float32.

    Args:
        input_ids, position_ids, token_type_ids: one shape (...), int64 or int32, inside their tables.
        word_embeddings, position_embeddings, token_type_embeddings: (rows, hidden_size), float32, float16 or bfloat16,
            any strides.
        weight, layer_norm_bias: (hidden_size,), the tables' dtype.
        eps: added to the variance.
        dropout_p: 0.
        codes, scales: if given, the result goes there too, quantised before it is rounded to the tables' dtype, as
            `quantize_rows` does: contiguous float8_e4m3fn (..., hidden_size), and float32 (rows, 1).

    Returns:
        (..., hidden_size), contiguous, in the tables' dtype.

    Raises:
        ValueError: dropout_p is not 0, or codes or scales is not such a tensor.
    """
    if dropout_p > 0:
        raise ValueError(f"embedding_layer_norm: dropout_p is {dropout_p}, the Triton kernel has no dropout")
    hidden_size = word_embeddings.shape[1]
    out = word_embeddings.new_empty((*input_ids.shape, hidden_size))
    if out.numel() == 0:
        return out
    if codes is not None:
        check_codes("embedding_layer_norm", out, codes, scales)
    num_rows = input_ids.numel()
    shape = blocks(num_rows, hidden_size)
    with torch.cuda.device_of(out):
        _embedding_layer_norm_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
            input_ids.contiguous(),
            position_ids.contiguous(),
            token_type_ids.contiguous(),
            word_embeddings,
            position_embeddings,
            token_type_embeddings,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            codes,
            scales,
            num_rows,
            *word_embeddings.stride(),
            *position_embeddings.stride(),
            *token_type_embeddings.stride(),
            eps,
            HIDDEN_SIZE=hidden_size,
            **shape,
        )
    return out


def embedding_layer_norm_train(
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
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dropout(LayerNorm(word + token type + position)), in float32, and what `embedding_layer_norm_backward` needs.

    Args:
        input_ids to eps: as of `embedding_layer_norm`.
        dropout_p, seed: as of `dropout_arguments`.

    Returns:
        out, normalized: contiguous (..., hidden_size), the tables' dtype; normalized is before gain, bias and dropout.
        rstd: (rows,) float32, one over the standard deviation of each row.
    """
    hidden_size, num_rows = word_embeddings.shape[1], input_ids.numel()
    out, normalized = (word_embeddings.new_empty((*input_ids.shape, hidden_size)) for _ in range(2))
    rstd = out.new_empty(num_rows, dtype=torch.float32)
    if out.numel() == 0:
        return out, normalized, rstd
    shape = blocks(num_rows, hidden_size)
    with torch.cuda.device_of(out):
        _embedding_layer_norm_train_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
            input_ids.contiguous(),
            position_ids.contiguous(),
            token_type_ids.contiguous(),
            word_embeddings,
            position_embeddings,
            token_type_embeddings,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            normalized,
            rstd,
            num_rows,
            *word_embeddings.stride(),
            *position_embeddings.stride(),
            *token_type_embeddings.stride(),
            eps,
            *dropout_arguments(dropout_p, seed),
            HIDDEN_SIZE=hidden_size,
            **shape,
        )
    return out, normalized, rstd
