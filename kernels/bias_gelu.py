"""gelu(x + bias) in Triton: each program handles a tile of rows and features."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements a program; 32 for each of its 128 threads


@triton.jit
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
    features = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < num_rows) & (features < num_features)
    x = tl.load(x_ptr + rows * stride_row + features.to(tl.int64) * stride_feature, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + features, mask=features < num_features, other=0.0)
    t = x.to(tl.float32) + bias.to(tl.float32)
    if TANH:
        # 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2u)), u = sqrt(2 / pi) (t + 0.044715 t^3)
        gate = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * (t + 0.044715 * t * t * t)))
    else:
        gate = 0.5 + 0.5 * tl.erf(t * 0.7071067811865476)  # t / sqrt(2)
    tl.store(out_ptr + rows * num_features + features, t * gate, mask=inside)


def bias_gelu(x: Tensor, bias: Tensor, approximate: str, out: Tensor | None = None) -> Tensor:
    """gelu(x + bias), computed in float32.

    Args:
        x: (..., features), float32, float16 or bfloat16, any strides.
        bias: (features,), x's dtype.
        approximate: "none" (erf) or "tanh".
        out: where the result goes; may be x.

    Returns:
        A contiguous tensor of x's shape and dtype.
    """
    out = x.new_empty(x.shape) if out is None else out
    if out.numel() == 0:
        return out
    num_features = x.shape[-1]
    rows = x.reshape(-1, num_features)
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
            rows.stride(0),
            rows.stride(1),
            TANH=approximate == "tanh",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return out
