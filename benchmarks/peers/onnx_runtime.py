"""ONNX Runtime, after its transformer optimiser; int8 with dynamic quantisation, one scale per output channel."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.optimizer import optimize_model
from torch import Tensor

from benchmarks.peers.tracing import LastHiddenState, example, quiet
from bert_fast.benchmarking import Encode


def build(model: Any, precision: str) -> Encode:
    """See `Peer.build`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with TemporaryDirectory() as folder:
        path = _optimized(model, Path(folder))
        if precision == "int8":
            path = _quantized(path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        (hidden,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return torch.from_numpy(hidden)

    return encode


def _optimized(model: Any, folder: Path) -> Path:
    """The model exported, with whole steps (attention, residual and LayerNorm, bias and GELU) as single nodes."""
    exported, optimized = folder / "exported.onnx", folder / "optimized.onnx"
    model.set_attn_implementation("eager")  # the optimiser finds attention in this form only ...
    inputs = example(model)
    with quiet():
        torch.onnx.export(
            LastHiddenState(model).eval(),
            tuple(inputs.values()),
            str(exported),
            dynamo=False,  # ... and as the older exporter writes it
            input_names=list(inputs),
            output_names=["last_hidden_state"],
            dynamic_axes={name: {0: "batch_size", 1: "seq_len"} for name in (*inputs, "last_hidden_state")},
        )
    config = model.config
    fused = optimize_model(str(exported), "bert", config.num_attention_heads, config.hidden_size)
    if (found := fused.get_fused_operator_statistics()["Attention"]) != config.num_hidden_layers:
        raise RuntimeError(f"ONNX Runtime's optimiser fused {found} attentions of {config.num_hidden_layers}")
    fused.save_model_to_file(str(optimized))
    return optimized


def _quantized(path: Path) -> Path:
    quantized = path.with_name("int8.onnx")
    quantize_dynamic(
        str(path),
        str(quantized),
        op_types_to_quantize=["MatMul", "Attention"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # shape inference does not know fused nodes
    )
    return quantized
