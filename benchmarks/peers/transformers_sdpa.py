"""transformers with SDPA attention, as it is: what every row starts from."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. For int8, which it has not, the model stays in float32; for fp8 it is in bfloat16."""
    dtype = {"int8": torch.float32, "float8_e4m3fn": torch.bfloat16}.get(precision)
    return last_hidden_state(model.to(dtype or getattr(torch, precision)))
