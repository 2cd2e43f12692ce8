"""The gradient of one vector per sequence in Triton: each program has a block of channels of one sequence's tokens."""

# mypy: allow-untyped-defs, disable-error-code=assignment

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.pooling import CLS, MAX, MEAN, MEAN_SQRT_LEN, MODES, WEIGHTED_MEAN


@triton.jit(do_not_specialize=["batch_size", "num_tokens"])
def _pooling_backward_kernel(
    grad_ptr,
    hidden_ptr,
    cu_seqlens_ptr,
    dhidden_ptr,
    batch_size,
    num_tokens,
    hidden_size,
    stride_sequence,
    stride_grad,
    stride_token,
    stride_channel,
    MODE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    in_batch = sequence < batch_size  # the rows after the last sequence's are one more, with zeros
    channels = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)[None, :]
    in_channels = channels < hidden_size
    # Clamped, so that offsets past the tokens reach nothing that is not there.
    start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + sequence), 0), num_tokens)
    end = tl.where(in_batch, tl.load(cu_seqlens_ptr + tl.minimum(sequence + 1, batch_size)), num_tokens)
    end = tl.minimum(tl.maximum(end, start), num_tokens)
    seq_len = end - start

    grad_at = grad_ptr + sequence * stride_sequence + channels * stride_grad
    share = tl.load(grad_at, mask=channels < tl.where(in_batch, hidden_size, 0), other=0.0).to(tl.float32)
    x_at = hidden_ptr + start.to(tl.int64) * stride_token + channels * stride_channel
    n = tl.maximum(seq_len, 1).to(tl.float32)
    if MODE == MAX:
        num_read = tl.where(in_batch, seq_len, 0)
        largest = tl.full((BLOCK_T, BLOCK_C), float("-inf"), tl.float32)
        for first in range(0, num_read, BLOCK_T):
            tokens = (first + tl.arange(0, BLOCK_T))[:, None]
            inside = (tokens < num_read) & in_channels
            x = tl.load(x_at + tokens.to(tl.int64) * stride_token, mask=inside, other=float("-inf")).to(tl.float32)
            largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
        has_nan = tl.max((largest != largest).to(tl.int32), axis=0, keep_dims=True)
        largest = tl.where(has_nan != 0, float("nan"), tl.max(largest, axis=0, keep_dims=True))
        ties = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for first in range(0, num_read, BLOCK_T):
            tokens = (first + tl.arange(0, BLOCK_T))[:, None]
            inside = (tokens < num_read) & in_channels
            x = tl.load(x_at + tokens.to(tl.int64) * stride_token, mask=inside, other=0.0).to(tl.float32)
            ties += tl.where(inside & (x == largest), 1.0, 0.0)
        divisor = tl.where(in_batch, tl.sum(ties, axis=0, keep_dims=True), 1.0)
    elif MODE == MEAN:
        share = tl.div_rn(share, n)
    elif MODE == MEAN_SQRT_LEN:
        share = tl.div_rn(share, tl.sqrt_rn(n))
    elif MODE == WEIGHTED_MEAN:
        share = tl.div_rn(share, n * (n + 1.0) * 0.5)

    for first in range(0, seq_len, BLOCK_T):
        tokens = (first + tl.arange(0, BLOCK_T))[:, None]
        inside = (tokens < seq_len) & in_channels
        if MODE == CLS:
            dhidden = tl.where(tokens == 0, share, 0.0)
        elif MODE == MAX:
            # 0 / 0 where the sequence has NaN, which nothing is equal to
            in_sequence = (tokens < num_read) & in_channels
            x = tl.load(x_at + tokens.to(tl.int64) * stride_token, mask=in_sequence, other=0.0).to(tl.float32)
            dhidden = tl.div_rn(share * (x == largest).to(tl.float32), tl.broadcast_to(divisor, (BLOCK_T, BLOCK_C)))
        elif MODE == WEIGHTED_MEAN:
            dhidden = share * (tokens + 1)
        else:
            dhidden = tl.broadcast_to(share, (BLOCK_T, BLOCK_C))
        dhidden_at = dhidden_ptr + (start + tokens).to(tl.int64) * hidden_size + channels
        tl.store(dhidden_at, dhidden, mask=inside)


def pooling_backward(grad: Tensor, hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """The gradient of `pooling`'s result by its tokens, computed in float32.

    Args:
        grad: (batch_size, hidden_size), the gradient of the result, any strides.
        hidden: (num_tokens, hidden_size), the forward's, any strides; only "max" reads it.
        cu_seqlens: (batch_size + 1,) int32 on the same device.
        mode: as of `pooling`. Of "max", all tokens that have the maximum get the same share, as of `torch.amax`.

    Returns:
        hidden's shape and dtype, contiguous; zeros in the rows from cu_seqlens[-1] on.
    """
    dhidden = hidden.new_empty(hidden.shape)
    if dhidden.numel() == 0:
        return dhidden
    (num_tokens, hidden_size), batch_size = hidden.shape, grad.shape[0]
    block_c = 64
    with torch.cuda.device_of(hidden):
        _pooling_backward_kernel[(batch_size + 1, triton.cdiv(hidden_size, block_c))](
            grad,
            hidden,
            cu_seqlens.contiguous(),
            dhidden,
            batch_size,
            num_tokens,
            hidden_size,
            *grad.stride(),
            *hidden.stride(),
            MODE=MODES.index(mode),
            BLOCK_T=128,
            BLOCK_C=block_c,
        )
    return dhidden
