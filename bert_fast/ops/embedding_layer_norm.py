"""dropout(LayerNorm(word + position + token type)): BERT's input representation (Devlin et al., 2018, figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.checks import ids_in_range
from bert_fast.ops import _check
from bert_fast.ops._autograd import Gradient
from bert_fast.ops._dispatch import Impl, Op, Traits, extension, triton_launchers
from bert_fast.ops._dropout import draw_seeds, dropout


def reference(
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
    padding_idx: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """The definition."""
    hidden = (
        F.embedding(input_ids, word_embeddings, padding_idx)
        + F.embedding(token_type_ids, token_type_embeddings)
        + F.embedding(position_ids, position_embeddings)
    )
    return dropout(F.layer_norm(hidden, hidden.shape[-1:], weight, layer_norm_bias, eps), dropout_p, seed)


def check(
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
    padding_idx: int | None = None,
    seed: Tensor | None = None,
) -> None:
    """ValueError for shapes, dtypes, devices or ids that no implementation takes."""
    op = "embedding_layer_norm"
    tables = {
        "word_embeddings": word_embeddings,
        "position_embeddings": position_embeddings,
        "token_type_embeddings": token_type_embeddings,
    }
    _check.same_kind(op, **tables, weight=weight, layer_norm_bias=layer_norm_bias)
    hidden_size = word_embeddings.shape[-1]
    for name, table in tables.items():
        if table.dim() != 2 or table.shape[1] != hidden_size:
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)}, expected (rows, {hidden_size})")
    for name, vector in (("weight", weight), ("layer_norm_bias", layer_norm_bias)):
        _check.shape(op, name, vector, (hidden_size,))
    for name, ids, table in (
        ("input_ids", input_ids, word_embeddings),
        ("position_ids", position_ids, position_embeddings),
        ("token_type_ids", token_type_ids, token_type_embeddings),
    ):
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{op}: {name} is {ids.dtype}, expected int64 or int32")
        if ids.device != table.device:
            raise ValueError(f"{op}: {name} is on {ids.device} but its table is on {table.device}")
        _check.shape(op, name, ids, input_ids.shape)
        ids_in_range(name, ids, table.shape[0])
    _check.dropout(op, dropout_p, seed)


def fake(
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
    padding_idx: int | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Shape and dtype of the result."""
    return word_embeddings.new_empty((*input_ids.shape, word_embeddings.shape[1]))


def _forward_only(fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel without `padding_idx`, which only the gradient depends on, and without the seed of dropout."""
    return lambda *args: fused(*args[:10])


def _load_triton() -> Callable[..., Tensor]:
    from bert_fast.kernels.embedding_layer_norm import embedding_layer_norm

    return _forward_only(embedding_layer_norm)


def _load_triton_training() -> Any:
    return triton_launchers("embedding_layer_norm", "embedding_layer_norm_train")


def _load_cpp() -> Callable[..., Tensor]:
    from bert_fast._C import embedding_layer_norm

    return _forward_only(embedding_layer_norm)


def _forward(launchers: Any, *args: Any) -> tuple[Tensor, ...]:
    out: tuple[Tensor, ...] = launchers.embedding_layer_norm_train(*args[:10], args[11])
    return out


def _backward(
    launchers: Any, grad: Tensor, result: Tensor | None, saved: Sequence[Tensor], args: Sequence[Any], needed: Any
) -> Sequence[Tensor | None]:
    *ids, word, position, token_type, weight, _, _, dropout_p, padding_idx, seed = args
    rows = (table.shape[0] for table in (word, position, token_type))
    grads = launchers.embedding_layer_norm_backward(grad, *ids, *saved, weight, *rows, dropout_p, seed, padding_idx)
    return (None, None, None, *grads, None, None, None, None)


def _saved(input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor, word: Tensor, *others: Any) -> Any:
    """The rows before gain and bias, and one over the deviation of each."""
    shape = (*input_ids.shape, word.shape[1])
    return word.new_empty(shape), word.new_empty(input_ids.numel(), dtype=torch.float32)


OP = Op(
    "embedding_layer_norm",
    "(Tensor input_ids, Tensor position_ids, Tensor token_type_ids, Tensor word_embeddings,"
    " Tensor position_embeddings, Tensor token_type_embeddings, Tensor weight, Tensor layer_norm_bias,"
    " float eps, float dropout_p, int? padding_idx, Tensor? seed) -> Tensor",
    reference=reference,
    fake=fake,
    check=check,
    impls=(
        Impl(
            "triton",
            "cuda",
            (torch.float32, torch.float16, torch.bfloat16),
            _load_triton,
            load_training=_load_triton_training,
        ),
        Impl("cpp", "cpu", (torch.float32, torch.bfloat16), _load_cpp, validates=True, load_training=extension),
    ),
    lead=3,
    traits=lambda *args: Traits(dropout=args[9] > 0),
    gradient=Gradient(_forward, _backward, _saved, reads=(0, 1, 2, 6, 11)),
)


def embedding_layer_norm(
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    word_embeddings: Tensor,
    position_embeddings: Tensor,
    token_type_embeddings: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    padding_idx: int | None = None,
    seed: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        input_ids, position_ids, token_type_ids: one shape (...), int64 or int32.
        word_embeddings, position_embeddings, token_type_embeddings: (rows, hidden_size) tables.
        weight, layer_norm_bias: (hidden_size,), gain and bias of the LayerNorm.
        eps: added to the variance.
        dropout_p: probability of zeroing an element of the result, rounded to a 256th; 0 in evaluation.
        padding_idx: row of `word_embeddings` that gets no gradient, as in `torch.nn.Embedding`.
        seed: int64 scalar on the CPU, of which the mask is a function; drawn from torch's generator when not given.
        impl: force "triton", "cpp" or "reference"; ValueError when it cannot serve the call.

    Returns:
        (..., hidden_size), contiguous, in the tables' dtype. Statistics are taken in float32 or wider.

    Raises:
        ValueError: an id is outside its table (the message gives its index and value), or shapes, dtypes or devices
            do not match.
    """
    if dropout_p > 0 and seed is None:
        seed = draw_seeds(1)[0]
    return OP(
        input_ids,
        position_ids,
        token_type_ids,
        word_embeddings,
        position_embeddings,
        token_type_embeddings,
        weight,
        layer_norm_bias,
        eps,
        dropout_p,
        padding_idx,
        seed,
        impl=impl,
    )
