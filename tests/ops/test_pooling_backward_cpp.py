"""The gradient of the C++ pooling: numbers, layouts, odd inputs, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import Implementation
from layouts import LAYOUTS
from numerics import assert_no_worse
from torch import Tensor
from training_definitions import outcome

from bert_fast import _C
from bert_fast.ops.pooling import MODES
from bert_fast.ops.pooling import reference as pooling

SEQUENCES = {
    "one token of one channel": ([1], 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 20),
    "only empty sequences": ([0, 0], 20),
    "MiniLM, several blocks of channels": ([4, 7, 70], 384),
    "channels one past a block": ([3, 2], 129),
}


def pooling_gradient(grad: Tensor, hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    return outcome(lambda h: pooling(h, cu_seqlens, mode), grad, hidden)[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), SEQUENCES.values(), ids=SEQUENCES.keys())
def test_pooling(cpp: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden, grad = cpp.randn(sum(lengths), hidden_size), cpp.randn(len(lengths), hidden_size)
    args = (cpp.cu_seqlens(lengths), mode)
    fast = _C.pooling_backward(grad, hidden, *args)
    plain, truth = (pooling_gradient(grad.to(d), hidden.to(d), *args) for d in (cpp.dtype, torch.float64))
    assert_no_worse(fast, plain, truth)


def test_pooling_ties_share(cpp: Implementation) -> None:
    hidden, grad = cpp.randn(30, 20).round(), cpp.randn(2, 20)
    args = (cpp.cu_seqlens([13, 17]), "max")
    truth = pooling_gradient(grad.double(), hidden.double(), *args)
    assert_no_worse(_C.pooling_backward(grad, hidden, *args), pooling_gradient(grad, hidden, *args), truth)
    assert (truth[:13].count_nonzero(0) > 1).any()


def test_pooling_nan_and_infinities_as_amax_has_them(cpp: Implementation) -> None:
    hidden, grad = cpp.randn(30, 20), cpp.randn(2, 20)
    hidden[3, 4], hidden[20, 5], hidden[21, 5], hidden[:13, 6] = torch.nan, torch.inf, torch.inf, -torch.inf
    args = (cpp.cu_seqlens([13, 17]), "max")
    torch.testing.assert_close(
        _C.pooling_backward(grad, hidden, *args), pooling_gradient(grad, hidden, *args), equal_nan=True
    )


@pytest.mark.parametrize("mode", MODES)
def test_pooling_of_rows_past_the_last_sequence(cpp: Implementation, mode: str) -> None:
    hidden, grad, cu_seqlens = cpp.randn(9, 20), cpp.randn(2, 20), cpp.cu_seqlens([3, 4])
    fast = _C.pooling_backward(grad, hidden, cu_seqlens, mode)
    assert torch.equal(fast[:7], _C.pooling_backward(grad, hidden[:7], cu_seqlens, mode))
    assert not fast[7:].any()
    none = _C.pooling_backward(grad[:0], hidden, cpp.cu_seqlens([]), mode)
    assert torch.equal(none, torch.zeros_like(hidden))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pooling_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor], mode: str) -> None:
    args = (cpp.randn(3, 36), cpp.randn(10, 36), cpp.cu_seqlens([3, 0, 7]))
    assert torch.equal(_C.pooling_backward(*map(layout, args), mode), _C.pooling_backward(*args, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), [([], 8), ([3, 2], 0), ([0], 0)], ids=str)
def test_pooling_zero_size(cpp: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden, grad = cpp.randn(sum(lengths), hidden_size), cpp.randn(len(lengths), hidden_size)
    assert _C.pooling_backward(grad, hidden, cpp.cu_seqlens(lengths), mode).shape == hidden.shape


@pytest.mark.parametrize("mode", MODES)
def test_pooling_threads(threads: int, mode: str) -> None:
    args = (torch.randn(3, 384), torch.randn(400, 384), torch.tensor([0, 150, 150, 400], dtype=torch.int32), mode)
    several = _C.pooling_backward(*args)
    torch.set_num_threads(1)
    assert torch.equal(several, _C.pooling_backward(*args))


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "too few tokens": (
        "pooling_backward",
        [torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 3], dtype=torch.int32), "mean"],
        "cu_seqlens runs from 0 to 3, expected 0 to 2",
    ),
    "mode": (
        "pooling_backward",
        [torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 2], dtype=torch.int32), "sum"],
        "mode is 'sum'",
    ),
    "pooling's grad": (
        "pooling_backward",
        [torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2], dtype=torch.int32), "mean"],
        r"grad has shape \(2, 3\), expected \(1, 3\)",
    ),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
