"""softmax(q k^T * scale + bias) of chosen heads: the attention maps that people look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._dispatch import Impl, Op, Traits
from bert_fast.ops.attention import check_bias, scores_of

_NAME = "attention_probabilities"


def reference(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: Sequence[int], scale: float, bias: Tensor | None
) -> Tensor:
    """The definition."""
    heads = list(heads)
    q, k = (t[:, heads].transpose(0, 1) for t in (q, k))  # (len(heads), num_tokens, head_dim)
    bias = None if bias is None else bias[heads]
    maps = []
    for index, (start, end) in enumerate(_check.sequence_bounds(_NAME, cu_seqlens, q.shape[1])):
        padding = max_seqlen - (end - start)
        if padding < 0:
            raise ValueError(f"{_NAME}: sequence {index} has {end - start} tokens, more than max_seqlen = {max_seqlen}")
        probabilities = torch.softmax(scores_of(q[:, start:end], k[:, start:end], scale, bias), dim=-1)
        maps.append(F.pad(probabilities, (0, padding, 0, padding)))
    return torch.stack(maps) if maps else q.new_zeros((0, len(heads), max_seqlen, max_seqlen))


def check(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: Sequence[int], scale: float, bias: Tensor | None
) -> None:
    """ValueError for shapes, dtypes, devices or heads that no implementation takes."""
    _check.same_kind(_NAME, q=q, k=k)
    if q.dim() != 3:
        raise ValueError(f"{_NAME}: q has shape {tuple(q.shape)}, expected (num_tokens, heads, head_dim)")
    _check.shape(_NAME, "k", k, q.shape)
    _check.cu_seqlens(_NAME, cu_seqlens, q.device)
    for head in heads:
        if not 0 <= head < q.shape[1]:
            raise ValueError(f"{_NAME}: heads has {head}, expected 0 to {q.shape[1] - 1}")
    if bias is not None:
        check_bias(_NAME, bias, q, max_seqlen)


def fake(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int, heads: Sequence[int], scale: float, bias: Tensor | None
) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty((cu_seqlens.shape[0] - 1, len(heads), max_seqlen, max_seqlen))


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.attention_probabilities import attention_probabilities

    return attention_probabilities


def _triton_limits(traits: Traits) -> str | None:
    return None if traits.head_dim <= 256 else f"takes head_dim up to 256, not {traits.head_dim}"


OP = Op(
    _NAME,
    "(Tensor q, Tensor k, Tensor cu_seqlens, SymInt max_seqlen, int[] heads, float scale, Tensor? bias) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(Impl("triton", "cuda", (torch.float32, torch.float16, torch.bfloat16), _load_triton, _triton_limits),),
    traits=lambda *args: Traits(head_dim=args[0].shape[-1]),
)


def attention_probabilities(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    heads: Sequence[int] | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """What each token attends to: the probabilities that `attention` multiplies v by, of some heads, to look at.

    Args:
        q, k: ragged (num_tokens, heads, head_dim), any strides.
        cu_seqlens: (batch_size + 1,) int32 on q's device: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; read from `cu_seqlens` when not given, which waits for
            the device. On a GPU the result of a longer sequence is undefined.
        heads: which heads, in this order; all of them when not given.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        bias: (heads, at least max_seqlen, at least max_seqlen) of q's dtype, added to the scaled scores.
        impl: force "triton" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (batch_size, len(heads), max_seqlen, max_seqlen) in q's dtype, differentiable: [i, j, query, key] of sequence i
        and head heads[j]; zeros past the tokens of the sequence.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a head is not there.
    """
    if q.dim() != 3:
        raise ValueError(f"{_NAME}: q has shape {tuple(q.shape)}, expected (num_tokens, heads, head_dim)")
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    heads = list(range(q.shape[1])) if heads is None else list(heads)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return OP(q, k, cu_seqlens, max_seqlen, heads, scale, bias, impl=impl)
