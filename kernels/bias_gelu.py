"""gelu(x + bias) in Triton: tiles of rows and features, or whole rows where the result is quantised."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.quantize import check_codes
from bert_fast.kernels.rows import blocks, store_codes

_TILE = 4096  # elements a program; 32 for each of its 128 threads


@triton.jit
def normal_tail(t):
    """Phi(-|t|), or Phi(-6) where that is less: 2 to a minimax polynomial. The error is at most 7e-7.

    It takes less than half the instructions of erf, with which arithmetic and not memory would limit a pass over 16-bit
    values.
    """
    u = tl.minimum(tl.abs(t), 6.0)
    log2_tail = 3.290431050118059e-05
    log2_tail = log2_tail * u - 0.0007621495169587433
    log2_tail = log2_tail * u + 0.008038800209760666
    log2_tail = log2_tail * u - 0.05331532284617424
    log2_tail = log2_tail * u - 0.458871454000473
    log2_tail = log2_tail * u - 1.1511567831039429
    log2_tail = log2_tail * u - 0.9999995827674866
    return tl.exp2(log2_tail)


@triton.jit
def gelu(t, TANH: tl.constexpr, ROUNDED: tl.constexpr):
    """gelu of float32 t, in float32; `ROUNDED` says that the result is going to be rounded to a 16-bit dtype."""
    if TANH:
        # 0.5 t (1 + tanh(u)) = t / (1 + 2^(-2 log2(e) u)), u = sqrt(2 / pi) (t + 0.044715 t^3)
        return t / (1.0 + tl.exp2(-2.302208198144325 * (t + 0.044715 * t * t * t)))
    elif ROUNDED:
        # t Phi(t) = max(t, 0) - |t| Phi(-|t|). The error is at most 1.2e-7, and relative to the result below zero 6e-5
        # to -4 and 1e-3 to -6.
        return tl.maximum(t, 0.0, propagate_nan=tl.PropagateNan.ALL) - tl.minimum(tl.abs(t), 6.0) * normal_tail(t)
    else:
        return t * (0.5 + 0.5 * tl.erf(t * 0.7071067811865476))  # t / sqrt(2)


@triton.jit
def _gelu_of_sum(x_rows, bias_ptr, stride_feature, features, num_features, in_rows, TANH: tl.constexpr):
    """gelu(x + bias) in float32 where there are rows and features: (BLOCK_M, BLOCK_N)."""
    inside = in_rows & (features < num_features)
    x = tl.load(x_rows + features.to(tl.int64) * stride_feature, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + features, mask=features < num_features, other=0.0)
    return gelu(x.to(tl.float32) + bias.to(tl.float32), TANH, x.dtype != tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    stride_row,
    stride_feature,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    features = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    out = _gelu_of_sum(x_ptr + rows * stride_row, bias_ptr, stride_feature, features, num_features, in_rows, TANH)
    tl.store(out_ptr + rows * num_features + features, out, mask=in_rows & (features < num_features))


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_bias_gelu_kernel(
    x_ptr,
    bias_ptr,
    out_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    stride_row,
    stride_feature,
    NUM_FEATURES: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    x_rows = x_ptr + rows * stride_row
    block = tl.arange(0, BLOCK_N)[None, :]
    parts = ()
    for start in tl.static_range(0, NUM_FEATURES, BLOCK_N):
        out = _gelu_of_sum(x_rows, bias_ptr, stride_feature, start + block, NUM_FEATURES, in_rows, TANH)
        parts = parts + (out,)
    store_codes(parts, codes_ptr, scales_ptr, rows, in_rows, block, NUM_FEATURES, BLOCK_N)
    if out_ptr is not None:
        for start in tl.static_range(0, NUM_FEATURES, BLOCK_N):
            features = start + block
            out_rows = out_ptr + rows * NUM_FEATURES
            tl.store(out_rows + features, parts[start // BLOCK_N], mask=in_rows & (features < NUM_FEATURES))


def bias_gelu(
    x: Tensor,
    bias: Tensor,
    approximate: str,
    out: Tensor | None = None,
    codes: Tensor | None = None,
    scales: Tensor | None = None,
) -> Tensor:
    """gelu(x + bias), computed in float32.

    Args:
        x: (..., features), float32, float16 or bfloat16, any strides.
        bias: (features,), x's dtype.
        approximate: "none" (erf) or "tanh".
        out: where the result goes; may be x.
        codes, scales: if given, the result goes there, quantised as `quantize_rows` does, and to `out` only if that is
            given too: contiguous float8_e4m3fn of x's shape, and float32 (rows, 1).

    Returns:
        A contiguous tensor of x's shape and dtype, or the codes where they are all that was asked for.

    Raises:
        ValueError: codes or scales is not such a tensor.
    """
    num_features = x.shape[-1]
    rows = x.reshape(-1, num_features) if x.numel() else x
    if codes is not None:
        check_codes("bias_gelu", x, codes, scales)
        if x.numel() == 0:
            return codes if out is None else out
        shape = blocks(rows.shape[0], num_features)
        with torch.cuda.device_of(x):
            _quantized_bias_gelu_kernel[(triton.cdiv(rows.shape[0], shape["BLOCK_M"]),)](
                rows,
                bias.contiguous(),
                out,
                codes,
                scales,
                rows.shape[0],
                *rows.stride(),
                NUM_FEATURES=num_features,
                TANH=approximate == "tanh",
                **shape,
            )
        return codes if out is None else out
    out = x.new_empty(x.shape) if out is None else out
    if out.numel() == 0:
        return out
    block_n = min(triton.next_power_of_2(num_features), 1024)
    block_m = _TILE // block_n
    grid = (triton.cdiv(rows.shape[0], block_m), triton.cdiv(num_features, block_n))
    with torch.cuda.device_of(x):
        _bias_gelu_kernel[grid](
            rows,
            bias.contiguous(),
            out,
            rows.shape[0],
            num_features,
            *rows.stride(),
            TANH=approximate == "tanh",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return out
