"""One vector per sequence in Triton: each program reduces a block of channels over the tokens of one sequence."""

# mypy: allow-untyped-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean")
CLS, MEAN, MAX, MEAN_SQRT_LEN, WEIGHTED_MEAN = (tl.constexpr(code) for code in range(len(MODES)))


@triton.jit(do_not_specialize=["num_tokens"])
def _pooling_kernel(
    hidden_ptr,
    cu_seqlens_ptr,
    out_ptr,
    num_tokens,
    hidden_size,
    stride_token,
    stride_channel,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_channels = channels < hidden_size
    # Clamped, so that offsets past the tokens read nothing that is not there.
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_tokens)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence + 1), start), num_tokens)
    seq_len = end - start
    num_read = tl.minimum(seq_len, 1) if MODE == CLS else seq_len

    columns = hidden_ptr + start.to(tl.int64) * stride_token + channels.to(tl.int64)[None, :] * stride_channel
    fill = float("-inf") if MODE == MAX else 0.0
    pooled = tl.full((BLOCK_T, BLOCK_C), fill, tl.float32)
    for first in range(0, num_read, BLOCK_T):
        tokens = (first + tl.arange(0, BLOCK_T))[:, None]
        inside = (tokens < num_read) & in_channels[None, :]
        x = tl.load(columns + tokens.to(tl.int64) * stride_token, mask=inside, other=fill).to(tl.float32)
        if MODE == MAX:
            pooled = tl.maximum(pooled, x, propagate_nan=tl.PropagateNan.ALL)
        elif MODE == WEIGHTED_MEAN:
            pooled += x * (tokens + 1)
        else:
            pooled += x

    if MODE == MAX:
        has_nan = tl.max((pooled != pooled).to(tl.int32), axis=0)  # tl.max passes over NaN, torch.amax does not
        out = tl.where(has_nan != 0, float("nan"), tl.max(pooled, axis=0))
        out = tl.where(seq_len > 0, out, 0.0)
    else:
        n = tl.maximum(seq_len, 1).to(tl.float32)
        if MODE == MEAN:
            divisor = n
        elif MODE == MEAN_SQRT_LEN:
            divisor = tl.sqrt_rn(n)
        elif MODE == WEIGHTED_MEAN:
            divisor = n * (n + 1.0) * 0.5
        else:
            divisor = 1.0
        out = tl.div_rn(tl.sum(pooled, axis=0), divisor)
    tl.store(out_ptr + sequence * hidden_size + channels, out, mask=in_channels)


def pooling(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """One vector per sequence, reduced in float32.

    Args:
        hidden: (num_tokens, hidden_size), float32, float16 or bfloat16, any strides.
        cu_seqlens: (batch_size + 1,) int32 on the same device.
        mode: "cls", "mean", "max", "mean_sqrt_len_tokens" or "weightedmean".

    Returns:
        (batch_size, hidden_size) in hidden's dtype; zeros for a sequence without tokens.
    """
    num_tokens, hidden_size = hidden.shape
    batch_size = cu_seqlens.shape[0] - 1
    out = hidden.new_empty((batch_size, hidden_size))
    if out.numel() == 0:
        return out
    # A program has 128 rows of 64 channels in flight, so that a text of 512 tokens is read in four waits, and one text
    # still goes to a dozen programs.
    block_c = 64
    with torch.cuda.device_of(hidden):
        _pooling_kernel[(batch_size, triton.cdiv(hidden_size, block_c))](
            hidden,
            cu_seqlens.contiguous(),
            out,
            num_tokens,
            hidden_size,
            *hidden.stride(),
            MODE=MODES.index(mode),
            BLOCK_T=128,
            BLOCK_C=block_c,
        )
    return out
