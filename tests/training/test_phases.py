"""Phases of a run: their steps, whose texts they have, and how they are resumed."""

from __future__ import annotations

import json
import math
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.training.batches import TokenBudgetSampler
from bert_fast.training.phases import PhasedSampler, split_steps


@given(st.integers(2, 10**6), st.lists(st.integers(1, 50), min_size=1, max_size=4))
def test_steps_add_up(total: int, weights: list[int]) -> None:
    fractions = [weight / sum(weights) for weight in weights]
    try:
        steps = split_steps(total, fractions)
    except ValueError:
        assert min(fractions) * total < 1.5
        return
    assert sum(steps) == total
    assert all(abs(got - total * fraction) <= 1 for got, fraction in zip(steps, fractions, strict=True))


def test_googles_phases() -> None:
    assert split_steps(1_000_000, [0.9, 0.1]) == [900_000, 100_000]
    for fractions in ([0.9, 0.2], [1.5, -0.5]):
        with pytest.raises(ValueError, match="parts that add up to 1"):
            split_steps(10, fractions)
    with pytest.raises(ValueError, match="phase 2 of 2 has none of the 4 steps"):
        split_steps(4, [0.9, 0.1])


def samplers(sizes: list[int], replicas: int = 1, rank: int = 0) -> list[TokenBudgetSampler]:
    """Of texts of three tokens, two in a batch."""
    return [TokenBudgetSampler([3] * size, 6, seed=5, num_replicas=replicas, rank=rank) for size in sizes]


@given(
    st.lists(st.tuples(st.integers(2, 9), st.integers(1, 12)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 2),
)
@settings(deadline=None)
def test_each_phase_has_its_steps_of_its_texts(phases: list[tuple[int, int]], accumulation: int, replicas: int) -> None:
    sizes, steps = [size for size, _ in phases], [count for _, count in phases]
    runs = [PhasedSampler(samplers(sizes, replicas, rank), steps, accumulation) for rank in range(replicas)]
    ends, done, epoch = list(accumulate(sizes)), [0] * len(steps), 0
    while sum(done) < sum(steps):
        batches = []
        for run in runs:
            run.set_epoch(epoch)
            assert len(run) == run.num_batches() == runs[0].num_batches()
            batches += list(run)
        phase = runs[0].phase()
        texts = [index for batch in batches for index in batch]
        assert len(set(texts)) == len(texts), "a text is there twice in an epoch"
        assert all(ends[phase] - sizes[phase] <= index < ends[phase] for index in texts)
        done[phase] += math.ceil(len(batches) / replicas / accumulation)
        assert sum(done[phase + 1 :]) == 0, "phases in order"
        if phase + 1 < len(steps):
            assert done[phase] <= steps[phase]
        epoch += 1
    assert done[:-1] == steps[:-1]


def test_a_state_is_where_the_run_was() -> None:
    run = PhasedSampler(samplers([5, 4]), [4, 3])
    run.set_epoch(2)
    state = json.loads(json.dumps(run.state_dict()))
    again = PhasedSampler(samplers([5, 4]), [4, 3])
    again.load_state_dict(state)
    assert again.epoch == 2
    assert again.phase() == run.phase() == 1
    assert list(again) == list(run)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PhasedSampler(samplers([5, 4], 2), [4, 3]), "num_replicas was 1 and is 2"),
        (PhasedSampler(samplers([5, 4]), [5, 2]), r"steps was \[4, 3\] and is \[5, 2\]"),
        (PhasedSampler(samplers([5, 4]), [4, 3], 2), "accumulation was 1 and is 2"),
        (PhasedSampler(samplers([5, 6]), [4, 3]), "num_texts was 4 and is 6"),
    ],
)
def test_what_changed_is_named(other: PhasedSampler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(PhasedSampler(samplers([5, 4]), [4, 3]).state_dict())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 samplers for 2 phases"):
        PhasedSampler(samplers([5]), [4, 3])
    with pytest.raises(ValueError, match="it lacks"):
        PhasedSampler(samplers([5]), [4]).load_state_dict(samplers([5])[0].state_dict())
    with pytest.raises(ValueError, match="epoch is -1"):
        PhasedSampler(samplers([5]), [4]).set_epoch(-1)
