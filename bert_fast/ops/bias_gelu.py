"""gelu(x + bias): the activation of BERT's feed-forward block (Hendrycks & Gimpel, 2016, arXiv:1606.08415)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, extension, triton_launchers

APPROXIMATIONS = ("none", "tanh")


def reference(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """The definition: `0.5 t (1 + erf(t / sqrt(2)))` for "none", the tanh form for "tanh", at t = x + bias."""
    return F.gelu(x + bias, approximate=approximate)


def check(x: Tensor, bias: Tensor, approximate: str) -> None:
    """ValueError for shapes, dtypes, devices or a form that no implementation takes."""
    _check.same_kind("bias_gelu", x=x, bias=bias)
    if x.dim() < 1:
        raise ValueError("bias_gelu: x is a scalar, expected (..., features)")
    _check.shape("bias_gelu", "bias", bias, x.shape[-1:])
    _check.choice("bias_gelu", "approximate", approximate, APPROXIMATIONS)


def fake(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(x.shape)


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.bias_gelu import bias_gelu

    return bias_gelu


def _load_triton_training() -> Any:
    return triton_launchers("bias_gelu", "bias_gelu")


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import bias_gelu

    return bias_gelu


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    return (launchers.bias_gelu(*args),)


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    return (*launchers.bias_gelu_backward(grad, *args), None)


OP = Op(
    "bias_gelu",
    "(Tensor x, Tensor bias, str approximate) -> Tensor",
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


def bias_gelu(
    x: Tensor, bias: Tensor, *, approximate: str = "none", impl: str | None = None, out: Tensor | None = None
) -> Tensor:
    """gelu(x + bias).

    Args:
        x: (..., features), floating point.
        bias: (features,), same dtype and device.
        approximate: "none" for the exact (erf) form, "tanh" for Google's.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.
        out: contiguous, of the result's shape and dtype: where the result goes, without gradients; may be x.

    Returns:
        A contiguous tensor of x's shape and dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return OP(x, bias, approximate, impl=impl, out=out)
