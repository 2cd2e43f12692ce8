"""What attention in training, C++, refuses: the same for every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bert_fast import _C

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": torch.zeros(2, 6, 6)}, r"bias has shape \(2, 6, 6\), expected None"),
    "dropout_p below 0": ({"dropout_p": -0.1}, "dropout_p is -0.1, expected 0 to 1"),
    "dropout_p no number": ({"dropout_p": float("nan")}, "dropout_p is nan, expected 0 to 1"),
    "no seed": ({"seed": None}, "dropout_p is 0.5 without a seed"),
    "seed's dtype": ({"seed": torch.tensor(1.0)}, "seed is torch.float32 of shape"),
    "seed's shape": ({"seed": torch.tensor([1])}, r"seed is torch.int64 of shape \(1,\), expected an int64 scalar"),
    "k's shape": ({"k": torch.ones(6, 2, 3)}, r"k has shape \(6, 2, 3\), expected \(6, 2, 4\)"),
    "v's dtype": ({"v": torch.ones(6, 2, 4).half()}, "v is torch.float16, expected torch.float32 or torch.bfloat16"),
    "dimensions": ({"cu_seqlens": None}, r"q has shape \(6, 2, 4\), expected \(batch_size, seq_len, heads"),
    "offsets": ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "cu_seqlens runs from 0 to 7, expected"),
    "mask and offsets": ({"attention_mask": torch.ones(1, 6, dtype=torch.bool)}, "attention_mask and cu_seqlens are"),
}

REFUSED_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    **REFUSED,
    "grad's shape": ({"grad": torch.ones(6, 2, 3)}, r"grad has shape \(6, 2, 3\), expected \(6, 2, 4\)"),
    "grad's dtype": ({"grad": torch.ones(6, 2, 4).double()}, "grad is torch.float64, expected torch.float32"),
    "out's shape": ({"out": torch.ones(5, 2, 4)}, r"out has shape \(5, 2, 4\), expected \(6, 2, 4\)"),
    "lse's shape": ({"lse": torch.ones(6, 3)}, r"lse has shape \(6, 3\), expected \(6, 2\)"),
    "lse's dtype": ({"lse": torch.ones(6, 2).bfloat16()}, "lse is torch.bfloat16, expected torch.float32"),
}


ARGUMENTS: dict[str, Any] = {
    **dict.fromkeys(("q", "k", "v"), torch.ones(6, 2, 4)),
    **{"cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32), "max_seqlen": 4, "attention_mask": None},
    **{"scale": 1.0, "dropout_p": 0.5, "bias": None, "schedule": None, "seed": torch.tensor(7)},
}
SAVED = {"grad": torch.ones(6, 2, 4), "out": torch.ones(6, 2, 4), "lse": torch.zeros(6, 2)}


@pytest.mark.parametrize(("changed", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"attention_train: {match}"):
        _C.attention_train(**{**ARGUMENTS, **changed})


@pytest.mark.parametrize(("changed", "match"), REFUSED_BACKWARD.values(), ids=REFUSED_BACKWARD.keys())
def test_refused_backward(changed: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"attention_backward: {match}"):
        _C.attention_backward(**{**ARGUMENTS, **SAVED, **changed})
