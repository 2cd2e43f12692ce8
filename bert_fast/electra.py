"""ELECTRA (Clark et al., 2020, arXiv:2003.10555): a small generator replaces tokens, a discriminator finds them.

Its heads over the fast encoder, and how the two are trained together, which is google-research/electra's,
run_pretraining.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from bert_fast import electra_heads, losses, masked_lm, modules
from bert_fast.config import BertConfig
from bert_fast.encoder import linear
from bert_fast.heads import Head
from bert_fast.inputs import BertInputs
from bert_fast.outputs import LogitsOutput, ModelOutput
from bert_fast.ragged import Ragged

#: What the discriminator's loss is multiplied by before the generator's is added.
DISCRIMINATOR_WEIGHT = 50.0

#: Probabilities, in float64, of a block of rows that are drawn from at once: 64 MB.
BLOCK_PROBABILITIES = 2**23


class ElectraModel(modules.BertModel):
    """The fast BERT with embeddings that may be of another width; it has no pooler."""

    def __init__(self, config: BertConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer)


class _Fast(modules.Pretrained):
    base = ElectraModel


class ElectraForMaskedLM(_Fast, electra_heads.ElectraForMaskedLM):
    """The generator over the fast encoder."""

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The loss alone, from the tokens that have a label."""
        rows = _labelled(self, inputs, labels)
        if rows is None:
            return super().loss(inputs, labels, divisor, targets)
        predictions = SimpleNamespace(transform=self.generator_predictions, decoder=self.generator_lm_head)
        return LogitsOutput(loss=masked_lm.loss(predictions, rows, divisor))


def _labelled(
    generator: electra_heads.ElectraForMaskedLM, inputs: BertInputs, labels: Tensor | None
) -> masked_lm.Labelled | None:
    """The rows that the generator's loss reads, or None where the plain way has to run."""
    encoder = generator.bert
    if labels is None or not isinstance(encoder, ElectraModel) or masked_lm.obstacle(generator.generator_lm_head):
        return None
    return encoder.encode_labelled(inputs, labels)


class ElectraForPreTraining(_Fast, electra_heads.ElectraForPreTraining):
    """The discriminator over the fast encoder."""


class ElectraForSequenceClassification(_Fast, electra_heads.ElectraForSequenceClassification):
    """The fast ELECTRA with a classifier of texts."""


class ElectraForTokenClassification(_Fast, electra_heads.ElectraForTokenClassification):
    """The fast ELECTRA with a classifier of tokens."""


class ElectraForQuestionAnswering(_Fast, electra_heads.ElectraForQuestionAnswering):
    """The fast ELECTRA with a span head."""


class ElectraForMultipleChoice(_Fast, electra_heads.ElectraForMultipleChoice):
    """The fast ELECTRA with a scorer of choices."""


class ElectraForSentenceEmbedding(_Fast, electra_heads.ElectraHead, modules.BertForSentenceEmbedding):
    """The fast ELECTRA with pooling. What it saves is a folder of sentence-transformers."""


#: As `modules.HEADS`.
HEADS: dict[str | None, type[nn.Module]] = {
    None: ElectraModel,
    "masked_lm": ElectraForMaskedLM,
    "pre_training": ElectraForPreTraining,
    "sequence_classification": ElectraForSequenceClassification,
    "token_classification": ElectraForTokenClassification,
    "question_answering": ElectraForQuestionAnswering,
    "multiple_choice": ElectraForMultipleChoice,
    "sentence_embedding": ElectraForSentenceEmbedding,
}


@torch.no_grad()
def sample(hidden: Tensor, decoder: nn.Linear) -> Tensor:
    """Words drawn from softmax(decoder(hidden)), without gradient; one number of torch's generator for each row.

    Drawn by the inverse of the cumulative distribution, in float64: Gumbel noise would take a number for each word.

    Args:
        hidden: (rows, features).
        decoder: gives the scores, (rows, vocab_size).

    Returns:
        (rows,) int64.
    """
    where = torch.rand(hidden.shape[0], 1, dtype=torch.float64, device=hidden.device)
    words = [
        _inverse(linear(part, decoder.weight, decoder.bias), numbers)
        for part, numbers in (
            (hidden[start : start + size], where[start : start + size])
            for size in (max(1, BLOCK_PROBABILITIES // decoder.weight.shape[0]),)
            for start in range(0, hidden.shape[0], size)
        )
    ]
    return torch.cat([torch.zeros(0, dtype=torch.int64, device=hidden.device), *words])


def _inverse(scores: Tensor, numbers: Tensor) -> Tensor:
    """scores (rows, words), numbers (rows, 1) of [0, 1) -> (rows,): the first word up to which more is cumulated."""
    cumulated = torch.softmax(scores.double(), -1).cumsum(-1)
    found = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).squeeze(1)
    return found.clamp(max=scores.shape[1] - 1)


def corrupt(ragged: Ragged, positions: Tensor, originals: Tensor, samples: Tensor) -> tuple[Ragged, Tensor]:
    """The batch that the discriminator sees, and which of its tokens are not the original ones.

    A sample that is the original counts as original. The first token of a sequence, which is [CLS], is never replaced.

    Args:
        ragged: as the generator saw it, with [MASK] at most of the positions.
        positions: (labels,) int64, numbers of the tokens that the generator predicted.
        originals, samples: (labels,) int64, what stood there, and what the generator says.

    Returns:
        The batch with the samples in it, and (num_tokens,) bool.
    """
    ids, replaced = ragged.input_ids.clone(), torch.zeros_like(ragged.input_ids, dtype=torch.bool)
    if ids.numel():
        is_first = torch.zeros_like(replaced)
        starts, is_empty = ragged.first()
        is_first[starts[~is_empty]] = True
        words = torch.where(is_first[positions], originals, samples)
        ids[positions] = words.to(ids.dtype)
        replaced[positions] = words != originals
    return replace(ragged, input_ids=ids), replaced


@dataclass
class ElectraOutput(ModelOutput):
    """What a step of pre-training gives.

    `generator_loss` is over the labels, `discriminator_loss` a mean over all tokens, not weighed; `logits` and
    `replaced` are (num_tokens,), of the tokens without padding, one sequence after another.
    """

    loss: Tensor | None = None
    generator_loss: Tensor | None = None
    discriminator_loss: Tensor | None = None
    logits: Tensor | None = None
    replaced: Tensor | None = None


class ElectraPretraining(modules.Pretrained, Head):
    """Generator and discriminator, trained together: loss = the generator's + 50 * the discriminator's.

    They share all of the embeddings: the tables of words, positions and token types, and their LayerNorm, as in
    google-research/electra (model/modeling.py, scope "electra/embeddings"). What the generator samples has no gradient.

    Called as `Head.forward` says, with labels (batch_size, seq_len): the original token where the generator is to
    predict it, else -100. `loss_only` runs without padding, and without the scores of tokens that have no label.

    Args:
        generator, discriminator: over embeddings of one shape. The generator's own are given up.

    Attributes:
        discriminator_weight: what the discriminator's loss is multiplied by.

    Raises:
        ValueError: their embeddings differ in shape.
    """

    def __init__(
        self, generator: electra_heads.ElectraForMaskedLM, discriminator: electra_heads.ElectraForPreTraining
    ) -> None:
        nn.Module.__init__(self)
        for name in ("vocab_size", "embedding_size", "max_position_embeddings", "type_vocab_size"):
            ours, theirs = getattr(generator.config, name), getattr(discriminator.config, name)
            if ours != theirs:
                raise ValueError(f"{name} of the generator is {ours}, of the discriminator {theirs}: they share tables")
        self.config = discriminator.config
        self.generator, self.discriminator = generator, discriminator
        self.discriminator_weight = DISCRIMINATOR_WEIGHT
        self.generator.bert.embeddings = self.discriminator.bert.embeddings
        self.generator.tie_weights()

    @property
    def shapes(self) -> tuple[BertConfig, ...]:
        """The configs of both encoders."""
        return (self.generator.config, self.discriminator.config)

    def answer(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ElectraOutput:
        """The plain way: whichever encoders the two have, over the batch as it was given."""
        if labels is None:
            raise ValueError("ELECTRA's pre-training needs labels: the tokens that the generator is to predict")
        ragged, padding = inputs.checked(self.config).to_ragged()
        positions, originals = masked_lm.labelled(labels, padding, self.config.vocab_size)
        encoded = self.generator.bert.encode_batch(inputs)
        hidden = self.generator.generator_predictions(padding.pack(encoded.pad(encoded.rows))[positions])
        scores = self.generator.generator_lm_head(hidden)
        generator_loss = losses.cross_entropy(scores, originals, divisor)
        corrupted, replaced = corrupt(ragged, positions, originals, sample(hidden, self.generator.generator_lm_head))
        ids = padding.pad(corrupted.input_ids)
        logits = self.discriminator.answer(replace(inputs, input_ids=ids), None, None, {})["logits"]
        return self._joined(generator_loss, padding.pack(logits), replaced)

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ElectraOutput:
        """The same from the tokens there are; of the generator from those that have a label."""
        rows, model = _labelled(self.generator, inputs, labels), self.discriminator.bert
        if rows is None or not isinstance(model, ElectraModel) or model._obstacle():
            return self.answer(inputs, labels, divisor, targets)
        decoder = self.generator.generator_lm_head
        hidden = self.generator.generator_predictions(rows.rows)
        generator_loss = masked_lm.decoder_loss(hidden, decoder, rows.labels, divisor)
        ragged, _ = inputs.checked(self.config).to_ragged()
        ragged, replaced = corrupt(ragged, rows.positions, rows.labels, sample(hidden, decoder))
        logits = self.discriminator.discriminator_predictions(model.encode(ragged))
        return self._joined(generator_loss, logits, replaced)

    def _joined(self, generator_loss: Tensor, logits: Tensor, replaced: Tensor) -> ElectraOutput:
        discriminator_loss = electra_heads.replaced_loss(logits, replaced)
        loss = generator_loss + self.discriminator_weight * discriminator_loss
        return ElectraOutput(loss, generator_loss, discriminator_loss, logits, replaced)

    def save_pretrained(self, directory: str | Path) -> None:
        """The discriminator into `directory`, the generator into `generator` below it: what transformers loads."""
        from bert_fast.saving import save_pretrained

        save_pretrained(self.discriminator, directory)
        save_pretrained(self.generator, Path(directory) / "generator")
