"""LayerNorm(x + bias + residual) in Triton: each program normalises a few whole rows."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.quantize import check_codes, magnitude_bits, row_scale
from bert_fast.kernels.rows import blocks


@triton.jit
def _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, channels, inside):
    """x + bias + residual in float32, zero where not `inside`: (BLOCK_M, BLOCK_N)."""
    x = tl.load(x_rows + channels * stride_x, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_rows + channels * stride_residual, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    return x + bias + residual


@triton.jit
def normalised(hidden, mean, rstd, weight_ptr, bias_ptr, channels, in_row):
    """(hidden - mean) * rstd * weight + bias in float32, zero where a channel is not `in_row`: (BLOCK_M, BLOCK_N)."""
    weight = tl.load(weight_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=in_row, other=0.0).to(tl.float32)
    return (hidden - mean) * rstd * weight + bias


@triton.jit
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
    x_rows = x_ptr + rows * stride_x_row
    residual_rows = residual_ptr + rows * stride_residual_row
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]

    # Some passes over the row. Where it fits in one block they read the same tile, which then stays in registers.
    total = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        inside = (rows < num_rows) & (start + block < HIDDEN_SIZE)
        hidden = _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, start + block, inside)
        total += tl.sum(hidden, axis=1, keep_dims=True)
    mean = total / HIDDEN_SIZE

    total = tl.zeros((BLOCK_M, 1), tl.float32)
    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        inside = (rows < num_rows) & (start + block < HIDDEN_SIZE)
        hidden = _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, start + block, inside)
        centred = tl.where(inside, hidden - mean, 0.0)
        total += tl.sum(centred * centred, axis=1, keep_dims=True)
    rstd = tl.rsqrt(total / HIDDEN_SIZE + eps)

    inverse = 1.0
    if codes_ptr is not None:
        largest = tl.zeros((BLOCK_M, 1), tl.int32)
        for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
            channels = start + block
            inside = (rows < num_rows) & (channels < HIDDEN_SIZE)
            hidden = _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, channels, inside)
            out = normalised(hidden, mean, rstd, weight_ptr, layer_norm_bias_ptr, channels, channels < HIDDEN_SIZE)
            largest = tl.maximum(largest, tl.max(magnitude_bits(out), axis=1, keep_dims=True))
        scale = row_scale(largest)
        tl.store(scales_ptr + rows, scale, mask=rows < num_rows)
        inverse = 1.0 / scale

    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = (rows < num_rows) & (channels < HIDDEN_SIZE)
        hidden = _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, channels, inside)
        out = normalised(hidden, mean, rstd, weight_ptr, layer_norm_bias_ptr, channels, channels < HIDDEN_SIZE)
        tl.store(out_ptr + rows * HIDDEN_SIZE + channels, out, mask=inside)
        if codes_ptr is not None:
            tl.store(codes_ptr + rows * HIDDEN_SIZE + channels, (out * inverse).to(tl.float8e4nv), mask=inside)


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
