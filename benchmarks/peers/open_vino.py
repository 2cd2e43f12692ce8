"""OpenVINO, in its mode for low latency: all threads work on one call. int8 is calibrated, with its own NNCF."""

from __future__ import annotations

from typing import Any

import nncf
import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.peers.tracing import LastHiddenState, example, quiet
from bert_fast.benchmarking import Encode
from bert_fast.folders import DEMO, resolve
from bert_fast.tokenization import Tokenizer
from bert_fast.verify import shipped_sentences

#: What is not int8 in an int8 model runs in the type that OpenVINO takes for this CPU.
HINTS = {"float32": {"INFERENCE_PRECISION_HINT": "f32"}, "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16"}, "int8": {}}


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    inputs = example(model)
    with quiet():
        converted = openvino.convert_model(
            LastHiddenState(model).eval(), example_input=inputs, input=[(name, [-1, -1]) for name in inputs]
        )
    if precision == "int8":
        converted = _quantized(converted, model.config)
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        **HINTS[precision],
    }
    compiled = openvino.Core().compile_model(converted, "CPU", properties)

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(compiled({name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return encode


def _quantized(converted: openvino.Model, config: Any) -> openvino.Model:
    """With ranges of activations as the shipped sentences give them."""
    tokenizer = Tokenizer.from_pretrained(resolve(DEMO))

    def inputs(text: str) -> dict[str, NDArray[np.int64]]:
        ids = tokenizer([text], config.max_position_embeddings).input_ids[None] % config.vocab_size
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}

    dataset = nncf.Dataset(shipped_sentences(), inputs)
    return nncf.quantize(converted, dataset, model_type=nncf.ModelType.TRANSFORMER)
