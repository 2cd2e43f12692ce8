"""Cross-entropy of a decoder over the vocabulary, without ever holding the scores of all rows.

The scores are made in blocks of rows, and each block becomes its gradient before the next one is made, as in
Liger-Kernel's fused linear cross-entropy (Hsu et al., 2024, arXiv:2410.10989): memory does not grow with rows x words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.checks import ids_in_range
from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op

#: Scores that a block holds: 64 MB of floats.
BLOCK_SCORES = 2**24


def reference(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, divisor: float) -> Tensor:
    """The definition: the sum of the rows' cross-entropies over `divisor`, in float32 or wider."""
    scores = F.linear(hidden, weight.to(hidden.dtype)) + bias.to(hidden.dtype)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return F.cross_entropy(wide, labels, reduction="sum") / divisor


def check(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, divisor: float) -> None:
    """ValueError for shapes, dtypes, devices or labels that no implementation takes."""
    op = "masked_lm_loss"
    _check.same_kind(op, weight=weight, bias=bias)
    if not (hidden.dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32):
        _check.same_kind(op, hidden=hidden, weight=weight)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}, "
            "expected (rows, hidden_size) and (vocab_size, hidden_size)"
        )
    _check.shape(op, "bias", bias, weight.shape[:1])
    _check.shape(op, "labels", labels, hidden.shape[:1])
    for name, tensor in (("hidden", hidden), ("labels", labels)):
        if tensor.device != weight.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but weight is on {weight.device}")
    if labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels is {labels.dtype}, expected int64")
    ids_in_range("labels", labels, weight.shape[0])
    if not divisor > 0:
        raise ValueError(f"{op}: divisor is {divisor}, expected a positive number")


def fake(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, divisor: float) -> Tensor:
    """Shape and dtype of the result."""
    return hidden.new_empty((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)


def _block_size(weight: Tensor) -> int:
    return max(1, BLOCK_SCORES // max(1, weight.shape[0]))


def _run(launchers: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, divisor: float) -> Tensor:
    """The loss alone."""
    loss, size = hidden.new_zeros((), dtype=torch.float32), _block_size(weight)
    for start in range(0, hidden.shape[0], size):
        scores = launchers.dense(hidden[start : start + size], weight, None)
        loss += launchers.cross_entropy_(scores, bias, labels[start : start + size]).sum()
    return loss / divisor


def _forward(
    launchers: Any, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, divisor: float
) -> tuple[Tensor, ...]:
    """The loss, and its gradients by hidden, weight and bias, the last two in float32."""
    loss, size = hidden.new_zeros((), dtype=torch.float32), _block_size(weight)
    inner = _inner_divisor(hidden, divisor)
    scaled = hidden / inner
    dhidden, dweight, dbias = _saved(hidden, weight, bias)
    for start in range(0, hidden.shape[0], size):
        part = slice(start, start + size)
        scores = launchers.dense(hidden[part], weight, None)
        loss += launchers.cross_entropy_(scores, bias, labels[part]).sum()
        # Now they are their gradients, not yet divided.
        dx, dw, db = launchers.dense_backward(scores, scaled[part], weight, True, True, True)
        torch.div(dx, inner, out=dhidden[part])
        if start == 0:
            dweight, dbias = dw.float(), db.float() / inner
        else:
            dweight += dw
            dbias.add_(db, alpha=1 / inner)
    if hidden.shape[0] == 0:
        dweight.zero_(), dbias.zero_()
    return loss / divisor, dhidden, dweight, dbias


def _inner_divisor(hidden: Tensor, divisor: float) -> float:
    """What the gradients are divided by before the upstream gradient is known.

    Not in float16: they would vanish before the factor of a gradient scaler reaches them.
    """
    return 1.0 if hidden.dtype == torch.float16 else divisor


def _saved(hidden: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
        bias.new_empty(bias.shape, dtype=torch.float32),
    )


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    """The gradients are there already: times the upstream one, which most often is 1."""
    hidden, weight, bias, _, divisor = args
    factor = grad * (_inner_divisor(hidden, divisor) / divisor)
    if factor.device.type != "cpu" or factor != 1:
        saved = [gradient * factor for gradient in saved]
    grads = (g.to(a.dtype) for g, a in zip(saved, (hidden, weight, bias), strict=True))
    return (*grads, None, None)


def _load_cpp() -> Callable[..., Tensor]:
    return partial(_run, _load_cpp_training())


def _load_cpp_training() -> Any:
    from bert_fast._C import cross_entropy_, dense, dense_backward

    return SimpleNamespace(cross_entropy_=cross_entropy_, dense=dense, dense_backward=dense_backward)


def _load_triton() -> Callable[..., Tensor]:
    return partial(_run, _load_triton_training())


def _load_triton_training() -> Any:
    from bert_fast.kernels.cross_entropy import cross_entropy_

    return SimpleNamespace(cross_entropy_=cross_entropy_, dense=_dense, dense_backward=_dense_backward)


def _dense(x: Tensor, weight: Tensor, bias: None) -> Tensor:
    return x @ weight.to(x.dtype).t()


def _dense_backward(grad: Tensor, x: Tensor, weight: Tensor, *needed: bool) -> tuple[Tensor, Tensor, Tensor]:
    return grad @ weight.to(grad.dtype), grad.t() @ x, grad.sum(0, dtype=torch.float32)


OP = Op(
    "masked_lm_loss",
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor labels, float divisor) -> Tensor",
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
        Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, load_training=_load_cpp_training),
    ),
    gradient=Gradient(_forward, _backward, _saved),
)


def masked_lm_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    *,
    divisor: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """The cross-entropies of softmax(hidden weight^T + bias), summed over the rows and divided.

    The forward computes the gradients too when they will be wanted, so the backward costs next to nothing, and only
    one block of scores exists at a time.

    Args:
        hidden: (rows, hidden_size): the rows that have a label, after the head's transform. bfloat16 or float16 beside
            float32 weights is legal, as autocast has it.
        weight, bias: (vocab_size, hidden_size) and (vocab_size,), the decoder's.
        labels: (rows,) int64, every one in [0, vocab_size).
        divisor: a positive number; the number of rows when not given, or 1 if there are none.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.

    Returns:
        A float32 scalar; 0 for no rows.

    Raises:
        ValueError: a label is out of range (the message gives its index and value), or shapes, dtypes or devices do
            not match.
    """
    return OP(hidden, weight, bias, labels, float(max(1, labels.shape[0]) if divisor is None else divisor), impl=impl)
