"""The one list of shapes: every benchmark takes its models and batches from here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bert_fast.benchmarking import load
from bert_fast.config import BertConfig

MINILM_L6 = BertConfig(hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
BERT_BASE = BertConfig()
BERT_LARGE = BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)

#: Whether everything runs, not how fast.
TINY = BertConfig(vocab_size=500, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256)


@dataclass(frozen=True)
class ModelCases:
    """A model and the batches it is timed on (`bert_fast.benchmarking.parse_case` reads them).

    Attributes:
        title: what tables call it.
        source: checkpoint with the real weights, or a configuration that gets random ones.
        cases: the batches.
    """

    title: str
    source: str | BertConfig
    cases: tuple[str, ...]


#: Per model: one short text, one long, a full batch where nothing is padding, and lengths as texts have them.
MODELS = {
    "minilm": ModelCases("MiniLM-L6", "demo", ("1x16", "1x128", "32x128", "mix32")),
    "base": ModelCases("BERT-base", BERT_BASE, ("1x16", "1x128", "16x128", "mix16")),
    "large": ModelCases("BERT-large", BERT_LARGE, ("1x128", "mix8")),
    "tiny": ModelCases("Tiny", TINY, ("squad3", "1x16")),
}


#: Models timed when none is named.
DEFAULT_MODELS = ("minilm", "base")

#: The model and batches that show how throughput depends on the number of texts, and on their length.
SWEEP_MODEL = "minilm"
SWEEP = {
    "number of texts of 128 tokens": tuple(f"{batch_size}x128" for batch_size in (1, 2, 4, 8, 16, 32)),
    "length of 8 texts, in tokens": tuple(f"8x{seq_len}" for seq_len in (8, 16, 32, 64, 128, 256, 512)),
}

#: Texts of mixed lengths that are encoded from strings.
NUM_STRINGS = 256


@dataclass(frozen=True)
class Workload:
    """A model in one precision, and its batches, the most telling first."""

    model: str
    dtype: str
    cases: tuple[str, ...]


#: What a GPU is measured on, the most telling first: as much of it as the time allows.
GPU_WORKLOADS = (
    Workload("base", "bfloat16", ("squad64", "1x128", "128x128", "mix256", "32x384", "1x16", "1x384")),
    Workload("large", "bfloat16", ("squad64", "1x128", "32x384", "128x128", "mix256", "1x16", "1x384")),
    Workload("large", "float8_e4m3fn", ("squad64", "32x384", "1x128")),
    Workload("base", "float16", ("squad64", "128x128", "1x128")),
    Workload("large", "float16", ("squad64",)),
    Workload("base", "float8_e4m3fn", ("squad64", "128x128")),
)

#: What peers are timed on that compile each shape anew, for tens of seconds: again the most telling first.
GPU_COMPILED = (
    Workload("base", "bfloat16", ("squad64", "128x128", "1x128")),
    Workload("large", "bfloat16", ("squad64",)),
)


@dataclass(frozen=True)
class KernelCase:
    """A kernel alone, on a batch: activations of `width` features, 64 to a head."""

    op: str
    case: str
    dtype: str = "bfloat16"
    width: int = 1024
    dropout_p: float = 0.0

    @property
    def name(self) -> str:
        """What tables call the batch."""
        return f"{self.case}, width {self.width}{f', dropout {self.dropout_p}' if self.dropout_p else ''}"


#: Tensors of 0.2 to 0.3 gigabytes: several times any L2, and a launch is hidden behind the kernel before.
KERNELS = (
    *(KernelCase("attention", case) for case in ("256x512", "512x256", "1024x128", "squad728", "2048x64", "mix3072")),
    KernelCase("attention_backward", "256x512"),
    KernelCase("attention_backward", "256x512", dropout_p=0.1),
    KernelCase("residual_layer_norm", "1024x128"),
    KernelCase("embedding_layer_norm", "1024x128"),
    KernelCase("bias_gelu", "256x128", width=4096),
    *(KernelCase("attention", case, "float16") for case in ("256x512", "1024x128")),
    KernelCase("residual_layer_norm", "1024x128", "float16"),
    KernelCase("residual_layer_norm", "1024x128", width=768),
    KernelCase("linear_gelu", "256x128"),
    KernelCase("pooling", "squad728"),
)

#: Of each kernel something small: whether it runs, not how fast.
QUICK_KERNELS = (
    KernelCase("attention", "3x8", width=128),
    KernelCase("attention", "mix5", "float32", width=64),
    KernelCase("attention_backward", "mix5", "float32", width=64),
    KernelCase("attention_backward", "3x8", "float32", width=64, dropout_p=0.1),
    *(
        KernelCase(op, "mix4", width=64)
        for op in ("residual_layer_norm", "embedding_layer_norm", "bias_gelu", "linear_gelu", "pooling")
    ),
)


@dataclass(frozen=True)
class TrainCase:
    """Steps of training.

    Attributes:
        model: a key of `MODELS`.
        task: "classification" of whole texts, or "mlm", which predicts 15% of the tokens.
        batch: the texts of a step (`parse_case`); of a mix, the distribution that they are drawn from.
        steps: timed together, as their batches differ.
    """

    model: str
    task: str
    batch: str
    steps: int


#: On a CPU: as many texts as leave time for every contender.
TRAINING = (
    TrainCase("minilm", "classification", "mix16", 5),
    TrainCase("minilm", "mlm", "mix16", 5),
    TrainCase("base", "classification", "mix8", 3),
    TrainCase("base", "mlm", "mix8", 3),
)

#: On a GPU, the most telling first: the real mix beside transformers, then pre-training in full batches.
GPU_TRAINING = (
    TrainCase("base", "classification", "squad64", 4),
    TrainCase("base", "mlm", "128x128", 2),
    TrainCase("large", "mlm", "32x512", 2),
    TrainCase("base", "mlm", "squad64", 4),
)

#: Whether it runs, not how fast.
QUICK_TRAINING = (TrainCase("tiny", "classification", "mix4", 3), TrainCase("tiny", "mlm", "mix4", 3))


def build_model(source: str | BertConfig) -> Any:
    """A `ModelCases.source` as transformers' BertModel in float32 and eval mode; random weights are always the same."""
    if isinstance(source, str):
        return load(source, "float32")
    from transformers import BertConfig as TransformersConfig
    from transformers import BertModel

    torch.manual_seed(0)
    return BertModel(TransformersConfig.from_dict(source.to_dict(), attn_implementation="sdpa")).eval()


@dataclass(frozen=True)
class OpCase:
    """Sizes at which single ops are timed: those of a model, on a batch; and why these."""

    model: str
    config: BertConfig
    case: str
    reason: str


OP_CASES = (
    OpCase("minilm", MINILM_L6, "1x16", "one query: the cost of a call shows"),
    OpCase("minilm", MINILM_L6, "mix32", "ragged: sequences of very different lengths share the cores"),
    OpCase("minilm", MINILM_L6, "32x128", "full batch, head_dim 32: activations of several megabytes"),
    OpCase("base", BERT_BASE, "16x128", "hidden_size 768, head_dim 64: the sizes of most checkpoints"),
    OpCase("base", BERT_BASE, "2x512", "the longest sequences: attention outweighs the rest"),
)


def products(config: BertConfig) -> dict[str, tuple[int, int, str]]:
    """The products of a layer: name -> in_features, out_features, and what follows (`benchmarks/test_ops.py`)."""
    hidden, wide = config.hidden_size, config.intermediate_size
    return {
        "qkv": (hidden, 3 * hidden, "bias"),
        "attention output": (hidden, hidden, "residual and LayerNorm"),
        "intermediate": (hidden, wide, "gelu"),
        "output": (wide, hidden, "residual and LayerNorm"),
    }
