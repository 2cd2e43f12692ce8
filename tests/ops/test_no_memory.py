"""Tensors of the right shape that hold no values: the C++ kernels refuse them, they do not read address 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bert_fast import _C


def freed(tensor: Tensor) -> Tensor:
    """As sharding leaves the weights of a layer that does not run."""
    tensor.untyped_storage().resize_(0)
    return tensor


WITHOUT_MEMORY: dict[str, Callable[[Tensor], Tensor]] = {
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "the zero derivative of forward mode": lambda t: torch._efficientzerotensor(t.shape),
    "freed storage": freed,
}
X, WEIGHT, VECTOR = torch.ones(2, 3), torch.ones(3, 3), torch.ones(3)
HEADS, OFFSETS, IDS = torch.ones(2, 1, 3), torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 1])
CALLS: dict[str, list[Any]] = {
    "bias_gelu": [X, VECTOR, "none"],
    "bias_gelu_backward": [X, X, VECTOR, "none"],
    "residual_layer_norm_train": [X, VECTOR, X, VECTOR, VECTOR, 1e-12, 0.0, None],
    "residual_layer_norm_backward": [X, X, torch.ones(2), VECTOR, 0.0, None, torch.float32],
    "embedding_layer_norm_train": [*(IDS,) * 3, *(WEIGHT,) * 3, VECTOR, VECTOR, 1e-12, 0.0, None],
    "pooling_backward": [X[:1], X, OFFSETS, "mean"],
    "cross_entropy_": [X, VECTOR, IDS],
    "dense": [X, WEIGHT, VECTOR],
    "dense_backward": [X, X, WEIGHT, True, True, True],
    "attention": [HEADS, HEADS, HEADS, OFFSETS, 2, None, 1.0, 0.0],
    "attention_train": [HEADS, HEADS, HEADS, OFFSETS, 2, None, 1.0, 0.0, None, None, None],
}


@pytest.mark.parametrize("without", WITHOUT_MEMORY.values(), ids=WITHOUT_MEMORY.keys())
@pytest.mark.parametrize(("function", "args"), CALLS.items(), ids=CALLS.keys())
def test_refused(function: str, args: list[Any], without: Callable[[Tensor], Tensor]) -> None:
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.is_floating_point():
            given = [a.clone() if isinstance(a, Tensor) else a for a in args]
            given[index] = without(given[index])
            with pytest.raises(ValueError, match="has no memory, expected a tensor that holds its values"):
                getattr(_C, function)(*given)
