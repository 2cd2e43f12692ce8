"""Masked language modelling: which tokens are to be predicted, drawn anew in every epoch, the same for every worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from bert_fast.data.counters import Uniforms
from bert_fast.data.masking import Masking
from bert_fast.training.batches import INDEX, WORD_IDS, PackingCollator


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

    Every random number comes from (seed, epoch, index of the example) alone. So the masks are new in every epoch, and
    the same in a resumed run, in any batch and with any number of workers.

    Args:
        seed: of the masks, together with epoch and index.
        max_position_embeddings: how many tokens a text may have; None for any number.
        masking: how many tokens, which, and what becomes of them, as `bert_fast.data.masking.Masking` takes it:
            `vocab_size`, `mask_token_id` and `special_token_ids`, and others by choice. All schemes but `subword` need
            `word_ids`.

    Raises:
        ValueError: an argument is impossible.
    """

    def __init__(self, *, seed: int = 0, max_position_embeddings: int | None = None, **masking: Any) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}, expected at least 0")
        self.masking = Masking(**masking)
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
            features: as `PackingCollator` takes them, without labels, from an `IndexedDataset`; `word_ids`
                (num_tokens,) say which tokens are of one word, -1 of none.

        Returns:
            What `PackingCollator` does, and labels (1, num_tokens) int64: the token at the chosen positions, -100 at
            all others.

        Raises:
            ValueError: what `PackingCollator` raises; an example has no index, has labels, or lacks the ids of words
                that the scheme needs.
        """
        batch = self.pack(features)
        if INDEX not in features[0]:
            raise ValueError("the features have no index to draw their masks from; wrap the data set in IndexedDataset")
        if "labels" in batch:
            raise ValueError("the features have labels, which the tokens to predict would overwrite")
        ids: NDArray[np.int64] = batch["input_ids"][0].numpy()
        lengths = np.diff(batch["cu_seq_lens_q"].numpy()).astype(np.int64)
        words = self._words(features, lengths) if self.masking.needs_words else None
        draws = self._draw([int(feature[INDEX]) for feature in features], lengths)
        hidden, labels = self.masking.hide(ids, lengths, draws, words)
        batch["input_ids"] = torch.from_numpy(hidden)[None]
        batch["labels"] = torch.from_numpy(labels)[None]
        return batch

    def _words(self, features: Sequence[Mapping[str, Any]], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        if WORD_IDS not in features[0]:
            raise ValueError(
                f"the features have no {WORD_IDS}, which masks of the scheme {self.masking.scheme} are drawn by"
            )
        words = [np.asarray(feature[WORD_IDS], np.int64) for feature in features]
        for index, (ids, length) in enumerate(zip(words, lengths.tolist(), strict=True)):
            if ids.shape != (length,):
                raise ValueError(
                    f"{WORD_IDS} of feature {index} has shape {ids.shape}, expected ({length},), its tokens"
                )
        return np.concatenate(words)

    def _draw(self, indices: list[int], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
        """(numbers, num_tokens) of [0, 1), as `Masking.hide` takes them."""
        uniforms, rows, parts = Uniforms(self.seed, int(self._epoch)), self.masking.numbers, []
        for index, length in zip(indices, lengths.tolist(), strict=True):
            uniforms.go_to(index)
            parts.append(uniforms.take(rows * length).reshape(rows, length))
        return np.concatenate(parts, axis=1)
