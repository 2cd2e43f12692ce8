"""The gradient of gelu(x + bias) in Triton: each program takes a block of features over its share of the rows.

The gradient of the bias is added up on the way, so x and what comes from above are read once.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.bias_gelu import normal_tail
from bert_fast.kernels.rows import sharing_programs, sum_of_programs

_BLOCK_M = 4  # rows of a tile; a thread has 8 features of each


@triton.jit
def gelu_derivative(t, TANH: tl.constexpr, ROUNDED: tl.constexpr):
    """The derivative of gelu at float32 t, in float32; `ROUNDED` as of `gelu`."""
    if TANH:
        # t s with s = 1 / (1 + e), e = exp(-2 u), u = sqrt(2 / pi) (t + 0.044715 t^3): s + t s (1 - s) 2 u'
        square = t * t
        e = tl.exp2(-2.302208198144325 * t * (1.0 + 0.044715 * square))
        s = 1.0 / (1.0 + e)
        rest = tl.where(t < 0, 1.0 - s, e * s)
        return s + t * s * rest * (1.5957691216057308 + 0.2140644488178072 * square)
    else:
        # Phi(t) + t phi(t), phi(t) = exp(-t^2 / 2) / sqrt(2 pi)
        if ROUNDED:
            tail = normal_tail(t)
            cumulative = tl.where(t < 0, tail, 1.0 - tail)
        else:
            cumulative = 0.5 + 0.5 * tl.erf(t * 0.7071067811865476)
        return cumulative + t * (0.3989422804014327 * tl.exp2(-0.7213475204444817 * t * t))


@triton.jit(do_not_specialize=["num_rows", "num_programs"])
def _bias_gelu_backward_kernel(
    grad_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,
    num_rows,
    num_features,
    num_programs,
    stride_grad_row,
    stride_grad,
    stride_x_row,
    stride_x,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    features = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]
    in_features = features < num_features
    bias = tl.load(bias_ptr + features, mask=in_features, other=0.0).to(tl.float32)
    dbias = tl.zeros((1, BLOCK_N), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_M), num_programs):
        rows = (tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        inside = (rows < num_rows) & in_features
        grad = tl.load(grad_ptr + rows * stride_grad_row + features * stride_grad, mask=inside, other=0.0)
        x = tl.load(x_ptr + rows * stride_x_row + features * stride_x, mask=inside, other=0.0)
        dx = grad.to(tl.float32) * gelu_derivative(x.to(tl.float32) + bias, TANH, x.dtype != tl.float32)
        tl.store(dx_ptr + rows * num_features + features, dx, mask=inside)
        dbias += tl.sum(dx, axis=0, keep_dims=True)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * num_features + features, dbias, mask=in_features)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of gelu(x + bias), computed in float32; the same bits every time.

    Args:
        grad: (..., features), the gradient of the result, any strides.
        x: shape of grad, float32, float16 or bfloat16, any strides.
        bias: (features,).
        approximate: "none" (erf) or "tanh".

    Returns:
        dx: contiguous, x's shape and dtype.
        dbias: (features,), bias's dtype; a sum in float32.
    """
    dx = x.new_empty(x.shape)
    if dx.numel() == 0:
        return dx, bias.new_zeros(bias.shape)
    num_features = x.shape[-1]
    grad, x = grad.reshape(-1, num_features), x.reshape(-1, num_features)
    # As many warps as there are 256 features in a block: each thread then has 8 in every row, and adds up its own.
    num_warps = 4 if num_features % 1024 == 0 else 2
    block_n = num_warps * 256
    num_programs = sharing_programs(triton.cdiv(x.shape[0], _BLOCK_M), x.device)
    sums = x.new_empty((num_programs, num_features), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _bias_gelu_backward_kernel[(num_programs, triton.cdiv(num_features, block_n))](
            grad,
            x,
            bias.contiguous(),
            dx,
            sums,
            x.shape[0],
            num_features,
            num_programs,
            *grad.stride(),
            *x.stride(),
            TANH=approximate == "tanh",
            BLOCK_M=_BLOCK_M,
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
    return dx, sum_of_programs(sums, bias.dtype)
