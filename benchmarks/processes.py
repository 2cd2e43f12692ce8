"""Contenders that have a process each, so that their threads, allocators and OpenMP runtimes do not meet."""

from __future__ import annotations

import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.budget import Budget
from bert_fast.benchmarking import Cost
from bert_fast.timing import Timing, compare

ROOT = Path(__file__).resolve().parent.parent

#: Lines of a failed worker's own messages that its error repeats.
TAIL = 15

#: Seconds of rounds after which three have to do (`compare`): a batch of BERT-base takes some contenders 3 s a call.
ENOUGH = 20.0


class WorkerError(RuntimeError):
    """A contender's process failed, died or took too long; the message names it and says what it was doing."""

    def __init__(self, message: str, contender: str, request: str) -> None:
        super().__init__(message)
        self.contender, self.request = contender, request


def whole(answer: Tensor) -> Tensor:
    """All of an answer, where no part of it is to be left out."""
    return answer


@dataclass(frozen=True)
class Spec:
    """How a contender is made, in its process.

    Attributes:
        make: returns the function to time; picklable.
        modules: what it imports, so that they are not counted as its memory.
        python: the interpreter.
    """

    make: Callable[[], Callable[[Any], Tensor]]
    modules: tuple[str, ...] = ()
    python: str = sys.executable


class Worker:
    """A contender in a process of its own, as `compare` takes it. Building begins at once; `ready` waits for it.

    Each of its methods raises WorkerError when the process fails, or has not answered when the budget is spent.
    """

    def __init__(self, name: str, spec: Spec, threads: int, device: str = "cpu", budget: Budget | None = None) -> None:
        self.name, self.device = name, device
        self._budget = budget or Budget()
        self._connection, theirs = Pipe()
        self._messages = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  open as long as it runs
        with theirs:
            self.process = subprocess.Popen(
                [spec.python, "-m", "benchmarks.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._messages,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "RAYON_NUM_THREADS": str(threads)},  # the tokenizers'; the others' are set by call
            )
        self._send("build", spec.modules, spec.make, threads, device)

    def ready(self) -> None:
        """Wait until it is built; WorkerError if it fails."""
        self._receive()

    def give(self, arguments: Any, part: Callable[[Tensor], Tensor] = whole) -> None:
        """What the contender is called with from now on, and what of its answer is compared; both picklable."""
        self._ask("give", arguments, part)

    def answer(self) -> Tensor:
        """See `Contender`."""
        return self._ask("answer")

    def warm_up(self, calls: int) -> None:
        """See `Contender`."""
        self._ask("warm_up", calls)

    def sample(self) -> float:
        """See `Contender`."""
        return self._ask("sample")

    def cost(self) -> Cost:
        """What it took beside its time, since `warm_up`."""
        return self._ask("cost")

    @contextmanager
    def within(self, budget: Budget) -> Iterator[None]:
        """Another budget, for the length of the context."""
        before, self._budget = self._budget, budget
        try:
            yield
        finally:
            self._budget = before

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self.process.kill()
        self.process.wait()
        self._messages.close()

    def _ask(self, request: str, *arguments: Any) -> Any:
        self._send(request, *arguments)
        return self._receive()

    def _send(self, request: str, *arguments: Any) -> None:
        self._request = request
        try:
            self._connection.send_bytes(pickle.dumps((request, arguments)))
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> Any:
        try:
            left = self._budget.left
            if not self._connection.poll(None if math.isinf(left) else left):
                raise WorkerError(f"{self.name} had not finished {self._request} when the time was up", *self._who)
            result, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if error:
            raise WorkerError(f"{self.name} failed in {self._request}:\n{error}", *self._who)
        return result

    @property
    def _who(self) -> tuple[str, str]:
        return self.name, self._request

    def _died(self) -> WorkerError:
        status = self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        self._messages.seek(0)
        tail = "".join(self._messages.readlines()[-TAIL:])
        return WorkerError(f"the process of {self.name} {how} in {self._request}:\n{tail}", *self._who)


class Crew:
    """Workers that are measured together, ended with the context; one that fails is ended alone, or started anew.

    Attributes:
        specs: of those that are to run; entering the context starts them, and `ready` those that came later.
    """

    def __init__(
        self,
        specs: Mapping[str, Spec],
        threads: int,
        device: str = "cpu",
        budget: Budget | None = None,
        worker: type[Worker] = Worker,
    ) -> None:
        self.specs = dict(specs)
        self._start = lambda name: worker(name, self.specs[name], threads, device, budget)
        self._building: dict[str, Worker] = {}
        self._built: dict[str, Worker] = {}

    def __enter__(self) -> Crew:
        self._launch()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.specs):
            self.end(name)

    def ready(self) -> dict[str, Worker]:
        """All of them, in the order of `specs`, built; WorkerError if one cannot be."""
        self._launch()
        for name, worker in list(self._building.items()):
            worker.ready()
            self._built[name] = self._building.pop(name)
        return {name: self._built[name] for name in self.specs}

    def end(self, name: str, again: bool = False) -> None:
        """End the process of one; `again` if `ready` is to start it anew."""
        for workers in (self._building, self._built):
            if name in workers:
                workers.pop(name).close()
        if not again:
            del self.specs[name]

    def _launch(self) -> None:
        for name in self.specs:
            if name not in self._building and name not in self._built:
                self._building[name] = self._start(name)


@contextmanager
def workers(specs: Mapping[str, Spec], threads: int, device: str = "cpu") -> Iterator[dict[str, Worker]]:
    """A worker for each contender, built; ended with the context."""
    with Crew(specs, threads, device) as crew:
        yield crew.ready()


def compare_workers(
    contenders: Mapping[str, Worker],
    arguments: Any,
    repeats: int,
    part: Callable[[Tensor], Tensor] = whole,
    **options: Any,
) -> tuple[dict[str, Timing], dict[str, Cost]]:
    """`compare` of this part of these workers' answers, called with `arguments`; and what each costs beside time."""
    for worker in contenders.values():
        worker.give(arguments, part)
    timings = compare(contenders, repeats, warmup=0, enough=ENOUGH, **options)
    return timings, {name: worker.cost() for name, worker in contenders.items()}
