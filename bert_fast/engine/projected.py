"""The CPU's encoder for embeddings of another width than the layers, which the C++ one does not take: op by op, each
product over packed weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast import ops
from bert_fast.encoder import embed, projection
from bert_fast.engine.cpu import ACTIVATIONS, OpByOp
from bert_fast.ragged import Ragged

#: The C++ encoder's names for activations as `ops.linear` has them.
_FUSED = {"gelu_erf": "gelu", "gelu_tanh": "gelu_tanh", "relu": "relu"}

_Norm = tuple[Tensor, Tensor, float]


class _Layer(NamedTuple):
    qkv: ops.PackedWeight  # (3 * hidden_size, hidden_size): query, key and value one after another
    attention_output: ops.PackedWeight
    attention_norm: _Norm
    intermediate: ops.PackedWeight
    output: ops.PackedWeight
    norm: _Norm


class ProjectedEngine(OpByOp):
    """An encoder with `embeddings_project`, in every precision of the CPU. The residual stream is float.

    Args:
        bert: as `PackedEngine` takes it, with `embeddings_project`.
        hidden_act, num_heads, precision: as there.
    """

    def __init__(self, bert: Any, hidden_act: str, num_heads: int, precision: str) -> None:
        super().__init__(bert.embeddings)
        self.precision = precision
        self._activation, self._num_heads = _FUSED[ACTIVATIONS[hidden_act]], num_heads
        self._embeddings = bert.embeddings  # fp32 reads the parameters themselves
        if precision != "fp32" or self._dtype != torch.float32:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            self._embeddings = copy.deepcopy(bert.embeddings).to(dtype).requires_grad_(False)
        self._project = self._packed(projection(bert))
        self._layers = [
            _Layer(
                qkv=self._packed(layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
                attention_output=self._packed(layer.attention.output.dense),
                attention_norm=_norm(layer.attention.output.LayerNorm),
                intermediate=self._packed(layer.intermediate.dense),
                output=self._packed(layer.output.dense),
                norm=_norm(layer.output.LayerNorm),
            )
            for layer in bert.encoder.layer
        ]

    def _packed(self, *linears: Any) -> ops.PackedWeight:
        """One product for several linear modules."""
        weight, bias = (
            torch.cat([getattr(module, name).detach() for module in linears]) for name in ("weight", "bias")
        )
        return ops.PackedWeight.pack(weight, bias, precision=self.precision)

    @torch.no_grad()
    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        rows = ops.linear(embed(self._embeddings, ragged).float(), self._project)
        states = [rows]
        for layer in self._layers:
            q, k, v = ops.linear(rows, layer.qkv).unflatten(-1, (3, self._num_heads, -1)).unbind(1)
            context = ops.attention(q, k, v, cu_seqlens=ragged.cu_seqlens, max_seqlen=ragged.max_seqlen).flatten(-2)
            rows = ops.linear(context, layer.attention_output, residual=rows, layer_norm=layer.attention_norm)
            wide = ops.linear(rows, layer.intermediate, activation=self._activation)
            rows = ops.linear(wide, layer.output, residual=rows, layer_norm=layer.norm)
            if hidden_states is not None:
                states.append(rows)
        if hidden_states is not None:
            hidden_states.extend(state.to(self._dtype) for state in states)
        return rows.to(self._dtype)


def _norm(norm: Any) -> _Norm:
    return norm.weight.detach().float(), norm.bias.detach().float(), norm.eps
