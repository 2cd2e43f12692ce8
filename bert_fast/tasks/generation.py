"""Text from a masked language model, which was never taught to write: masks after a prompt, filled again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_fast.tasks.filling import MaskFiller
from bert_fast.terminal import progress_bar

#: How masks become words, and how many steps it takes if nobody says.
METHODS: dict[str, int | None] = {"gibbs": 10, "mask_predict": 10, "left_to_right": None}


def generate(
    filler: MaskFiller,
    prompt: str,
    length: int,
    *,
    method: str = "gibbs",
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    suffix: str = "",
    num_samples: int = 1,
    seed: int = 0,
    progress: bool | None = None,
) -> list[str]:
    """Texts that begin with a prompt.

    Args:
        filler: the model.
        prompt: what stands before the masks; it may be empty.
        length: tokens to write.
        method: "gibbs" fills all masks, then hides one token after another and draws it anew given all others, in a
            random order (Wang & Cho, 2019); "mask_predict" fills all at once, then hides the least certain ones again,
            fewer in each step (Ghazvininejad et al., 2019); "left_to_right" fills each mask once.
        steps: of "gibbs" how often each token is drawn, of "mask_predict" how often the model runs; None for 10.
            "left_to_right" has none.
        temperature: logits are divided by it; 0 takes the most probable word.
        top_k: draw among so many words only; None for all.
        suffix: what stands after the masks, such as a full stop.
        num_samples: how many texts; each has random numbers of its own, whatever their number.
        seed: of them.
        progress: show a bar; None shows one on a terminal, for work of more than two seconds.

    Raises:
        ValueError: an argument is impossible, or the text would be longer than the model reads.
    """
    steps = _checked(method, steps, length=length, temperature=temperature, top_k=top_k, num_samples=num_samples)
    before, after = (row[1:-1] for row in filler.encode([prompt, suffix]))
    if filler.mask_token_id in [*before, *after]:
        raise ValueError(f"a {filler.mask_token} is in the prompt or the suffix: {prompt!r}, {suffix!r}")
    cls_id, sep_id = filler.encode([""])[0]
    start = 1 + len(before)
    row = np.concatenate([[cls_id], before, np.full(length, filler.mask_token_id), after, [sep_id]])
    if len(row) > filler.max_length:
        most = filler.max_length
        raise ValueError(
            f"prompt, {length} tokens and suffix are {len(row)}, more than the {most} that the model reads"
        )
    rows = np.tile(row, (num_samples, 1))
    drawers = [_Drawer(filler, temperature, top_k, seed + index) for index in range(num_samples)]
    places = range(start, start + length)
    runs = {"gibbs": (steps + 1) * length, "mask_predict": steps, "left_to_right": length}[method]
    with progress_bar(total=runs, unit=" runs", show=progress) as bar:
        if method == "mask_predict":
            _mask_predict(filler, rows, drawers, places, steps, bar.update)
        else:
            _one_by_one(filler, rows, drawers, places, steps if method == "gibbs" else 0, bar.update)
    return [filler.decode(ids) for ids in rows]


def _checked(method: str, steps: int | None, **numbers: Any) -> int:
    """The number of steps; ValueError for what is impossible."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    usual = METHODS[method]
    if usual is None and steps is not None:
        raise ValueError(f"steps is {steps}, but {method} takes none: it fills each mask once")
    steps = steps if steps is not None else usual or 0
    least = {"length": 1, "temperature": 0, "top_k": 1, "num_samples": 1, "steps": 0 if usual is None else 1}
    for name, value in {**numbers, "steps": steps}.items():
        if value is not None and not value >= least[name]:
            raise ValueError(f"{name} is {value}, expected at least {least[name]}")
    return steps


class _Drawer:
    """Draws the words of one text."""

    def __init__(self, filler: MaskFiller, temperature: float, top_k: int | None, seed: int) -> None:
        self.temperature, self.top_k, self.banned = temperature, top_k, filler.special_token_ids
        self.generator = torch.Generator().manual_seed(seed)

    def words(self, scores: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(masks, vocab_size) log-probabilities -> the words drawn and their log-probabilities, (masks,) each."""
        scores = scores.clone()
        scores[:, self.banned] = -torch.inf
        if self.temperature == 0:
            words = scores.argmax(1, keepdim=True)
        else:
            logits = scores / self.temperature
            if self.top_k is not None and self.top_k < scores.shape[1]:
                logits = logits.masked_fill(logits < logits.topk(self.top_k).values[:, -1:], -torch.inf)
            words = torch.multinomial(logits.softmax(1), 1, generator=self.generator)
        return words[:, 0].numpy(), scores.gather(1, words)[:, 0].numpy()

    def order(self, places: range) -> NDArray[np.int64]:
        """The places in a random order."""
        return np.array(places)[torch.randperm(len(places), generator=self.generator).numpy()]


def _one_by_one(
    filler: MaskFiller,
    rows: NDArray[np.int64],
    drawers: list[_Drawer],
    places: range,
    sweeps: int,
    progress: Callable[[int], object],
) -> None:
    """Fill from left to right, then each again in every sweep; rows (num_samples, seq_len) are changed."""
    samples = np.arange(len(rows))
    orders = [np.tile(np.array(places), (len(rows), 1))]
    orders += [np.stack([drawer.order(places) for drawer in drawers]) for _ in range(sweeps)]
    for place in np.concatenate(orders, axis=1).T:
        rows[samples, place] = filler.mask_token_id
        said = filler.log_probabilities(list(rows), list(place[:, None]))
        for index, drawer in enumerate(drawers):
            rows[index, place[index]] = drawer.words(said[index : index + 1])[0][0]
        progress(1)


def _mask_predict(
    filler: MaskFiller,
    rows: NDArray[np.int64],
    drawers: list[_Drawer],
    places: range,
    steps: int,
    progress: Callable[[int], object],
) -> None:
    """Fill all masks, and the least certain `length * (steps - t) / steps` of them again in step t; `rows` changes."""
    length = len(places)
    certainty = np.zeros((len(rows), length), np.float32)
    for step in range(steps):
        hidden = length * (steps - step) // steps
        if hidden:
            chosen = np.sort(certainty.argsort(axis=1, kind="stable")[:, :hidden], axis=1)
            np.put_along_axis(rows, chosen + places.start, filler.mask_token_id, axis=1)
            said = filler.log_probabilities(list(rows), list(chosen + places.start)).split(hidden)
            for index, (drawer, scores) in enumerate(zip(drawers, said, strict=True)):
                words, certainty[index, chosen[index]] = drawer.words(scores)
                rows[index, chosen[index] + places.start] = words
        progress(1)
