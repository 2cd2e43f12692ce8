"""The head that makes a vector of a text, and the losses that it is trained with, by sentence-transformers' names.

The encoder below it is whichever a subclass names. Losses are taken in float32 or wider, outside of autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bert_fast.config import BertConfig
from bert_fast.heads import Head
from bert_fast.inputs import BertInputs
from bert_fast.outputs import Encoded, SentenceEmbeddingOutput

#: How the vectors of the tokens of a text become one.
POOLING_MODES = ("cls", "mean", "max")

#: Under this name the settings stand in `config.json`.
CONFIG_KEY = "sentence_embedding"


@dataclass(frozen=True)
class EmbeddingSettings:
    """How vectors are made, and what they are trained with.

    Attributes:
        pooling_mode: one of `POOLING_MODES`.
        normalize: scale the vectors to length 1.
        max_seq_length: the most tokens of a text; longer ones lose their end.
        loss: one of `LOSSES`.
        scale: of the cosine in the losses that have a softmax.
        margin: of "triplet".
        symmetric: whether "multiple_negatives_ranking" also has each positive find its anchor.
        gather_across_devices: whether its candidates are those of all processes that train together, not only of one.
        mini_batch_size: in training, texts that the encoder keeps activations of at a time: the loss is that of the
            whole batch, in the memory of so many texts, for one more forward pass. None keeps those of all.

    Raises:
        ValueError: one of them is impossible; the message has its name and value.
    """

    pooling_mode: str = "mean"
    normalize: bool = True
    max_seq_length: int = 128
    loss: str = "multiple_negatives_ranking"
    scale: float = 20.0
    margin: float = 1.0
    symmetric: bool = False
    gather_across_devices: bool = False
    mini_batch_size: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("pooling_mode", POOLING_MODES), ("loss", tuple(LOSSES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        for name in ("scale", "margin"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        if self.max_seq_length < 3:
            raise ValueError(f"max_seq_length is {self.max_seq_length}, expected at least 3")
        size, gather = self.mini_batch_size, self.gather_across_devices
        if size is not None and (type(size) is not int or size < 1):
            raise ValueError(f"mini_batch_size is {size!r}, expected a whole number of at least 1")
        if type(gather) is not bool:
            raise ValueError(f"gather_across_devices is {gather!r}, expected true or false")
        if gather and self.loss != "multiple_negatives_ranking":
            raise ValueError(f"gather_across_devices is for multiple_negatives_ranking, but the loss is {self.loss}")

    @classmethod
    def of(cls, config: BertConfig) -> EmbeddingSettings:
        """What a config says; the defaults where it says nothing.

        Raises:
            ValueError: it says what is not known.
        """
        values = config.extra.get(CONFIG_KEY, {})
        if not isinstance(values, dict) or (unknown := values.keys() - cls.__dataclass_fields__.keys()):
            what = sorted(unknown) if isinstance(values, dict) else values
            raise ValueError(f"{CONFIG_KEY} of the config has {what!r}, which are none of its settings")
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """As a field of a config."""
        return {CONFIG_KEY: asdict(self)}


def multiple_negatives_ranking(
    vectors: Tensor, labels: Tensor, text_ids: Tensor, settings: EmbeddingSettings
) -> Tensor:
    """Cross-entropy of finding the positive among all positives and negatives of the batch (Henderson et al., 2017).

    A candidate that is known not to be wrong is left out: one that has the text of the anchor, or of any positive that
    this anchor has in the batch. Where no text occurs twice this is sentence-transformers'
    `MultipleNegativesRankingLoss`, and with `symmetric` the mean of both directions. With `gather_across_devices` the
    candidates, and for `symmetric` the anchors, are those of all processes; the mean stays that of one's own examples.

    Args:
        vectors: (batch_size, num_texts, dimension): anchor, positive, negatives.
        labels: not read.
        text_ids: (batch_size, num_texts), equal for equal texts.
        settings: give `scale`, `symmetric` and `gather_across_devices`.
    """
    vectors, first, num_own = F.normalize(vectors, dim=2), 0, len(vectors)
    if settings.gather_across_devices and torch.is_grad_enabled() and dist.is_available() and dist.is_initialized():
        vectors, text_ids, first = _gathered(vectors, text_ids)
    own = slice(first, first + num_own)
    anchors, candidates = vectors[:, 0], vectors[:, 1:].transpose(0, 1).flatten(0, 1)
    not_wrong = _not_wrong(text_ids)
    scores = (anchors[own] @ candidates.T * settings.scale).masked_fill(not_wrong[own], -torch.inf)
    right = scores.diagonal(first)
    log_sum = scores.logsumexp(1)
    if settings.symmetric:
        backwards = (anchors @ candidates[own].T * settings.scale).masked_fill(not_wrong[:, own], -torch.inf)
        log_sum = (log_sum + backwards.logsumexp(0)) / 2
    return (log_sum - right).mean()


def _gathered(vectors: Tensor, text_ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """The examples of all processes, one process after another, and the number of the first one of this process.

    Gradients go back to the process whose vector it is, summed over all. Processes may have unequal many examples.
    """
    from torch.distributed.nn.functional import all_gather  # absent from a torch without torch.distributed

    counts = [torch.zeros(1, dtype=torch.int64, device=vectors.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(vectors)], device=vectors.device))
    sizes = [int(count) for count in counts]
    missing = max(sizes) - len(vectors)
    padded_ids = F.pad(text_ids, (0, 0, 0, missing)).contiguous()
    ids = [torch.empty_like(padded_ids) for _ in sizes]
    dist.all_gather(ids, padded_ids)
    parts = all_gather(F.pad(vectors, (0, 0, 0, 0, 0, missing)).contiguous())
    together, numbers = (torch.cat([part[:size] for part, size in zip(p, sizes, strict=True)]) for p in (parts, ids))
    return together, numbers, sum(sizes[: dist.get_rank()])


def _not_wrong(text_ids: Tensor) -> Tensor:
    """(batch_size, candidates) bool: candidates that are no negatives of an anchor, besides its own positive."""
    anchors, positives = text_ids[:, 0], text_ids[:, 1]
    candidates = text_ids[:, 1:].T.flatten()
    same_anchor = (anchors[:, None] == anchors).float()
    is_positive = same_anchor @ (positives[:, None] == candidates).float() > 0
    return (is_positive | (candidates == anchors[:, None])).fill_diagonal_(False)


def triplet(vectors: Tensor, labels: Tensor, text_ids: Tensor, settings: EmbeddingSettings) -> Tensor:
    """max(0, |anchor - positive| - |anchor - negative| + margin), Euclidean (Reimers & Gurevych, 2019, section 3).

    Args:
        vectors: (batch_size, num_texts, dimension); several negatives count as so many triplets.
        labels, text_ids: not read.
        settings: give `margin`.
    """
    anchor, positive, negative = vectors[:, :1], vectors[:, 1:2], vectors[:, 2:]
    near, far = (torch.linalg.vector_norm(anchor - other, dim=2) for other in (positive, negative))
    return F.relu(near - far + settings.margin).mean()


def cosine_similarity(vectors: Tensor, labels: Tensor, text_ids: Tensor, settings: EmbeddingSettings) -> Tensor:
    """Mean squared error of the cosine of two texts against their score; vectors (batch_size, 2, dimension)."""
    return F.mse_loss(torch.cosine_similarity(vectors[:, 0], vectors[:, 1]), labels)


def cosent(vectors: Tensor, labels: Tensor, text_ids: Tensor, settings: EmbeddingSettings) -> Tensor:
    """log(1 + sum of exp(scale * (cos_j - cos_i)) over the pairs with score_i > score_j) (Huang et al., 2024).

    Args:
        vectors: (batch_size, 2, dimension).
        labels: (batch_size,) scores, of which only the order matters.
        text_ids: not read.
        settings: give `scale`.
    """
    cosines = torch.cosine_similarity(vectors[:, 0], vectors[:, 1]) * settings.scale
    differences = (cosines - cosines[:, None]).masked_fill(labels[:, None] <= labels, -torch.inf)
    return F.pad(differences.flatten(), (1, 0)).logsumexp(0)


Loss = Callable[[Tensor, Tensor, Tensor, EmbeddingSettings], Tensor]

LOSSES: dict[str, Loss] = {
    "multiple_negatives_ranking": multiple_negatives_ranking,
    "triplet": triplet,
    "cosine_similarity": cosine_similarity,
    "cosent": cosent,
}

#: Those that compare with a score.
SCORED = frozenset({"cosine_similarity", "cosent"})
#: Those that are a mean over examples, wherever batches are cut.
SEPARATE = frozenset({"cosine_similarity", "triplet"})


class BertForSentenceEmbedding(Head):
    """A vector for each text of a batch; the loss is over examples of several texts, which follow each other.

    Targets are `labels` (num_examples,) floats, the scores, which a loss without scores does not read, and `text_ids`
    (num_examples, texts of each): equal numbers for equal texts.
    """

    pooled = False
    other_labels = ("text_ids",)

    def __init__(self, config: BertConfig) -> None:
        self.settings = EmbeddingSettings.of(config)
        super().__init__(config)

    def answer(
        self, inputs: BertInputs, labels: Tensor | None, divisor: float | None, targets: dict[str, Tensor | None]
    ) -> SentenceEmbeddingOutput:
        """sentence_embedding (num_sequences, hidden_size)."""
        text_ids, loss = targets["text_ids"], None
        is_learning = labels is not None and text_ids is not None and self.training and torch.is_grad_enabled()
        encoded, size = None, self.settings.mini_batch_size
        if size is None or not is_learning or inputs.output_hidden_states or inputs.output_attentions:
            vectors, encoded = self.vectors_of(inputs)
        else:
            # Run again in the backward, with the same random numbers, so that dropout hides the same.
            run = partial(checkpoint, lambda part: self.vectors_of(part)[0], use_reentrant=False)
            vectors = torch.cat([run(part) for part in _parts(inputs, size)])
        if labels is not None and text_ids is not None:
            loss = self.loss_of(vectors, labels, text_ids, divisor)
        said = (None, None) if encoded is None else (encoded.hidden_states, encoded.attentions)
        return SentenceEmbeddingOutput(loss, vectors, *said)

    def vectors_of(self, inputs: BertInputs) -> tuple[Tensor, Encoded]:
        """(num_sequences, hidden_size), and what the encoder says."""
        encoded = self.bert.encode_batch(inputs)
        vectors = self.pool(*_tokens(inputs, encoded))
        return F.normalize(vectors, dim=1) if self.settings.normalize else vectors, encoded

    def pool(self, tokens: Tensor, cu_seqlens: Tensor) -> Tensor:
        """(num_tokens, hidden_size) and (num_sequences + 1,) int32 -> (num_sequences, hidden_size); zeros for none."""
        mode = self.settings.pooling_mode
        pooled = []
        for text in tokens.split(cu_seqlens.diff().tolist()):
            if mode == "mean" and len(text):
                pooled.append(text.mean(0))
            elif mode == "max" and len(text):
                pooled.append(text.amax(0))
            else:
                pooled.append(text[:1].sum(0))
        return torch.stack(pooled)

    def loss_of(self, vectors: Tensor, labels: Tensor, text_ids: Tensor, divisor: float | None) -> Tensor:
        """Mean over the examples, or their share of `divisor`; ValueError for shapes that do not belong together."""
        if text_ids.dim() != 2 or text_ids.numel() != len(vectors) or labels.shape != text_ids.shape[:1]:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} and text_ids {tuple(text_ids.shape)}, expected "
                f"(num_examples,) and (num_examples, texts) of {len(vectors)} texts"
            )
        least = 3 if self.settings.loss == "triplet" else 2
        if text_ids.shape[1] < least or (self.settings.loss in SCORED and text_ids.shape[1] > 2):
            raise ValueError(f"the loss {self.settings.loss!r} does not take examples of {text_ids.shape[1]} texts")
        with torch.autocast(vectors.device.type, enabled=False):
            vectors = vectors if vectors.dtype == torch.float64 else vectors.float()
            examples = vectors.unflatten(0, text_ids.shape)
            loss = LOSSES[self.settings.loss](examples, labels.to(vectors.dtype), text_ids, self.settings)
        return loss if divisor is None else loss * (len(labels) / divisor)


def _parts(inputs: BertInputs, size: int) -> Iterator[BertInputs]:
    """A packed batch, so many texts at a time."""
    if inputs.cu_seq_lens_q is None:
        raise ValueError(f"mini_batch_size is {size}, but the batch is padded, and only a packed one is cut in parts")
    starts = inputs.cu_seq_lens_q.tolist()
    for first in range(0, len(starts) - 1, size):
        ends = inputs.cu_seq_lens_q[first : first + size + 1]
        columns = slice(starts[first], starts[first + len(ends) - 1])
        names = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
        given = {name: getattr(inputs, name) for name in names}
        cut = {name: tensor[:, columns] for name, tensor in given.items() if tensor is not None}
        yield BertInputs(**cut, cu_seq_lens_q=ends - ends[0])


def _tokens(inputs: BertInputs, encoded: Encoded) -> tuple[Tensor, Tensor]:
    """The rows of all tokens there are, (num_tokens, hidden_size), and where the texts begin."""
    rows, keep = encoded.rows, encoded.keep
    if rows.dim() == 3:
        rows = rows.flatten(0, 1) if keep is None else rows[keep]
    if inputs.cu_seq_lens_q is not None:
        return rows, inputs.cu_seq_lens_q
    if keep is None:
        given: Any = inputs.inputs_embeds if inputs.input_ids is None else inputs.input_ids
        lengths = torch.full(given.shape[:1], given.shape[1], device=rows.device)
    else:
        lengths = keep.sum(1)
    return rows, F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
