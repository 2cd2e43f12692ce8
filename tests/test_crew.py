"""A contender that fails, or takes too long, costs its own figures and no others."""

from __future__ import annotations

import math
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.budget import Budget
from benchmarks.cases import QUICK_KERNELS
from benchmarks.processes import Crew, Spec, WorkerError
from benchmarks.suite import Settings, bench_kernels, measure

PEAK = {
    "threads": 1,
    "instructions": [{"dtype": "bfloat16", "instruction": "matrix product", "gops": 395_000.0}],
    "copy_gbs": 2150.0,
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of this file, in the workers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def test_budget_is_of_the_real_clock() -> None:
    budget = Budget(0.2)
    assert 0.1 < budget.left <= 0.2
    assert budget.share(1, 3) == pytest.approx(budget.left / 4, rel=0.1)
    time.sleep(0.25)
    assert budget.left == 0.0
    assert Budget().left == math.inf


def make_ones() -> Any:
    return lambda given: torch.ones(4)


def make_slow() -> Any:
    def sleep(_: Any) -> Tensor:
        time.sleep(60)
        return torch.ones(4)

    return sleep


def make_wrong() -> Any:
    return lambda given: torch.zeros(4)


def make_failing() -> Any:
    raise KeyError("no such precision")


def make_dying() -> Any:
    return lambda given: os.kill(os.getpid(), signal.SIGKILL)


def specs(**make: Any) -> dict[str, Spec]:
    return {name: Spec(partial(function), ("test_crew",)) for name, function in make.items()}


def settings(seconds: float | None = None) -> Settings:
    return Settings(PEAK, threads=1, repeats=1, dtypes=["float32"], peers=[], budget=Budget(seconds))


def test_a_peer_that_fails_costs_only_its_own_figures() -> None:
    given = settings()
    contenders = specs(transformers=make_ones, wrong=make_wrong, broken=make_failing, bert_fast=make_ones)
    with Crew(contenders, 1) as crew:
        measured = measure(given, crew, "a case", None)
        assert measured is not None
        timings, costs = measured
        assert list(timings) == list(costs) == list(crew.specs) == ["transformers", "bert_fast"]
    failed, wrong = given.left_out
    assert failed == "a case: broken failed in build: KeyError: 'no such precision'"
    assert "a case: wrong differs from transformers by a relative error" in wrong


def test_a_bert_fast_that_dies_is_started_anew_for_the_next_case() -> None:
    given = settings()
    with Crew(specs(transformers=make_ones, bert_fast=make_dying), 1) as crew:
        assert measure(given, crew, "first", None) is None
        assert measure(given, crew, "second", None) is None
    assert [reason.split(":")[0] for reason in given.left_out] == ["first", "second"]


def test_a_bert_fast_that_cannot_be_built_is_tried_once() -> None:
    given = settings()
    with Crew(specs(transformers=make_ones, bert_fast=make_failing), 1) as crew:
        assert measure(given, crew, "first", None) is None
        assert list(crew.specs) == ["transformers"]


def test_no_row_outlasts_the_budget() -> None:
    given = settings(12.0)
    start = time.monotonic()
    with Crew(specs(transformers=make_ones, bert_fast=make_slow), 1, budget=given.budget) as crew:
        assert measure(given, crew, "slow", None) is None
        assert time.monotonic() - start < 16
        assert measure(given, crew, "next", None) is None
    assert "slow: bert_fast had not finished answer when the time was up" in given.left_out[0]
    assert given.left_out[-1] == "next: no time was left"


def test_crew_says_who_cannot_be_built() -> None:
    with Crew(specs(broken=make_failing), 1) as crew, pytest.raises(WorkerError) as caught:
        crew.ready()
    assert (caught.value.contender, caught.value.request) == ("broken", "build")


def test_kernels_without_time_are_named() -> None:
    given = settings(1e-9)
    assert list(bench_kernels(given, QUICK_KERNELS[:2])) == []
    assert given.left_out == [
        "attention 3x8, width 128 bfloat16: no time was left",
        "attention mix5, width 64 float32: no time was left",
    ]
