"""LayerNorm(residual + dropout(x + bias)): how each of BERT's sub-layers ends (post-LayerNorm, Ba et al., 2016)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, Traits, extension, triton_launchers
from bert_fast.ops._dropout import draw_seeds, dropout

#: dtypes that x may have beside float32, as autocast has it.
NARROW = (torch.bfloat16, torch.float16)


def reference(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition. The variance is the biased one, over the last dimension."""
    hidden = dropout(x + bias, dropout_p, seed) + residual
    return F.layer_norm(hidden, hidden.shape[-1:], weight, layer_norm_bias, eps)


def check(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> None:
    """ValueError for shapes, dtypes or devices that no implementation takes."""
    op = "residual_layer_norm"
    rows = {"x": x, "residual": residual}
    if x.dtype in NARROW and residual.dtype == torch.float32 and x.device == residual.device:
        rows.pop("x")
    _check.same_kind(op, **rows, bias=bias, weight=weight, layer_norm_bias=layer_norm_bias)
    if x.dim() < 1:
        raise ValueError(f"{op}: x is a scalar, expected (..., hidden_size)")
    _check.shape(op, "residual", residual, x.shape)
    for name, vector in (("bias", bias), ("weight", weight), ("layer_norm_bias", layer_norm_bias)):
        _check.shape(op, name, vector, x.shape[-1:])
    _check.dropout(op, dropout_p, seed)


def fake(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None = None,
) -> Tensor:
    """Shape and dtype of the result."""
    return residual.new_empty(residual.shape)


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.residual_layer_norm import residual_layer_norm

    return _without_seed(residual_layer_norm)


def _load_triton_training() -> Any:
    return triton_launchers("residual_layer_norm", "residual_layer_norm_train")


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import residual_layer_norm

    return _without_seed(residual_layer_norm)


def _without_seed(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel for inference, which has no dropout and takes one dtype."""

    def run(x: Tensor, bias: Tensor, residual: Tensor, *args: Any, out: Tensor | None = None) -> Tensor:
        x = x.to(residual.dtype) if x.dtype in NARROW else x
        return fused(x, bias, residual, *args[:4], out=out)

    return run


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = launchers.residual_layer_norm_train(*args)
    return out


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    x, _, _, weight, _, _, dropout_p, seed = args
    normalized, rstd = saved
    dx, dbias, dresidual, dweight, dlayer_norm_bias = launchers.residual_layer_norm_backward(
        grad, normalized, rstd, weight, dropout_p, seed, x.dtype
    )
    return dx, dbias, dresidual, dweight, dlayer_norm_bias, None, None, None


def _saved(x: Tensor, bias: Tensor, residual: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """The rows before gain and bias, and one over the deviation of each."""
    rows = residual[..., 0].numel() if residual.shape[-1] else 0
    return residual.new_empty(residual.shape), residual.new_empty(rows, dtype=torch.float32)


def _cpp_limits(traits: Traits) -> str | None:
    return "takes no float16" if traits.half else None


OP = Op(
    "residual_layer_norm",
    "(Tensor x, Tensor bias, Tensor residual, Tensor weight, Tensor layer_norm_bias, float eps, float dropout_p,"
    " Tensor? seed) -> Tensor",
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
    lead=2,
    traits=lambda *args: Traits(dropout=args[6] > 0, half=args[0].dtype == torch.float16),
    gradient=Gradient(_forward, _backward, _saved, reads=(3, 7)),
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
    seed: Tensor | None = None,
    impl: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x + bias)) over the last dimension.

    Args:
        x: (..., hidden_size), the sub-layer's product without its bias; bfloat16 or float16 beside float32 is legal, as
            autocast has it.
        bias: (hidden_size,), the bias of that product.
        residual: shape of x, the sub-layer's input.
        weight, layer_norm_bias: (hidden_size,), gain and bias of the LayerNorm.
        eps: added to the variance.
        dropout_p: probability of zeroing an element of x + bias, rounded to a 256th; 0 in evaluation.
        seed: int64 scalar on the CPU, of which the mask is a function; drawn from torch's generator when not given.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.
        out: where the result goes, without gradients: contiguous, of its shape and dtype;
            may be x or residual.

    Returns:
        A contiguous tensor of residual's shape and dtype. Statistics are taken in float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    if dropout_p > 0 and seed is None:
        seed = draw_seeds(1)[0]
    return OP(x, bias, residual, weight, layer_norm_bias, eps, dropout_p, seed, impl=impl, out=out)
