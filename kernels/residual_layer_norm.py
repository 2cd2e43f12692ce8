"""LayerNorm(x + bias + residual) in Triton: each program normalises a few whole rows."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 1024  # elements a program at least; 8 for each of its 128 threads, one 16-byte load of a 16-bit dtype
_MAX_BLOCK_N = 8192  # channels of a row held in registers


@triton.jit
def _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, channels, inside):
    """x + bias + residual in float32, zero where not `inside`: (BLOCK_M, BLOCK_N)."""
    x = tl.load(x_rows + channels * stride_x, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_rows + channels * stride_residual, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    return x + bias + residual


@triton.jit
def _residual_layer_norm_kernel(
    x_ptr,
    bias_ptr,
    residual_ptr,
    weight_ptr,
    layer_norm_bias_ptr,
    out_ptr,
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

    # Three passes over the row. Where it fits in one block they read the same tile, which then stays in registers.
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

    for start in tl.static_range(0, HIDDEN_SIZE, BLOCK_N):
        channels = start + block
        inside = (rows < num_rows) & (channels < HIDDEN_SIZE)
        hidden = _hidden(x_rows, bias_ptr, residual_rows, stride_x, stride_residual, channels, inside)
        weight = tl.load(weight_ptr + channels, mask=channels < HIDDEN_SIZE, other=0.0).to(tl.float32)
        bias = tl.load(layer_norm_bias_ptr + channels, mask=channels < HIDDEN_SIZE, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * HIDDEN_SIZE + channels, (hidden - mean) * rstd * weight + bias, mask=inside)


def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + bias + residual) over the last dimension, computed in float32.

    Args:
        x, residual: (..., hidden_size), float32, float16 or bfloat16, any strides.
        bias, weight, layer_norm_bias: (hidden_size,), x's dtype.
        eps: added to the variance.
        dropout_p: 0.
        out: where the result goes; may be x or residual.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: dropout_p is not 0.
    """
    if dropout_p > 0:
        raise ValueError(f"residual_layer_norm: dropout_p is {dropout_p}, the Triton kernel has no dropout")
    out = x.new_empty(x.shape) if out is None else out
    if out.numel() == 0:
        return out
    hidden_size = x.shape[-1]
    x, residual = x.reshape(-1, hidden_size), residual.reshape(-1, hidden_size)
    block_n = min(triton.next_power_of_2(hidden_size), _MAX_BLOCK_N)
    block_m = max(1, _TILE // block_n)
    with torch.cuda.device_of(x):
        _residual_layer_norm_kernel[(triton.cdiv(x.shape[0], block_m),)](
            x,
            bias.contiguous(),
            residual,
            weight.contiguous(),
            layer_norm_bias.contiguous(),
            out,
            x.shape[0],
            *x.stride(),
            *residual.stride(),
            eps,
            HIDDEN_SIZE=hidden_size,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=8 if block_n > 2048 else 4,
        )
    return out
