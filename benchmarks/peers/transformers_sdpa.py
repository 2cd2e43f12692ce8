"""transformers with SDPA attention, as it is: what every row starts from."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. In int8, which it has not, the model stays in float32."""
    return last_hidden_state(model.to(torch.float32 if precision == "int8" else getattr(torch, precision)))
