"""Learning rates over a run: a warm-up, then a decay, as torch's `LambdaLR`, whose state resumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def _linear(step: int, warmup: int, total: int) -> float:
    return (total - step) / max(1, total - warmup)


def _google(step: int, warmup: int, total: int) -> float:
    return 1 - step / total


def _constant(step: int, warmup: int, total: int) -> float:
    return 1.0


def _cosine(step: int, warmup: int, total: int) -> float:
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


#: What the learning rate is multiplied by after the warm-up of w steps, at step t of T.
#:
#: - linear: (T - t) / (T - w), as transformers' `get_linear_schedule_with_warmup`;
#: - google: 1 - t / T, as google-research/bert (optimization.py): it falls short of the full rate by w / T;
#: - constant: 1;
#: - cosine: (1 + cos(pi (t - w) / (T - w))) / 2, as transformers' `get_cosine_schedule_with_warmup`.
SCHEDULES: dict[str, Callable[[int, int, int], float]] = {
    "linear": _linear,
    "google": _google,
    "constant": _constant,
    "cosine": _cosine,
}


def make_schedule(name: str, optimizer: Optimizer, *, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """The schedule of a run, to be stepped after each step of the optimiser.

    The rate of each parameter group is multiplied: by t / warmup_steps in step t of the warm-up, counted from 0, and
    then as `SCHEDULES` says; by its last value after the end.

    Args:
        name: one of `SCHEDULES`.
        optimizer: whose rates to set.
        total_steps: steps of the optimiser in the whole run, warm-up included.
        warmup_steps: at most as many.

    Raises:
        ValueError: the name is unknown, or the steps are impossible.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule is {name!r}, expected one of {', '.join(SCHEDULES)}")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}, expected at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}, expected 0 to total_steps {total_steps}")
    return LambdaLR(optimizer, partial(_factor, decay=SCHEDULES[name], warmup=warmup_steps, total=total_steps))


def _factor(step: int, decay: Callable[[int, int, int], float], warmup: int, total: int) -> float:
    return step / warmup if step < warmup else decay(min(step, total), warmup, total)
