"""Batches by tokens: which texts go together, and one ragged batch made of them."""

from __future__ import annotations

import hashlib
from bisect import insort
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Sampler

#: How many of the texts that come next are looked at for one that fills the rest of a batch.
LOOKAHEAD = 64

#: What `IndexedDataset` calls the number of an example among its features.
INDEX = "example_index"

#: The words that tokens belong to, -1 for none, which masks are drawn by.
WORD_IDS = "word_ids"

#: Names under which transformers' collators take labels, too.
_LABELS = ("label", "label_ids")

#: Features that are not for the model.
_NOT_INPUTS = frozenset({INDEX, WORD_IDS, "attention_mask", "special_tokens_mask", "length"})


class _Plan(NamedTuple):
    """The batches of an epoch, of all replicas: batch i is texts `order[cuts[i]:cuts[i + 1]]`."""

    order: NDArray[np.int64]
    cuts: list[int]

    @property
    def num_batches(self) -> int:
        return len(self.cuts) - 1

    def batch(self, index: int) -> list[int]:
        return self.order[self.cuts[index] : self.cuts[index + 1]].tolist()


class TokenBudgetSampler(Sampler[list[int]]):
    """A batch sampler whose batches hold as many texts as fit into a number of tokens.

    With packing there is no padding to save, so that texts need not be grouped by length: the order is a random
    permutation for each (seed, epoch), and batches are filled from it in turn. What is left of a batch is given to the
    text, among the next `LOOKAHEAD`, that fills it best.

    Every replica has the same number of batches, and all replicas together have every text once. Where the batches do
    not come out even, the last ones are split until they do; `drop_last` leaves them out instead, at most
    `num_replicas - 1` batches, other ones in every epoch.

    In a run: `set_epoch` before each epoch, `advance` after each batch that was trained on. The state counts these, not
    what a `DataLoader` has fetched ahead, so that a run which is resumed gets exactly the batches that were to come. It
    may be resumed with another number of replicas: these share what is left of the epoch.

    Args:
        lengths: (num_texts,) tokens of each text; 0 is legal.
        max_tokens: of a batch, in real tokens.
        seed: of the order, together with the epoch.
        shuffle: False keeps the order of the texts, for evaluation; batches are then less full.
        num_replicas, rank: how many processes share the batches, and which one this is.
        max_sequences: texts of a batch; None for any number.
        drop_last: leave out the batches that do not come out even.

    Attributes:
        epoch: the present one.
        start_batch: how many of its batches this replica has trained on; an iteration starts there.

    Raises:
        ValueError: a text is longer than the budget, there are fewer texts than replicas, or an argument is impossible.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        max_tokens: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        num_replicas: int = 1,
        rank: int = 0,
        max_sequences: int | None = None,
        drop_last: bool = False,
    ) -> None:
        for name, value, low in (
            ("max_tokens", max_tokens, 1),
            ("seed", seed, 0),
            ("num_replicas", num_replicas, 1),
            ("max_sequences", 1 if max_sequences is None else max_sequences, 1),
        ):
            if value < low:
                raise ValueError(f"{name} is {value}, expected at least {low}")
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank is {rank}, expected one of 0 to {num_replicas - 1}")
        self.lengths = _checked_lengths(lengths, max_tokens)
        self._digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=16).hexdigest()
        if len(self.lengths) < num_replicas:
            raise ValueError(f"{len(self.lengths)} texts cannot give each of {num_replicas} replicas a batch")
        self.max_tokens, self.max_sequences = max_tokens, max_sequences
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.num_replicas, self.rank = num_replicas, rank
        self.epoch, self.start_batch = 0, 0
        #: Who had the beginning of this epoch, if there was another number of replicas: (replicas, batches of each).
        self._earlier: list[tuple[int, int]] = []
        self._plans: dict[Any, _Plan] = {}

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch, from its first batch; the present one stays where it is."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected at least 0")
        if epoch != self.epoch:
            self.epoch, self.start_batch, self._earlier = epoch, 0, []

    def advance(self, num_batches: int = 1) -> None:
        """Count batches as trained on: an iteration or a state from now on leaves them out.

        Raises:
            ValueError: the epoch does not have as many.
        """
        if self.start_batch + num_batches > self.num_batches():
            done, whole = self.start_batch + num_batches, self.num_batches()
            raise ValueError(f"{done} batches are done of the {whole} of epoch {self.epoch}; set_epoch begins another")
        self.start_batch += num_batches

    def num_batches(self, epoch: int | None = None) -> int:
        """Of each replica in an epoch, by default the present one; epochs differ by few.

        Of an epoch that was begun with another number of replicas only what was left is counted.
        """
        if epoch is None or epoch == self.epoch:
            return self._plan().num_batches // self.num_replicas
        return self._deal(self._order(epoch)).num_batches // self.num_replicas

    def __len__(self) -> int:
        """How many batches an iteration gives: those of the present epoch from `start_batch` on."""
        return self.num_batches() - self.start_batch

    def __iter__(self) -> Iterator[list[int]]:
        plan = self._plan()
        first = self.start_batch * self.num_replicas + self.rank
        return (plan.batch(index) for index in range(first, plan.num_batches, self.num_replicas))

    def state_dict(self) -> dict[str, Any]:
        """Where the run is, the same on every replica; numbers and strings that JSON holds."""
        return {
            **self._identity(),
            "epoch": self.epoch,
            "start_batch": self.start_batch,
            "num_replicas": self.num_replicas,
            "earlier": [list(part) for part in self._earlier],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go where the run was.

        Raises:
            ValueError: the state is of other data or of other batches; the message says what differs.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(f"the state of the sampler lacks {', '.join(sorted(missing))}")
        if differences := [
            f"{name} was {state[name]!r} and is {value!r}"
            for name, value in self._identity().items()
            if state[name] != value
        ]:
            raise ValueError(f"the data or the batches have changed since the run was saved: {'; '.join(differences)}")
        self.epoch, self.start_batch = int(state["epoch"]), int(state["start_batch"])
        self._earlier = [(int(replicas), int(batches)) for replicas, batches in state["earlier"]]
        if state["num_replicas"] != self.num_replicas:
            self._earlier.append((int(state["num_replicas"]), self.start_batch))
            self.start_batch = 0

    def _identity(self) -> dict[str, Any]:
        """What decides the batches of an epoch, besides the number of replicas."""
        return {
            "num_texts": len(self.lengths),
            "num_tokens": int(self.lengths.sum()),
            "digest_of_lengths": self._digest,
            "max_tokens": self.max_tokens,
            "max_sequences": self.max_sequences,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(len(self.lengths))
        # NumPy guarantees the integers of Philox from release to release, but not its own permutations of them.
        keys = np.random.Philox(np.random.SeedSequence((self.seed, epoch))).random_raw(len(self.lengths))
        return keys.argsort(kind="stable")

    def _plan(self) -> _Plan:
        key = (self.epoch, *self._earlier)
        if key not in self._plans:
            order = self._order(self.epoch)
            for replicas, batches in self._earlier:
                before = self._deal(order, replicas)
                order = before.order[before.cuts[replicas * batches] :]
            self._plans = {key: self._deal(order)}
        return self._plans[key]

    def _deal(self, order: NDArray[np.int64], num_replicas: int | None = None) -> _Plan:
        """Fill batches with the texts of `order`, which is changed, and make their number a multiple."""
        num_replicas = num_replicas or self.num_replicas
        sizes = self.lengths[order]
        cuts = _fill(order, sizes, self.max_tokens, self.max_sequences, LOOKAHEAD if self.shuffle else 0)
        remainder = (len(cuts) - 1) % num_replicas
        if self.drop_last:
            return _Plan(order, cuts[: len(cuts) - remainder])
        if remainder:
            _split_last(cuts, sizes, num_replicas)
        return _Plan(order, cuts)


def _checked_lengths(lengths: ArrayLike, max_tokens: int) -> NDArray[np.int64]:
    array = np.asarray(lengths)
    if array.ndim != 1 or not array.size or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"lengths is {array.dtype} of shape {array.shape}, expected integers (num_texts,), at least one"
        )
    for wrong, expected in ((array < 0, "at least 0"), (array > max_tokens, f"at most max_tokens {max_tokens}")):
        if wrong.any():
            index = int(wrong.argmax())
            raise ValueError(f"text {index} has {array[index]} tokens, expected {expected}")
    return array.astype(np.int64)


def _fill(
    order: NDArray[np.int64], sizes: NDArray[np.int64], max_tokens: int, max_sequences: int | None, lookahead: int
) -> list[int]:
    """Where to cut the texts into batches; texts that fill one are moved forward, in `order` and `sizes`.

    Every batch starts with the text that has waited longest, so none is put off to the end of the epoch.
    """
    ends, num_texts, cuts = sizes.cumsum(), len(sizes), [0]
    while (start := cuts[-1]) < num_texts:
        budget = (ends[start - 1] if start else 0) + max_tokens
        last = num_texts if max_sequences is None else min(num_texts, start + max_sequences)
        stop = min(int(ends.searchsorted(budget, side="right")), last)
        while stop < last and (room := budget - ends[stop - 1]) > 0:
            window = sizes[stop : stop + lookahead]
            fitting = np.where(window <= room, window, 0)
            if not fitting.any():
                break
            found = stop + int(fitting.argmax())
            for array in (order, sizes):
                array[stop], array[stop + 1 : found + 1] = array[found], array[stop:found].copy()
            ends[stop : found + 1] = ends[stop - 1] + sizes[stop : found + 1].cumsum()
            stop += 1
        cuts.append(stop)
    return cuts


def _split_last(cuts: list[int], sizes: NDArray[np.int64], num_replicas: int) -> None:
    """Split batches of the last step, the ones with most tokens first, until all replicas have one.

    Where these have too few texts for that, batches before them are split, too.
    """
    num_batches = len(cuts) - 1
    missing, tail = -num_batches % num_replicas, num_batches % num_replicas
    while tail <= num_batches and len(sizes) - cuts[num_batches - tail] < tail + missing:
        tail += 1
    if tail > num_batches:
        raise ValueError(
            f"{len(sizes)} texts fill {num_batches} batches, which {num_replicas} replicas cannot share evenly; "
            "drop_last=True leaves out the last ones"
        )
    ends, first = sizes.cumsum(), num_batches - tail
    for _ in range(missing):
        several = [(a, b) for a, b in pairwise(cuts[first:]) if b - a > 1]
        start, stop = max(several, key=lambda batch: sizes[slice(*batch)].sum())
        half = ends[start : stop - 1].searchsorted((ends[start] - sizes[start] + ends[stop - 1]) / 2)
        insort(cuts, start + 1 + min(int(half), stop - start - 2))


class PackingCollator:
    """Features of several texts -> one batch without padding, by transformers' names.

    Integers with one value per token (`token_type_ids`, labels of tokens) are laid end to end as (1, num_tokens) int64.
    Numbers, and vectors of floats (labels of several classes at once), are stacked: (batch_size, ...), integers as
    int64, floats as float32. `label` and `label_ids` become `labels`. What is not for the model is left out:
    `attention_mask`, which may hide no token, `special_tokens_mask`, `length`, `word_ids` and what
    `masking.IndexedDataset` adds.

    A text without tokens is legal: the encoder gives zeros for it.

    Args:
        max_position_embeddings: how many tokens a text may have; None for any number.
    """

    def __init__(self, *, max_position_embeddings: int | None = None) -> None:
        self.max_position_embeddings = max_position_embeddings

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Pack.

        Args:
            features: of each text `input_ids` (num_tokens,), and whatever else; lists, arrays or tensors.

        Returns:
            input_ids, position_ids (1, num_tokens) int64; cu_seq_lens_q (batch_size + 1,) int32: text i is columns
            cu_seq_lens_q[i] to cu_seq_lens_q[i + 1]; max_length_q, an int; and the other features.

        Raises:
            ValueError: a feature is missing or is not what the others are; the message names its text by index.
        """
        if not features:
            raise ValueError("there are no features to make a batch of")
        for index, feature in enumerate(features):
            if "input_ids" not in feature:
                raise ValueError(
                    f"feature {index} has no input_ids; it has {', '.join(map(str, feature)) or 'nothing'}"
                )
            if different := feature.keys() ^ features[0].keys():
                raise ValueError(f"features 0 and {index} do not have the same names: {', '.join(sorted(different))}")
        columns = {name: [_array(name, i, f[name]) for i, f in enumerate(features)] for name in features[0]}
        lengths = np.array([len(ids) if ids.ndim == 1 else 0 for ids in columns["input_ids"]])
        self._check_length(lengths)
        if "attention_mask" in columns:
            _check_nothing_hidden(columns["attention_mask"])
        cu_seqlens = np.zeros(len(features) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        positions = np.arange(cu_seqlens[-1]) - np.repeat(cu_seqlens[:-1], lengths)
        batch: dict[str, Any] = {"position_ids": torch.from_numpy(positions)[None]}
        for name, arrays in columns.items():
            if name not in _NOT_INPUTS:
                batch["labels" if name in _LABELS else name] = _join(name, arrays, lengths)
        return {**batch, "cu_seq_lens_q": torch.from_numpy(cu_seqlens), "max_length_q": int(lengths.max())}

    def _check_length(self, lengths: NDArray[np.int64]) -> None:
        longest, most = int(lengths.argmax()), self.max_position_embeddings
        if most is not None and lengths[longest] > most:
            raise ValueError(
                f"feature {longest} has {lengths[longest]} tokens, more than max_position_embeddings {most}"
            )


def _array(name: str, index: int, value: Any) -> NDArray[Any]:
    try:
        array = value.numpy() if isinstance(value, Tensor) else np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{name} of feature {index} is not an array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} of feature {index} is a {type(value).__name__}, expected numbers")
    return array


def _check_nothing_hidden(masks: list[NDArray[Any]]) -> None:
    for index, mask in enumerate(masks):
        if not mask.all():
            raise ValueError(f"attention_mask of feature {index} hides tokens; give the texts without padding")


def _join(name: str, arrays: list[NDArray[Any]], lengths: NDArray[np.int64]) -> Tensor:
    """(1, num_tokens) of values per token, (batch_size, ...) of values per text."""
    if name == "input_ids" or _is_per_token(arrays[0]):
        for index, (array, length) in enumerate(zip(arrays, lengths, strict=True)):
            if not _is_per_token(array):
                got = f"{array.dtype} of shape {array.shape}"
                raise ValueError(f"{name} of feature {index} is {got}, expected integers (num_tokens,)")
            if len(array) != length:
                hint = "; labels of several classes at once are floats" if name in ("labels", *_LABELS) else ""
                raise ValueError(f"{name} of feature {index} has {len(array)} values for {length} tokens{hint}")
        return torch.from_numpy(np.concatenate(arrays).astype(np.int64))[None]
    for index, array in enumerate(arrays):
        if array.shape != arrays[0].shape:
            raise ValueError(f"{name} of feature {index} has shape {array.shape}, that of feature 0 {arrays[0].shape}")
    stacked = np.stack(arrays)
    kinds = {"b": np.bool_, "f": np.float32}
    return torch.from_numpy(stacked.astype(kinds.get(stacked.dtype.kind, np.int64)))


def _is_per_token(array: NDArray[Any]) -> bool:
    return array.ndim == 1 and (array.dtype.kind in "iu" or not array.size)
