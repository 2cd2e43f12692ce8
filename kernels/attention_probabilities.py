"""The probabilities of attention, for those who want to look at them (attention itself never stores them)."""

# mypy: allow-untyped-defs

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.attention import LOG2_E, LOWEST, config, pointers, positive_scale, scores_of
from bert_fast.kernels.attention_schedule import bounds


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "max_seqlen"])
def _probabilities_kernel(
    q_ptr,
    k_ptr,
    out_ptr,
    cu_seqlens_ptr,
    bias_ptr,
    num_tokens,
    num_tiles,
    max_seqlen,
    scale_log2,
    stride_q_token,
    stride_q,
    stride_k_token,
    stride_k,
    stride_bias_query,
    stride_bias_key,
    stride_out_batch,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One head. Each program takes a tile of one sequence's queries, twice over the keys: sums, then probabilities."""
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    queries = tl.program_id(0) % num_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    start, seq_len = bounds(cu_seqlens_ptr + batch, 1, num_tokens, max_seqlen)
    channels, block = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_head, is_query = (channels < HEAD_DIM)[None, :], queries < seq_len
    q_tile = pointers(q_ptr + start * stride_q_token, queries, stride_q_token, channels, stride_q)
    q = tl.load(q_tile, mask=is_query[:, None] & in_head, other=0.0) * SIGN
    k_ptr += start * stride_k_token
    out_ptr += batch * stride_out_batch

    row_sum = tl.zeros(queries.shape, tl.float32)
    row_max = tl.full(queries.shape, LOWEST, tl.float32)
    for first_key in range(0, seq_len, BLOCK_N):
        keys = first_key + block
        is_key = keys < seq_len
        k = tl.load(
            pointers(k_ptr, keys, stride_k_token, channels, stride_k), mask=is_key[:, None] & in_head, other=0.0
        )
        bias = None if bias_ptr is None else pointers(bias_ptr, queries, stride_bias_query, keys, stride_bias_key)
        scores, factor = scores_of(q, k, bias, is_query, is_key, scale_log2)
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
        row_sum = row_sum * tl.exp2(row_max - new_max)
        row_sum += tl.sum(tl.exp2(tl.fma(scores, factor, -new_max[:, None])), axis=1)
        row_max = new_max
    normalizer = 1.0 / tl.where(is_query, row_sum, 1.0)
    for first_key in range(0, max_seqlen, BLOCK_N):  # past the sequence too: zeros
        keys = first_key + block
        is_key = keys < seq_len
        k = tl.load(
            pointers(k_ptr, keys, stride_k_token, channels, stride_k), mask=is_key[:, None] & in_head, other=0.0
        )
        bias = None if bias_ptr is None else pointers(bias_ptr, queries, stride_bias_query, keys, stride_bias_key)
        scores, factor = scores_of(q, k, bias, is_query, is_key, scale_log2)
        probabilities = tl.exp2(tl.fma(scores, factor, -row_max[:, None])) * normalizer[:, None]
        probabilities = tl.where(is_query[:, None] & is_key[None, :], probabilities, 0.0)
        inside = (queries < max_seqlen)[:, None] & (keys < max_seqlen)[None, :]
        tl.store(pointers(out_ptr, queries, max_seqlen, keys, 1), probabilities, mask=inside)


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    heads: Sequence[int],
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) of some heads, within each sequence, with float32 softmax and sums.

    Args:
        q, k: (num_tokens, heads, head_dim), float32, float16 or bfloat16, any strides, head_dim up to 256.
        cu_seqlens: (batch_size + 1,) int32: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; the result of a longer one is undefined.
        heads: which heads, each at least 0.
        scale: factor of the scores.
        bias: (heads, at least max_seqlen, at least max_seqlen), any strides.

    Returns:
        (batch_size, len(heads), max_seqlen, max_seqlen) in q's dtype: [i, j, query, key]; zeros past the sequence.
    """
    batch_size, head_dim = cu_seqlens.shape[0] - 1, q.shape[-1]
    out = q.new_empty((batch_size, len(heads), max_seqlen, max_seqlen))
    sizes = {**config(q, max_seqlen), "BLOCK_N": 32, "num_stages": 1}  # two loops, each with its operands in registers
    del sizes["WHOLE_ROW"]
    num_tiles = triton.cdiv(max_seqlen, sizes["BLOCK_M"])
    if out.numel() == 0:
        return out
    sign, scale = positive_scale(scale)
    cu_seqlens = cu_seqlens.contiguous()
    with torch.cuda.device_of(q):
        for index, head in enumerate(heads):  # a launch for each: few are looked at, and no index goes to the device
            _probabilities_kernel[(batch_size * num_tiles,)](
                q[:, head],
                k[:, head],
                out[:, index],
                cu_seqlens,
                None if bias is None else bias[head],
                q.shape[0],
                num_tiles,
                max_seqlen,
                scale * LOG2_E.value,
                q.stride(0),
                q.stride(2),
                k.stride(0),
                k.stride(2),
                *((0, 0) if bias is None else bias.stride()[1:]),
                out.stride(0),
                SIGN=sign,
                HEAD_DIM=head_dim,
                **sizes,
            )
    return out
