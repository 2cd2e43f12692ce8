"""`torch.compile` of transformers with SDPA, weights frozen; compiled anew for each shape, in the untimed calls."""

from __future__ import annotations

import copy
from typing import Any

import torch

from bert_fast.benchmarking import Encode


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. Freezing needs that the calls are made without gradients."""
    torch.compiler.reset()  # or the shapes of models before this one would count towards the limit on recompilations
    copied = copy.deepcopy(model).to(getattr(torch, precision))
    compiled = torch.compile(copied, dynamic=False, options={"freezing": True})
    return lambda inputs: compiled(**inputs).last_hidden_state
