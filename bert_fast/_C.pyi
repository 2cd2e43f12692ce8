# ruff: noqa: N999
"""The C++ kernels, for CPUs: the implementations that the ops of `bert_fast.ops` load. Tensors are float32 or bfloat16.

Each op takes the positional arguments of its schema there, raises ValueError for what it cannot take, and releases the
GIL. Import torch first.
"""

from torch import Tensor, dtype
from torch.nn import Module

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

class ForwardResult:
    """What a forward gives; what was not asked for is None or empty."""

    rows: Tensor
    pooled: Tensor
    states: list[Tensor]

class Encoder:
    """An encoder over weights that are packed when it is made; see `bert_fast.engine`."""

    def __init__(
        self,
        precision: str,
        activation: str,
        num_heads: int,
        out_bfloat16: bool,
        word_embeddings: Tensor,
        position_embeddings: Tensor,
        token_type_embeddings: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        norm_eps: float,
        layers: list[list[Tensor]],
        layer_norm_eps: list[tuple[float, float]],
    ) -> None: ...
    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        cu_seqlens: Tensor,
        want_rows: bool = True,
        want_states: bool = False,
        modes: list[str] = [],
        normalize: bool = False,
    ) -> ForwardResult: ...
    def forward_padded(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        want_states: bool = False,
        modes: list[str] = [],
    ) -> ForwardResult: ...
    def packed_bytes(self) -> int: ...

def fingerprint(module: Module) -> tuple[int, int]:
    """(structure, parameters) of a tree of torch modules: whether it has changed."""

# Training (csrc/bindings/training.cpp)

def dropout_bytes(seed: int, first_row: int, rows: int, columns: int, plane: int = 0) -> Tensor:
    """The random bytes that decide about dropout, (rows, columns) uint8."""

# Training (csrc/bindings/attention_backward.cpp)

def attention_train(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(out, lse): q's shape and dtype; float32 of q.shape[:-1], the natural logarithm of the sum of e^(scaled score).

    Both are zero where the mask hides the query. `bias` is refused; `max_seqlen` and `schedule` are not needed.
    """

def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    attention_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    bias: Tensor | None,
    schedule: Tensor | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): views [..., i, :, :] of one (*q.shape[:-2], 3, heads, head_dim) tensor; zero where the mask hides.

    The arguments are those of `attention_train`, what it returned, and the gradient of `out`. A head of a sequence is
    one thread's work, so a single long sequence with few heads leaves threads idle.
    """

def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias."""

def dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_dx: bool, need_dweight: bool, need_dbias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias) of dense, None where not needed."""

def residual_layer_norm_train(
    x: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, the normalised rows in its dtype, and 1 / their standard deviation: float32, one for each row.

    x may be bfloat16 beside float32. seed: int64 scalar; None where dropout_p is 0.
    """

def residual_layer_norm_backward(
    grad: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    dropout_p: float,
    seed: Tensor | None,
    x_dtype: dtype,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbias, dresidual, dweight, dlayer_norm_bias; without dropout and in one dtype dx is dresidual."""

def embedding_layer_norm_train(
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
    seed: Tensor | None,
    /,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `residual_layer_norm_train`; the dropout comes after the LayerNorm."""

def embedding_layer_norm_backward(
    grad: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    normalized: Tensor,
    rstd: Tensor,
    weight: Tensor,
    vocab_rows: int,
    position_rows: int,
    token_type_rows: int,
    dropout_p: float,
    seed: Tensor | None,
    padding_idx: int | None,
    /,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the three tables, dense, and dweight, dlayer_norm_bias. Row padding_idx of words gets none."""

def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, approximate: str, /) -> tuple[Tensor, Tensor]:
    """dx and dbias."""

def pooling_backward(grad: Tensor, hidden: Tensor, cu_seqlens: Tensor, mode: str, /) -> Tensor:
    """The gradient of hidden; zeros in rows past cu_seqlens[-1]."""

def cross_entropy_(logits: Tensor, bias: Tensor, labels: Tensor, /) -> Tensor:
    """The losses (rows,) in float32; logits (rows, classes) become softmax(logits + bias) - onehot(labels)."""
