"""Contenders are timed in interleaved rounds, and not at all when their answers differ."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bert_fast import timing
from bert_fast.timing import Call, Timing, WrongAnswerError, compare, mean_cosine


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only where a test says so."""
    fake = SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def test_compare_interleaves_and_rotates(clock: SimpleNamespace) -> None:
    order: list[str] = []

    def contender(name: str) -> torch.Tensor:
        order.append(name)
        clock.now += 1.0
        return torch.ones(2)

    timings = compare({name: Call(lambda name=name: contender(name)) for name in "abc"}, repeats=4, warmup=0)
    assert "".join(order[-12:]) == "abc" + "bca" + "cab" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(measured.samples == (1.0,) * 4 for measured in timings.values())


def test_compare_repeats_short_calls_within_a_sample(clock: SimpleNamespace) -> None:
    calls = {"short": 0, "long": 0}

    def contender(name: str, seconds: float) -> torch.Tensor:
        calls[name] += 1
        clock.now += seconds
        return torch.ones(2)

    contenders = {"short": Call(lambda: contender("short", 2.0**-10)), "long": Call(lambda: contender("long", 2.0))}
    timings = compare(contenders, repeats=3, warmup=2)
    # One call for the answer, two to warm up, one to see how long it takes; then three samples, of one call or of 52
    # after an untimed one.
    assert calls == {"short": 4 + 3 * (1 + 52), "long": 4 + 3}
    assert timings["short"].median == pytest.approx(2.0**-10)
    assert timings["long"].median == 2.0


@pytest.mark.parametrize(("enough", "rounds"), [(2.5, 3), (8.5, 5), (100.0, 7)])
def test_compare_stops_when_it_has_enough(clock: SimpleNamespace, enough: float, rounds: int) -> None:
    def contender() -> torch.Tensor:
        clock.now += 1.0
        return torch.ones(2)

    timings = compare({"a": Call(contender), "b": Call(contender)}, repeats=7, enough=enough)
    assert len(timings["a"].samples) == len(timings["b"].samples) == rounds


def test_a_shorter_sample_takes_fewer_calls(clock: SimpleNamespace) -> None:
    def contender() -> torch.Tensor:
        clock.now += 2.0**-10
        return torch.ones(2)

    call = Call(contender, min_sample=2.0**-8)
    call.warm_up(1)
    assert call.count == 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([1.0, 2.1]), "fast differs from plain by a relative error of 4.5e-02, allowed 1e-05"),
        (torch.tensor([1.0, float("nan")]), "relative error of nan"),
        (torch.ones(3), r"fast gives shape \(3,\) but plain gives \(2,\)"),
    ],
    ids=["another number", "NaN", "another shape"],
)
def test_compare_times_nothing_when_answers_differ(
    monkeypatch: pytest.MonkeyPatch, answer: torch.Tensor, message: str
) -> None:
    def perf_counter() -> float:
        raise AssertionError("the clock was read")

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=perf_counter))
    with pytest.raises(WrongAnswerError, match=message):
        compare({"plain": Call(lambda: torch.tensor([1.0, 2.0])), "fast": Call(lambda: answer)})


def test_compare_reports_the_error_it_allowed() -> None:
    timings = compare(
        {"plain": Call(lambda: torch.tensor([3.0, 4.0])), "fast": Call(lambda: torch.tensor([3.0, 4.5]))},
        repeats=1,
        max_error=0.2,
    )
    assert (timings["plain"].error, timings["fast"].error) == (0.0, pytest.approx(0.1))


def test_compare_looks_at_the_part_it_is_told() -> None:
    contenders = {"plain": Call(lambda: torch.tensor([1.0, 7.0])), "fast": Call(lambda: torch.tensor([1.0, 0.0]))}
    timings = compare(contenders, repeats=1, part=lambda answer: answer[:1])
    assert timings["fast"].error == 0.0


def test_compare_needs_a_round() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        compare({"plain": Call(lambda: torch.ones(1))}, repeats=0)


def test_timing_summary() -> None:
    summary = Timing((5.0, 1.0, 2.0, 4.0, 3.0), error=0.0, cosine=1.0)
    assert (summary.median, summary.quartiles) == (3.0, (2.0, 4.0))


def test_mean_cosine_is_of_vectors() -> None:
    answer, expected = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert mean_cosine(answer, expected) == pytest.approx((1 + 0.5**0.5) / 2)
