"""The fast BERT: the plain one's parameters, run as a ragged batch of tokens through the ops.

`encode` needs only a tree of modules with the names of a Hugging Face checkpoint, so it serves the classes below and
somebody's transformers model alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import heads, ops, reference
from bert_fast.activation import GELU_FORMS, activation
from bert_fast.inputs import BertInputs
from bert_fast.outputs import Encoded
from bert_fast.ragged import Ragged


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
    buffers = _Buffers.for_forward(rows)
    if hidden_states is not None:
        hidden_states.append(rows.clone() if buffers.reuse else rows)
    for layer in bert.encoder.layer:
        context = _attend(layer.attention.self, rows, ragged, num_heads, buffers)
        rows = _residual(layer.attention.output, context, rows, buffers)
        rows = _residual(layer.output, _widen(layer.intermediate.dense, rows, hidden_act, buffers), rows, buffers)
        if hidden_states is not None:
            hidden_states.append(rows.clone() if buffers.reuse else rows)
    return rows


class _Buffers:
    """Memory for the intermediate results of a forward without gradients, which every layer uses again.

    Fresh memory is not free: the pages of a new 25 MB tensor cost more to map than GELU costs to compute. Without
    buffers (`reuse` is False) every product is a fresh tensor, as autograd, autocast and the compiler need them.
    """

    def __init__(self, reuse: bool) -> None:
        self.reuse = reuse
        self._tensors: dict[str, Tensor] = {}

    @classmethod
    def for_forward(cls, rows: Tensor) -> _Buffers:
        """Buffers if nobody needs to see the intermediate results of this forward."""
        recorded = torch.is_grad_enabled() or torch.is_autocast_enabled(rows.device.type)
        return cls(reuse=not recorded and not torch.compiler.is_compiling())

    def like(self, name: str, rows: Tensor, width: int) -> Tensor | None:
        """The buffer of this name, (num_tokens, width), or None where results are fresh tensors."""
        if not self.reuse:
            return None
        if name not in self._tensors:
            self._tensors[name] = rows.new_empty((rows.shape[0], width))
        return self._tensors[name]

    def linear(self, name: str, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """rows @ weight.T + bias: (num_tokens, in_features) -> (num_tokens, out_features)."""
        out = self.like(name, rows, weight.shape[0])
        if out is None:
            return F.linear(rows, weight, bias)
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
    )


def _attend(attention: Any, rows: Tensor, ragged: Ragged, num_heads: int, buffers: _Buffers) -> Tensor:
    q, k, v = (
        buffers.linear(name, rows, linear.weight, linear.bias).unflatten(-1, (num_heads, -1))
        for name, linear in (("q", attention.query), ("k", attention.key), ("v", attention.value))
    )  # (num_tokens, num_heads, head_dim)
    out = buffers.like("context", rows, rows.shape[1])
    return ops.attention(
        q,
        k,
        v,
        cu_seqlens=ragged.cu_seqlens,
        max_seqlen=ragged.max_seqlen,
        dropout_p=_dropout_p(attention.dropout),
        out=None if out is None else out.view(q.shape),
    ).flatten(-2)


def _widen(dense: Any, rows: Tensor, hidden_act: str, buffers: _Buffers) -> Tensor:
    if hidden_act not in GELU_FORMS:
        return activation(F.linear(rows, dense.weight, dense.bias), hidden_act)
    wide = buffers.linear("wide", rows, dense.weight)
    # Under autocast the product comes in the lower dtype, the bias in the parameters'.
    bias = dense.bias.to(wide.dtype)
    return ops.bias_gelu(wide, bias, approximate=GELU_FORMS[hidden_act], out=wide if buffers.reuse else None)


def _residual(output: Any, rows: Tensor, residual: Tensor, buffers: _Buffers) -> Tensor:
    norm = output.LayerNorm
    # Under autocast the residual stream stays in the parameters' dtype, as in the plain model.
    product = buffers.linear("product", rows, output.dense.weight).to(residual.dtype)
    return ops.residual_layer_norm(
        product,
        output.dense.bias,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=_dropout_p(output.dropout),
        out=residual if buffers.reuse else None,
    )


def _dropout_p(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


#: What `obstacle` lets the ops replace, besides the containers of a family.
LEAVES = frozenset({nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList})


def obstacle(module: nn.Module, known: frozenset[type], harmless_hooks: str | None = None) -> str | None:
    """Why the ops may not stand in for the modules of this tree, or None.

    Somebody may have hooked a module, or put another in its place (LoRA, a quantised linear, a parametrisation): then
    only calling the modules themselves is right.

    Args:
        module: the tree.
        known: the exact types that the ops know how to replace, besides `LEAVES`.
        harmless_hooks: name of a Python module whose forward hooks may be left out.
    """
    stack = [module]
    while stack:
        part = stack.pop()
        if type(part) not in LEAVES and type(part) not in known:
            return f"a {type(part).__name__} stands in it"
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            hooks = [*part._forward_pre_hooks.values(), *part._backward_hooks.values()]
            hooks += [*part._backward_pre_hooks.values(), *part._forward_hooks.values()]
            if any(getattr(hook, "__module__", None) != harmless_hooks or harmless_hooks is None for hook in hooks):
                return f"a {type(part).__name__} in it has a hook"
        stack.extend(child for child in part._modules.values() if child is not None)
    return None


_KNOWN = frozenset(
    {
        reference.BertEmbeddings,
        reference.BertEncoder,
        reference.BertLayer,
        reference.BertAttention,
        reference.BertSelfAttention,
        reference.BertIntermediate,
        reference.ResidualOutput,
        reference.BertPooler,
    }
)


class Pretrained(nn.Module):
    """Saving, for every class below."""

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the checkpoint folder that `bert_fast.from_pretrained` and transformers read; see `loading`."""
        from bert_fast.loading import save_pretrained

        save_pretrained(self, directory)


class BertModel(Pretrained, reference.BertModel):
    """The plain BERT's arguments, parameters and answers, computed without padding on the ops.

    Calls that the ops do not serve (`output_attentions`, `inputs_embeds`) run the plain definition.
    """

    def encode(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """The last layer's rows, (num_tokens, hidden_size), of a batch that has no padding; see `modules.encode`."""
        return encode(self, ragged, self.config.hidden_act, self.config.num_attention_heads, hidden_states)

    def encode_batch(self, inputs: BertInputs) -> Encoded:
        """The hidden rows of a batch, one per token there is."""
        if inputs.output_attentions or inputs.inputs_embeds is not None:
            return super().encode_batch(inputs)
        if reason := self._obstacle():
            ops.warn_of_fallback(f"the plain definition runs instead of the fast one: {reason}")
            return super().encode_batch(inputs)
        batch = inputs.checked(self.config)
        ragged, padding = batch.to_ragged()
        hidden_states: list[Tensor] | None = [] if inputs.output_hidden_states else None
        rows = self.encode(ragged, hidden_states)
        return Encoded(
            rows=rows,
            pad=padding.pad,
            keep=batch.mask,
            pooler_output=None if self.pooler is None else self.pooler(first_tokens(rows, ragged)),
            hidden_states=None if hidden_states is None else tuple(padding.pad(state) for state in hidden_states),
        )

    def _obstacle(self) -> str | None:
        return obstacle(self.embeddings, _KNOWN) or obstacle(self.encoder, _KNOWN)


def first_tokens(rows: Tensor, ragged: Ragged) -> Tensor:
    """(batch_size, hidden_size), the first token of each sequence; zeros for one without tokens."""
    return ops.pooling(rows, ragged.cu_seqlens, mode="cls")


class BertForMaskedLM(Pretrained, heads.BertForMaskedLM):
    """The fast BERT with the masked-language-model head."""

    base = BertModel


class BertForNextSentencePrediction(Pretrained, heads.BertForNextSentencePrediction):
    """The fast BERT with the next-sentence head."""

    base = BertModel


class BertForPreTraining(Pretrained, heads.BertForPreTraining):
    """The fast BERT with both pre-training heads."""

    base = BertModel


class BertForSequenceClassification(Pretrained, heads.BertForSequenceClassification):
    """The fast BERT with a classifier of texts."""

    base = BertModel


class BertForTokenClassification(Pretrained, heads.BertForTokenClassification):
    """The fast BERT with a classifier of tokens."""

    base = BertModel


class BertForQuestionAnswering(Pretrained, heads.BertForQuestionAnswering):
    """The fast BERT with a span head."""

    base = BertModel


class BertForMultipleChoice(Pretrained, heads.BertForMultipleChoice):
    """The fast BERT with a scorer of choices."""

    base = BertModel


#: The heads by the name `from_pretrained(head=...)` takes; None is the model without one.
HEADS: dict[str | None, type[nn.Module]] = {
    None: BertModel,
    "masked_lm": BertForMaskedLM,
    "next_sentence": BertForNextSentencePrediction,
    "pre_training": BertForPreTraining,
    "sequence_classification": BertForSequenceClassification,
    "token_classification": BertForTokenClassification,
    "question_answering": BertForQuestionAnswering,
    "multiple_choice": BertForMultipleChoice,
}
