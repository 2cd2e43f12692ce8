"""The C++ cross_entropy_: numbers, layouts, odd inputs, threads, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from numerics import assert_no_worse
from torch import Tensor
from training_definitions import assert_same, outcome

from bert_fast import _C

LOGITS = {
    "one class: nothing to learn": (3, 1),
    "two": (5, 2),
    "less than a vector": (4, 7),
    "one past four vectors of 16": (3, 65),
    "one past the blocks of sums": (12, 513),
    "BERT's vocabulary": (3, 30522),
}


def cross_entropy_gradients(logits: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax - onehot by plain PyTorch, and the truth: at the label minus the others, as 1 is no digit of it."""
    plain = outcome(lambda x: F.cross_entropy(x + bias, labels, reduction="sum"), torch.tensor(1.0), logits)[1]
    index = labels[:, None]
    others = (logits.double() + bias.double()).softmax(-1).scatter(1, index, 0.0)
    return plain, others.scatter(1, index, -others.sum(-1, keepdim=True))


@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["own bias", "float32 bias"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("rows", "classes"), LOGITS.values(), ids=LOGITS.keys())
def test_cross_entropy(
    cpp: Implementation, rows: int, classes: int, scale: float, bias_dtype: torch.dtype | None
) -> None:
    logits, bias = cpp.randn(rows, classes) * scale, cpp.randn(classes).to(bias_dtype or cpp.dtype)
    labels = torch.randint(classes, (rows,))
    labels[:2] = torch.tensor([0, classes - 1])  # the ends of a row
    truth = F.cross_entropy((logits.double() + bias.double()), labels, reduction="none")
    plain = F.cross_entropy((logits.float() + bias.float()), labels, reduction="none")
    gradients = cross_entropy_gradients(logits, bias, labels)
    losses = _C.cross_entropy_(logits, bias, labels)
    assert_no_worse(losses, plain, truth, "losses")
    assert_no_worse(logits, *gradients, "gradient")


def test_cross_entropy_of_many_classes(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(2, 300_000), cpp.randn(300_000), torch.tensor([299_999, 5])
    gradients = cross_entropy_gradients(logits, bias, labels)
    _C.cross_entropy_(logits, bias, labels)
    assert_no_worse(logits, *gradients, "gradient")


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number(cpp: Implementation) -> None:
    logits = torch.full((2, 64), 1e4, dtype=cpp.dtype)
    losses = _C.cross_entropy_(logits, torch.zeros(64, dtype=cpp.dtype), torch.tensor([3, 60]))
    torch.testing.assert_close(losses, torch.full((2,), 64.0).log())
    assert logits[0, 0] == 1 / 64
    assert logits[0, 3] == cpp.tensor(1 / 64 - 1)


def test_cross_entropy_of_an_almost_certain_label(cpp: Implementation) -> None:
    logits = cpp.tensor([[0.0, -1.0, 15.0, -2.0]])
    others = sum(torch.tensor([-15.0, -16.0, -17.0], dtype=torch.float64).exp())
    losses = _C.cross_entropy_(logits, torch.zeros(4, dtype=cpp.dtype), torch.tensor([2]))
    torch.testing.assert_close(losses.double(), torch.log1p(others)[None], rtol=1e-5, atol=0)
    expected = -others / (1 + others)
    torch.testing.assert_close(logits[0, 2].double(), expected, rtol=1e-5 + torch.finfo(cpp.dtype).eps, atol=0)


def test_cross_entropy_odd_logits_stay_in_their_row(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(4, 100), cpp.randn(100), torch.randint(1, 100, (4,))
    clean = logits.clone()
    clean_losses = _C.cross_entropy_(clean, bias, labels)
    logits[0, 99], logits[1, 5], logits[2, 0] = torch.nan, torch.inf, -torch.inf
    losses = _C.cross_entropy_(logits, bias, labels)
    assert losses[:2].isnan().all()
    assert logits[:2].isnan().all()
    assert logits[2, 0] == 0
    assert logits[2].isfinite().all()
    assert losses[3] == clean_losses[3]
    assert torch.equal(logits[3], clean[3])


def test_cross_entropy_zero_size(cpp: Implementation) -> None:
    for classes in (0, 5):
        losses = _C.cross_entropy_(cpp.randn(0, classes), cpp.randn(classes), torch.zeros(0, dtype=torch.int64))
        assert (losses.dtype, losses.shape) == (torch.float32, (0,))


def test_cross_entropy_bias_and_labels_in_any_layout(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(5, 40), cpp.randn(40), torch.randint(40, (5,))
    other = logits.clone()
    losses = _C.cross_entropy_(logits, bias, labels)
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (bias, labels)]
    assert_same((_C.cross_entropy_(other, *spread), other), (losses, logits))


def test_cross_entropy_threads(threads: int) -> None:
    logits, bias, labels = torch.randn(50, 3000), torch.randn(3000), torch.randint(3000, (50,))
    other = logits.clone()
    losses = _C.cross_entropy_(logits, bias, labels)
    torch.set_num_threads(1)
    assert_same((losses, logits), (_C.cross_entropy_(other, bias, labels), other))


def test_labels_that_would_be_overwritten_are_refused() -> None:
    logits = torch.zeros(2, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        _C.cross_entropy_(logits, torch.zeros(4), logits[0].view(torch.int64))


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "a label": (
        "cross_entropy_",
        [torch.ones(2, 3), torch.ones(3), torch.tensor([0, -100])],
        r"labels -100 at index 1 is out of range \[0, 3\)",
    ),
    "labels' shape": ("cross_entropy_", [torch.ones(2, 3), torch.ones(3), torch.tensor([0])], "labels has shape"),
    "strided logits": (
        "cross_entropy_",
        [torch.ones(3, 2).T, torch.ones(3), torch.tensor([0, 1])],
        "logits has strides",
    ),
    "logits' dtype": ("cross_entropy_", [torch.ones(2, 3).half(), torch.ones(3), torch.tensor([0, 1])], "logits is"),
    "bias's dtype": (
        "cross_entropy_",
        [torch.ones(2, 3), torch.ones(3).double(), torch.tensor([0, 1])],
        "bias is torch",
    ),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
