"""gelu(x weight^T + bias): the first half of BERT's feed-forward block, over a module's own weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._dispatch import Impl, Op
from bert_fast.ops.bias_gelu import APPROXIMATIONS


def reference(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """The definition, with the GELU of `bias_gelu`."""
    return F.gelu(F.linear(x, weight, bias), approximate=approximate)


def check(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> None:
    """ValueError for shapes, dtypes, devices or a form that no implementation takes."""
    op = "linear_gelu"
    _check.same_kind(op, x=x, weight=weight, bias=bias)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (out_features, in_features)")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (..., {weight.shape[1]})")
    _check.shape(op, "bias", bias, weight.shape[:1])
    _check.choice(op, "approximate", approximate, APPROXIMATIONS)


def fake(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.linear_gelu import linear_gelu

    return linear_gelu


OP = Op(
    "linear_gelu",
    "(Tensor x, Tensor weight, Tensor bias, str approximate) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(Impl("triton", "cuda", (torch.float32, torch.float16, torch.bfloat16), _load_triton),),
)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, approximate: str = "none", impl: str | None = None
) -> Tensor:
    """gelu(x @ weight.T + bias).

    On a GPU one kernel, or a product and one pass over its result, whichever `bert-fast tune` found the faster for the
    shape. On a CPU the definition runs (`linear`, over packed weights, is the fast one there).

    Args:
        x: (..., in_features), floating point.
        weight: (out_features, in_features), same dtype and device.
        bias: (out_features,), same dtype and device.
        approximate: "none" for the exact (erf) form, "tanh" for Google's.
        impl: force "triton" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (..., out_features) in x's dtype, contiguous. Sums and the GELU are taken in float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return OP(x, weight, bias, approximate, impl=impl)
