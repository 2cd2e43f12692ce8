"""One vector per sequence from the vectors of its tokens (Reimers & Gurevych, 2019, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, extension, triton_launchers

#: The names that sentence-transformers gives the modes in its `pooling_mode`.
MODES = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean")


def reference(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """The definition. A sequence without tokens gives zeros."""
    bounds = _check.sequence_bounds("pooling", cu_seqlens, hidden.shape[0])
    rows = [_pool(hidden[a:b], mode) for a, b in bounds]
    return torch.stack(rows) if rows else hidden.new_zeros((0, hidden.shape[1]))


def _pool(tokens: Tensor, mode: str) -> Tensor:
    """(seq_len, hidden_size) -> (hidden_size,)."""
    seq_len = tokens.shape[0]
    if seq_len == 0:
        return tokens.sum(0)
    match mode:
        case "cls":
            return tokens[0]
        case "mean":
            return tokens.mean(0)
        case "max":
            return tokens.amax(0)
        case "mean_sqrt_len_tokens":
            return tokens.sum(0) / seq_len**0.5
        case _:  # weightedmean: token i of n weighs i, counted from 1
            position = torch.arange(1, seq_len + 1, dtype=tokens.dtype, device=tokens.device)
            return (tokens * position[:, None]).sum(0) / (seq_len * (seq_len + 1) / 2)


def check(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> None:
    """ValueError for shapes, dtypes, devices or a mode that no implementation takes."""
    _check.same_kind("pooling", hidden=hidden)
    if hidden.dim() != 2:
        raise ValueError(f"pooling: hidden has shape {tuple(hidden.shape)}, expected (num_tokens, hidden_size)")
    _check.cu_seqlens("pooling", cu_seqlens, hidden.device)
    _check.choice("pooling", "mode", mode, MODES)


def fake(hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """Shape and dtype of the result."""
    return hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1]))


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.pooling import pooling

    return pooling


def _load_triton_training() -> Any:
    return triton_launchers("pooling", "pooling")


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import pooling

    return pooling


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    return (launchers.pooling(*args),)


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    return launchers.pooling_backward(grad, *args), None, None


OP = Op(
    "pooling",
    "(Tensor hidden, Tensor cu_seqlens, str mode) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(
        Impl(
            "triton",
            "cuda",
            (torch.float32, torch.float16, torch.bfloat16),
            _load_triton,
            load_training=_load_triton_training,
        ),
        Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True, load_training=extension),
    ),
    gradient=Gradient(_forward, _backward, reads=(0, 1)),
)


def pooling(hidden: Tensor, cu_seqlens: Tensor, *, mode: str = "mean", impl: str | None = None) -> Tensor:
    """One vector per sequence.

    Args:
        hidden: (num_tokens, hidden_size), the tokens of all sequences, one after another.
        cu_seqlens: (batch_size + 1,) int32 on the same device: sequence i is rows cu_seqlens[i] to cu_seqlens[i + 1].
        mode: "cls" (the first token), "mean", "max", "mean_sqrt_len_tokens" (sum / sqrt(n)) or "weightedmean" (token
            i of n weighs i).
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (batch_size, hidden_size) in hidden's dtype; zeros for a sequence without tokens. Sums are taken in float32 or
        wider.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the mode is unknown.
    """
    return OP(hidden, cu_seqlens, mode, impl=impl)
