"""The encoder on a GPU: kernels and matrix products one after another, over fused weights."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.activation import GELU_FORMS, activation
from bert_fast.encoder import projection

#: The dtype of the rows in each precision; fp8's is bfloat16, or that of the parameters if it has 16 bits.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Products(Protocol):
    """The matrix products of a precision. What a product reads, `x`, is the rows or what stands for them."""

    def pack(self, weight: Tensor) -> Any:
        """(out_features, in_features) as the products take it."""

    def linear(self, x: Any, weight: Any, bias: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, (num_rows, out_features) in the dtype of the rows."""

    def widen(self, x: Any, weight: Any, bias: Tensor, hidden_act: str) -> Any:
        """act(x @ weight.T + bias), as the next product reads it."""

    def targets(self, num_rows: int, width: int, device: torch.device) -> dict[str, Any]:
        """Where a kernel that makes rows puts, beside them, what a product reads: its arguments."""

    def reads(self, rows: Tensor, targets: dict[str, Any]) -> Any:
        """What a product reads of rows that were made with these targets; without, they are looked at once more."""


class PlainProducts:
    """Products in the dtype of the rows, which they read themselves."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def pack(self, weight: Tensor) -> Tensor:
        """See `Products`."""
        return weight.to(self.dtype).contiguous()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """See `Products`."""
        return F.linear(x, weight, bias)

    def widen(self, x: Tensor, weight: Tensor, bias: Tensor, hidden_act: str) -> Tensor:
        """See `Products`."""
        from bert_fast.kernels.linear_gelu import linear_gelu

        if hidden_act not in GELU_FORMS:
            return activation(F.linear(x, weight, bias), hidden_act)
        return linear_gelu(x, weight, bias, GELU_FORMS[hidden_act])

    def targets(self, num_rows: int, width: int, device: torch.device) -> dict[str, Any]:
        """See `Products`."""
        return {}

    def reads(self, rows: Tensor, targets: dict[str, Any]) -> Tensor:
        """See `Products`."""
        return rows


class Fp8Products:
    """Products of e4m3 codes: a scale for each row of the activations, one for each output feature of the weights.

    Args:
        dtype: of the rows, float16 or bfloat16.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """See `Products`."""
        from bert_fast.kernels.quantize import quantize_weight

        return quantize_weight(weight)

    def linear(self, x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor | None = None) -> Tensor:
        """See `Products`."""
        from bert_fast.kernels.quantize import scaled_linear

        return scaled_linear(*x, *weight, bias, self.dtype)

    def widen(
        self, x: tuple[Tensor, Tensor], weight: tuple[Tensor, Tensor], bias: Tensor, hidden_act: str
    ) -> tuple[Tensor, Tensor]:
        """See `Products`."""
        from bert_fast.kernels.bias_gelu import bias_gelu

        if hidden_act not in GELU_FORMS:
            return self.reads(activation(self.linear(x, weight, bias), hidden_act), {})
        wide = self.linear(x, weight)
        targets = self.targets(wide.shape[0], wide.shape[1], wide.device)
        bias_gelu(wide, bias, GELU_FORMS[hidden_act], **targets)
        return self.reads(wide, targets)

    def targets(self, num_rows: int, width: int, device: torch.device) -> dict[str, Any]:
        """See `Products`."""
        codes = torch.empty((num_rows, width), dtype=torch.float8_e4m3fn, device=device)
        return {"codes": codes, "scales": torch.empty((num_rows, 1), dtype=torch.float32, device=device)}

    def reads(self, rows: Tensor, targets: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """See `Products`."""
        from bert_fast.kernels.quantize import quantize_rows

        return (targets["codes"], targets["scales"]) if targets else quantize_rows(rows)


class _Norm(NamedTuple):
    weight: Tensor
    bias: Tensor
    eps: float


class _Dense(NamedTuple):
    weight: Any  # as `Products.pack` gives it
    bias: Tensor


class _Layer(NamedTuple):
    qkv: _Dense  # (3 * hidden_size, hidden_size): query, key and value one after another
    attention_output: _Dense
    attention_norm: _Norm
    intermediate: _Dense
    output: _Dense
    norm: _Norm


class Layers:
    """The weights of an encoder, and its forward.

    The product of query, key and value is one, over a copy of their weights: 3 * hidden_size^2 elements a layer, 42 MB
    for BERT-base in 16 bits. All other tensors are the parameters themselves where they have the precision's dtype.

    Args:
        bert: has `embeddings` and `encoder` with a Hugging Face checkpoint's names, perhaps `embeddings_project`, of
            one dtype.
        hidden_act: one of `activation.ACTIVATIONS`.
        num_heads: attention heads.
        precision: "fp32", "fp16", "bf16" or "fp8".

    Attributes:
        dtype: of the rows.
        hidden_size: their width.
    """

    def __init__(self, bert: Any, hidden_act: str, num_heads: int, precision: str) -> None:
        embeddings = bert.embeddings
        own = embeddings.word_embeddings.weight.dtype
        self.dtype = DTYPES.get(precision, own if own == torch.float16 else torch.bfloat16)
        self._products: Products = Fp8Products(self.dtype) if precision == "fp8" else PlainProducts(self.dtype)
        self._hidden_act, self._num_heads = hidden_act, num_heads
        tables = (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings)
        self._tables = [self._cast(table.weight) for table in tables]
        self._norm = self._norm_of(embeddings.LayerNorm)
        project = projection(bert)
        self._project = None if project is None else self._dense(project)
        self.hidden_size = int(
            embeddings.word_embeddings.weight.shape[1] if project is None else project.weight.shape[0]
        )
        self._layers = [
            _Layer(
                qkv=self._dense(layer.attention.self.query, layer.attention.self.key, layer.attention.self.value),
                attention_output=self._dense(layer.attention.output.dense),
                attention_norm=self._norm_of(layer.attention.output.LayerNorm),
                intermediate=self._dense(layer.intermediate.dense),
                output=self._dense(layer.output.dense),
                norm=self._norm_of(layer.output.LayerNorm),
            )
            for layer in bert.encoder.layer
        ]

    def _cast(self, parameter: Tensor) -> Tensor:
        return parameter.detach().to(self.dtype)

    def _norm_of(self, norm: Any) -> _Norm:
        return _Norm(self._cast(norm.weight), self._cast(norm.bias), norm.eps)

    def _dense(self, *linears: Any) -> _Dense:
        """One product for several linear modules."""
        weights, biases = ([getattr(linear, name).detach() for linear in linears] for name in ("weight", "bias"))
        weight, bias = (parts[0] if len(parts) == 1 else torch.cat(parts) for parts in (weights, biases))
        return _Dense(self._products.pack(weight), self._cast(bias))

    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        states: list[Tensor] | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The rows of the last layer. Nothing waits for the device.

        Args:
            input_ids, position_ids, token_type_ids: (num_rows,), inside their tables.
            cu_seqlens: (batch_size + 1,) int32. Rows past its end belong to no sequence, and the results in them mean
                nothing.
            max_seqlen: at least the longest sequence.
            states: if given, the embeddings and the rows of every layer are appended to it.
            out: where the rows go; (num_rows, hidden_size) of `dtype`.

        Returns:
            (num_rows, hidden_size) of `dtype`.
        """
        from bert_fast.kernels.attention import attention, schedule
        from bert_fast.kernels.embedding_layer_norm import embedding_layer_norm

        products, heads, norm = self._products, self._num_heads, self._norm
        word, position, token_type = self._tables
        num_rows, hidden_size = input_ids.shape[0], self.hidden_size
        scale = (hidden_size // heads) ** -0.5
        targets = products.targets(num_rows, word.shape[1], word.device)
        ids = (input_ids, position_ids, token_type_ids)
        rows = embedding_layer_norm(*ids, word, position, token_type, norm.weight, norm.bias, norm.eps, 0.0, **targets)
        x = products.reads(rows, targets)
        if self._project is not None:
            rows = products.linear(x, *self._project)
            x = products.reads(rows, {})
        order = None
        for i, layer in enumerate(self._layers):
            if states is not None:
                states.append(rows)
            q, k, v = products.linear(x, *layer.qkv).view(num_rows, 3, heads, -1).unbind(1)
            order = schedule(q, cu_seqlens, max_seqlen) if i == 0 else order
            context = attention(q, k, v, cu_seqlens, max_seqlen, None, scale, 0.0, schedule=order)
            context = context.view(num_rows, hidden_size)
            product = products.linear(products.reads(context, {}), layer.attention_output.weight)
            rows, x = self._add_and_normalize(product, layer.attention_output.bias, rows, layer.attention_norm)
            wide = products.widen(x, *layer.intermediate, self._hidden_act)
            product = products.linear(wide, layer.output.weight)
            last = out if layer is self._layers[-1] else None
            rows, x = self._add_and_normalize(product, layer.output.bias, rows, layer.norm, last)
        if states is not None:
            states.append(rows)
        return rows

    def _add_and_normalize(
        self, product: Tensor, bias: Tensor, residual: Tensor, norm: _Norm, out: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """LayerNorm(product + bias + residual), in product's memory if `out` is not given; and what a product reads."""
        from bert_fast.kernels.residual_layer_norm import residual_layer_norm

        targets = self._products.targets(product.shape[0], product.shape[1], product.device)
        out = product if out is None else out
        rows = residual_layer_norm(product, bias, residual, norm.weight, norm.bias, norm.eps, 0.0, out=out, **targets)
        return rows, self._products.reads(rows, targets)
