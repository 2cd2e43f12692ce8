"""A process for each contender: it answers, rests between calls, counts its memory, and is named when it fails."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.processes import Spec, Worker, WorkerError, compare_workers, workers
from bert_fast.timing import WrongAnswerError

THREADS = 2


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of this file, in the workers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def make_scaled(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda given: given * factor


def make_threads() -> Callable[[Any], Tensor]:
    return lambda _: torch.tensor([float(torch.get_num_threads()), float(torch.is_inference_mode_enabled())])


def make_product() -> Callable[[Tensor], Tensor]:
    """Large enough for all threads of torch's pool."""
    weight = torch.ones(512, 512)
    return lambda given: given @ weight


def make_large(megabytes: int, in_calls: int) -> Callable[[Any], Tensor]:
    """Holds so much, and as much again while it is built; a call needs `in_calls` more."""
    held = torch.ones(megabytes, 250_000)
    held.clone()
    return lambda _: torch.ones(in_calls, 250_000).sum()[None] + held[0, :1]


def make_failing() -> Callable[[Any], Tensor]:
    raise KeyError("no such layer")


def make_dying() -> Callable[[Any], Tensor]:
    def die(_: Any) -> Tensor:
        print("about to go", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    return die


def make_busy() -> Callable[[Any], Tensor]:
    """Leaves a thread behind that never rests."""
    import threading

    def spin() -> None:
        while True:
            pass

    threading.Thread(target=spin, daemon=True).start()
    return lambda given: given


def spec(make: Callable[..., Any], *arguments: Any) -> Spec:
    return Spec(partial(make, *arguments), ("test_processes",))


@pytest.fixture
def product() -> Iterator[Worker]:
    with workers({"product": spec(make_product)}, THREADS) as started:
        started["product"].give(torch.ones(512, 512))
        yield started["product"]


def test_workers_are_compared() -> None:
    specs = {"one": spec(make_scaled, 1.0), "nearly": spec(make_scaled, 1.000001)}
    with workers(specs, THREADS) as started:
        for given in (torch.tensor([1.0, 2.0]), torch.ones(2, 3)):  # built once, called with one thing and another
            timings, costs = compare_workers(started, given, repeats=3)
            assert list(timings) == list(costs) == ["one", "nearly"]
            assert all(len(timing.samples) == 3 and timing.median > 0 for timing in timings.values())
            assert timings["nearly"].error == pytest.approx(1e-6, rel=0.1)
        processes = [worker.process for worker in started.values()]
        assert len({process.pid for process in processes} | {os.getpid()}) == 3
    assert all(process.returncode is not None for process in processes)


def test_a_worker_has_the_threads_it_is_given() -> None:
    with workers({"threads": spec(make_threads)}, 1) as started:
        started["threads"].give(None)
        assert started["threads"].answer().tolist() == [1.0, 1.0]


def test_a_wrong_answer_is_refused() -> None:
    with (
        workers({"right": spec(make_scaled, 1.0), "wrong": spec(make_scaled, 1.1)}, THREADS) as started,
        pytest.raises(WrongAnswerError, match=r"wrong differs from the expected answer by .* 1\.0e-01"),
    ):
        compare_workers(started, torch.ones(4), repeats=1, expected=torch.ones(4))


def cpu_seconds(process: int) -> float:
    """Of all threads of a process so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_worker_uses_no_cpu(product: Worker) -> None:
    product.warm_up(1)
    product.sample()
    before = cpu_seconds(product.process.pid)
    time.sleep(0.5)
    assert cpu_seconds(product.process.pid) - before <= 0.01
    for _ in range(4):
        product.sample()
    assert cpu_seconds(product.process.pid) - before >= 0.05  # samples themselves do


def test_a_worker_that_does_not_rest_is_named() -> None:
    with (
        pytest.raises(WorkerError, match=r"(?s)busy failed in build:.*[1-9] threads still run, on .* cores, 5 s after"),
        workers({"busy": spec(make_busy)}, THREADS),
    ):
        pass


def test_memory_is_the_contenders_own() -> None:
    with workers({"large": spec(make_large, 60, 30)}, THREADS) as started:
        started["large"].give(None)
        started["large"].answer()
        started["large"].warm_up(1)
        memory = started["large"].cost()
    assert 120 <= memory.build_mb <= 135  # what it holds, twice
    assert (
        90 <= memory.calls_mb <= 140
    )  # what it holds, and what a call needs; the system may not have taken the rest back


def test_a_worker_that_fails_is_named() -> None:
    with (
        pytest.raises(WorkerError, match=r"(?s)broken failed in build:.*make_failing.*KeyError: 'no such layer'"),
        workers({"fine": spec(make_scaled, 1.0), "broken": spec(make_failing)}, THREADS),
    ):
        pass


def test_a_call_that_fails_is_named(product: Worker) -> None:
    product.give(torch.ones(3, 7))
    with pytest.raises(WorkerError, match=r"(?s)product failed in answer:.*mat1 and mat2 shapes cannot be multiplied"):
        product.answer()
    product.give(torch.ones(1, 512))
    assert product.answer().shape == (1, 512)


def test_a_worker_that_dies_is_named() -> None:
    with workers({"mortal": spec(make_dying)}, THREADS) as started:
        mortal = started["mortal"]
        mortal.give(None)
        with pytest.raises(WorkerError, match=r"the process of mortal was ended by SIGKILL in answer:\nabout to go"):
            mortal.answer()
        with pytest.raises(WorkerError, match="the process of mortal was ended by SIGKILL in sample"):
            mortal.sample()


def test_an_interpreter_that_cannot_start_a_worker_is_told_from_the_rest() -> None:
    with (
        pytest.raises(WorkerError, match="the process of strange exited with 1 in build"),
        workers({"strange": Spec(partial(make_scaled, 1.0), python="/bin/false")}, THREADS),
    ):
        pass
