"""A run of several phases, each with its own texts and batches: 90% of the steps at 128 tokens, the rest at 512."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import Sampler

from bert_fast.training.batches import TokenBudgetSampler


class _Epoch(NamedTuple):
    """An epoch of the run: which phase, which epoch of its sampler, and how many batches of that."""

    phase: int
    epoch: int
    num_batches: int


def split_steps(total: int, fractions: Sequence[float]) -> list[int]:
    """Steps of each phase: all of them together, each at most one from its fraction of them.

    Raises:
        ValueError: a fraction is not above 0, they do not add up to 1, or a phase has no step.
    """
    if any(not fraction > 0 for fraction in fractions) or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"the phases have {', '.join(map(str, fractions))} of the steps, expected parts that add up to 1"
        )
    ends = [round(total * sum(fractions[: index + 1])) for index in range(len(fractions))]
    steps = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if 0 in steps:
        raise ValueError(f"phase {steps.index(0) + 1} of {len(steps)} has none of the {total} steps")
    return steps


class PhasedSampler(Sampler[list[int]]):
    """Batches of one phase after another, of `batches.TokenBudgetSampler`s, whose place it takes in a trainer.

    The epochs of a phase come one after another until it has had its steps; the last of them is cut there, and the next
    epoch of the run is the first one of the next phase. The last phase goes on for as long as it is asked to.

    The texts of all phases are one data set: those of the first phase, then those of the second one, and so on.

    Args:
        samplers: of each phase, all of the same replica.
        steps: of each phase, in steps of the optimiser.
        accumulation: batches of a step.

    Attributes:
        epoch: of the run.

    Raises:
        ValueError: there are not as many samplers as steps.
    """

    def __init__(self, samplers: Sequence[TokenBudgetSampler], steps: Sequence[int], accumulation: int = 1) -> None:
        if len(samplers) != len(steps) or not samplers:
            raise ValueError(f"{len(samplers)} samplers for {len(steps)} phases, expected one each")
        self.samplers, self.steps, self.accumulation = tuple(samplers), tuple(steps), accumulation
        sizes = [len(sampler.lengths) for sampler in samplers]
        self._offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self.epoch = 0
        self._epochs: list[_Epoch] = []
        self._left = steps[0]

    def set_epoch(self, epoch: int) -> None:
        """Go to an epoch of the run, from its first batch."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}, expected at least 0")
        self.epoch = epoch

    def phase(self, epoch: int | None = None) -> int:
        """The number of the phase that an epoch of the run, by default the present one, belongs to."""
        return self._at(epoch).phase

    def num_batches(self, epoch: int | None = None) -> int:
        """Of each replica in an epoch, by default the present one."""
        return self._at(epoch).num_batches

    def __len__(self) -> int:
        return self.num_batches()

    def __iter__(self) -> Iterator[list[int]]:
        phase, epoch, num_batches = self._at(None)
        self.samplers[phase].set_epoch(epoch)
        offset = self._offsets[phase]
        return ([index + offset for index in batch] for batch in islice(self.samplers[phase], num_batches))

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; numbers and strings that JSON holds."""
        phases = [{**sampler.state_dict(), "epoch": 0, "start_batch": 0, "earlier": []} for sampler in self.samplers]
        return {
            "phases": phases,
            "steps": list(self.steps),
            "accumulation": self.accumulation,
            "epoch": self.epoch,
            "start_batch": 0,
            "num_replicas": self.samplers[0].num_replicas,
            "earlier": [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the epoch where the run was; what was done of it is for the caller to leave out.

        Raises:
            ValueError: the phases, their data or batches or the number of replicas have changed.
        """
        now = self.state_dict()
        if missing := now.keys() - state.keys():
            raise ValueError(
                f"the state of the run is not one of several phases: it lacks {', '.join(sorted(missing))}"
            )
        for name in ("num_replicas", "accumulation", "steps"):
            if state[name] != now[name]:
                raise ValueError(
                    f"{name} was {state[name]} and is {now[name]}: a run of several phases goes on only as it was begun"
                )
        for sampler, phase in zip(self.samplers, state["phases"], strict=True):
            sampler.load_state_dict(phase)
        self.epoch = int(state["epoch"])

    def _at(self, epoch: int | None) -> _Epoch:
        wanted = self.epoch if epoch is None else epoch
        while len(self._epochs) <= wanted:
            self._epochs.append(self._next())
        return self._epochs[wanted]

    def _next(self) -> _Epoch:
        """The epoch that follows the known ones; `_left` is what its phase still has to do, in steps."""
        last = self._epochs[-1] if self._epochs else _Epoch(0, -1, 0)
        phase, epoch = (last.phase, last.epoch + 1) if self._left else (last.phase + 1, 0)
        if not self._left:
            self._left = self.steps[phase]
        num_batches = self.samplers[phase].num_batches(epoch)
        if phase + 1 == len(self.samplers):
            return _Epoch(phase, epoch, num_batches)
        taken = min(num_batches, self._left * self.accumulation)
        self._left -= math.ceil(taken / self.accumulation)
        return _Epoch(phase, epoch, taken)
