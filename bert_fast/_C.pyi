# ruff: noqa: N999
"""The C++ kernels, for CPUs: the implementations that the ops of `bert_fast.ops` load. Tensors are float32 or bfloat16.

Each op takes the positional arguments of its schema there, raises ValueError for what it cannot take, and releases the
GIL. Import torch first.
"""

from torch import Tensor

def bias_gelu(x: Tensor, bias: Tensor, approximate: str, out: Tensor | None = None) -> Tensor: ...
def residual_layer_norm(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    out: Tensor | None = None,
) -> Tensor: ...
def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    /,
) -> Tensor: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    out: Tensor | None = None,
) -> Tensor: ...
def pooling(hidden: Tensor, cu_seqlens: Tensor, mode: str, /) -> Tensor: ...
def linear(
    x: Tensor,
    panels: Tensor,
    vectors: Tensor,
    out_features: int,
    in_features: int,
    activation: str | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    /,
) -> Tensor: ...
def pack_weight(weight: Tensor, bias: Tensor, precision: str, /) -> tuple[Tensor, Tensor]:
    """The panels and vectors of a `bert_fast.ops.PackedWeight`; weight and bias are float32."""

def available_isas() -> list[str]:
    """Instruction sets that this machine has, best last."""

def set_isa(name: str, /) -> None:
    """Run on this instruction set from now on; ValueError when the machine does not have it."""

def get_isa() -> str:
    """The instruction set in use: the last `set_isa`, else the environment's BERT_FAST_ISA, else the best one."""

def build_info() -> str:
    """Compiler and torch that this module was built with."""
