"""transformers with PyTorch's own dynamic quantisation of every linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.ao.quantization import quantize_dynamic

from benchmarks.peers.tracing import quiet
from bert_fast.benchmarking import Encode, last_hidden_state


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    with quiet():  # that it is to move to another package
        return last_hidden_state(quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8, inplace=True))
