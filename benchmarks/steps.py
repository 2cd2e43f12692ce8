"""What training is timed on: the texts of a few steps that stand for many, as each sampler and collator gives them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.cases import TrainCase
from bert_fast.benchmarking import EncoderShape, parse_case, useful_flops
from bert_fast.losses import IGNORED_LABEL

#: Batches that transformers' sampler with `group_by_length` sorts by length at a time, where there are so many texts.
MEGA_BATCH = 50

#: Selections of batches that are tried for one that stands for a mega-batch.
TRIALS = 20_000

#: How far the best of them may be from the mega-batch.
TOLERANCE = 0.05

#: Share of the tokens that masked language modelling predicts; of those, 80% are replaced by [MASK], 10% by any word.
PREDICTED, MASKED, RANDOM = 0.15, 0.8, 0.1
MASK_ID = 103

#: "padded" and "packed" take the texts as they come; "grouped" sorts them by length first, and pads.
LAYOUTS = ("padded", "grouped", "packed")

Batch = dict[str, Any]


@dataclass(frozen=True)
class Text:
    """One text: ids (length,) as the model sees them, and the label (), or labels (length,), -100 where none."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Steps:
    """The texts of a few steps, the same for every contender.

    Attributes:
        case: what is trained on them.
        lengths: of the texts in tokens, in the order in which a sampler draws them; `len(lengths) / case.steps` a step.
        vocab_size: ids are below it.
    """

    case: TrainCase
    lengths: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of(cls, case: TrainCase, vocab_size: int) -> Steps:
        """Steps whose texts are as many, as long and as much padded, by either sampler, as those of a mega-batch."""
        return cls(case, _drawn(case.batch, case.steps), vocab_size)

    @property
    def batch_size(self) -> int:
        """Texts of a step."""
        return len(self.lengths) // self.case.steps

    @cached_property
    def texts(self) -> list[Text]:
        """In the order of `lengths`; the same every time. Words are as frequent as Zipf's law has it."""
        generator = torch.Generator().manual_seed(0)
        return [self._text(length, generator) for length in self.lengths]

    def batches(self, layout: str) -> list[Batch]:
        """A batch for each step, in one of `LAYOUTS`, by transformers' names.

        Padded: input_ids, attention_mask (batch_size, longest), labels. Packed: input_ids, position_ids
        (1, num_tokens), cu_seq_lens_q and _k (batch_size + 1,) int32, max_length_q and _k, labels. labels are
        (batch_size,), or as input_ids.
        """
        return [collate(texts, layout) for texts in self.chosen(layout)]

    def first(self, layout: str) -> Batch:
        """The first texts that are drawn, in a layout: what answers are compared on."""
        return collate(self.texts[: self.batch_size], layout)

    def chosen(self, layout: str) -> list[list[Text]]:
        """The texts of each step."""
        order = list(range(len(self.lengths)))
        if layout == "grouped":
            order.sort(key=lambda index: -self.lengths[index])
        size = self.batch_size
        return [[self.texts[i] for i in order[start : start + size]] for start in range(0, len(order), size)]

    def computed_tokens(self, layout: str) -> int:
        """Tokens of all steps, with the padding that the collator adds."""
        return sum(
            sum(lengths) if layout == "packed" else len(lengths) * max(lengths)
            for lengths in ([len(text.ids) for text in texts] for texts in self.chosen(layout))
        )

    @property
    def predicted(self) -> int:
        """Tokens that have a label."""
        return sum(int((text.labels != IGNORED_LABEL).sum()) for text in self.texts) if self.case.task == "mlm" else 0

    def flops(self, config: EncoderShape) -> int:
        """Useful operations of all steps: three times those of a forward pass.

        The encoder's over real tokens (`useful_flops`), and of masked language modelling the head's, `2 h^2 + 2 h v`
        for each predicted token, hidden size h and v words.
        """
        h = config.hidden_size
        return 3 * (useful_flops(config, self.lengths) + self.predicted * 2 * h * (h + self.vocab_size))

    def _text(self, length: int, generator: torch.Generator) -> Text:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator)

        ids = (self.vocab_size ** uniform(length)).long().clamp(1, self.vocab_size - 1)  # density 1 / id
        if self.case.task == "classification":
            return Text(ids, torch.randint(2, (), generator=generator))
        predicted = torch.randperm(length, generator=generator)[: max(1, round(PREDICTED * length))]
        labels = torch.full_like(ids, IGNORED_LABEL)
        labels[predicted] = ids[predicted]
        words = torch.randint(1, self.vocab_size, (length,), generator=generator)
        what = uniform(length)
        shown = torch.where(
            what < MASKED, min(MASK_ID, self.vocab_size - 1), torch.where(what < MASKED + RANDOM, words, ids)
        )
        return Text(torch.where(labels == IGNORED_LABEL, ids, shown), labels)


@cache
def _drawn(batch: str, steps: int) -> tuple[int, ...]:
    """The lengths of the texts of so many steps."""
    batch_size = len(parse_case(batch).lengths)
    kind = batch.removesuffix(str(batch_size))
    if kind not in ("mix", "squad"):
        return parse_case(batch).lengths * steps
    lengths = np.array(parse_case(f"{kind}{MEGA_BATCH * batch_size}").lengths)
    return tuple(representative(lengths, batch_size, steps).tolist())


def representative(lengths: NDArray[np.int64], batch_size: int, steps: int) -> NDArray[np.int64]:
    """So many batches of a mega-batch that are like all of it in tokens, and in padding by either sampler.

    A few texts at random will not do: sorted, they are far from each other, and grouping them looks worse than it is.
    So the batches come from the sorted mega-batch, and of many selections and orders, of those where neither sampler
    pads more than in the whole mega-batch, the one is taken that comes closest to it: by the largest relative
    difference in computed tokens for each real one, by either sampler, and a quarter of that in tokens a text.

    Args:
        lengths: of `MEGA_BATCH` batches.
        batch_size: texts of a batch.
        steps: how many of the batches to choose.

    Returns:
        (steps * batch_size,) lengths in the order of random sampling; sorted, they are the batches of the grouped one.

    Raises:
        ValueError: none is within `TOLERANCE`, as there are too few steps.
    """
    rng = np.random.default_rng(0)
    grouped = np.sort(lengths)[::-1].reshape(-1, batch_size)
    longest = np.mean([rng.permutation(lengths).reshape(-1, batch_size).max(1).mean() for _ in range(100)])
    mean = lengths.mean()
    goal = np.array([mean, longest / mean, grouped[:, 0].mean() / mean])
    best, found = np.inf, lengths[:0]
    for _ in range(TRIALS):
        batches = grouped[rng.choice(len(grouped), steps, replace=False)]
        drawn = rng.permutation(batches.ravel())
        mean = drawn.mean()
        has = np.array([mean, drawn.reshape(steps, -1).max(1).mean() / mean, batches[:, 0].mean() / mean])
        if (has[1:] > goal[1:]).any():
            continue
        distance = (np.abs(has / goal - 1) * (0.25, 1.0, 1.0)).max()
        if distance < best:
            best, found = distance, drawn
    if best > TOLERANCE:
        raise ValueError(f"steps is {steps}: no {steps} batches of {batch_size} texts are padded like all of them")
    return found


def collate(texts: Sequence[Text], layout: str) -> Batch:
    """One batch, see `Steps.batches`."""
    ids, labels = [text.ids for text in texts], [text.labels for text in texts]
    of_tokens = labels[0].dim() > 0
    if layout == "packed":
        lengths = torch.tensor([len(part) for part in ids])
        offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        longest = int(lengths.max())
        return {
            "input_ids": torch.cat(ids)[None],
            "position_ids": torch.cat([torch.arange(len(part)) for part in ids])[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
            "max_length_q": longest,
            "max_length_k": longest,
            "labels": torch.cat(labels)[None] if of_tokens else torch.stack(labels),
        }
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(part) for part in ids], batch_first=True),
        "labels": pad_sequence(labels, True, IGNORED_LABEL) if of_tokens else torch.stack(labels),
    }
