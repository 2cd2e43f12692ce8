"""x weight^T + bias over weights as they are: the matrix products of training.

In 16 bits beside float32 weights, as autocast has it, the weights are rounded to x's dtype for the product, and their
gradient is summed and kept in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, extension


def reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError for shapes, dtypes or devices that no implementation takes."""
    op = "dense"
    _check.same_kind(op, weight=weight, bias=bias)
    if not (x.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32 and x.device == weight.device):
        _check.same_kind(op, x=x, weight=weight)
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}, "
            "expected (..., in_features) and (out_features, in_features)"
        )
    if weight.numel() == 0:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected neither dimension to be 0")
    if bias is not None:
        _check.shape(op, "bias", bias, weight.shape[:1])


def fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    return (launchers.dense(*args),)


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    x, weight, _ = args
    grads: tuple[Tensor | None, ...] = launchers.dense_backward(grad, x, weight, *needed)
    return grads


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import dense

    return dense


OP = Op(
    "dense",
    "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    # On a GPU the definition is cuBLAS, which nothing here is faster than.
    impls=(Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True, load_training=extension),),
    gradient=Gradient(_forward, _backward, reads=(0, 1)),
)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str | None = None) -> Tensor:
    """x weight^T + bias.

    Args:
        x: (..., in_features), floating point.
        weight: (out_features, in_features), of x's dtype, or float32 beside bfloat16 or float16.
        bias: (out_features,), of weight's dtype; none if None.
        impl: force "cpp" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (..., out_features), contiguous, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return OP(x, weight, bias, impl=impl)
