"""Gradients of attention in Triton (FlashAttention-2: Dao, 2023, arXiv:2307.08691), without atomics.

With P the probabilities, D dropout's factors (0, or one over the probability of being kept) and out = (P * D) v:

    dv = (P * D)^T grad
    dS = P * ((grad v^T) * D - delta), where delta is the sum of grad * out over the channels of a query
    dq = scale dS k
    dk = scale dS^T q

P is made again from the scores and their logarithm of sums, D from the seed. A first kernel walks over the keys of a
tile of queries, for dq and delta; a second one over the queries of a tile of keys, for dk and dv. Where a tile holds a
whole sequence's keys the second one makes dq too, and is the only one.
"""

# mypy: allow-untyped-defs

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import attention
from bert_fast.kernels.attention import LOG2_E, pointers
from bert_fast.kernels.attention_schedule import grid, place
from bert_fast.kernels.dropout import dropout_arguments, kept

#: Programs that clear the gradients of rows past the last sequence, and elements that each of them clears at once.
_CLEARING, _CLEARED = 32, tl.constexpr(4096)


@triton.jit
def _load(matrix, rows, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D) of a matrix given by its pointer and strides; zeros where it has none."""
    channels = tl.arange(0, BLOCK_D)
    inside = is_row[:, None] & (channels < HEAD_DIM)[None, :]
    return tl.load(pointers(matrix[0], rows, matrix[1], channels, matrix[2]), mask=inside, other=0.0)


@triton.jit
def _store(ptr, row, rows, values, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store (rows, BLOCK_D) in a matrix whose rows are `row` elements apart."""
    channels = tl.arange(0, BLOCK_D)
    tl.store(pointers(ptr, rows, row, channels, 1), values, mask=is_row[:, None] & (channels < HEAD_DIM)[None, :])


@triton.jit
def _sequence(ptr, strides, batch, start, head):
    """Pointer and strides of one head of a sequence, as `_load` takes them."""
    return ptr + batch * strides[0] + start * strides[1] + head * strides[2], strides[1], strides[3]


@triton.jit
def _exist(rows, seq_len, mask_ptr):
    """Which rows of a sequence there are."""
    exist = rows < seq_len
    if mask_ptr is not None:
        exist &= tl.load(mask_ptr + rows, mask=exist, other=0) != 0
    return exist


@triton.jit
def _gradient_scale(scale, seq_len, mask_ptr):
    """`scale`, but 0 for a single key: its probability is 1 whatever its score, and only errors would be scaled."""
    seen = seq_len
    if mask_ptr is not None:
        seen = 0
        for first in range(0, seq_len, 128):
            seen += tl.sum(_exist(first + tl.arange(0, 128), seq_len, mask_ptr).to(tl.int32))
    return tl.where(seen > 1, scale, 0.0)


@triton.jit
def _exponents(scores, lse, scale, dtype: tl.constexpr):
    """Of 2, of the probabilities. `lse` is as `_log_sums` gives it, with the scores' axis."""
    base_2 = dtype != tl.float32
    exponents = tl.fma(scores, scale * LOG2_E if base_2 else scale, -lse)
    return exponents if base_2 else exponents * LOG2_E


@triton.jit
def _log_sums(lse, dtype: tl.constexpr):
    """For `_exponents`: in the base that saves a multiplication of each score, or in that which keeps float32 exact."""
    return lse if dtype == tl.float32 else lse * LOG2_E


@triton.jit
def _kept_gradient(dkept, keep, kept_scale):
    """The gradient of probabilities, by that of those that dropout keeps and scales up; `keep` is None without."""
    return dkept if keep is None else tl.where(keep, dkept * kept_scale, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_tiles", "max_seqlen", "seed", "threshold"])
def _attention_backward_queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    rows_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
    schedule_ptr,
    mask_ptr,
    num_tokens,
    num_rows,
    num_tiles,
    max_seqlen,
    heads,
    scale,
    seed,
    threshold,
    kept_scale,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    out_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """dq of a tile of queries, and in rows_ptr, (heads, 2, num_rows), what the other kernel needs of each query."""
    head = (tl.program_id(0) % heads).to(tl.int64)
    batch, start, token, seq_len, first_query = place(
        cu_seqlens_ptr, schedule_ptr, tl.program_id(0) // heads, num_tokens, num_tiles, max_seqlen, BLOCK
    )
    if first_query >= seq_len:
        return
    if q_ptr.dtype.element_ty == tl.float32 and seq_len <= BLOCK:  # the other kernel makes all of it
        return
    if mask_ptr is not None:
        mask_ptr += batch * num_tokens
    queries, block = first_query + tl.arange(0, BLOCK), tl.arange(0, INNER)
    is_query = _exist(queries, seq_len, mask_ptr)
    q = _load(_sequence(q_ptr, q_strides, batch, start, head), queries, is_query, HEAD_DIM, BLOCK_D)
    grad = _load(_sequence(grad_ptr, grad_strides, batch, start, head), queries, is_query, HEAD_DIM, BLOCK_D)
    out = _load(_sequence(out_ptr, out_strides, batch, start, head), queries, is_query, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + (token + queries) * heads + head, mask=is_query, other=0.0)
    lse = _log_sums(lse, q.dtype)
    rows_ptr += head * 2 * num_rows + token
    tl.store(rows_ptr + queries, lse, mask=queries < seq_len)
    tl.store(rows_ptr + num_rows + queries, delta, mask=queries < seq_len)

    k, v = _sequence(k_ptr, k_strides, batch, start, head), _sequence(v_ptr, v_strides, batch, start, head)
    dq = tl.zeros(q.shape, tl.float32)
    # A loop that may not run sets its sums once more, and then ptxas waits for every product (its warning C7515).
    for first_key in range(0, tl.maximum(seq_len, 1), INNER):
        keys = first_key + block
        is_key = _exist(keys, seq_len, mask_ptr)
        k_tile = _load(k, keys, is_key, HEAD_DIM, BLOCK_D)
        v_tile = _load(v, keys, is_key, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        dkept = tl.dot(grad, tl.trans(v_tile), input_precision="ieee")
        exponents = _exponents(scores, lse[:, None], scale, q.dtype)
        if mask_ptr is not None or first_key + INNER > seq_len:
            exponents = tl.where(is_key[None, :], exponents, float("-inf"))
        keep = None
        if threshold is not None:
            keep = kept(seed, threshold, (token + queries)[:, None], first_key, head, INNER)
        dscores = tl.exp2(exponents) * (_kept_gradient(dkept, keep, kept_scale) - delta[:, None])
        dq = tl.dot(dscores.to(q.dtype), k_tile, dq, input_precision="ieee")
    dq *= _gradient_scale(scale, seq_len, mask_ptr)
    if mask_ptr is not None:
        dq = tl.where(is_query[:, None], dq, 0.0)
    row = 3 * heads * HEAD_DIM
    _store(dqkv_ptr + token * row + head * HEAD_DIM, row, queries, dq, queries < seq_len, HEAD_DIM, BLOCK_D)


@triton.jit
def _walk_queries(
    q,
    k,
    v,
    grad,
    out,
    lse_ptr,
    heads,
    dqkv_ptr,
    mask_ptr,
    first_key,
    seq_len,
    scale,
    dropout,
    rows_ptr,
    num_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
):
    """dk and dv of a tile of keys. Without rows_ptr the tile holds all keys of its sequence, and dq is made too.

    In float32 such a tile also sums P, and P * dP for delta: with the errors of the dP that it is subtracted from,
    which matters where a probability is nearly 1. 16 bits have larger errors, and take delta from `out`, with fewer
    registers.
    """
    seed, threshold, kept_scale, token, head = dropout
    width = heads * HEAD_DIM
    keys, block = first_key + tl.arange(0, BLOCK), tl.arange(0, INNER)
    is_key = _exist(keys, seq_len, mask_ptr)
    k, v = _load(k, keys, is_key, HEAD_DIM, BLOCK_D), _load(v, keys, is_key, HEAD_DIM, BLOCK_D)
    gradient_scale = _gradient_scale(scale, seq_len, mask_ptr)
    dk = tl.zeros(k.shape, tl.float32)
    dv = tl.zeros(k.shape, tl.float32)
    for first_query in range(0, tl.maximum(seq_len, 1), INNER):  # runs at least once, as above
        queries = first_query + block
        is_query = _exist(queries, seq_len, mask_ptr)
        q_tile = _load(q, queries, is_query, HEAD_DIM, BLOCK_D)
        grad_tile = _load(grad, queries, is_query, HEAD_DIM, BLOCK_D)
        if rows_ptr is None:
            lse = tl.load(lse_ptr + queries.to(tl.int64) * heads, mask=is_query, other=0.0)
            lse = _log_sums(lse, k.dtype)
        else:
            lse = tl.load(rows_ptr + queries, mask=is_query, other=0.0)
        scores = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
        dkept = tl.dot(v, tl.trans(grad_tile), input_precision="ieee")
        exponents = _exponents(scores, lse[None, :], scale, k.dtype)
        if rows_ptr is None and (mask_ptr is not None or seq_len < BLOCK):
            exponents = tl.where(is_key[:, None], exponents, float("-inf"))
        probabilities = tl.exp2(exponents)
        if rows_ptr is None and k.dtype == tl.float32:
            probabilities *= (1.0 / tl.sum(probabilities, axis=0))[None, :]
        keep, weights = None, probabilities
        if threshold is not None:
            keep = tl.trans(kept(seed, threshold, (token + queries)[:, None], first_key, head, BLOCK))
            weights = tl.where(keep, probabilities, 0.0)
        dprobabilities = _kept_gradient(dkept, keep, kept_scale)
        if rows_ptr is None and k.dtype == tl.float32:
            delta = tl.sum(probabilities * dprobabilities, axis=0)
        elif rows_ptr is None:
            out_tile = _load(out, queries, is_query, HEAD_DIM, BLOCK_D)
            delta = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        else:
            delta = tl.load(rows_ptr + num_rows + queries, mask=is_query, other=0.0)
        dv = tl.dot(weights.to(v.dtype), grad_tile, dv, input_precision="ieee")
        dscores = (probabilities * (dprobabilities - delta[None, :])).to(k.dtype)
        dk = tl.dot(dscores, q_tile, dk, input_precision="ieee")
        if rows_ptr is None:
            dq = tl.dot(tl.trans(dscores), k, input_precision="ieee") * gradient_scale
            if mask_ptr is not None:
                dq = tl.where(is_query[:, None], dq, 0.0)
            _store(dqkv_ptr, 3 * width, queries, dq, queries < seq_len, HEAD_DIM, BLOCK_D)
    dk *= gradient_scale
    if threshold is not None:
        dv *= kept_scale
    if mask_ptr is not None:
        dk = tl.where(is_key[:, None], dk, 0.0)
        dv = tl.where(is_key[:, None], dv, 0.0)
    _store(dqkv_ptr + width, 3 * width, keys, dk, keys < seq_len, HEAD_DIM, BLOCK_D)
    _store(dqkv_ptr + 2 * width, 3 * width, keys, dv, keys < seq_len, HEAD_DIM, BLOCK_D)


@triton.jit
def _clear(dqkv_ptr, end_ptr, num_tokens, row, program, CLEARING: tl.constexpr):
    """Zeros in the rows from `end_ptr`'s to the last, by one of CLEARING programs."""
    end = tl.minimum(tl.maximum(tl.load(end_ptr), 0), num_tokens).to(tl.int64) * row
    size = tl.full((), num_tokens, tl.int64) * row
    for first in range(end + program * _CLEARED, size, CLEARING * _CLEARED):
        places = first + tl.arange(0, _CLEARED)
        tl.store(dqkv_ptr + places, tl.zeros((_CLEARED,), dqkv_ptr.dtype.element_ty), mask=places < size)


@triton.jit(
    do_not_specialize=["batch_size", "num_tokens", "num_rows", "tiles", "num_tiles", "max_seqlen", "seed", "threshold"]
)
def _attention_backward_keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    out_ptr,
    lse_ptr,
    rows_ptr,
    dqkv_ptr,
    cu_seqlens_ptr,
    schedule_ptr,
    mask_ptr,
    batch_size,
    num_tokens,
    num_rows,
    tiles,
    num_tiles,
    max_seqlen,
    heads,
    scale,
    seed,
    threshold,
    kept_scale,
    q_strides,
    k_strides,
    v_strides,
    grad_strides,
    out_strides,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    INNER: tl.constexpr,
    CLEARING: tl.constexpr,
):
    """dk and dv of a tile of keys; dq too where rows_ptr is None, which says that a tile holds all of its sequence."""
    row = 3 * heads * HEAD_DIM
    tile = tl.program_id(0) // heads
    head = (tl.program_id(0) % heads).to(tl.int64)
    if cu_seqlens_ptr is not None and tile >= tiles:
        _clear(dqkv_ptr, cu_seqlens_ptr + batch_size, num_tokens, row, tl.program_id(0) - tiles * heads, CLEARING)
        return
    batch, start, token, seq_len, first_key = place(
        cu_seqlens_ptr, schedule_ptr, tile, num_tokens, num_tiles, max_seqlen, BLOCK
    )
    if first_key >= seq_len:
        return
    if mask_ptr is not None:
        mask_ptr += batch * num_tokens
    q, grad = _sequence(q_ptr, q_strides, batch, start, head), _sequence(grad_ptr, grad_strides, batch, start, head)
    k, v = _sequence(k_ptr, k_strides, batch, start, head), _sequence(v_ptr, v_strides, batch, start, head)
    out = _sequence(out_ptr, out_strides, batch, start, head)
    dqkv_ptr += token * row + head * HEAD_DIM
    lse_ptr += token * heads + head
    dropout = (seed, threshold, kept_scale, token, head)
    args = (q, k, v, grad, out, lse_ptr, heads, dqkv_ptr, mask_ptr, first_key, seq_len, scale, dropout)
    if rows_ptr is None or (q_ptr.dtype.element_ty == tl.float32 and seq_len <= BLOCK):
        _walk_queries(*args, None, num_rows, HEAD_DIM, BLOCK_D, BLOCK, INNER)
    else:
        rows_ptr += head * 2 * num_rows + token
        _walk_queries(*args, rows_ptr, num_rows, HEAD_DIM, BLOCK_D, BLOCK, INNER)


#: By head_dim padded to a power of two, at least 64: INNER, warps, and pipeline stages of both kernels, for tiles of
#: attention's BLOCK_M rows. What the registers hold without spills, dropout included, and 99 KiB of shared memory
#: where products are of a warp; where they are of four at once, 227 KiB, and 64 rows at once, as fewer would wait for
#: shared memory.
_SIZES = {
    False: {
        64: {"keys": (32, 8, 2), "queries": (32, 8, 2)},
        128: {"keys": (16, 8, 1), "queries": (32, 8, 1)},
        256: {"keys": (16, 8, 1), "queries": (16, 8, 1)},
    },
    True: {
        64: {"keys": (64, 8, 3), "queries": (64, 8, 3)},
        128: {"keys": (32, 8, 2), "queries": (64, 8, 2)},
        256: {"keys": (32, 8, 2), "queries": (32, 8, 2)},
    },
}

#: The same where one tile holds any sequence, by its keys and head_dim.
_WHOLE_SIZES = {
    False: {(64, 64): (32, 4, 1), (128, 64): (32, 8, 1), (64, 128): (32, 8, 1)},
    True: {(64, 64): (64, 4, 1), (128, 64): (64, 8, 2)},
}


@functools.cache
def has_warpgroup_products(device: torch.device) -> bool:
    """Whether four warps multiply together there: Hopper and the Blackwells of data centres, not those of desktops."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10, 11)


def config(q: Tensor, max_seqlen: int) -> dict[str, dict[str, int]]:
    """Launch options of both kernels for q (..., head_dim): tiles of BLOCK rows, that meet INNER others at once.

    There is no "queries" where one tile holds any sequence; else BLOCK is that of `attention`, as the schedule is.
    """
    forward = attention.config(q, max_seqlen)
    block, block_d = forward["BLOCK_M"], forward["BLOCK_D"]
    if q.dtype == torch.float32 or not attention.has_matrix_units(q.device):
        sizes = {kernel: (block, 16, 8, 1) for kernel in ("keys", "queries")}
    else:
        wide, channels, keys = has_warpgroup_products(q.device), max(64, block_d), 64 if max_seqlen <= 64 else 128
        sizes = {kernel: (block, *values) for kernel, values in _SIZES[wide][channels].items()}
        if max_seqlen <= keys and (keys, channels) in _WHOLE_SIZES[wide]:
            sizes = {"keys": (keys, *_WHOLE_SIZES[wide][keys, channels])}
    names = ("BLOCK", "INNER", "num_warps", "num_stages")
    return {kernel: {"BLOCK_D": block_d, **dict(zip(names, values, strict=True))} for kernel, values in sizes.items()}


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention_train` by q, k and v, with float32 sums; the same bits every time.

    Args:
        grad: gradient of `out`, of its shape and dtype, any strides.
        out, lse: what `attention_train` gave for the other arguments.
        bias: None.

    Returns:
        dq, dk, dv: [..., 0, :, :], [..., 1, :, :] and [..., 2, :, :] of one tensor (*q.shape[:-2], 3, heads, head_dim)
        of q's dtype. Zeros for positions that the mask hides, and for rows after the last sequence.

    Raises:
        ValueError: a bias is given, there is dropout but no seed, or the schedule has the wrong shape.
    """
    if bias is not None:
        raise ValueError(f"attention_backward: bias has shape {tuple(bias.shape)}, expected None")
    *batch, num_tokens, heads, head_dim = q.shape
    batch_size = batch[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = config(q, max_seqlen)
    block = sizes["keys"]["BLOCK"]
    if "queries" not in sizes:
        schedule = None  # of the forward's tiles; there is one for each sequence
    tiles, num_tiles = grid(schedule, batch_size, num_tokens, max_seqlen, block)
    dqkv = q.new_empty((*q.shape[:-2], 3, heads, head_dim))
    if dqkv.numel() == 0 or tiles == 0:
        dq, dk, dv = dqkv.zero_().unbind(-3)
        return dq, dk, dv
    seed_number, threshold, kept_scale = dropout_arguments(dropout_p, seed)
    num_rows, programs = batch_size * num_tokens, tiles * heads
    if cu_seqlens is not None:
        num_rows, programs, cu_seqlens = num_tokens, programs + _CLEARING, cu_seqlens.contiguous()
    rows = lse.new_empty((heads, 2, num_rows)) if "queries" in sizes else None
    attention_mask = None if attention_mask is None else attention_mask.contiguous()
    tensors = (q, k, v, grad, out, lse.contiguous(), rows, dqkv, cu_seqlens, schedule, attention_mask)
    numbers = (num_tiles, max_seqlen, heads, scale, seed_number, threshold, kept_scale)
    strides = [t.stride() if cu_seqlens is None else (0, *t.stride()) for t in (q, k, v, grad, out)]
    with torch.cuda.device_of(q):
        if "queries" in sizes:
            _attention_backward_queries_kernel[(tiles * heads,)](
                *tensors,
                num_tokens,
                num_rows,
                *numbers,
                *strides,
                HEAD_DIM=head_dim,
                **sizes["queries"],
            )
        _attention_backward_keys_kernel[(programs,)](
            *tensors,
            batch_size,
            num_tokens,
            num_rows,
            tiles,
            *numbers,
            *strides,
            HEAD_DIM=head_dim,
            CLEARING=_CLEARING,
            **sizes["keys"],
        )
    dq, dk, dv = dqkv.unbind(-3)
    return dq, dk, dv
