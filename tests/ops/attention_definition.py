"""Attention in training as plain PyTorch defines it, with the dropout of `bert_fast.ops._dropout`: any dtype."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from implementations import Implementation
from numerics import assert_no_worse, to_double
from torch import Tensor

from bert_fast.ops._dropout import dropout
from bert_fast.ops.attention import scores_of


class _Softmax(torch.autograd.Function):
    """softmax over the last dimension with a gradient that does not cancel, for the truth.

    Of a key that has all of P but 1e-20, P_i (g_i - sum_j P_j g_j) is 0 in float64, too, and should be about 1e-20.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        probabilities = torch.softmax(scores, -1)
        ctx.save_for_backward(probabilities)
        return probabilities

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (probabilities,) = ctx.saved_tensors
        differences = grad[..., :, None] - grad[..., None, :]
        return probabilities * (differences @ probabilities[..., None])[..., 0]


class Sequences(NamedTuple):
    """Where the sequences are, and what is done to their scores: the arguments that are no matrices."""

    cu_seqlens: Tensor | None
    max_seqlen: int
    attention_mask: Tensor | None
    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None

    @property
    def arguments(self) -> tuple[Tensor | None, int, Tensor | None, float, float, None, None, Tensor | None]:
        """As the launchers take them, without bias and schedule."""
        return (*self[:5], None, None, self.seed)


def attention_train(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(out, lse): q's shape, and that without head_dim."""
    if sequences.cu_seqlens is None:
        rows = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(q.shape[:2])
        return _attend(q, k, v, sequences, rows)
    parts = []
    for a, b in pairwise(sequences.cu_seqlens.tolist()):
        parts.append(_attend(q[a:b], k[a:b], v[a:b], sequences, torch.arange(a, b, device=q.device)))
    out, lse = zip(*parts, strict=True) if parts else ([q * 0], [q[..., 0] * 0])
    return torch.cat(out), torch.cat(lse)


def _attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(..., seq_len, heads, head_dim) of tokens numbered `rows`."""
    keep = torch.ones_like(rows, dtype=torch.bool)
    if sequences.attention_mask is not None:
        keep = sequences.attention_mask
    hidden = ~keep[..., None, None]
    q, k, v = (t.masked_fill(hidden, 0.0).transpose(-3, -2) for t in (q, k, v))  # (..., heads, seq_len, head_dim)
    scores = scores_of(q, k, sequences.scale, None)
    scores = scores.masked_fill(~keep[..., None, None, :], torch.finfo(scores.dtype).min)
    probabilities = _Softmax.apply(scores) if scores.dtype == torch.float64 else torch.softmax(scores, -1)
    planes = [
        dropout(plane, sequences.dropout_p, sequences.seed, rows, head)
        for head, plane in enumerate(probabilities.unbind(-3))
    ]
    kept = torch.stack(planes, -3) if planes else probabilities
    out = (kept @ v).transpose(-3, -2).masked_fill(hidden, 0.0)
    lse = torch.logsumexp(scores, -1).transpose(-2, -1).masked_fill(hidden[..., 0], 0.0)
    return out, lse


def assert_attention_train(
    fast: tuple[Tensor, ...], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences
) -> None:
    """`fast`, (out, lse, dq, dk, dv) for the upstream gradient `grad`, is no worse than the definition in its dtype.

    lse is float32 in every dtype, and so is what it is compared with: as one row, for its errors are those of scores.
    """

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        upstream, *inputs = tensors
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out, lse = attention_train(leaves[0], leaves[1], leaves[2], sequences)
        return (out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream))

    plain, truth = run(grad, q, k, v), run(*map(to_double, (grad, q, k, v)))
    _, lse = attention_train(q.float(), k.float(), v.float(), sequences._replace(dropout_p=0.0))
    for name, f, p, t in zip(("out", "lse", "dq", "dk", "dv"), fast, (plain[0], lse, *plain[2:]), truth, strict=True):
        if name == "lse":
            f, p, t = f.flatten(), p.flatten(), t.flatten()
        assert_no_worse(f, p, t, name)


def train(implementation: Implementation, grad: Tensor, qkv: list[Tensor], sequences: Sequences) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv)."""
    out, lse = implementation("attention_train", *qkv, *sequences.arguments)
    return (out, lse, *implementation("attention_backward", grad, *qkv, out, lse, *sequences.arguments))


def check(implementation: Implementation, qkv: list[Tensor], sequences: Sequences) -> tuple[Tensor, ...]:
    """`train` under a random upstream gradient, compared with the definition."""
    grad = implementation.randn(*qkv[0].shape)
    fast = train(implementation, grad, qkv, sequences)
    assert_attention_train(fast, grad, *qkv, sequences)
    return fast
