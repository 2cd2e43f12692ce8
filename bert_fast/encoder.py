"""BERT's encoder over a ragged batch of tokens, as a sequence of ops.

`encode` needs only a tree of modules with the names of a Hugging Face checkpoint, so it serves our own classes and
somebody's transformers model alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops, sharding
from bert_fast.activation import GELU_FORMS, activation
from bert_fast.checks import is_transformed
from bert_fast.ragged import Ragged

#: Tokens that go through the feed-forward block together on a CPU: enough for full-speed products, few enough that the
#: wide activations stay in the cache between the three steps that touch them.
CHUNK = 1024


def encode(
    bert: Any,
    ragged: Ragged,
    hidden_act: str,
    num_heads: int,
    hidden_states: list[Tensor] | None = None,
    subset: Tensor | None = None,
) -> Tensor:
    """The rows of the last layer.

    A layer that transformers marked for gradient checkpointing is computed again in the backward.

    Args:
        bert: has `embeddings` and `encoder`, with the names of a Hugging Face BERT below them, and `embeddings_project`
            where the embeddings have another width than the layers.
        ragged: the tokens.
        hidden_act: one of `activation.ACTIVATIONS`.
        num_heads: attention heads.
        hidden_states: if given, the embeddings and the rows of every layer are appended to it.
        subset: (rows,) int64, numbers of the only tokens whose rows are wanted; the last layer leaves out the others
            after its attention. Not with `hidden_states`.

    Returns:
        (num_tokens, hidden_size), or with `subset` (rows, hidden_size), in the dtype of the parameters.
    """
    layers = bert.encoder.layer
    seeds = _seeds(bert, len(layers))
    rows = sharding.called(bert.embeddings, partial(_embed, bert.embeddings, ragged, seeds[0][0]))()
    if (project := getattr(bert, "embeddings_project", None)) is not None:  # a transformers BERT knows of no such thing
        rows = linear(rows, project.weight, project.bias).to(rows.dtype)  # autocast lowers products only
    if _may_overwrite(rows) and not sharding.is_sharded(bert):
        rows = _encode_in_place(bert, rows, ragged, hidden_act, num_heads, hidden_states)
        return rows if subset is None else rows.index_select(0, subset)
    schedule = ops.attention_schedule(rows.unflatten(-1, (num_heads, -1)), ragged.cu_seqlens, ragged.max_seqlen)
    if hidden_states is not None:
        hidden_states.append(rows)
    for index, layer in enumerate(layers):
        run = sharding.called(
            layer,
            partial(
                _layer,
                layer,
                ragged=ragged,
                hidden_act=hidden_act,
                num_heads=num_heads,
                schedule=schedule,
                seeds=seeds[index + 1],
                subset=subset if index + 1 == len(layers) else None,
            ),
        )
        # A wrapper that stands in a layer's place may not have the attribute.
        is_checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        if is_checkpointed and torch.is_grad_enabled() and not rows.requires_grad:
            rows = rows.detach().requires_grad_()  # or re-entry would find nothing to differentiate
        rows = layer._gradient_checkpointing_func(run, rows) if is_checkpointed else run(rows)
        if hidden_states is not None:
            hidden_states.append(rows)
    return rows


def encode_first(bert: Any, ragged: Ragged, hidden_act: str, num_heads: int) -> Tensor:
    """(batch_size, hidden_size), the last layer's row of the first token of each sequence; zeros for an empty one."""
    starts, is_empty = ragged.first()
    return encode(bert, ragged, hidden_act, num_heads, subset=starts).masked_fill(is_empty[:, None], 0.0)


def _layer(
    layer: Any,
    rows: Tensor,
    ragged: Ragged,
    hidden_act: str,
    num_heads: int,
    schedule: Tensor | None,
    seeds: Sequence[Tensor | None],
    subset: Tensor | None,
) -> Tensor:
    """One layer, whose intermediate results autograd, or somebody else, looks at."""
    context = _attend(layer.attention.self, rows, ragged, num_heads, schedule=schedule, seed=seeds[0])
    if subset is not None:
        context, rows = context.index_select(0, subset), rows.index_select(0, subset)
    return _after_attention(layer, context, rows, hidden_act, seeds=seeds[1:])


def _encode_in_place(
    bert: Any, rows: Tensor, ragged: Ragged, hidden_act: str, num_heads: int, hidden_states: list[Tensor] | None
) -> Tensor:
    """The layers over `rows`, which they overwrite."""
    buffers = _Buffers()
    if hidden_states is not None:
        hidden_states.append(rows.clone())
    for layer in bert.encoder.layer:
        context = _attend(layer.attention.self, rows, ragged, num_heads, buffers)
        for part, residual in zip(context.split(CHUNK), rows.split(CHUNK), strict=True):
            _after_attention(layer, part, residual, hidden_act, buffers)
        if hidden_states is not None:
            hidden_states.append(rows.clone())
    return rows


def _seeds(bert: Any, num_layers: int) -> list[tuple[Tensor | None, ...]]:
    """Seeds of dropout: those of the embeddings, then three for each layer. None where there is no dropout.

    They are drawn in one go, before a layer runs: one that is computed again in the backward has the same.
    """
    if not bert.training:
        return [(None,) * 3] * (1 + num_layers)
    return [tuple(layer.unbind()) for layer in ops.draw_seeds(3 * (1 + num_layers)).view(-1, 3).unbind()]


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
        return linear(rows, weight, bias)
    out = buffers.like(name, rows, weight.shape[0])
    return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, differentiable, in the dtype that autocast asks for."""
    if rows.device.type != "cpu":
        return F.linear(rows, weight, bias)  # autocast keeps the weights that it has rounded
    if torch.is_autocast_enabled("cpu"):
        rows = rows.to(torch.get_autocast_dtype("cpu"))
    if rows.dtype == torch.bfloat16 and _has_matrix_unit():
        return F.linear(rows, weight.to(rows.dtype), None if bias is None else bias.to(rows.dtype))
    return ops.dense(rows, weight, bias)


@cache
def _has_matrix_unit() -> bool:
    """Whether torch's bfloat16 products use AMX, which is several times as fast as AVX-512."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class _Split(torch.autograd.Function):
    """(num_tokens, 3, heads, head_dim) -> three views of it, whose gradients are joined again without a copy."""

    @staticmethod
    def forward(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(1)
        return q, k, v

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        num_tokens, heads, head_dim = dq.shape
        step, strides = heads * head_dim, (3 * heads * head_dim, head_dim, 1)
        storage = dq.untyped_storage().data_ptr()
        are_joined = all(
            grad.stride() == strides
            and grad.untyped_storage().data_ptr() == storage
            and grad.storage_offset() == dq.storage_offset() + index * step
            for index, grad in enumerate((dq, dk, dv))
        )
        if are_joined:
            return dq.as_strided((num_tokens, 3, heads, head_dim), (strides[0], step, head_dim, 1))
        return torch.stack((dq, dk, dv), 1)


def _split_heads(attention: Any, rows: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, each (num_tokens, num_heads, head_dim), of one product."""
    parts = attention.query, attention.key, attention.value
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    qkv = linear(rows, weight, bias).unflatten(-1, (3, num_heads, -1))
    if torch.compiler.is_compiling() or is_transformed() or ops.forward_ad_is_on():
        return qkv.unbind(1)
    return _Split.apply(qkv)


def _embed(embeddings: Any, ragged: Ragged, seed: Tensor | None) -> Tensor:
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
        seed=seed,
    )


def _attend(
    attention: Any,
    rows: Tensor,
    ragged: Ragged,
    num_heads: int,
    buffers: _Buffers | None = None,
    schedule: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Self-attention before its output projection: (num_tokens, hidden_size) -> the same."""
    if buffers is None:
        q, k, v = _split_heads(attention, rows, num_heads)
    else:
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
        schedule=schedule,
        seed=seed,
        out=None if buffers is None else buffers.like("context", rows, rows.shape[1]).view(q.shape),
    ).flatten(-2)


def _after_attention(
    layer: Any,
    context: Tensor,
    residual: Tensor,
    hidden_act: str,
    buffers: _Buffers | None = None,
    seeds: Sequence[Tensor | None] = (None, None),
) -> Tensor:
    """The rest of a layer, token by token; with buffers the result overwrites `residual`."""
    rows = _residual(layer.attention.output, context, residual, buffers, seeds[0])
    wide = _widen(layer.intermediate.dense, rows, hidden_act, buffers)
    return _residual(layer.output, wide, rows, buffers, seeds[1])


def _widen(dense: Any, rows: Tensor, hidden_act: str, buffers: _Buffers | None) -> Tensor:
    """act(dense(rows)): (num_tokens, hidden_size) -> (num_tokens, intermediate_size)."""
    if hidden_act not in GELU_FORMS:
        return activation(_linear("wide", rows, dense.weight, dense.bias, buffers), hidden_act)
    wide = _linear("wide", rows, dense.weight, None, buffers)
    # Under autocast the product comes in the lower dtype, the bias in the parameters'.
    bias = dense.bias.to(wide.dtype)
    return ops.bias_gelu(wide, bias, approximate=GELU_FORMS[hidden_act], out=None if buffers is None else wide)


def _residual(
    output: Any, rows: Tensor, residual: Tensor, buffers: _Buffers | None, seed: Tensor | None = None
) -> Tensor:
    """LayerNorm(residual + dropout(dense(rows))). Under autocast the residual stream stays in the parameters' dtype."""
    norm = output.LayerNorm
    return ops.residual_layer_norm(
        _linear("product", rows, output.dense.weight, None, buffers),
        output.dense.bias,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=_dropout_p(output.dropout),
        seed=seed,
        out=None if buffers is None else residual,
    )


def _dropout_p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0
