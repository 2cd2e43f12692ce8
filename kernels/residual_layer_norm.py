"""LayerNorm(x + bias + residual) in Triton: each program normalises a few whole rows."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.dropout import dropout_arguments, dropped_out
from bert_fast.kernels.quantize import check_codes
from bert_fast.kernels.rows import blocks, store_codes


@triton.jit
def load_vector(vector_ptr, channels, rows, HIDDEN_SIZE: tl.constexpr):
    """One vector for every row, float32 (BLOCK_M, BLOCK_N), zero past HIDDEN_SIZE.

    Each row reads it, from the nearest cache: so no value has to go from one thread to another.
    """
    channels = tl.broadcast_to(channels, (rows.shape[0], channels.shape[1]))
    return tl.load(vector_ptr + channels, mask=channels < HIDDEN_SIZE, other=0.0).to(tl.float32)


@triton.jit
def _statistics(parts, block, eps, HIDDEN_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Mean, and one over the standard deviation, of rows, (BLOCK_M, 1); arguments as of `store_codes`."""
    total = parts[0]
    for start in tl.static_range(BLOCK_N, HIDDEN_SIZE, BLOCK_N):
        total += parts[start // BLOCK_N]
    # Rounded to nearest, unlike `/`, so that the mean of equal values is their value: rstd may be 10^6 there.
    mean = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), HIDDEN_SIZE * 1.0)

    squares = tl.zeros_like(parts[0])
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        centred = tl.where(start + block < HIDDEN_SIZE, parts[start // BLOCK_N] - mean, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / HIDDEN_SIZE + eps)


@triton.jit
def store_normalised(
    parts,
    weight_ptr,
    bias_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    in_rows,
    block,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the LayerNorm of rows, and as float8 codes if there are `codes_ptr`; arguments as of `store_codes`."""
    mean, rstd = _statistics(parts, block, eps, HIDDEN_SIZE, BLOCK_N)
    normalised = ()
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        weight = load_vector(weight_ptr, channels, rows, HIDDEN_SIZE)
        bias = load_vector(bias_ptr, channels, rows, HIDDEN_SIZE)
        normalised = normalised + ((parts[start // BLOCK_N] - mean) * rstd * weight + bias,)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        out_rows = out_ptr + rows * HIDDEN_SIZE
        tl.store(out_rows + channels, normalised[start // BLOCK_N], mask=in_rows & (channels < HIDDEN_SIZE))
    if codes_ptr is not None:
        store_codes(normalised, codes_ptr, scales_ptr, rows, in_rows, block, HIDDEN_SIZE, BLOCK_N)


@triton.jit
def store_for_training(
    parts,
    weight_ptr,
    bias_ptr,
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
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the LayerNorm of rows, with dropout if there is a seed, and what its gradient needs."""
    mean, rstd = _statistics(parts, block, eps, HIDDEN_SIZE, BLOCK_N)
    tl.store(rstd_ptr + rows, rstd, mask=in_rows)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = in_rows & (channels < HIDDEN_SIZE)
        normalized = (parts[start // BLOCK_N] - mean) * rstd
        weight = load_vector(weight_ptr, channels, rows, HIDDEN_SIZE)
        bias = load_vector(bias_ptr, channels, rows, HIDDEN_SIZE)
        out = dropped_out(normalized * weight + bias, rows, channels, seed, threshold, scale)
        tl.store(normalized_ptr + rows * HIDDEN_SIZE + channels, normalized, mask=inside)
        tl.store(out_ptr + rows * HIDDEN_SIZE + channels, out, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _residual_layer_norm_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    layer_norm_bias_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    stride_x_row,
    stride_x,
    stride_residual_row,
    stride_residual,
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    x_rows = x_ptr + rows * stride_x_row
    residual_rows = residual_ptr + rows * stride_residual_row
    parts = ()
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = in_rows & (channels < HIDDEN_SIZE)
        x = tl.load(x_rows + channels * stride_x, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_rows + channels * stride_residual, mask=inside, other=0.0).to(tl.float32)
        bias = load_vector(bias_ptr, channels, rows, HIDDEN_SIZE)
        parts = parts + (x + bias + residual,)
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
def _residual_layer_norm_train_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    layer_norm_bias_ptr,
    out_ptr,
    normalized_ptr,
    rstd_ptr,
    num_rows,
    stride_x_row,
    stride_x,
    stride_residual_row,
    stride_residual,
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
    x_rows = x_ptr + rows * stride_x_row
    residual_rows = residual_ptr + rows * stride_residual_row
    parts = ()
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = in_rows & (channels < HIDDEN_SIZE)
        x = tl.load(x_rows + channels * stride_x, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_rows + channels * stride_residual, mask=inside, other=0.0).to(tl.float32)
        bias = load_vector(bias_ptr, channels, rows, HIDDEN_SIZE)
        parts = parts + (dropped_out(x + bias, rows, channels, seed, threshold, scale) + residual,)
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
        None,
        None,
        1.0,
        HIDDEN_SIZE,
        BLOCK_N,
    )


def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + bias + residual) over the last dimension, computed in float32.

    Args:
        x, residual: (..., hidden_size), float32, float16 or bfloat16, any strides.
        bias, weight, layer_norm_bias: (hidden_size,), x's dtype.
        eps: added to the variance.
        dropout_p: 0.
        out: where the result goes; may be x or residual.
        codes, scales: if given, the result goes there too, quantised before it is rounded to x's dtype, as
            `quantize_rows` does: contiguous float8_e4m3fn of x's shape, and float32 (rows, 1).

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: dropout_p is not 0, or codes or scales is not such a tensor.
    """
    if dropout_p > 0:
        raise ValueError(f"residual_layer_norm: dropout_p is {dropout_p}, the Triton kernel has no dropout")
    out = x.new_empty(x.shape) if out is None else out
    if out.numel() == 0:
        return out
    if codes is not None:
        check_codes("residual_layer_norm", x, codes, scales)
    hidden_size = x.shape[-1]
    x, residual = x.reshape(-1, hidden_size), residual.reshape(-1, hidden_size)
    shape = blocks(x.shape[0], hidden_size)
    with torch.cuda.device_of(x):
        _residual_layer_norm_kernel[(triton.cdiv(x.shape[0], shape["BLOCK_M"]),)](
            x,
            bias.contiguous(),
            residual,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            codes,
            scales,
            x.shape[0],
            *x.stride(),
            *residual.stride(),
            eps,
            HIDDEN_SIZE=hidden_size,
            **shape,
        )
    return out


def residual_layer_norm_train(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm(residual + dropout(x + bias)), computed in float32, and what `residual_layer_norm_backward` needs.

    Args:
        x: (..., hidden_size), float32, float16 or bfloat16, any strides; may be 16-bit beside float32 others.
        bias, weight, layer_norm_bias: (hidden_size,), residual's dtype.
        residual: shape of x, any strides.
        eps: added to the variance.
        dropout_p, seed: as of `dropout_arguments`.

    Returns:
        out, normalized: contiguous tensors of x's shape and residual's dtype; normalized is before gain and bias.
        rstd: (rows,) float32, one over the standard deviation of each row.
    """
    hidden_size = x.shape[-1]
    out, normalized = residual.new_empty(x.shape), residual.new_empty(x.shape)
    rstd = x.new_empty(x.numel() // max(hidden_size, 1), dtype=torch.float32)
    if out.numel() == 0:
        return out, normalized, rstd
    x, residual = x.reshape(-1, hidden_size), residual.reshape(-1, hidden_size)
    shape = blocks(x.shape[0], hidden_size)
    with torch.cuda.device_of(x):
        _residual_layer_norm_train_kernel[(triton.cdiv(x.shape[0], shape["BLOCK_M"]),)](
            x,
            bias.contiguous(),
            residual,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            normalized,
            rstd,
            x.shape[0],
            *x.stride(),
            *residual.stride(),
            eps,
            *dropout_arguments(dropout_p, seed),
            HIDDEN_SIZE=hidden_size,
            **shape,
        )
    return out, normalized, rstd
