"""masked_lm_loss: the loss and its gradients against the definition, in one block and in several, and refusals."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from numerics import assert_no_worse
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.masked_lm_loss import reference

module = importlib.import_module("bert_fast.ops.masked_lm_loss")  # the package has the function by this name


def inputs(rows: int, dtype: torch.dtype = torch.float32, weight_dtype: torch.dtype | None = None) -> tuple[Any, ...]:
    """hidden, weight, bias, labels: 300 words, 40 channels."""
    weight_dtype = weight_dtype or dtype
    hidden = torch.randn(rows, 40).to(dtype).requires_grad_()
    weight = (torch.randn(300, 40) / 4).to(weight_dtype).requires_grad_()
    return hidden, weight, torch.randn(300).to(weight_dtype).requires_grad_(), torch.randint(300, (rows,))


def outcome(function: Any, args: tuple[Any, ...], divisor: float) -> list[Tensor]:
    """The losses of the rows one by one, and three times the gradients of the loss of all of them."""
    hidden, weight, bias, labels = args
    with torch.no_grad():
        rows = [function(hidden[i : i + 1], weight, bias, labels[i : i + 1], 1.0) for i in range(len(labels))]
    loss = function(*args, divisor)
    torch.testing.assert_close(loss, sum(rows, torch.zeros(())).to(loss.dtype) / divisor)
    return [torch.stack(rows), *torch.autograd.grad(loss * 3, args[:3])]


def run(*args: Any) -> Tensor:
    return ops.masked_lm_loss(*args[:4], divisor=args[4], impl="cpp")


@pytest.mark.parametrize("block_scores", [2**24, 300 * 5, 1], ids=["one block", "blocks of 5 rows", "row by row"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_loss_and_gradients(
    dtype: torch.dtype, weight_dtype: torch.dtype, block_scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", block_scores)
    args = inputs(17, dtype, weight_dtype)
    wide = (*(t.detach().double().requires_grad_() for t in args[:3]), args[3])
    found, plain, truth = outcome(run, args, 11.0), outcome(reference, args, 11.0), outcome(reference, wide, 11.0)
    assert [t.dtype for t in found] == [torch.float32, dtype, weight_dtype, weight_dtype]
    for name, f, p, t in zip(("losses", "dhidden", "dweight", "dbias"), found, plain, truth, strict=True):
        assert_no_worse(f, p, t, name=name)


def test_the_loss_alone_is_the_same() -> None:
    args = inputs(17)
    with torch.no_grad():
        assert torch.equal(run(*args, 1.0), run(*args, 1.0))
    torch.testing.assert_close(run(*args, 1.0), reference(*args, 1.0))


def test_no_rows_are_no_loss_and_no_gradients() -> None:
    args = inputs(0)
    loss = ops.masked_lm_loss(*args)
    gradients = torch.autograd.grad(loss, args[:3])
    assert loss == 0
    assert [g.shape for g in gradients] == [(0, 40), (300, 40), (300,)]
    assert all(g.count_nonzero() == 0 for g in gradients)


def test_the_mean_is_the_default() -> None:
    hidden, weight, bias, labels = inputs(6)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.t() + bias, labels)
    torch.testing.assert_close(ops.masked_lm_loss(hidden, weight, bias, labels), expected)


def test_scores_of_all_rows_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SCORES", 300 * 4)
    seen = []
    launchers = module._load_cpp_training()

    def dense(x: Tensor, *others: Any) -> Any:
        seen.append(x.shape[0])
        return launchers.dense(x, *others)

    spied = type(launchers)(**{**vars(launchers), "dense": dense})
    module._forward(spied, *inputs(10), 1.0)
    assert seen == [4, 4, 2]


def test_gradcheck_of_the_definition() -> None:
    hidden, weight, bias, labels = inputs(3, torch.float64)
    assert torch.autograd.gradcheck(lambda *tensors: reference(*tensors, labels, 2.0), (hidden, weight, bias))


REFUSED = {
    "a label out of range": ({"labels": torch.tensor([5, 300])}, r"labels 300 at index 1 is out of range \[0, 300\)"),
    "an ignored label": ({"labels": torch.tensor([5, -100])}, r"labels -100 at index 1 is out of range"),
    "labels' shape": ({"labels": torch.tensor([5])}, r"labels has shape \(1,\), expected \(2,\)"),
    "labels' dtype": ({"labels": torch.tensor([5, 6], dtype=torch.int32)}, "labels is torch.int32, expected int64"),
    "hidden's width": ({"hidden": torch.ones(2, 41)}, r"hidden has shape \(2, 41\) and weight \(300, 40\)"),
    "bias's shape": ({"bias": torch.ones(299)}, r"bias has shape \(299,\), expected \(300,\)"),
    "dtypes": ({"hidden": torch.ones(2, 40, dtype=torch.float64)}, "weight is torch.float32 but hidden is"),
    "a divisor of zero": ({"divisor": 0}, r"divisor is 0\.0, expected a positive number"),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], match: str) -> None:
    hidden, weight, bias, labels = inputs(2)
    args = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, **changes}
    with pytest.raises(ValueError, match=match):
        ops.masked_lm_loss(**args)
