"""The CPU's encoders over packed weights: the C++ one, embeddings to last hidden state in one call, and torch's
products where the CPU has a matrix unit that the C++ kernels do not use."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import ops
from bert_fast.activation import GELU_FORMS
from bert_fast.encoder import encode, first_tokens, has_matrix_unit, projection
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.ragged import Padding, Ragged

#: A checkpoint's `hidden_act` as the C++ encoder names it.
ACTIVATIONS = {name: {"none": "gelu_erf", "tanh": "gelu_tanh"}[form] for name, form in GELU_FORMS.items()}
ACTIVATIONS["relu"] = "relu"

#: Modules of a layer whose weight and bias the C++ encoder takes, in its order.
LAYER_MODULES = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "attention.output.LayerNorm",
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)

LINEAR_MODULES = tuple(name for name in LAYER_MODULES if not name.endswith("LayerNorm"))


class PackedEngine:
    """The C++ encoder.

    Args:
        bert: has `embeddings` and `encoder` with a Hugging Face checkpoint's names, float32 or bfloat16 on the CPU.
        hidden_act: one of `ACTIVATIONS`.
        num_heads: attention heads.
        precision: "fp32", "bf16" or "int8".
    """

    def __init__(self, bert: Any, hidden_act: str, num_heads: int, precision: str) -> None:
        from bert_fast._C import Encoder

        self.precision = precision
        norm, layers = bert.embeddings.LayerNorm, bert.encoder.layer
        tables = [table.weight.detach() for table in embedding_tables(bert.embeddings)]
        self._dtype, self._sizes = tables[0].dtype, TableSizes.of(bert.embeddings)
        if precision != "fp32":  # fp32 reads the parameters themselves
            tables = [table.bfloat16() for table in tables]
        self._encoder = Encoder(
            precision=precision,
            activation=ACTIVATIONS[hidden_act],
            num_heads=num_heads,
            out_bfloat16=self._dtype == torch.bfloat16,
            word_embeddings=tables[0],
            position_embeddings=tables[1],
            token_type_embeddings=tables[2],
            norm_weight=norm.weight.detach(),
            norm_bias=norm.bias.detach(),
            norm_eps=norm.eps,
            layers=[_layer_tensors(layer) for layer in layers],
            layer_norm_eps=[(layer.attention.output.LayerNorm.eps, layer.output.LayerNorm.eps) for layer in layers],
        )

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        result = self._encoder.forward(*_ids(ragged), want_states=hidden_states is not None)
        if hidden_states is not None:
            hidden_states.extend(result.states)
        return result.rows

    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """See `Engine`."""
        return self._encoder.forward(*_ids(ragged), want_rows=False, modes=list(modes), normalize=normalize).pooled

    def pack(self, inputs: BertInputs) -> tuple[Ragged, Padding]:
        """See `Engine`."""
        return inputs.checked(self._sizes).to_ragged()

    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Engine`."""
        if inputs.input_ids is None or inputs.cu_seq_lens_q is not None:
            return _pad(self, inputs, want_states)
        ids = (inputs.input_ids, inputs.attention_mask, inputs.token_type_ids, inputs.position_ids)
        try:
            result = self._encoder.forward_padded(*ids, want_states=want_states, modes=["cls"])
        except ValueError:
            inputs.checked(self._sizes)  # raises the same in the words of the plain path
            raise
        return result.rows, result.pooled.to(self._dtype), result.states


class OpByOp:
    """What engines share that make the rows in Python.

    Args:
        embeddings: with a Hugging Face checkpoint's names; their dtype is that of the rows.
    """

    precision: str

    def __init__(self, embeddings: Any) -> None:
        self._dtype, self._sizes = embeddings.word_embeddings.weight.dtype, TableSizes.of(embeddings)

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        raise NotImplementedError

    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """See `Engine`."""
        rows = self.rows(ragged)
        vectors = torch.cat([ops.pooling(rows, ragged.cu_seqlens, mode=mode).float() for mode in modes], dim=1)
        return F.normalize(vectors, dim=1) if normalize else vectors

    def pack(self, inputs: BertInputs) -> tuple[Ragged, Padding]:
        """See `Engine`."""
        return inputs.checked(self._sizes).to_ragged()

    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Engine`."""
        return _pad(self, inputs, want_states)


class TorchEngine(OpByOp):
    """bf16 by torch's own products, which use a CPU's matrix unit (AMX).

    It runs the ops one by one over a bfloat16 copy of the modules. A text may then give other bits in another batch:
    torch chooses its product by the batch's size.

    Args:
        bert, hidden_act, num_heads: as in `PackedEngine`; there may be an `embeddings_project`.
    """

    precision = "bf16"

    def __init__(self, bert: Any, hidden_act: str, num_heads: int) -> None:
        super().__init__(bert.embeddings)
        parts = {"embeddings": bert.embeddings, "embeddings_project": projection(bert), "encoder": bert.encoder}
        copies = {name: copy.deepcopy(part) for name, part in parts.items() if part is not None}
        self._tree = nn.ModuleDict(copies).bfloat16().requires_grad_(False)
        self._hidden_act, self._num_heads = hidden_act, num_heads

    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        states: list[Tensor] | None = None if hidden_states is None else []
        rows = encode(self._tree, ragged, self._hidden_act, self._num_heads, states)
        if hidden_states is not None and states is not None:
            hidden_states.extend(state.to(self._dtype) for state in states)
        return rows.to(self._dtype)


def prefers_torch(precision: str) -> bool:
    """Whether torch's products are faster on this CPU than packed ones."""
    return precision == "bf16" and has_matrix_unit()


def _pad(run: PackedEngine | OpByOp, inputs: BertInputs, want_states: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`Engine.padded` by way of `rows`."""
    ragged, padding = run.pack(inputs)
    states: list[Tensor] = []
    rows = run.rows(ragged, states if want_states else None)
    return padding.pad(rows), first_tokens(rows, ragged), [padding.pad(state) for state in states]


def embedding_tables(embeddings: Any) -> list[nn.Embedding]:
    """The three tables of an embeddings module, in the order of the C++ encoder."""
    return [embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings]


def _ids(ragged: Ragged) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return ragged.input_ids, ragged.position_ids, ragged.token_type_ids, ragged.cu_seqlens


def _layer_tensors(layer: Any) -> list[Tensor]:
    modules = (layer.get_submodule(name) for name in LAYER_MODULES)
    return [tensor.detach() for module in modules for tensor in (module.weight, module.bias)]
