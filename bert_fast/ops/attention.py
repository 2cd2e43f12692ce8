"""softmax(q k^T * scale) v within each sequence (Vaswani et al., 2017), ragged or padded."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._dispatch import Impl, Op, Traits

_SHAPES = "(batch_size, seq_len, heads, head_dim), or (num_tokens, heads, head_dim) with cu_seqlens"


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The definition: ragged with `cu_seqlens`, padded without. A query or key that the mask hides takes no part."""
    if cu_seqlens is None:
        return _attend(q, k, v, attention_mask, scale, dropout_p)
    bounds = _check.sequence_bounds("attention", cu_seqlens, q.shape[0])
    rows = [_attend(q[a:b], k[a:b], v[a:b], None, scale, dropout_p) for a, b in bounds]
    return torch.cat(rows) if rows else torch.zeros_like(q)


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, dropout_p: float) -> Tensor:
    """(..., seq_len, heads, head_dim) -> the same; `keep` is (..., seq_len), True where a token is."""
    if keep is not None:
        hidden = ~keep[..., None, None]
        q, k, v = (t.masked_fill(hidden, 0.0) for t in (q, k, v))  # whatever stands there reaches no sum, no gradient
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # (..., heads, seq_len, head_dim)
    scores = q @ k.transpose(-2, -1) * scale  # (..., heads, queries, keys)
    if keep is not None:
        # The lowest finite number, not -inf: a row with nothing to attend to stays finite, and its values are zero.
        scores = scores.masked_fill(~keep[..., None, None, :], torch.finfo(scores.dtype).min)
    out = (F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ v).transpose(-3, -2)
    return (out if keep is None else out.masked_fill(hidden, 0.0)).contiguous()


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> None:
    """ValueError for shapes, dtypes or devices that no implementation takes."""
    _check.same_kind("attention", q=q, k=k, v=v)
    _check.shape("attention", "k", k, q.shape)
    _check.shape("attention", "v", v, q.shape)
    if cu_seqlens is not None:
        if q.dim() != 3:
            raise ValueError(f"attention: q has shape {tuple(q.shape)}, expected (num_tokens, heads, head_dim)")
        if attention_mask is not None:
            raise ValueError("attention: attention_mask and cu_seqlens are both given, expected one of them")
        _check.cu_seqlens("attention", cu_seqlens, q.device)
    elif q.dim() != 4:
        raise ValueError(f"attention: q has shape {tuple(q.shape)}, expected {_SHAPES}")
    elif attention_mask is not None:
        _check.shape("attention", "attention_mask", attention_mask, q.shape[:2])
        if attention_mask.dtype != torch.bool:
            raise ValueError(f"attention: attention_mask is {attention_mask.dtype}, expected bool (True = attend)")
        if attention_mask.device != q.device:
            raise ValueError(f"attention: attention_mask is on {attention_mask.device} but q is on {q.device}")
    _check.probability("attention", "dropout_p", dropout_p)


def fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty(q.shape)


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.attention import attention

    return attention


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import attention

    return attention


def _triton_limits(traits: Traits) -> str | None:
    return None if traits.head_dim <= 256 else f"takes head_dim up to 256, not {traits.head_dim}"


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? attention_mask, float scale,"
    " float dropout_p) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(
        Impl("triton", "cuda", (torch.float32, torch.float16, torch.bfloat16), _load_triton, _triton_limits),
        Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True),
    ),
    traits=lambda *args: Traits(head_dim=args[0].shape[-1], dropout=args[7] > 0),
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    attention_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    impl: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention within each sequence.

    Args:
        q, k, v: ragged (num_tokens, heads, head_dim) with `cu_seqlens`, or padded (batch_size, seq_len, heads,
            head_dim). Any strides.
        cu_seqlens: (batch_size + 1,) int32 on q's device: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; read from `cu_seqlens` when not given, which waits for
            the device. On a GPU the rows of a longer sequence past it are undefined.
        attention_mask: (batch_size, seq_len) bool, True for the tokens there are, for the padded form; any pattern.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        dropout_p: probability of zeroing an attention probability; 0 in evaluation.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.
        out: where the result goes, without gradients: contiguous, of its shape and dtype;
            shares no memory with q, k and v.

    Returns:
        The shape of q, contiguous, in q's dtype. Positions that the mask hides are zeros.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if q.dim() not in (3, 4):
        raise ValueError(f"attention: q has shape {tuple(q.shape)}, expected 3 or 4 dimensions: {_SHAPES}")
    if cu_seqlens is None:
        max_seqlen = q.shape[1] if q.dim() == 4 else 0
    elif max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OP(q, k, v, cu_seqlens, max_seqlen, attention_mask, scale, dropout_p, impl=impl, out=out)
