"""ELECTRA's heads and their losses, over whichever encoder a subclass names as `base`.

Parameter names, outputs and losses are those of transformers' `ElectraFor*`, but for what `heads` says: positions that
the mask hides take no part in a loss. The first token, which some heads read, is the first one that the mask keeps.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import heads, losses, sentence_embedding
from bert_fast.activation import activation
from bert_fast.config import BertConfig, ElectraConfig
from bert_fast.outputs import Encoded, LogitsOutput


class ElectraHead(heads.Head):
    """A model whose encoder is `self.electra`; it has no pooler."""

    prefix = "electra."
    pooled = False

    @property
    def bert(self) -> Any:
        """The encoder, as other heads call it."""
        return self.electra


class GeneratorPredictions(nn.Module):
    """LayerNorm(gelu(dense(hidden))), before the generator's decoder."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., embedding_size)."""
        return self.LayerNorm(F.gelu(self.dense(hidden)))


class DiscriminatorPredictions(nn.Module):
    """dense_prediction(act(dense(hidden))): a score per token, above 0 for one that was replaced."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (...)."""
        return self.dense_prediction(activation(self.dense(hidden), self.hidden_act)).squeeze(-1)


class ElectraForMaskedLM(ElectraHead):
    """The generator: predicts every token; labels (batch_size, seq_len), -100 where there is nothing to predict."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.generator_predictions = GeneratorPredictions(config)
        self.generator_lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        heads.initialize(self.generator_predictions, config)
        heads.initialize(self.generator_lm_head, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the decoder's weight with the word embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.generator_lm_head.weight = self.bert.embeddings.word_embeddings.weight

    def scores(self, rows: Tensor) -> Tensor:
        """Of every word: (num_rows, hidden_size) -> (num_rows, vocab_size)."""
        scores: Tensor = self.generator_lm_head(self.generator_predictions(rows))
        return scores

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, seq_len, vocab_size)."""
        logits = encoded.pad(self.scores(encoded.rows))
        loss = None if labels is None else losses.token_loss(logits, labels, encoded, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class ElectraForPreTraining(ElectraHead):
    """The discriminator: whether each token was replaced; labels (batch_size, seq_len), 1 where it was, else 0."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.discriminator_predictions = DiscriminatorPredictions(config)
        heads.initialize(self.discriminator_predictions, config)

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, seq_len)."""
        logits = encoded.pad(self.discriminator_predictions(encoded.rows)[..., None]).squeeze(-1)
        loss = None
        if labels is not None:
            if labels.shape != logits.shape:
                raise ValueError(f"labels has shape {tuple(labels.shape)}, but the logits have {tuple(logits.shape)}")
            kept = slice(None) if encoded.keep is None else encoded.keep
            loss = replaced_loss(logits[kept], labels[kept], divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


def replaced_loss(logits: Tensor, replaced: Tensor, divisor: float | None = None) -> Tensor:
    """Binary cross-entropy, summed and divided by `divisor` or the number of tokens; logits, replaced: one shape."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.binary_cross_entropy_with_logits(wide, replaced.to(wide.dtype), reduction="sum")
    return loss / (max(1, logits.numel()) if divisor is None else divisor)


class ClassificationHead(nn.Module):
    """out_proj(dropout(gelu(dense(summary)))): GELU, whatever the encoder's activation is."""

    def __init__(self, config: BertConfig, num_outputs: int, dropout: nn.Dropout) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(dropout.p)
        self.out_proj = nn.Linear(config.hidden_size, num_outputs)

    def forward(self, summary: Tensor) -> Tensor:
        """(batch_size, hidden_size) -> (batch_size, num_outputs)."""
        return self.out_proj(self.dropout(F.gelu(self.dense(summary))))


class ElectraForSequenceClassification(ElectraHead, heads.BertForSequenceClassification):
    """As `heads.BertForSequenceClassification`, of the first token."""

    def make_classifier(self, config: BertConfig) -> nn.Module:
        """See `ClassificationHead`."""
        return ClassificationHead(config, self.num_outputs(config), self.dropout)

    def summary(self, encoded: Encoded) -> Tensor:
        """dropout(first token), (batch_size, hidden_size)."""
        summary: Tensor = self.dropout(encoded.first)
        return summary


class ElectraForTokenClassification(ElectraHead, heads.BertForTokenClassification):
    """As `heads.BertForTokenClassification`."""


class ElectraForQuestionAnswering(ElectraHead, heads.BertForQuestionAnswering):
    """As `heads.BertForQuestionAnswering`."""


class SequenceSummary(nn.Module):
    """dropout(act(summary(first token))), each as the config says."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        if config.summary_type != "first":
            raise ValueError(f"summary_type is {config.summary_type!r}, expected 'first'")
        width = config.hidden_size
        self.summary = nn.Linear(width, width) if config.summary_use_proj else nn.Identity()
        self.summary_activation = config.summary_activation
        self.last_dropout = nn.Dropout(config.summary_last_dropout)

    def forward(self, first: Tensor) -> Tensor:
        """(batch_size, hidden_size) -> the same."""
        summary: Tensor = self.summary(first)
        if self.summary_activation:  # transformers writes '' for none
            summary = activation(summary, self.summary_activation)
        return self.last_dropout(summary)


class ElectraForMultipleChoice(ElectraHead, heads.BertForMultipleChoice):
    """As `heads.BertForMultipleChoice`, of a summary of the first token."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__(config)
        self.sequence_summary = SequenceSummary(config)
        heads.initialize(self.sequence_summary, config)

    def summary(self, encoded: Encoded) -> Tensor:
        """See `SequenceSummary`."""
        summary: Tensor = self.sequence_summary(encoded.first)
        return summary


class ElectraForSentenceEmbedding(ElectraHead, sentence_embedding.BertForSentenceEmbedding):
    """As `sentence_embedding.BertForSentenceEmbedding`."""
