"""ELECTRA (Clark et al., 2020, arXiv:2003.10555): a small generator replaces tokens, a discriminator finds them.

Names of parameters, outputs and losses of the two are those of transformers' `ElectraForMaskedLM` and
`ElectraForPreTraining`, but for one thing: positions that the mask hides take no part in a loss. How the two are
trained together is google-research/electra's, run_pretraining.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bert_fast import engine, heads, losses, masked_lm, modules, reference
from bert_fast.activation import activation
from bert_fast.config import BertConfig
from bert_fast.encoder import linear
from bert_fast.folders import CONFIG_FILE
from bert_fast.heads import Head
from bert_fast.inputs import BertInputs
from bert_fast.outputs import Encoded, LogitsOutput, ModelOutput
from bert_fast.ragged import Ragged

#: What the discriminator's loss is multiplied by before the generator's is added.
DISCRIMINATOR_WEIGHT = 50.0

#: Probabilities, in float64, of a block of rows that are drawn from at once: 64 MB.
BLOCK_PROBABILITIES = 2**23

Electra = TypeVar("Electra", bound="_ElectraHead")


@dataclass
class ElectraConfig(BertConfig):
    """Configuration of an ELECTRA model, as `config.json` of a Hugging Face checkpoint holds it.

    The defaults are ELECTRA-small's discriminator. Embeddings narrower or wider than the layers are projected.
    """

    model_type: ClassVar[str] = "electra"

    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024
    embedding_size: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.embedding_size, int) and self.embedding_size > 0):
            raise ValueError(f"embedding_size is {self.embedding_size!r}, expected a positive integer")

    def generator(self, hidden_size: float = 0.25, layers: float = 1.0) -> ElectraConfig:
        """The generator of this discriminator, as google-research/electra makes it: `get_generator_config`.

        Its heads have 64 channels, its feed-forward block four times its width; embeddings are the discriminator's.

        Args:
            hidden_size: part of the discriminator's width; 1/4 for small and large, 1/3 for base.
            layers: part of the discriminator's layers.

        Raises:
            ValueError: a part is not above 0 and at most 1.
        """
        for name, part in (("hidden_size", hidden_size), ("layers", layers)):
            if not 0 < part <= 1:
                raise ValueError(f"generator_{name} is {part}, expected above 0 and at most 1")
        width = max(1, round(self.hidden_size * hidden_size))
        return replace(
            self,
            hidden_size=width,
            num_hidden_layers=round(self.num_hidden_layers * layers),
            num_attention_heads=next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0),
            intermediate_size=4 * width,
        )


class ElectraModel(modules.BertModel):
    """The fast BERT with embeddings of another width; without a pooler."""

    def engine(self) -> engine.Engine | None:
        """None where the embeddings are projected, which no packed weights do; else as in `BertModel`."""
        return None if self.embeddings_project is not None else super().engine()


class _ElectraHead(modules.Pretrained, Head):
    """A model whose encoder is `self.electra`.

    Args:
        config: its shape.
        base: the encoder's class; `reference.BertModel` for the plain definition.
    """

    base = ElectraModel
    prefix = "electra."
    pooled = False

    def __init__(self, config: ElectraConfig, base: type[reference.BertModel] = ElectraModel) -> None:
        nn.Module.__init__(self)
        self.config: ElectraConfig = config
        self.electra = base(config, add_pooling_layer=False)

    @property
    def bert(self) -> Any:
        """The encoder, as other heads call it."""
        return self.electra


class GeneratorPredictions(nn.Module):
    """LayerNorm(gelu(dense(hidden))), before the generator's decoder."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.LayerNorm = nn.LayerNorm(config.embedding_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.embedding_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., embedding_size)."""
        return self.LayerNorm(F.gelu(self.dense(hidden)))


class DiscriminatorPredictions(nn.Module):
    """dense_prediction(act(dense(hidden))): a score per token, above 0 for one that was replaced."""

    def __init__(self, config: ElectraConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.dense_prediction = nn.Linear(config.hidden_size, 1)
        self.hidden_act = config.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., hidden_size) -> (...)."""
        return self.dense_prediction(activation(self.dense(hidden), self.hidden_act)).squeeze(-1)


class ElectraForMaskedLM(_ElectraHead):
    """The generator: predicts every token; labels (batch_size, seq_len), -100 where there is nothing to predict."""

    def __init__(self, config: ElectraConfig, base: type[reference.BertModel] = ElectraModel) -> None:
        super().__init__(config, base)
        self.generator_predictions = GeneratorPredictions(config)
        self.generator_lm_head = nn.Linear(config.embedding_size, config.vocab_size)
        heads.initialize(self.generator_predictions, config)
        heads.initialize(self.generator_lm_head, config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Share the decoder's weight with the word embeddings, if the config says so."""
        if self.config.tie_word_embeddings:
            self.generator_lm_head.weight = self.electra.embeddings.word_embeddings.weight

    def read(
        self, encoded: Encoded, labels: Tensor | None, divisor: float | None = None, **targets: Tensor | None
    ) -> LogitsOutput:
        """logits (batch_size, seq_len, vocab_size)."""
        logits = encoded.pad(self.generator_lm_head(self.generator_predictions(encoded.rows)))
        loss = None if labels is None else losses.token_loss(logits, labels, encoded, divisor)
        return LogitsOutput(loss, logits, encoded.hidden_states, encoded.attentions)

    def loss(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> ModelOutput:
        """The loss alone, from the tokens that have a label."""
        rows = self.encode_labelled(inputs, labels)
        if rows is None:
            return super().loss(inputs, labels, divisor, targets)
        predictions = SimpleNamespace(transform=self.generator_predictions, decoder=self.generator_lm_head)
        return LogitsOutput(loss=masked_lm.loss(predictions, rows, divisor))

    def encode_labelled(self, inputs: BertInputs, labels: Tensor | None) -> masked_lm.Labelled | None:
        """The rows that the loss reads, or None where the plain way has to run."""
        if labels is None or not isinstance(self.electra, ElectraModel) or masked_lm.obstacle(self.generator_lm_head):
            return None
        return self.electra.encode_labelled(inputs, labels)


class ElectraForPreTraining(_ElectraHead):
    """The discriminator: whether each token was replaced; labels (batch_size, seq_len), 1 where it was, else 0."""

    def __init__(self, config: ElectraConfig, base: type[reference.BertModel] = ElectraModel) -> None:
        super().__init__(config, base)
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

    def __init__(self, generator: ElectraForMaskedLM, discriminator: ElectraForPreTraining) -> None:
        nn.Module.__init__(self)
        for name in ("vocab_size", "embedding_size", "max_position_embeddings", "type_vocab_size"):
            ours, theirs = getattr(generator.config, name), getattr(discriminator.config, name)
            if ours != theirs:
                raise ValueError(f"{name} of the generator is {ours}, of the discriminator {theirs}: they share tables")
        self.config = discriminator.config
        self.generator, self.discriminator = generator, discriminator
        self.discriminator_weight = DISCRIMINATOR_WEIGHT
        self.generator.electra.embeddings = self.discriminator.electra.embeddings
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
        encoded = self.generator.electra.encode_batch(inputs)
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
        rows, model = self.generator.encode_labelled(inputs, labels), self.discriminator.electra
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
        discriminator_loss = replaced_loss(logits, replaced)
        loss = generator_loss + self.discriminator_weight * discriminator_loss
        return ElectraOutput(loss, generator_loss, discriminator_loss, logits, replaced)

    def save_pretrained(self, directory: str | Path) -> None:
        """The discriminator into `directory`, the generator into `generator` below it: what transformers loads."""
        self.discriminator.save_pretrained(directory)
        self.generator.save_pretrained(Path(directory) / "generator")


def from_pretrained(folder: str | Path, model_class: type[Electra]) -> Electra:
    """A generator or discriminator with the weights of a checkpoint folder, in evaluation mode.

    Raises:
        ValueError: the checkpoint is not there, is damaged or is none of an ELECTRA; the message names what.
    """
    from bert_fast.loading import build, read_state_dict

    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(f"{folder} has no {CONFIG_FILE}")
    return build(model_class, ElectraConfig.from_json_file(folder / CONFIG_FILE), read_state_dict(folder))
