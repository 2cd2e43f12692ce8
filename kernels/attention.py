"""Attention within sequences in Triton: FlashAttention's online softmax (Dao et al., 2022, arXiv:2205.14135).

Each program holds a tile of one sequence's queries, for one head, and walks over that sequence's keys.
"""

# mypy: allow-untyped-defs

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
# Start of the running maximum: finite, so that exp2(-inf - maximum) is 0 in a block where every key is hidden.
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _attend_to_block(acc, row_sum, row_max, q, k_block, v_block, keep, in_head, scale_log2, MASKED: tl.constexpr):
    """Fold one block of keys into the running softmax.

    acc (BLOCK_M, BLOCK_D), row_sum and row_max (BLOCK_M,): float32, relative to 2^row_max. k_block, v_block:
    (BLOCK_N, BLOCK_D) pointers. keep (BLOCK_N,): the keys that there are, looked at only when MASKED. A key that is
    not kept is never read.
    """
    inside = keep[:, None] & in_head if MASKED else in_head
    k = tl.load(k_block, mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
    if MASKED:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    probabilities = tl.exp2(scores - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    v = tl.load(v_block, mask=inside, other=0.0)
    acc = tl.dot(probabilities.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return acc, row_sum * rescale + tl.sum(probabilities, axis=1), new_max


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    cu_seqlens_ptr,
    attention_mask_ptr,
    num_tokens,
    num_tiles,
    scale_log2,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_q,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_k,
    stride_v_batch,
    stride_v_token,
    stride_v_head,
    stride_v,
    RAGGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    batch = (tl.program_id(0) // num_tiles).to(tl.int64)
    first_query = tl.program_id(0) % num_tiles * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    if RAGGED:
        # Clamped, so that offsets past the tokens read and write nothing that is not there.
        start = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + batch), 0), num_tokens)
        seq_len = tl.minimum(tl.load(cu_seqlens_ptr + batch + 1), num_tokens) - start
        start = start.to(tl.int64)
    else:
        start = batch * 0
        seq_len = num_tokens
    if first_query >= seq_len:
        return

    queries = first_query + tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    channels = tl.arange(0, BLOCK_D).to(tl.int64)[None, :]
    in_head = channels < HEAD_DIM
    is_query = queries < seq_len
    q_rows = q_ptr + batch * stride_q_batch + head * stride_q_head + (start + queries)[:, None] * stride_q_token
    q = tl.load(q_rows + channels * stride_q, mask=is_query[:, None] & in_head, other=0.0)
    k_columns = k_ptr + batch * stride_k_batch + head * stride_k_head + start * stride_k_token + channels * stride_k
    v_columns = v_ptr + batch * stride_v_batch + head * stride_v_head + start * stride_v_token + channels * stride_v

    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    row_max = tl.full((BLOCK_M,), _LOWEST, tl.float32)
    full = 0 if HAS_MASK else seq_len // BLOCK_N * BLOCK_N
    for first_key in range(0, full, BLOCK_N):
        rows = (first_key + keys).to(tl.int64)[:, None]
        k_block, v_block = k_columns + rows * stride_k_token, v_columns + rows * stride_v_token
        acc, row_sum, row_max = _attend_to_block(
            acc, row_sum, row_max, q, k_block, v_block, keys, in_head, scale_log2, MASKED=False
        )
    for first_key in range(full, seq_len, BLOCK_N):  # every block with a mask, at most one without
        rows = (first_key + keys).to(tl.int64)[:, None]
        k_block, v_block = k_columns + rows * stride_k_token, v_columns + rows * stride_v_token
        keep = first_key + keys < seq_len
        if HAS_MASK:
            keep &= tl.load(attention_mask_ptr + batch * num_tokens + first_key + keys, mask=keep, other=0) != 0
        acc, row_sum, row_max = _attend_to_block(
            acc, row_sum, row_max, q, k_block, v_block, keep, in_head, scale_log2, MASKED=True
        )

    if HAS_MASK:
        visible = tl.load(attention_mask_ptr + batch * num_tokens + queries, mask=is_query, other=0) != 0
        acc = tl.where(visible[:, None], acc, 0.0)
        row_sum = tl.where(visible, row_sum, 1.0)
    out_tokens = (start + queries if RAGGED else batch * num_tokens + queries)[:, None]
    out_rows = out_ptr + (out_tokens * tl.num_programs(1) + head) * HEAD_DIM
    tl.store(out_rows + channels, acc / row_sum[:, None], mask=is_query[:, None] & in_head)


@functools.cache
def _has_matrix_units(device: torch.device) -> bool:
    """Whether `tl.dot` has an instruction for 16-bit tiles there; Triton multiplies element by element below sm_80."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _config(head_dim: int, max_seqlen: int, matrix_units: bool) -> dict[str, int]:
    """Tile sizes, warps and pipeline stages: the largest tiles that every GPU keeps in registers, without spilling.

    With matrix units, 128 queries a program where sequences are longer than 64 tokens, so that keys and values are
    read half as often. Without them (float32 in IEEE precision has none) the operands are in registers too.
    """
    block_d = max(16, triton.next_power_of_2(head_dim))
    if matrix_units:
        if block_d <= 64:
            sizes = (64, 64, 4, 2) if max_seqlen <= 64 else (128, 64, 8, 3)
        else:
            sizes = (64, 64 if block_d == 128 else 32, 8, 2)
    else:
        sizes = (32, 32, 4 if block_d <= 64 else 8, 1) if block_d <= 128 else (16, 16, 4, 1)
    return {"BLOCK_D": block_d, **dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), sizes, strict=True))}


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v within each sequence, with float32 softmax and sums.

    Args:
        q, k, v: ragged (num_tokens, heads, head_dim) with `cu_seqlens`, or padded (batch_size, seq_len, heads,
            head_dim); float32, float16 or bfloat16, any strides, head_dim up to 256.
        cu_seqlens: (batch_size + 1,) int32: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; rows past it are left unwritten.
        attention_mask: (batch_size, seq_len) bool, True for the tokens there are; padded form only.
        scale: factor of the scores.
        dropout_p: 0.
        out: where the result goes; shares no memory with q, k and v.

    Returns:
        The shape of q, contiguous, in q's dtype. Positions that the mask hides are zeros.

    Raises:
        ValueError: dropout_p is not 0.
    """
    if dropout_p > 0:
        raise ValueError(f"attention: dropout_p is {dropout_p}, the Triton kernel has no dropout")
    out = q.new_empty(q.shape) if out is None else out
    *_, num_tokens, heads, head_dim = q.shape
    batch_size = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    config = _config(head_dim, max_seqlen, q.dtype != torch.float32 and _has_matrix_units(q.device))
    num_tiles = triton.cdiv(max_seqlen, config["BLOCK_M"])
    if out.numel() == 0 or batch_size * num_tiles == 0:
        return out
    strides = [s for t in (q, k, v) for s in (t.stride() if cu_seqlens is None else (0, *t.stride()))]
    with torch.cuda.device_of(q):
        _attention_kernel[(batch_size * num_tiles, heads)](
            q,
            k,
            v,
            out,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            None if attention_mask is None else attention_mask.contiguous(),
            num_tokens,
            num_tiles,
            scale * _LOG2_E,
            *strides,
            RAGGED=cu_seqlens is not None,
            HAS_MASK=attention_mask is not None,
            HEAD_DIM=head_dim,
            **config,
        )
    return out
