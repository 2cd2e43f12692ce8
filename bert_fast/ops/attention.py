"""softmax(q k^T * scale + bias) v within each sequence (Vaswani et al., 2017), ragged or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, Traits, extension, triton_launchers
from bert_fast.ops._dropout import draw_seeds, dropout

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
    bias: Tensor | None = None,
    schedule: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition: ragged with `cu_seqlens`, padded without. A query or key that the mask hides takes no part."""
    if cu_seqlens is None:
        return _attend(q, k, v, attention_mask, scale, dropout_p, bias, seed)
    bounds = _check.sequence_bounds("attention", cu_seqlens, q.shape[0])
    rows = [_attend(q[a:b], k[a:b], v[a:b], None, scale, dropout_p, bias, seed, a) for a, b in bounds]
    return torch.cat(rows) if rows else torch.zeros_like(q)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    seed: Tensor | None,
    first_token: int = 0,
) -> Tensor:
    """(..., seq_len, heads, head_dim) -> the same; `keep` is (..., seq_len), True where a token is.

    `first_token` is the number of the first query among all tokens.
    """
    if keep is not None:
        hidden = ~keep[..., None, None]
        q, k, v = (t.masked_fill(hidden, 0.0) for t in (q, k, v))  # whatever stands there reaches no sum, no gradient
    q, k, v = (t.transpose(-3, -2) for t in (q, k, v))  # (..., heads, seq_len, head_dim)
    scores = scores_of(q, k, scale, bias)
    if keep is not None:
        # The lowest finite number, not -inf: a row with nothing to attend to stays finite, and its values are zero.
        scores = scores.masked_fill(~keep[..., None, None, :], torch.finfo(scores.dtype).min)
    tokens = torch.arange(q[..., 0, :, 0].numel(), device=q.device).view(*q.shape[:-3], 1, q.shape[-2]) + first_token
    planes = torch.arange(q.shape[-3], device=q.device)[:, None]
    probabilities = dropout(torch.softmax(scores, dim=-1), dropout_p, seed, tokens, planes)
    out = (probabilities @ v).transpose(-3, -2)
    return (out if keep is None else out.masked_fill(hidden, 0.0)).contiguous()


def scores_of(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """(..., heads, seq_len, head_dim) -> (..., heads, queries, keys), before the softmax."""
    scores = q @ k.transpose(-2, -1) * scale
    return scores if bias is None else scores + bias[:, : q.shape[-2], : q.shape[-2]]


def check(
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
    seed: Tensor | None = None,
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
    _check.dropout("attention", dropout_p, seed)
    if bias is not None:
        check_bias("attention", bias, q, max_seqlen)
    if schedule is not None:
        _check_schedule(schedule, q, cu_seqlens)


def check_bias(op: str, bias: Tensor, q: Tensor, max_seqlen: int) -> None:
    """ValueError unless `bias` can be added to the scores of sequences of up to `max_seqlen` tokens."""
    _check.same_kind(op, q=q, bias=bias)
    heads = q.shape[-2]
    if bias.dim() != 3 or bias.shape[0] != heads or min(bias.shape[1:]) < max_seqlen:
        raise ValueError(
            f"{op}: bias has shape {tuple(bias.shape)}, expected ({heads}, >= {max_seqlen}, >= {max_seqlen})"
        )


def _check_schedule(schedule: Tensor, q: Tensor, cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is None:
        raise ValueError("attention: schedule is given without cu_seqlens")
    if schedule.dim() != 2 or schedule.shape[0] != 3 or schedule.dtype != torch.int32 or not schedule.is_contiguous():
        raise ValueError(
            f"attention: schedule is {schedule.dtype} of shape {tuple(schedule.shape)} with strides "
            f"{schedule.stride()}, expected contiguous int32 (3, tiles) from attention_schedule"
        )
    if schedule.device != q.device:
        raise ValueError(f"attention: schedule is on {schedule.device} but q is on {q.device}")


def fake(
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
    seed: Tensor | None = None,
) -> Tensor:
    """Shape and dtype of the result."""
    return q.new_empty(q.shape)


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.attention import attention

    return lambda *args, **out: attention(*args[:10], **out)


def _load_triton_training() -> Any:
    return triton_launchers("attention", "attention_train")


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast import _C

    run: Callable[..., Tensor] = _C.attention

    def attention(*args: Any, out: Tensor | None = None) -> Tensor:
        return run(*args[:8], out=out)  # without bias, which it refuses, schedule, which is for GPUs, and seed

    return attention


def _cpp_limits(traits: Traits) -> str | None:
    return "has no bias" if traits.bias else None


def _triton_limits(traits: Traits) -> str | None:
    if traits.bias and traits.dropout:
        return "has no dropout beside a bias"
    return None if traits.head_dim <= 256 else f"takes head_dim up to 256, not {traits.head_dim}"


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = launchers.attention_train(*args)
    return out


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    q, k, v, *others = args
    grads = launchers.attention_backward(grad, q, k, v, result, *saved, *others)
    return (*grads, *(None for _ in others))


def _has_gradient(q: Tensor, *others: Any) -> bool:
    """No bias; and tiles of 256 channels of float32 take more shared memory than GPUs before sm_80 have."""
    bias = others[7]
    is_wide = q.is_cuda and q.dtype == torch.float32 and q.shape[-1] > 128
    return bias is None and not (is_wide and torch.cuda.get_device_capability(q.device) < (8, 0))


def _saved(q: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """log sum exp of the scores of each query and head."""
    return (q.new_empty(q.shape[:-1], dtype=torch.float32),)


OP = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? attention_mask, float scale,"
    " float dropout_p, Tensor? bias, Tensor? schedule, Tensor? seed) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(
        Impl(
            "triton",
            "cuda",
            (torch.float32, torch.float16, torch.bfloat16),
            _load_triton,
            _triton_limits,
            load_training=_load_triton_training,
        ),
        Impl(
            "cpp",
            "cpu",
            (torch.float32, torch.bfloat16),
            _load_cpp,
            _cpp_limits,
            validates=True,
            load_training=extension,
        ),
    ),
    traits=lambda *args: Traits(head_dim=args[0].shape[-1], dropout=args[7] > 0, bias=args[8] is not None),
    gradient=Gradient(
        _forward,
        _backward,
        _saved,
        reads=(0, 1, 2, 3, 5, 9, 10),
        reads_result=True,
        serves=_has_gradient,
    ),
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
    bias: Tensor | None = None,
    schedule: Tensor | None = None,
    seed: Tensor | None = None,
    impl: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Bidirectional attention within each sequence.

    Args:
        q, k, v: ragged (num_tokens, heads, head_dim) with `cu_seqlens`, or padded (batch_size, seq_len, heads,
            head_dim). Any strides.
        cu_seqlens: (batch_size + 1,) int32 on q's device: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        max_seqlen: at least the longest sequence, in tokens; read from `cu_seqlens` when not given, which waits for
            the device. On a GPU the result of a longer sequence is undefined.
        attention_mask: (batch_size, seq_len) bool, True for the tokens there are, for the padded form; any pattern.
        scale: factor of the scores; 1 / sqrt(head_dim) when not given.
        dropout_p: probability of zeroing an attention probability, rounded to a 256th; 0 in evaluation.
        bias: (heads, at least max_seqlen, at least max_seqlen) of q's dtype, any strides: [head, i, j] is added to the
            scaled score of query i and key j of a sequence, as relative positions want it. Triton and the definition.
        schedule: what `attention_schedule` gave; the result is the same without.
        seed: int64 scalar on the CPU, of which dropout's mask is a function; drawn from torch's generator when not
            given.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.
        out: where the result goes, without gradients: contiguous, of its shape and dtype;
            shares no memory with q, k and v.

    Returns:
        The shape of q, contiguous, in q's dtype. Positions that the mask hides are zeros. Triton
        takes a q with more rows than `cu_seqlens` ends with, and leaves the result of the others undefined.

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
    if dropout_p > 0 and seed is None:
        seed = draw_seeds(1)[0]
    args = (q, k, v, cu_seqlens, max_seqlen, attention_mask, scale, dropout_p, bias, schedule, seed)
    return OP(*args, impl=impl, out=out)


def attention_schedule(q: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor | None:
    """A better order of work for all calls of `attention` with these sequences, such as those of a model's layers.

    The longest sequences go first, and no program starts without queries. It takes one small launch and never waits for
    the device. It pays where lengths differ and the longest sequence has more queries than a program takes (64 or 128).

    Args:
        q: (num_tokens, heads, head_dim): what the calls will be given, or another tensor of its shape, dtype and
            device.
        cu_seqlens, max_seqlen: as those of `attention`.

    Returns:
        (3, tiles) int32 on q's device; None where it cannot pay (few or equal sequences), and on the CPU.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if q.dim() != 3:
        raise ValueError(f"attention_schedule: q has shape {tuple(q.shape)}, expected (num_tokens, heads, head_dim)")
    _check.cu_seqlens("attention_schedule", cu_seqlens, q.device)
    traits = Traits(head_dim=q.shape[-1])
    if q.device.type != "cuda" or OP.select("cuda", q.dtype, traits).name != "triton":
        return None
    from bert_fast.kernels.attention import schedule

    return schedule(q, cu_seqlens, max_seqlen)
