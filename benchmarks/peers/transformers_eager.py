"""transformers with attention written out in PyTorch operations."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    model.set_attn_implementation("eager")
    return last_hidden_state(model.to(getattr(torch, precision)))
