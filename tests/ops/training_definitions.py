"""What the tests of the C++ row kernels of training share.

The definitions are plain PyTorch with the dropout of `bert_fast/ops/_dropout.py`, in float64 with the same seed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numerics import assert_no_worse, to_double
from torch import Tensor

EPS = 1e-12  # BERT's
PROBABILITIES = (0.0, 0.1, 1.0)

SHAPES = {
    "one element, whose variance is zero": (1, 1),
    "no leading dimension": (24,),
    "narrower than any vector, rows that are no multiple of four": (3, 5),
    "one past a vector of 16 and of 32": (5, 33),
    "one past the bytes of a call of the generator": (4, 129),
    "MiniLM, one row past the first sums": (65, 384),
    "BERT-base": (16, 768),
    "many short rows: sums of sums": (1300, 8),
    "several leading dimensions": (2, 3, 2, 10),
    "long rows": (12, 2056),
}


def seed_for(dropout_p: float) -> Tensor | None:
    return torch.tensor(2**62 + 77) if dropout_p > 0 else None


def outcome(definition: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The result of a definition and the gradients of its inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = definition(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_training(
    fast: list[Tensor], definition: Callable[..., Tensor], upstream: Tensor, inputs: list[Tensor], names: str
) -> None:
    """The result and every gradient of a fused forward and backward are no worse than the plain definition's."""
    plain = outcome(definition, upstream, *inputs)
    truth = outcome(definition, upstream.double(), *map(to_double, inputs))
    for name, f, p, t in zip(["out", *names.split()], fast, plain, truth, strict=True):
        assert f.is_contiguous(), name
        assert_no_worse(f, p, t, name)


def assert_same(a: Any, b: Any) -> None:
    """The same bits, NaN included, in every tensor of two tuples."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
