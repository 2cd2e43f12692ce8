"""Learning rates against transformers' and Google's formulas, and over a resumed run."""

import numpy as np
import pytest
import torch

from bert_fast.training.schedules import SCHEDULES, make_schedule

LR = 0.5
STEPS = [
    (10, 3),  # the ordinary case
    (10, 0),  # no warm-up
    (10, 10),  # nothing but warm-up
    (1, 0),  # a single step
]


def optimizer(groups=(LR,)):
    return torch.optim.SGD([{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in groups])


def rates(schedule, num_steps):
    """Of each step, and of what comes after the last one."""
    found = []
    for _ in range(num_steps):
        found.append(schedule.get_last_lr())
        schedule.optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("total", "warmup"), STEPS)
@pytest.mark.parametrize(
    ("name", "theirs"), [("linear", "linear"), ("constant", "constant_with_warmup"), ("cosine", "cosine")]
)
def test_as_transformers(name, theirs, total, warmup):
    get_scheduler = pytest.importorskip("transformers").get_scheduler
    expected = get_scheduler(theirs, optimizer(), num_warmup_steps=warmup, num_training_steps=total)
    got = make_schedule(name, optimizer(), total_steps=total, warmup_steps=warmup)
    np.testing.assert_allclose(rates(got, total + 1), rates(expected, total + 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("total", "warmup"), STEPS)
def test_as_google(total, warmup):
    """google-research/bert, optimization.py: polynomial_decay of power 1, and is_warmup."""

    def rate(step):
        decayed = LR * (1 - min(step, total) / total)
        return LR * step / warmup if step < warmup else decayed

    schedule = make_schedule("google", optimizer(), total_steps=total, warmup_steps=warmup)
    np.testing.assert_allclose(rates(schedule, total + 3), [[rate(step)] for step in range(total + 3)], rtol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_resumed_run_has_the_same_rates(name):
    groups = (LR, LR / 4)  # as with layer-wise decay
    whole = rates(make_schedule(name, optimizer(groups), total_steps=12, warmup_steps=4), 12)
    assert [second for _, second in whole] == pytest.approx([first / 4 for first, _ in whole])
    for done in (2, 7):  # in the warm-up and after it
        first = make_schedule(name, optimizer(groups), total_steps=12, warmup_steps=4)
        rates(first, done)
        second = make_schedule(name, optimizer(groups), total_steps=12, warmup_steps=4)
        second.optimizer.load_state_dict(first.optimizer.state_dict())
        second.load_state_dict(first.state_dict())
        assert rates(second, 12 - done) == whole[done:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "square"}, "schedule is 'square', expected one of linear, google, constant, cosine"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"warmup_steps": 9}, "warmup_steps is 9, expected 0 to total_steps 8"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**({"name": "linear", "optimizer": optimizer(), "total_steps": 8} | arguments))
