"""Attention within sequences in Triton (FlashAttention: Dao et al., 2022, arXiv:2205.14135).

Each program holds a tile of one sequence's queries, for one head. Where the scores of a tile fit in registers it takes
its softmax over whole rows at once; else it walks over blocks of keys, with the online softmax.
"""

# mypy: allow-untyped-defs

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.attention_schedule import attention_schedule, grid, place
from bert_fast.kernels.dropout import dropout_arguments, kept

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Start of a running maximum: finite, so that exp2(-inf - maximum) is 0 in a block where every key is hidden.
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def pointers(base, rows, stride_row, columns, stride_column):
    """(rows, columns) pointers into a matrix at `base`, with 64-bit offsets."""
    return base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def scores_of(q, k, bias_tile, is_query, is_key, scale_log2):
    """(queries, keys) float32, and the factor that exp2 wants them multiplied by.

    Without a bias they are the bare products: scaling is part of the one multiply-add before exp2.
    """
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    factor = scale_log2
    if bias_tile is not None:
        bias = tl.load(bias_tile, mask=is_query[:, None] & is_key[None, :], other=0.0).to(tl.float32)
        scores = scores * scale_log2 + bias * LOG2_E
        factor = 1.0
    return scores, factor


@triton.jit
def dropped(probabilities, dropout, queries, first_key):
    """(queries, keys) float32 with zeros where `dropout` does not keep; not scaled up, and as they are without it.

    dropout: None, or (seed, threshold, index of the sequence's first token, head). first_key: a multiple of 16.
    """
    if dropout is not None:
        rows = (dropout[2] + queries)[:, None]
        keep = kept(dropout[0], dropout[1], rows, first_key, dropout[3], probabilities.shape[1])
        probabilities = tl.where(keep, probabilities, 0.0)
    return probabilities


@triton.jit
def _whole_row(
    q_ptr,
    k_ptr,
    v_ptr,
    strides,
    queries,
    seq_len,
    scale_log2,
    mask_ptr,
    bias_ptr,
    dropout,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """For the queries of a sequence of at most BLOCK_N keys: sums of values, maxima, and sums of exponentials.

    The sums are relative to 2^maximum; those of values are of the keys that `dropout` keeps, if it is given.
    One maximum and one exponential of each score, nothing to rescale. All pointers are at the sequence's first token.
    """
    q_strides, k_strides, v_strides, bias_strides = strides
    channels, keys = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_head, is_query, is_key = (channels < HEAD_DIM)[None, :], queries < seq_len, keys < seq_len
    if mask_ptr is not None:
        is_key &= tl.load(mask_ptr + keys, mask=is_key, other=0) != 0
    inside = is_key[:, None] & in_head
    k = tl.load(pointers(k_ptr, keys, k_strides[0], channels, k_strides[1]), mask=inside, other=0.0)
    v = tl.load(pointers(v_ptr, keys, v_strides[0], channels, v_strides[1]), mask=inside, other=0.0)
    q_tile = pointers(q_ptr, queries, q_strides[0], channels, q_strides[1])
    q = tl.load(q_tile, mask=is_query[:, None] & in_head, other=0.0) * SIGN
    bias_tile = None if bias_ptr is None else pointers(bias_ptr, queries, bias_strides[0], keys, bias_strides[1])
    scores, factor = scores_of(q, k, bias_tile, is_query, is_key, scale_log2)
    if mask_ptr is not None or seq_len < BLOCK_N:
        scores = tl.where(is_key[None, :], scores, float("-inf"))
    row_max = tl.maximum(tl.max(scores, axis=1) * factor, LOWEST)
    probabilities = tl.exp2(tl.fma(scores, factor, -row_max[:, None]))
    weights = dropped(probabilities, dropout, queries, 0)
    return tl.dot(weights.to(v.dtype), v, input_precision="ieee"), row_max, tl.sum(probabilities, axis=1)


@triton.jit
def _online(
    q_ptr,
    k_ptr,
    v_ptr,
    strides,
    queries,
    seq_len,
    scale_log2,
    mask_ptr,
    bias_ptr,
    dropout,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `_whole_row`, for any number of keys: the sums so far are relative to 2^row_max."""
    q_strides, k_strides, v_strides, bias_strides = strides
    channels, block = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    in_head, is_query = (channels < HEAD_DIM)[None, :], queries < seq_len
    q_tile = pointers(q_ptr, queries, q_strides[0], channels, q_strides[1])
    q = tl.load(q_tile, mask=is_query[:, None] & in_head, other=0.0) * SIGN
    k_tile = pointers(k_ptr, block, k_strides[0], channels, k_strides[1])
    v_tile = pointers(v_ptr, block, v_strides[0], channels, v_strides[1])
    bias_tile = None if bias_ptr is None else pointers(bias_ptr, queries, bias_strides[0], block, bias_strides[1])
    acc = tl.zeros(q.shape, tl.float32)
    row_sum = tl.zeros(queries.shape, tl.float32)
    row_max = tl.full(queries.shape, LOWEST, tl.float32)
    for first_key in range(0, seq_len, BLOCK_N):
        first_row = tl.full((), first_key, tl.int64)
        is_key = first_key + block < seq_len
        if mask_ptr is not None:
            is_key &= tl.load(mask_ptr + first_key + block, mask=is_key, other=0) != 0
        k = tl.load(k_tile + first_row * k_strides[0], mask=is_key[:, None] & in_head, other=0.0)
        bias_block = None if bias_tile is None else bias_tile + first_row * bias_strides[1]
        scores, factor = scores_of(q, k, bias_block, is_query, is_key, scale_log2)
        if mask_ptr is not None or first_key + BLOCK_N > seq_len:
            scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1) * factor)
        probabilities = tl.exp2(tl.fma(scores, factor, -new_max[:, None]))
        rescale = tl.exp2(row_max - new_max)
        v = tl.load(v_tile + first_row * v_strides[0], mask=is_key[:, None] & in_head, other=0.0)
        weights = dropped(probabilities, dropout, queries, first_key)
        acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        row_sum = row_sum * rescale + tl.sum(probabilities, axis=1)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_tokens", "num_tiles", "max_seqlen", "seed", "threshold"])
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    schedule_ptr,
    mask_ptr,
    bias_ptr,
    num_tokens,
    num_tiles,
    max_seqlen,
    heads,
    scale_log2,
    seed,
    threshold,
    kept_scale,
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
    stride_bias_head,
    stride_bias_query,
    stride_bias_key,
    SIGN: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE_ROW: tl.constexpr,
):
    # The heads of a tile are neighbours in memory: programs side by side take them.
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch, start, token, seq_len, first_query = place(
        cu_seqlens_ptr, schedule_ptr, tile, num_tokens, num_tiles, max_seqlen, BLOCK_M
    )
    if first_query >= seq_len:
        return

    q_ptr += batch * stride_q_batch + head * stride_q_head + start * stride_q_token
    k_ptr += batch * stride_k_batch + head * stride_k_head + start * stride_k_token
    v_ptr += batch * stride_v_batch + head * stride_v_head + start * stride_v_token
    if mask_ptr is not None:
        mask_ptr += batch * num_tokens
    if bias_ptr is not None:
        bias_ptr += head * stride_bias_head
    queries = first_query + tl.arange(0, BLOCK_M)
    strides = (
        (stride_q_token, stride_q),
        (stride_k_token, stride_k),
        (stride_v_token, stride_v),
        (stride_bias_query, stride_bias_key),
    )
    args = (q_ptr, k_ptr, v_ptr, strides, queries, seq_len, scale_log2, mask_ptr, bias_ptr)
    dropout = None if threshold is None else (seed, threshold, token, head)
    if not WHOLE_ROW:
        acc, row_max, row_sum = _online(*args, dropout, SIGN, HEAD_DIM, BLOCK_D, BLOCK_N)
    elif seq_len <= BLOCK_N // 2:  # a short sequence among longer ones: half the products and exponentials
        acc, row_max, row_sum = _whole_row(*args, dropout, SIGN, HEAD_DIM, BLOCK_D, BLOCK_N // 2)
    else:
        acc, row_max, row_sum = _whole_row(*args, dropout, SIGN, HEAD_DIM, BLOCK_D, BLOCK_N)

    is_query = queries < seq_len
    if mask_ptr is not None:
        visible = tl.load(mask_ptr + queries, mask=is_query, other=0) != 0
        acc = tl.where(visible[:, None], acc, 0.0)
        row_max = tl.where(visible, row_max, 0.0)
        row_sum = tl.where(visible, row_sum, 1.0)
    if lse_ptr is not None:
        lse_rows = lse_ptr + (token + queries) * heads + head
        tl.store(lse_rows, (row_max + tl.log2(row_sum)) * LN_2, mask=is_query)
    channels = tl.arange(0, BLOCK_D)
    normalizer = 1.0 / row_sum if threshold is None else kept_scale / row_sum
    out_tile = pointers(out_ptr + (token * heads + head) * HEAD_DIM, queries, heads * HEAD_DIM, channels, 1)
    tl.store(out_tile, acc * normalizer[:, None], mask=is_query[:, None] & (channels < HEAD_DIM)[None, :])


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """Whether `tl.dot` has an instruction for 16-bit tiles there; Triton multiplies element by element below sm_80."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def config(q: Tensor, max_seqlen: int) -> dict[str, Any]:
    """Tile sizes, form of the softmax, warps and pipeline stages for q (..., head_dim)."""
    block_d = max(16, triton.next_power_of_2(q.shape[-1]))
    if q.dtype != torch.float32 and has_matrix_units(q.device):
        sizes = _matrix_config(block_d, max_seqlen)
    else:  # products element by element, their operands in registers: small tiles, many warps
        sizes = ({64: 64, 256: 16}.get(block_d, 32), 32, False, 8, 1)
    names = ("BLOCK_M", "BLOCK_N", "WHOLE_ROW", "num_warps", "num_stages")
    return {"BLOCK_D": block_d, **dict(zip(names, sizes, strict=True))}


def _matrix_config(block_d: int, max_seqlen: int) -> tuple[int, int, bool, int, int]:
    """The largest tiles that every GPU from sm_80 keeps in registers and in 99 KiB of shared memory.

    A multiprocessor of an H200 takes, at head_dim 64, L^2 / 16 cycles for the products of a sequence of L tokens and
    as many for its exponentials, but 28 L for its 512 bytes a token from memory, which is more below L = 450. So short
    sequences have small programs, four to a multiprocessor (at most 128 registers a thread): some load while others
    compute. For long ones what counts is that 128 queries read each key and value half as often as 64 do.
    """
    if max_seqlen <= 64 and block_d <= 128:
        return 64, 64, True, 4, 1
    if max_seqlen <= 128 and block_d <= 64:
        return 64, 128, True, 4, 1
    if block_d <= 64:
        return 128, 64, False, 8, 3
    return 128 if block_d == 128 else 64, 32, False, 8, 2


def positive_scale(scale: float) -> tuple[int, float]:
    """A sign for q, and a positive factor of the scores, whose maximum can be taken before they are scaled."""
    return (scale > 0) - (scale < 0), abs(scale) or 1.0


def schedule(q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor | None:
    """What `attention` takes as `schedule` for every q, k and v of this shape and dtype; None where none can pay.

    It can pay where sequences may have several tiles and differ: then programs without work are not started, and the
    longest sequences go first. It costs one launch.
    """
    block_m, batch_size = config(q, max_seqlen)["BLOCK_M"], cu_seqlens.shape[0] - 1
    if batch_size <= 1 or max_seqlen <= block_m or q.shape[0] >= batch_size * max_seqlen:
        return None
    return attention_schedule(cu_seqlens, q.shape[0], max_seqlen, block_m)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
    schedule: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T * scale + bias) v within each sequence, with float32 softmax and sums.

    Args:
        q, k, v: ragged (num_tokens, heads, head_dim) with `cu_seqlens`, or padded (batch_size, seq_len, heads,
            head_dim); float32, float16 or bfloat16, any strides, head_dim up to 256.
        cu_seqlens: (batch_size + 1,) int32: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; the result of a longer one is undefined.
        attention_mask: (batch_size, seq_len) bool, True for the tokens there are; padded form only.
        scale: factor of the scores.
        dropout_p: 0; `attention_train` has dropout.
        bias: (heads, at least max_seqlen, at least max_seqlen), any strides: added to the scaled scores of query i
            and key j of a sequence.
        schedule: what the function of that name gave for this shape; the result is the same without.
        out: where the result goes; shares no memory with q, k and v.

    Returns:
        The shape of q, contiguous, in q's dtype. Positions that the mask hides are zeros; rows that belong to no
        sequence are undefined.

    Raises:
        ValueError: dropout_p is not 0, or bias or schedule have the wrong shape.
    """
    if dropout_p > 0:
        raise ValueError(f"attention: dropout_p is {dropout_p}, expected 0; attention_train has dropout")
    out = q.new_empty(q.shape) if out is None else out
    _launch(
        q, k, v, cu_seqlens, max_seqlen, attention_mask, scale, bias, schedule, out, None, dropout_arguments(0.0, None)
    )
    return out


def attention_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention` with dropout of the probabilities, and what `attention_backward` needs beside its result.

    Args:
        dropout_p: probability of zeroing a probability, 0 to 1; the mask is that of bert_fast/ops/_dropout.py, with
            the query's token as row, the key's position in its sequence as column, and the head as plane.
        seed: int64 scalar on the CPU; None without dropout.

    Returns:
        out, as of `attention`; lse, float32 of shape q.shape[:-1]: the natural logarithm of each query's sum of
        exp(score), 0 where the mask hides the query, undefined for rows that belong to no sequence.

    Raises:
        ValueError: there is dropout but no seed, or bias or schedule have the wrong shape.
    """
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    dropout = dropout_arguments(dropout_p, seed)
    _launch(q, k, v, cu_seqlens, max_seqlen, attention_mask, scale, bias, schedule, out, lse, dropout)
    return out, lse


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    bias: Tensor | None,
    schedule: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    dropout: tuple[int | None, int | None, float],
) -> None:
    """Fill `out`, and `lse` if it is given; `dropout` is what `dropout_arguments` gave."""
    *_, num_tokens, heads, head_dim = q.shape
    if bias is not None and (bias.dim() != 3 or bias.shape[0] != heads or min(bias.shape[1:]) < max_seqlen):
        raise ValueError(
            f"attention: bias has shape {tuple(bias.shape)}, expected ({heads}, >= {max_seqlen}, >= {max_seqlen})"
        )
    sizes = config(q, max_seqlen)
    batch_size = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles, num_tiles = grid(schedule, batch_size, num_tokens, max_seqlen, sizes["BLOCK_M"])
    if out.numel() == 0 or tiles == 0:
        return
    sign, scale = positive_scale(scale)
    strides = [s for t in (q, k, v) for s in (t.stride() if cu_seqlens is None else (0, *t.stride()))]
    with torch.cuda.device_of(q):
        _attention_kernel[(tiles * heads,)](
            q,
            k,
            v,
            out,
            lse,
            None if cu_seqlens is None else cu_seqlens.contiguous(),
            schedule,
            None if attention_mask is None else attention_mask.contiguous(),
            bias,
            num_tokens,
            num_tiles,
            max_seqlen,
            heads,
            scale * LOG2_E.value,
            *dropout,
            *strides,
            *((0, 0, 0) if bias is None else bias.stride()),
            SIGN=sign,
            HEAD_DIM=head_dim,
            **sizes,
        )
