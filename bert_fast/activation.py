"""The activations a checkpoint's `hidden_act` can name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

#: How `torch.nn.functional.gelu` spells each form of GELU: the erf form, and the tanh form of Google's own code.
GELU_FORMS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

ACTIVATIONS = (*GELU_FORMS, "relu", "silu", "tanh")


def activation(x: Tensor, hidden_act: str) -> Tensor:
    """Apply the activation named `hidden_act`, one of `ACTIVATIONS`."""
    if hidden_act in GELU_FORMS:
        return F.gelu(x, approximate=GELU_FORMS[hidden_act])
    other: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh}
    return other[hidden_act](x)
