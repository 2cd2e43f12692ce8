"""BERT's encoder over a ragged batch of tokens, as a sequence of ops.

`encode` needs only a tree of modules with the names of a Hugging Face checkpoint, so it serves our own classes and
somebody's transformers model alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.activation import GELU_FORMS, activation
from bert_fast.ragged import Ragged

#: Tokens that go through the feed-forward block together on a CPU: enough for full-speed products, few enough that the
#: wide activations stay in the cache between the three steps that touch them.
CHUNK = 1024


def encode(
    bert: Any, ragged: Ragged, hidden_act: str, num_heads: int, hidden_states: list[Tensor] | None = None
) -> Tensor:
    """The rows of the last layer.

    Args:
        bert: has `embeddings` and `encoder`, with the names of a Hugging Face BERT below them.
        ragged: the tokens.
        hidden_act: one of `activation.ACTIVATIONS`.
        num_heads: attention heads.
        hidden_states: if given, the embeddings and the rows of every layer are appended to it.

    Returns:
        (num_tokens, hidden_size), in the dtype of the parameters.
    """
    rows = _embed(bert.embeddings, ragged)
    buffers = _Buffers() if _may_overwrite(rows) else None
    if hidden_states is not None:
        hidden_states.append(rows if buffers is None else rows.clone())
    for layer in bert.encoder.layer:
        if buffers is None:
            rows = _after_attention(layer, _attend(layer.attention.self, rows, ragged, num_heads), rows, hidden_act)
        else:
            context = _attend(layer.attention.self, rows, ragged, num_heads, buffers)
            for part, residual in zip(context.split(CHUNK), rows.split(CHUNK), strict=True):
                _after_attention(layer, part, residual, hidden_act, buffers)
        if hidden_states is not None:
            hidden_states.append(rows if buffers is None else rows.clone())
    return rows


def first_tokens(rows: Tensor, ragged: Ragged) -> Tensor:
    """(batch_size, hidden_size), the first token of each sequence; zeros for one without tokens."""
    return ops.pooling(rows, ragged.cu_seqlens, mode="cls")


class _Buffers:
    """Memory for the intermediate results of a forward on a CPU, used again by every layer and every chunk.

    Fresh memory is not free there: mapping the pages of a new 25 MB tensor takes longer than its GELU.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def like(self, name: str, rows: Tensor, width: int) -> Tensor:
        """The buffer of this name for as many tokens as `rows` has: (num_tokens, width)."""
        buffer = self._tensors.get(name)
        if buffer is None or buffer.shape[0] < rows.shape[0]:
            buffer = self._tensors[name] = rows.new_empty((rows.shape[0], width))
        return buffer[: rows.shape[0]]


def _may_overwrite(rows: Tensor) -> bool:
    """Whether nobody looks at the intermediate results: not autograd, forward-mode derivatives, autocast
    (which picks their dtype), or a compiler.

    On a GPU the allocator keeps freed memory at hand, and chunks would only be more launches.
    """
    seen = torch.is_grad_enabled() or ops.forward_ad_is_on() or torch.is_autocast_enabled(rows.device.type)
    seen = seen or torch.compiler.is_compiling()
    return rows.device.type == "cpu" and not seen


def _linear(name: str, rows: Tensor, weight: Tensor, bias: Tensor | None, buffers: _Buffers | None) -> Tensor:
    """rows @ weight.T + bias: (num_tokens, in_features) -> (num_tokens, out_features)."""
    if buffers is None:
        return F.linear(rows, weight, bias)
    out = buffers.like(name, rows, weight.shape[0])
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


def _embed(embeddings: Any, ragged: Ragged) -> Tensor:
    norm = embeddings.LayerNorm
    return ops.embedding_layer_norm(
        ragged.input_ids,
        ragged.position_ids,
        ragged.token_type_ids,
        embeddings.word_embeddings.weight,
        embeddings.position_embeddings.weight,
        embeddings.token_type_embeddings.weight,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=_dropout_p(embeddings.dropout),
        padding_idx=embeddings.word_embeddings.padding_idx,
    )


def _attend(attention: Any, rows: Tensor, ragged: Ragged, num_heads: int, buffers: _Buffers | None = None) -> Tensor:
    """Self-attention before its output projection: (num_tokens, hidden_size) -> the same."""
    q, k, v = (
        _linear(name, rows, linear.weight, linear.bias, buffers).unflatten(-1, (num_heads, -1))
        for name, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value))
    )  # (num_tokens, num_heads, head_dim)
    return ops.attention(
        q,
        k,
        v,
        cu_seqlens=ragged.cu_seqlens,
        max_seqlen=ragged.max_seqlen,
        dropout_p=attention.dropout.p if attention.training else 0.0,  # transformers, too, asks the module around it
        out=None if buffers is None else buffers.like("context", rows, rows.shape[1]).view(q.shape),
    ).flatten(-2)


def _after_attention(
    layer: Any, context: Tensor, residual: Tensor, hidden_act: str, buffers: _Buffers | None = None
) -> Tensor:
    """The rest of a layer, token by token; with buffers the result overwrites `residual`."""
    rows = _residual(layer.attention.output, context, residual, buffers)
    return _residual(layer.output, _widen(layer.intermediate.dense, rows, hidden_act, buffers), rows, buffers)


def _widen(dense: Any, rows: Tensor, hidden_act: str, buffers: _Buffers | None) -> Tensor:
    """act(dense(rows)): (num_tokens, hidden_size) -> (num_tokens, intermediate_size)."""
    if hidden_act not in GELU_FORMS:
        return activation(_linear("wide", rows, dense.weight, dense.bias, buffers), hidden_act)
    wide = _linear("wide", rows, dense.weight, None, buffers)
    # Under autocast the product comes in the lower dtype, the bias in the parameters'.
    bias = dense.bias.to(wide.dtype)
    return ops.bias_gelu(wide, bias, approximate=GELU_FORMS[hidden_act], out=None if buffers is None else wide)


def _residual(output: Any, rows: Tensor, residual: Tensor, buffers: _Buffers | None) -> Tensor:
    """LayerNorm(residual + dropout(dense(rows)))."""
    norm = output.LayerNorm
    # Under autocast the residual stream stays in the parameters' dtype, as in the plain model.
    product = _linear("product", rows, output.dense.weight, None, buffers).to(residual.dtype)
    return ops.residual_layer_norm(
        product,
        output.dense.bias,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=_dropout_p(output.dropout),
        out=None if buffers is None else residual,
    )


def _dropout_p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
