"""bert_fast: transformers' float32 model through `accelerate`, which rounds the weights itself."""

from __future__ import annotations

from typing import Any

import torch

from bert_fast import accelerate
from bert_fast.benchmarking import Encode, last_hidden_state

#: Arguments of `accelerate` and `Embedder` for a precision.
OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "fp32", "free_originals": True},
    "bfloat16": {"precision": "bf16", "free_originals": True},
    "int8": {"precision": "int8", "free_originals": True},
}


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`. On a GPU the model itself is in the precision, in fp8 in bfloat16."""
    if precision == "float8_e4m3fn":
        return last_hidden_state(accelerate(model.bfloat16(), precision="fp8"))
    if model.device.type == "cuda":
        return last_hidden_state(accelerate(model.to(getattr(torch, precision))))
    return last_hidden_state(accelerate(model, **OPTIONS[precision]))
