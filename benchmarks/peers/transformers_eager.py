"""transformers with attention written out in PyTorch operations."""

from __future__ import annotations

import copy
from typing import Any

import torch

from bert_fast.benchmarking import Encode


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    eager = copy.deepcopy(model).to(getattr(torch, precision))
    eager.set_attn_implementation("eager")
    return lambda inputs: eager(**inputs).last_hidden_state
