"""BERT's heads, over whichever encoder a subclass names as `base`.

Parameter names, outputs and losses are those of transformers' `BertFor*`, but for one thing: positions that the mask
hides take no part in a loss, so that it does not depend on how much padding a text was given.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast.activation import activation
from bert_fast.config import BertConfig
from bert_fast.inputs import BertInputs
from bert_fast.losses import cross_entropy, divisor_of, span_loss, token_loss
from bert_fast.outputs import Encoded, LogitsOutput, ModelOutput, PreTrainingOutput, QuestionAnsweringOutput


def initialize(module: nn.Module, config: BertConfig, truncated: bool = False) -> None:
    """Fresh parameters: weights from a normal of standard deviation `initializer_range`, biases and padding's row 0.

    Args:
        module: the tree to initialise, in place.
        config: gives `initializer_range`.
        truncated: cut the normal at two standard deviations, as Google's code does; transformers does not.
    """
    deviation = config.initializer_range
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            if truncated:
                nn.init.trunc_normal_(part.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
            else:
                nn.init.normal_(part.weight, std=deviation)
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
        if isinstance(part, nn.Embedding) and part.padding_idx is not None:
            nn.init.zeros_(part.weight[part.padding_idx].detach())


class Head(nn.Module):
    """A model whose encoder is `self.bert`.

    Attributes:
        base: the encoder's class, which a subclass names.
        prefix: what the names of the encoder's parameters begin with in a checkpoint, which is its name here.
        pooled: whether the head reads the pooler's output.
        pooled_only: whether it reads nothing but that, or the rows of the first tokens.
        other_labels: names of the targets it takes besides `labels`.
        kept_with_loss: fields of the output that are there with `loss_only`, too.
    """

    bert: Any
    base: type[Any]
    prefix: str = "bert."
    pooled: bool = True
    pooled_only: bool = False
    other_labels: tuple[str, ...] = ()
    kept_with_loss: tuple[str, ...] = ()

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.add_module(self.prefix.removesuffix("."), self.base(config, add_pooling_layer=self.pooled))

    @property
    def shapes(self) -> tuple[BertConfig, ...]:
        """The config of each encoder that a forward runs."""
        return (self.config,)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_only: bool = False,
        **options: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """Logits, and the loss where labels are given; `BertInputs` says what the inputs and options are.

        Args:
            num_items_in_batch: what the summed losses are divided by, in place of the number of labels in this batch:
                their number in all the batches, of all processes, that make up a step.
            loss_only: the output has the loss, which lets the model leave out what no loss reads, and nothing else but
                `seq_relationship_logits` where it is made of them. It is the mean over no labels, 0, where every label
                is -100.

        Raises:
            ValueError: an id or a label is out of range, or shapes do not match; or the loss is asked for without
                labels.
        """
        targets = {name: options.pop(name, None) for name in self.other_labels}
        inputs = BertInputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **options)
        divisor = divisor_of(num_items_in_batch)
        output = (self.loss if loss_only else self.answer)(inputs, labels, divisor, targets)
        return output.to_tuple() if return_dict is False else output

    def answer(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The whole output."""
        return self.read(self.bert.encode_batch(inputs, self.pooled_only), labels, divisor, **targets)

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The output with the loss alone."""
        output: Any = self.answer(inputs, labels, divisor, targets)
        return type(output)(_given(output.loss, self), **{name: output[name] for name in self.kept_with_loss})

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> ModelOutput:
        """The head's output from the encoder's; `divisor` is what the sum of the losses is divided by."""
        raise NotImplementedError


def _given(loss: Tensor | None, head: Head) -> Tensor:
    """The loss that is asked for; ValueError if there is none."""
    if loss is None:
        raise ValueError(f"loss_only without {' and '.join(('labels', *head.other_labels))}: there is no loss")
    return loss


class PredictionTransform(nn.Module):
    """LayerNorm(act(dense(hidden))), before the decoder of the masked-language-model head."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.hidden_act = config.hidden_act
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> the same."""
        return self.LayerNorm(activation(self.dense(hidden), self.hidden_act))


class LMPredictionHead(nn.Module):
    """Scores of every word of the vocabulary; the decoder's bias is this module's `bias`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.transform = PredictionTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., vocab_size)."""
        return self.decoder(self.transform(hidden))


class PreTrainingHeads(nn.Module):
    """The heads under the name `cls` of a checkpoint: masked language model, next sentence, or both."""

    def __init__(self, config: BertConfig, masked_lm: bool, next_sentence: bool) -> None:
        super().__init__()
        if masked_lm:
            self.predictions = LMPredictionHead(config)
        if next_sentence:
            self.seq_relationship = nn.Linear(config.hidden_size, 2)


class _PreTrainingHead(Head):
    masked_lm = False
    next_sentence = False

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.cls = PreTrainingHeads(config, self.masked_lm, self.next_sentence)
        initialize(self.cls, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the decoder's weight with the word embeddings and its bias with the head's, if the config says so."""
        if self.masked_lm and self.config.tie_word_embeddings:
            predictions = self.cls.predictions
            predictions.decoder.weight = self.bert.embeddings.word_embeddings.weight
            predictions.decoder.bias = predictions.bias


class BertForMaskedLM(_PreTrainingHead):
    """Predicts every token; labels (batch_size, seq_len), -100 where there is nothing to predict."""

    masked_lm = True
    pooled = False

    def scores(self, rows: Tensor) -> Tensor:
        """Of every word: (num_rows, hidden_size) -> (num_rows, vocab_size)."""
        scores: Tensor = self.cls.predictions(rows)
        return scores

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, seq_len, vocab_size)."""
        logits = encoded.pad(self.scores(encoded.rows))
        loss = None if labels is None else token_loss(logits, labels, encoded, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class BertForNextSentencePrediction(_PreTrainingHead):
    """Whether the second segment follows the first; labels (batch_size,): 0 it does, 1 it is random."""

    next_sentence = True
    pooled_only = True

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, 2)."""
        logits = self.cls.seq_relationship(encoded.pooler_output)
        loss = None if labels is None else cross_entropy(logits, labels, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class BertForPreTraining(_PreTrainingHead):
    """Both pre-training tasks; the loss needs both `labels` and `next_sentence_label`.

    Attributes:
        next_sentence_weight: what the second loss is multiplied by before it is added to the first; BERT's is 1.
    """

    masked_lm = True
    next_sentence = True
    other_labels = ("next_sentence_label",)
    kept_with_loss = ("seq_relationship_logits",)
    next_sentence_weight = 1.0

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> PreTrainingOutput:
        """prediction_logits (batch_size, seq_len, vocab_size), seq_relationship_logits (batch_size, 2)."""
        prediction = encoded.pad(self.cls.predictions(encoded.rows))
        relationship = self.cls.seq_relationship(encoded.pooler_output)
        next_sentence, loss = targets["next_sentence_label"], None
        if labels is not None and next_sentence is not None:
            loss = token_loss(prediction, labels, encoded, divisor) + self.pair_loss(relationship, next_sentence)
        return PreTrainingOutput(loss, prediction, relationship, encoded.hidden_states, encoded.attentions)

    def pair_loss(self, relationship: Tensor, next_sentence: Tensor) -> Tensor:
        """The second loss, weighed: a mean over pairs; relationship (batch_size, 2), next_sentence (batch_size,)."""
        return self.next_sentence_weight * cross_entropy(relationship, next_sentence, name="next_sentence_label")


class _Classifier(Head):
    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        dropout = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(dropout)
        self.classifier = self.make_classifier(config)
        initialize(self.classifier, config)

    def make_classifier(self, config: BertConfig) -> nn.Module:
        """(..., hidden_size) -> (..., num_outputs)."""
        return nn.Linear(config.hidden_size, self.num_outputs(config))

    def num_outputs(self, config: BertConfig) -> int:
        """Width of the classifier."""
        return config.num_labels

    def summary(self, encoded: Encoded) -> Tensor:
        """What a classifier of texts reads, (batch_size, hidden_size)."""
        summary: Tensor = self.dropout(encoded.pooler_output)
        return summary


class BertForSequenceClassification(_Classifier):
    """A label, several, or a number per text, by `problem_type`.

    Not given, it is a regression for one label, a single label where labels are integers, several otherwise.
    """

    pooled_only = True

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, num_labels)."""
        logits = self.classifier(self.summary(encoded))
        loss = None if labels is None else self.loss_of(logits, labels, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def loss_of(self, logits: Tensor, labels: Tensor, divisor: float | None) -> Tensor:
        """Mean squared error, cross-entropy or binary cross-entropy, each a mean over texts and labels."""
        problem = self.config.problem_type
        if problem is None:
            single = not labels.is_floating_point() and labels.dtype != torch.bool
            problem = "single_label_classification" if single else "multi_label_classification"
            problem = "regression" if self.config.num_labels == 1 else problem
        if problem == "single_label_classification":
            return cross_entropy(logits, labels, divisor)
        if labels.numel() != logits.numel():
            raise ValueError(f"labels has shape {tuple(labels.shape)}, but the logits have {tuple(logits.shape)}")
        labels = labels.reshape(logits.shape).to(logits.dtype)
        per_text = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
        mean: Tensor = per_text(logits, labels)
        return mean if divisor is None else mean * (labels.shape[0] / divisor)


class BertForTokenClassification(_Classifier):
    """A label per token; labels (batch_size, seq_len), -100 where a token has none."""

    pooled = False

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, seq_len, num_labels)."""
        logits = encoded.pad(self.classifier(self.dropout(encoded.rows)))
        loss = None if labels is None else token_loss(logits, labels, encoded, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)


class BertForMultipleChoice(_Classifier):
    """Picks one of several texts: inputs (batch_size, num_choices, seq_len), labels (batch_size,)."""

    def num_outputs(self, config: BertConfig) -> int:
        """One score per choice."""
        return 1

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | float | None = None,
        loss_only: bool = False,
        **options: Any,
    ) -> ModelOutput | tuple[Any, ...]:
        """As `Head.forward`; every choice is a row of the encoder's batch. logits (batch_size, num_choices)."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.dim() != (4 if input_ids is None else 3):
            shape = None if given is None else tuple(given.shape)
            raise ValueError(f"multiple choice takes (batch_size, num_choices, seq_len, ...), got {shape}")
        ids, mask, types, positions, embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        inputs = BertInputs(ids, mask, types, positions, embeds, **options)
        encoded = self.bert.encode_batch(inputs, pooled_only=True)
        logits = self.classifier(self.summary(encoded)).view(given.shape[:2])
        divisor = divisor_of(num_items_in_batch)
        loss = None if labels is None else cross_entropy(logits, labels, divisor)
        output = LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)
        if loss_only:
            output = LogitsOutput(_given(output.loss, self))
        return output.to_tuple() if return_dict is False else output


class BertForQuestionAnswering(Head):
    """The span that answers: `start_positions` and `end_positions` (batch_size,); one past the text is ignored.

    In a packed batch there is one of each for every text, and they count from its first token.
    """

    pooled = False
    other_labels: tuple[str, ...] = ("start_positions", "end_positions")

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        initialize(self.qa_outputs, config)

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> QuestionAnsweringOutput:
        """start_logits and end_logits (batch_size, seq_len)."""
        spans = encoded.pad(self.qa_outputs(encoded.rows))
        start, end = (logits.contiguous() for logits in spans.unbind(-1))
        starts, ends, loss = targets["start_positions"], targets["end_positions"], None
        if starts is not None and ends is not None:
            texts, keep = (spans, encoded.keep) if encoded.cu_seqlens is None else _texts(spans, encoded.cu_seqlens)
            losses = [
                span_loss(logits, positions, keep, divisor)
                for logits, positions in zip(texts.unbind(-1), (starts, ends), strict=True)
            ]
            loss = (losses[0] + losses[1]) / 2
        return QuestionAnsweringOutput(loss, start, end, encoded.hidden_states, encoded.attentions)


def _texts(packed: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of a packed batch (1, num_tokens, ...) as (batch_size, longest, ...), and which tokens there are."""
    lengths = cu_seqlens.diff()
    columns = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=packed.device)
    keep = columns < lengths[:, None]
    texts = packed.new_zeros((*keep.shape, *packed.shape[2:]))
    texts[keep] = packed[0]
    return texts, keep
