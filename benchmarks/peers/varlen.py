"""A BERT encoder without padding in plain PyTorch, on its `varlen_attn`: what one has without kernels of one's own.

Query, key and value are one product; everything else is PyTorch operations, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from bert_fast.benchmarking import Encode

#: (q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen), q, k, v (num_tokens, heads, head_dim) -> the shape of q.
Attend = Callable[..., Any]


def build(model: Any, precision: str, attend: Attend = varlen_attn) -> Encode:
    """See `Peer.build`.

    Raises:
        ValueError: the activation is another than the exact GELU.
    """
    if model.config.hidden_act != "gelu":
        raise ValueError(f"hidden_act is {model.config.hidden_act!r}, expected 'gelu'")
    model = model.to(getattr(torch, precision))
    layers = [_qkv(layer) for layer in model.encoder.layer]

    def encode(inputs: dict[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].bool()
        lengths = mask.sum(1, dtype=torch.int32)
        cu_seqlens = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        kept = mask.flatten().nonzero().flatten()  # this and the next wait for the device, as flash-attn's unpad_input
        max_seqlen = int(lengths.max())
        rows = _embed(model.embeddings, inputs, kept)
        for layer, qkv in zip(model.encoder.layer, layers, strict=True):
            heads = F.linear(rows, *qkv).unflatten(1, (3, model.config.num_attention_heads, -1)).unbind(1)
            context = attend(*heads, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen).flatten(1)
            rows = _add_norm(layer.attention.output, context, rows)
            rows = _add_norm(layer.output, F.gelu(layer.intermediate.dense(rows)), rows)
        padded = rows.new_zeros(mask.numel(), rows.shape[1])
        padded[kept] = rows
        return padded.view(*mask.shape, -1)

    return encode


def _qkv(layer: Any) -> tuple[Tensor, Tensor]:
    """The weights (3 hidden_size, hidden_size) and the biases of the three projections, one below the other."""
    projections = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
    return torch.cat([p.weight for p in projections]), torch.cat([p.bias for p in projections])


def _embed(embeddings: Any, inputs: dict[str, Tensor], kept: Tensor) -> Tensor:
    positions = kept % inputs["input_ids"].shape[1]
    return embeddings.LayerNorm(
        embeddings.word_embeddings(inputs["input_ids"].flatten()[kept])
        + embeddings.token_type_embeddings(inputs["token_type_ids"].flatten()[kept])
        + embeddings.position_embeddings(positions)
    )


def _add_norm(output: Any, x: Tensor, residual: Tensor) -> Tensor:
    return output.LayerNorm(output.dense(x) + residual)
