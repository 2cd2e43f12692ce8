"""The plain BERT (Devlin et al., 2018, arXiv:1810.04805), in PyTorch and nothing else: the truth of this package.

Parameter names are those of Hugging Face's checkpoints. Nothing here is optimised.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import electra_heads, heads, sentence_embedding
from bert_fast.activation import activation
from bert_fast.config import BertConfig
from bert_fast.inputs import BertInputs
from bert_fast.outputs import BaseModelOutputWithPooling, Encoded


class BertEmbeddings(nn.Module):
    """word + position + token type, then LayerNorm, then dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.embedding_size
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, words: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """`words` is (batch_size, seq_len, embedding_size), the word vectors; the ids are (batch_size, seq_len)."""
        hidden = words + self.token_type_embeddings(token_type_ids) + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(hidden))


class BertSelfAttention(nn.Module):
    """Scaled dot-product attention over `num_attention_heads` heads."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.attention_probs_dropout_prob)

    def forward(self, hidden: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
        """(batch_size, seq_len, hidden_size) -> the same, and the probabilities (batch_size, heads, queries, keys).

        `attends` is bool, (batch_size, 1 or queries, keys): which key a query may see. One that sees none gets zeros.
        """
        q, k, v = (
            linear(hidden).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )  # (batch_size, heads, seq_len, head_dim)
        attends = attends[:, None]
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(~attends, torch.finfo(scores.dtype).min)
        probabilities = torch.softmax(scores, dim=-1).masked_fill(~attends.any(-1, keepdim=True), 0.0)
        context = F.dropout(probabilities, self.dropout.p, self.training) @ v
        return context.transpose(1, 2).flatten(-2), probabilities


class ResidualOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(hidden))): how both sub-layers end."""

    def __init__(self, in_features: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """(..., in_features) and (..., hidden_size) -> (..., hidden_size)."""
        return self.LayerNorm(self.dropout(self.dense(hidden)) + residual)


class BertAttention(nn.Module):
    """The attention sub-layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = ResidualOutput(config.hidden_size, config)

    def forward(self, hidden: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
        """As `BertSelfAttention.forward`."""
        context, probabilities = self.self(hidden, attends)
        return self.output(context, hidden), probabilities


class BertIntermediate(nn.Module):
    """act(dense(hidden)): the wide half of the feed-forward sub-layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., intermediate_size)."""
        return activation(self.dense(hidden), self.hidden_act)


class BertLayer(nn.Module):
    """One Transformer layer: attention, then feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = ResidualOutput(config.intermediate_size, config)

    def forward(self, hidden: Tensor, attends: Tensor) -> tuple[Tensor, Tensor]:
        """As `BertSelfAttention.forward`."""
        hidden, probabilities = self.attention(hidden, attends)
        return self.output(self.intermediate(hidden), hidden), probabilities


class BertEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))


class BertPooler(nn.Module):
    """tanh(dense(first token)): trained by next-sentence prediction."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        """(batch_size, hidden_size) -> the same."""
        return torch.tanh(self.dense(first))


class BertModel(nn.Module):
    """Embeddings, encoder and pooler.

    Args:
        config: the model's shape.
        add_pooling_layer: False leaves the pooler out, as the heads that do not use it do.
    """

    def __init__(self, config: BertConfig, add_pooling_layer: bool = True) -> None:
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config)
        narrow = config.embedding_size != config.hidden_size
        self.embeddings_project = nn.Linear(config.embedding_size, config.hidden_size) if narrow else None
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        heads.initialize(self, config)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Run the model on a padded batch, or on a packed one with `cu_seq_lens_q`; `BertInputs` says what each is.

        Returns:
            last_hidden_state (batch_size, seq_len, hidden_size), zeros where the mask hides a position; pooler_output
            (batch_size, hidden_size) from the first token that the mask keeps; hidden_states and attentions where
            `output_hidden_states` and `output_attentions` ask for them. A tuple with `return_dict=False`.

        Raises:
            ValueError: an id is outside its table, or shapes do not match.
        """
        inputs = BertInputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        encoded = self.encode_batch(inputs)
        output = BaseModelOutputWithPooling(
            last_hidden_state=encoded.pad(encoded.rows),
            pooler_output=encoded.pooler_output,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def encode_batch(self, inputs: BertInputs, pooled_only: bool = False) -> Encoded:
        """The hidden rows of a batch, here padded as the caller gave it.

        `pooled_only` says that nobody will read them, but those of the first tokens, or the pooler's output alone.
        """
        batch = inputs.checked(self.config)
        words = self.embeddings.word_embeddings(batch.input_ids) if batch.inputs_embeds is None else batch.inputs_embeds
        hidden = self.embeddings(words, batch.token_type_ids, batch.position_ids)
        if self.embeddings_project is not None:
            hidden = self.embeddings_project(hidden)
        hidden_states, attentions = [hidden], []
        for layer in self.encoder.layer:
            hidden, probabilities = layer(hidden, batch.attends)
            hidden_states.append(hidden)
            attentions.append(probabilities)
        hidden = hidden_states[-1] = hidden.masked_fill(~batch.keep[..., None], 0.0)
        first = batch.first_tokens(hidden) if pooled_only or self.pooler is not None else None
        return Encoded(
            rows=hidden,
            pad=lambda rows: rows,
            keep=batch.mask,
            first=first,
            pooler_output=None if self.pooler is None else self.pooler(first),
            cu_seqlens=inputs.cu_seq_lens_q,
            hidden_states=tuple(hidden_states) if inputs.output_hidden_states else None,
            attentions=tuple(attentions) if inputs.output_attentions else None,
        )


class BertForMaskedLM(heads.BertForMaskedLM):
    """The plain BERT with the masked-language-model head."""

    base = BertModel


class BertForNextSentencePrediction(heads.BertForNextSentencePrediction):
    """The plain BERT with the next-sentence head."""

    base = BertModel


class BertForPreTraining(heads.BertForPreTraining):
    """The plain BERT with both pre-training heads."""

    base = BertModel


class BertForSequenceClassification(heads.BertForSequenceClassification):
    """The plain BERT with a classifier of texts."""

    base = BertModel


class BertForTokenClassification(heads.BertForTokenClassification):
    """The plain BERT with a classifier of tokens."""

    base = BertModel


class BertForQuestionAnswering(heads.BertForQuestionAnswering):
    """The plain BERT with a span head."""

    base = BertModel


class BertForMultipleChoice(heads.BertForMultipleChoice):
    """The plain BERT with a scorer of choices."""

    base = BertModel


class BertForSentenceEmbedding(sentence_embedding.BertForSentenceEmbedding):
    """The plain BERT with pooling."""

    base = BertModel


class ElectraModel(BertModel):
    """The plain BERT with embeddings that may be of another width; it has no pooler."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)


class ElectraForMaskedLM(electra_heads.ElectraForMaskedLM):
    """ELECTRA's generator over the plain encoder."""

    base = ElectraModel


class ElectraForPreTraining(electra_heads.ElectraForPreTraining):
    """ELECTRA's discriminator over the plain encoder."""

    base = ElectraModel


class ElectraForSequenceClassification(electra_heads.ElectraForSequenceClassification):
    """The plain ELECTRA with a classifier of texts."""

    base = ElectraModel


class ElectraForTokenClassification(electra_heads.ElectraForTokenClassification):
    """The plain ELECTRA with a classifier of tokens."""

    base = ElectraModel


class ElectraForQuestionAnswering(electra_heads.ElectraForQuestionAnswering):
    """The plain ELECTRA with a span head."""

    base = ElectraModel


class ElectraForMultipleChoice(electra_heads.ElectraForMultipleChoice):
    """The plain ELECTRA with a scorer of choices."""

    base = ElectraModel


class ElectraForSentenceEmbedding(electra_heads.ElectraForSentenceEmbedding):
    """The plain ELECTRA with pooling."""

    base = ElectraModel
