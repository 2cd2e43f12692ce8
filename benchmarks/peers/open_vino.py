"""OpenVINO, in its mode for low latency: all threads work on one call."""

from __future__ import annotations

from typing import Any

import openvino
import torch
from torch import Tensor

from benchmarks.peers.tracing import LastHiddenState, example, quiet
from bert_fast.benchmarking import Encode

HINTS = {"float32": "f32", "bfloat16": "bf16"}


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    inputs = example(model)
    with quiet():
        converted = openvino.convert_model(
            LastHiddenState(model).eval(), example_input=inputs, input=[(name, [-1, -1]) for name in inputs]
        )
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": HINTS[precision],
    }
    compiled = openvino.Core().compile_model(converted, "CPU", properties)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return encode
