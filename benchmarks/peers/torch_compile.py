"""`torch.compile` of transformers with SDPA, weights frozen; compiled anew for each shape, in the untimed calls."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. Freezing needs that the calls are made without gradients."""
    torch._dynamo.config.recompile_limit = 64  # shapes; the default of 8 is less than a run has
    compiled = torch.compile(model.to(getattr(torch, precision)), dynamic=False, options={"freezing": True})
    return last_hidden_state(compiled)
