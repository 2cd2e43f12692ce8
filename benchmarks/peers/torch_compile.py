"""`torch.compile` of transformers with SDPA; compiled anew for each shape, in the untimed calls."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. With frozen weights on a CPU, which needs calls without gradients; max-autotune on a GPU."""
    torch._dynamo.config.recompile_limit = 64  # shapes; the default of 8 is less than a run has
    model = model.to(getattr(torch, precision))
    if model.device.type == "cuda":
        return last_hidden_state(torch.compile(model, dynamic=False, mode="max-autotune"))
    return last_hidden_state(torch.compile(model, dynamic=False, options={"freezing": True}))
