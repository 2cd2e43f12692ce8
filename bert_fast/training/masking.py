"""Masked language modelling: which tokens are to be predicted, drawn anew in every epoch, the same for every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bert_fast.heads import IGNORED_LABEL
from bert_fast.training.batches import INDEX, PackingCollator

#: Of the tokens to predict these parts become [MASK], and any word of the vocabulary; the rest stays.
MASKED, REPLACED = 0.8, 0.1


class IndexedDataset(Dataset[dict[str, Any]]):
    """A data set whose examples know their number, which the masks are drawn from.

    Args:
        examples: gives features by index, and their number by `len`.
    """

    def __init__(self, examples: Any) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.examples[index], INDEX: index}


class MaskingCollator:
    """Packs texts as `PackingCollator` does, and hides some of their tokens, which the model has to predict.

    As in BERT (Devlin et al., 2018; google-research/bert, create_pretraining_data.py): of a text of n tokens, special
    ones included, min(max_predictions, max(1, round(mlm_probability * n))) are chosen among those that are not special,
    or as many as there are; 80% of them become [MASK], 10% a word drawn from the whole vocabulary, 10% stay.

    Every random number comes from (seed, epoch, index of the example) alone. So the masks are new in every epoch, and
    the same in a resumed run, in any batch and with any number of workers.

    Args:
        vocab_size: of the words that replace a token.
        mask_token_id: of [MASK].
        special_token_ids: never chosen: [CLS], [SEP], [PAD].
        mlm_probability: part of the tokens to predict.
        max_predictions: of a text; None for any number.
        seed: of the masks, together with epoch and index.
        max_position_embeddings: how many tokens a text may have; None for any number.

    Raises:
        ValueError: an argument is impossible.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        mask_token_id: int,
        special_token_ids: Sequence[int],
        mlm_probability: float = 0.15,
        max_predictions: int | None = None,
        seed: int = 0,
        max_position_embeddings: int | None = None,
    ) -> None:
        if not 0.0 < mlm_probability <= 1.0:
            raise ValueError(f"mlm_probability is {mlm_probability}, expected more than 0, at most 1")
        if max_predictions is not None and max_predictions < 1:
            raise ValueError(f"max_predictions is {max_predictions}, expected at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        for token in (mask_token_id, *special_token_ids):
            if not 0 <= token < vocab_size:
                raise ValueError(f"token id {token} is out of range [0, {vocab_size})")
        self.vocab_size, self.mask_token_id = vocab_size, mask_token_id
        self.special_token_ids = np.array(special_token_ids, np.int64)
        self.mlm_probability, self.max_predictions = mlm_probability, max_predictions
        self.seed = seed
        self.pack = PackingCollator(max_position_embeddings=max_position_embeddings)
        # Shared, because workers that persist keep the copy of this object that they were started with.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, before a `DataLoader` begins to fetch its batches; its workers follow."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected at least 0")
        self._epoch.fill_(epoch)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pack and mask.

        Args:
            features: as `PackingCollator` takes them, without labels, from an `IndexedDataset`.

        Returns:
            What `PackingCollator` does, and labels (1, num_tokens) int64: the token at the chosen positions, -100 at
            all others.

        Raises:
            ValueError: what `PackingCollator` raises; an example has no index, or has labels.
        """
        batch = self.pack(features)
        if INDEX not in features[0]:
            raise ValueError("the features have no index to draw their masks from; wrap the data set in IndexedDataset")
        if "labels" in batch:
            raise ValueError("the features have labels, which the tokens to predict would overwrite")
        ids: NDArray[np.int64] = batch["input_ids"][0].numpy()
        lengths = np.diff(batch["cu_seq_lens_q"].numpy())
        scores, actions, words = self._draw([int(feature[INDEX]) for feature in features], lengths)
        chosen = choose(scores, ~np.isin(ids, self.special_token_ids), lengths, self._counts(lengths))
        hidden = np.where(chosen & (actions < MASKED), self.mask_token_id, ids)
        replaced = chosen & (actions >= MASKED) & (actions < MASKED + REPLACED)
        hidden = np.where(replaced, (words * self.vocab_size).astype(np.int64), hidden)
        batch["input_ids"] = torch.from_numpy(hidden)[None]
        batch["labels"] = torch.from_numpy(np.where(chosen, ids, IGNORED_LABEL))[None]
        return batch

    def _draw(self, indices: list[int], lengths: NDArray[Any]) -> NDArray[np.float64]:
        """(3, num_tokens) numbers of [0, 1): the order of choice, what becomes of a token, and its replacement."""
        bits = np.random.Philox(np.random.SeedSequence((self.seed, int(self._epoch))))
        state, parts = bits.state, []
        for index, length in zip(indices, lengths, strict=True):
            state["state"]["counter"][2] = index  # of 2^256 values: streams of examples are 2^128 of them apart
            bits.state = state
            parts.append(bits.random_raw(3 * int(length)).reshape(3, -1))
        return np.ldexp(np.concatenate(parts, axis=1) >> 11, -53)

    def _counts(self, lengths: NDArray[Any]) -> NDArray[np.int64]:
        """How many tokens of each text to predict; halves are rounded to even, as Python does."""
        counts = np.maximum(1, np.rint(lengths * self.mlm_probability)).astype(np.int64)
        return counts if self.max_predictions is None else np.minimum(counts, self.max_predictions)


def choose(
    scores: NDArray[np.float64], candidates: NDArray[np.bool_], lengths: NDArray[Any], counts: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """The candidates with the lowest scores of each text, single tokens.

    Args:
        scores: (num_tokens,) below 1.
        candidates: (num_tokens,) which tokens may be chosen.
        lengths: (batch_size,) tokens of each text.
        counts: (batch_size,) how many to choose; all candidates where there are fewer.

    Returns:
        (num_tokens,) bool.
    """
    texts = np.repeat(np.arange(len(lengths)), lengths)
    order = np.argsort(2 * texts + np.where(candidates, scores, 1.5), kind="stable")
    ranks = np.arange(len(texts)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    chosen = np.zeros(len(texts), bool)
    chosen[order] = ranks < np.repeat(counts, lengths)
    return chosen & candidates
