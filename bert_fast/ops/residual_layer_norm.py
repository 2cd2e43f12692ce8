"""LayerNorm(residual + dropout(x + bias)): how each of BERT's sub-layers ends (post-LayerNorm, Ba et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._dispatch import Impl, Op, Traits


def reference(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, layer_norm_bias: Tensor, eps: float, dropout_p: float
) -> Tensor:
    """The definition. The variance is the biased one, over the last dimension."""
    hidden = F.dropout(x + bias, dropout_p) + residual
    return F.layer_norm(hidden, hidden.shape[-1:], weight, layer_norm_bias, eps)


def check(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, layer_norm_bias: Tensor, eps: float, dropout_p: float
) -> None:
    """ValueError for shapes, dtypes or devices that no implementation takes."""
    op = "residual_layer_norm"
    _check.same_kind(op, x=x, bias=bias, residual=residual, weight=weight, layer_norm_bias=layer_norm_bias)
    if x.dim() < 1:
        raise ValueError(f"{op}: x is a scalar, expected (..., hidden_size)")
    _check.shape(op, "residual", residual, x.shape)
    for name, vector in (("bias", bias), ("weight", weight), ("layer_norm_bias", layer_norm_bias)):
        _check.shape(op, name, vector, x.shape[-1:])
    _check.probability(op, "dropout_p", dropout_p)


def fake(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, layer_norm_bias: Tensor, eps: float, dropout_p: float
) -> Tensor:
    """Shape and dtype of the result."""
    return x.new_empty(x.shape)


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.residual_layer_norm import residual_layer_norm

    return residual_layer_norm


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import residual_layer_norm

    return residual_layer_norm


OP = Op(
    "residual_layer_norm",
    "(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor layer_norm_bias, float eps, float dropout_p)"
    " -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(
        Impl("triton", "cuda", (torch.float32, torch.float16, torch.bfloat16), _load_triton),
        Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True),
    ),
    traits=lambda *args: Traits(dropout=args[6] > 0),
)


def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    impl: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last dimension.

    Args:
        x: (..., hidden_size), the sub-layer's product without its bias.
        bias: (hidden_size,), the bias of that product.
        residual: shape of x, the sub-layer's input.
        weight, layer_norm_bias: (hidden_size,), gain and bias of the LayerNorm.
        eps: added to the variance.
        dropout_p: probability of zeroing an element of x + bias; 0 in evaluation.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.
        out: where the result goes, without gradients: contiguous, of its shape and dtype;
            may be x or residual.

    Returns:
        A contiguous tensor of x's shape and dtype. Statistics are taken in float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    return OP(x, bias, residual, weight, layer_norm_bias, eps, dropout_p, impl=impl, out=out)
