"""What a search of hyperparameters looks through: values to try, and ranges to draw from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.recipes._toml import argument_names, check_known, read_toml

#: The grid of BERT's fine-tuning (Devlin et al., 2018, appendix A.3).
PUBLISHED: dict[str, list[Any]] = {
    "per_device_train_batch_size": [16, 32],
    "learning_rate": [5e-5, 3e-5, 2e-5],
    "num_train_epochs": [2, 3, 4],
}


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included; whole numbers if both are; with `log` their logarithms are drawn evenly."""

    low: float
    high: float
    log: bool = False


#: Argument -> its values, or the range they are drawn from.
Space = Mapping[str, Sequence[Any] | Range]


def check_space(space: Space, *, grid: bool) -> None:
    """ValueError for a space that cannot be searched; the message names the argument.

    Args:
        space: what is searched.
        grid: whether every point is tried, so that there may be no ranges.
    """
    if not space:
        raise ValueError("there is nothing to vary")
    check_known(space, argument_names(), "the space")
    for name, values in space.items():
        if not isinstance(values, Range):
            if not values:
                raise ValueError(f"{name} has no values to try")
            if len({repr(value) for value in values}) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        elif grid:
            raise ValueError(f"{name} has a range, which only a search with a number of trials can draw from")
        elif not values.low < values.high or (values.log and values.low <= 0):
            below = "0 < low < high" if values.log else "low < high"
            raise ValueError(f"{name} has a range from {values.low} to {values.high}, expected {below}")


def grid_points(space: Space) -> list[dict[str, Any]]:
    """Every point of a space of values; the last argument changes fastest."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]  # type: ignore[arg-type]


def drawn_point(
    space: Space, tried: Sequence[tuple[Mapping[str, Any], float | None]], seed: int, startup: int
) -> dict[str, Any]:
    """The next point to try, by optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    It depends on the arguments alone, so that an interrupted search goes on as if it had not been.

    Args:
        space: what is searched.
        tried: points and what they scored, higher is better; None where they failed.
        seed: of this draw, together with the number of points tried.
        startup: so many points are drawn at random before.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    number = int(np.random.SeedSequence((seed, len(tried))).generate_state(1)[0])
    sampler = optuna.samplers.TPESampler(seed=number, n_startup_trials=startup)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions = {name: _distribution(values) for name, values in space.items()}
    for point, score in tried:
        state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.trial.create_trial(
                params={name: _choice(space[name], value) for name, value in point.items()},
                distributions=distributions,
                value=score,
                state=state,
            )
        )
    drawn = study.ask(distributions).params
    return {
        name: values[drawn[name]] if not isinstance(values, Range) else drawn[name] for name, values in space.items()
    }


def _choice(values: Sequence[Any] | Range, value: Any) -> Any:
    """As optuna has it: the number of a value, for it may be of any type."""
    return value if isinstance(values, Range) else list(values).index(value)


def _distribution(values: Sequence[Any] | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(list(range(len(values))))
    if isinstance(values.low, int) and isinstance(values.high, int):
        return IntDistribution(values.low, values.high, log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)


def read_space(path: str | Path) -> dict[str, list[Any] | Range]:
    """A space from a TOML file: `name = [values]`, or `name = { low = 1e-5, high = 1e-4, log = true }`.

    Raises:
        ValueError: the file is not TOML, or a value is neither of these; the message names it.
    """
    space: dict[str, list[Any] | Range] = {}
    for name, values in read_toml(path).items():
        if isinstance(values, list):
            space[name] = values
        elif isinstance(values, dict) and {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
            numbers = [values["low"], values["high"]]
            if not all(isinstance(n, int | float) and math.isfinite(n) for n in numbers):
                raise ValueError(f"{path}: {name} goes from {numbers[0]!r} to {numbers[1]!r}, expected numbers")
            space[name] = Range(**values)
        else:
            raise ValueError(f"{path}: {name} is {values!r}, expected a list of values, or low, high and perhaps log")
    return space
