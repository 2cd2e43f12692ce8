"""Side-by-side timing: answers are compared first, then the calls are timed in interleaved rounds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Largest relative error between two implementations of a whole encoder, by dtype. It tells a wrong answer from
#: rounding, which grows over the layers to some units in the last place; `bert-fast verify` judges the rounding.
MAX_ERROR = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}

#: Rounds that are taken however long they last.
FEWEST_ROUNDS = 3

#: Shortest sample, in seconds: a shorter call is repeated within the sample, or the machine's moods would be measured.
MIN_SAMPLE = 0.05


class WrongAnswerError(RuntimeError):
    """A contender's answer differs from the first one's, so nothing is timed; `contender` is its name."""

    def __init__(self, message: str, contender: str) -> None:
        super().__init__(message)
        self.contender = contender


@dataclass(frozen=True)
class Timing:
    """Measurements of one contender: seconds per call in each round; error and mean cosine of its answer."""

    samples: tuple[float, ...]
    error: float
    cosine: float

    @property
    def median(self) -> float:
        """Seconds per call."""
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds per call."""
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)


def relative_error(answer: Tensor, expected: Tensor) -> float:
    """|answer - expected| / |expected|, Euclidean norms over all elements, in float64; NaN if an element is NaN."""
    difference = (answer.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


def mean_cosine(answer: Tensor, expected: Tensor) -> float:
    """Mean over the vectors, which lie along the last dimension, of their cosine with the expected one; in float64."""
    return float(F.cosine_similarity(answer.double(), expected.double(), dim=-1).mean())


class Contender(Protocol):
    """What `compare` times: a call in this process (`Call`), or one that another process makes."""

    def answer(self) -> Tensor:
        """The result of the call."""

    def warm_up(self, calls: int) -> None:
        """Make so many untimed calls, and find out how many a sample needs."""

    def sample(self) -> float:
        """Seconds per call, over at least `MIN_SAMPLE` seconds of calls if nothing else is said."""


@dataclass
class Call:
    """A contender in this process: a function, and the device it runs on; on "cuda" the device's own clock times it.

    `min_sample` is its shortest sample, in seconds.
    """

    function: Callable[[], Tensor]
    device: torch.device | str = "cpu"
    min_sample: float = MIN_SAMPLE
    count: int = field(default=1, init=False)

    def answer(self) -> Tensor:
        """See `Contender`."""
        return self.function()

    def warm_up(self, calls: int) -> None:
        """See `Contender`."""
        for _ in range(calls):
            self.function()
        self.count = max(1, math.ceil(self.min_sample / self._seconds(1)))

    def sample(self) -> float:
        """See `Contender`."""
        if self.count > 1:
            self.function()  # meanwhile the caches held what is the others'
        return self._seconds(self.count)

    def host(self, calls: int) -> tuple[float, float]:
        """Medians over single calls to an idle GPU, in seconds: until a call returns, and until its answer is there."""
        returned, answered = [], []
        for _ in range(calls):
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.function()
            returned.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            answered.append(time.perf_counter() - start)
        return float(np.median(returned)), float(np.median(answered))

    def _seconds(self, count: int) -> float:
        """Seconds per call over `count` calls in a row."""
        if torch.device(self.device).type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(count):
                self.function()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / count
        start = time.perf_counter()
        for _ in range(count):
            self.function()
        return (time.perf_counter() - start) / count


def compare(
    contenders: Mapping[str, Contender],
    repeats: int = 7,
    warmup: int = 2,
    *,
    max_error: float | Mapping[str, float] = MAX_ERROR["float32"],
    expected: Tensor | None = None,
    part: Callable[[Tensor], Tensor] = lambda answer: answer,
    enough: float = math.inf,
) -> dict[str, Timing]:
    """Check that the contenders agree, then time them in interleaved rounds whose order rotates.

    Args:
        contenders: by name.
        repeats: rounds; each takes one sample of every contender.
        warmup: untimed calls of each contender before the rounds.
        max_error: largest `relative_error` that passes; of each contender, by name, where they differ.
        expected: the right answer; the first contender's when not given.
        part: what of an answer is compared.
        enough: seconds after which no further round begins, once there are `FEWEST_ROUNDS`.

    Raises:
        WrongAnswerError: an answer has another shape or too large an error. Nothing has been timed then.
        ValueError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    answers = {name: part(contender.answer()) for name, contender in contenders.items()}
    baseline, first_answer = next(iter(answers.items()))
    if expected is not None:
        baseline, first_answer = "the expected answer", part(expected)
    errors = _errors(answers, baseline, first_answer, max_error)
    cosines = {name: mean_cosine(answer, first_answer) for name, answer in answers.items()}
    for contender in contenders.values():
        contender.warm_up(warmup)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    began = time.perf_counter()
    for first in range(repeats):
        if first >= FEWEST_ROUNDS and time.perf_counter() - began > enough:
            break
        start = first % len(contenders)
        for name in islice(cycle(contenders), start, start + len(contenders)):
            samples[name].append(contenders[name].sample())
    return {name: Timing(tuple(samples[name]), errors[name], cosines[name]) for name in contenders}


def _errors(
    answers: dict[str, Tensor], baseline: str, expected: Tensor, max_error: float | Mapping[str, float]
) -> dict[str, float]:
    """Error of each answer against the expected one, which messages call `baseline`."""
    errors = {}
    for name, answer in answers.items():
        if answer.shape != expected.shape:
            raise WrongAnswerError(
                f"{name} gives shape {tuple(answer.shape)} but {baseline} gives {tuple(expected.shape)}", name
            )
        errors[name] = relative_error(answer, expected)
        allowed = max_error[name] if isinstance(max_error, Mapping) else max_error
        if not errors[name] <= allowed:  # not "greater": NaN must not pass
            raise WrongAnswerError(
                f"{name} differs from {baseline} by a relative error of {errors[name]:.1e}, allowed {allowed:.0e}",
                name,
            )
    return errors


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """torch's threads for the length of the context; None leaves them, and less than 1 is a ValueError."""
    if count is not None and count < 1:
        raise ValueError(f"threads is {count}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
