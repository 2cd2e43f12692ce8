"""Contenders that have a process each, so that their threads, allocators and OpenMP runtimes do not meet."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from torch import Tensor

from bert_fast.benchmarking import Memory
from bert_fast.timing import Timing, compare

ROOT = Path(__file__).resolve().parent.parent

#: Lines of a failed worker's own messages that its error repeats.
TAIL = 15


#: Seconds of rounds after which three have to do (`compare`): a batch of BERT-base takes some contenders 3 s a call.
ENOUGH = 20.0


class WorkerError(RuntimeError):
    """A contender's process failed or died; the message names it and says what it was doing."""


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
    """A contender in a process of its own, as `compare` takes it. Building begins at once; `ready` waits for it."""

    def __init__(self, name: str, spec: Spec, threads: int, device: str = "cpu") -> None:
        self.name = name
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

    def give(self, arguments: Any) -> None:
        """What the contender is called with from now on."""
        self._ask("give", arguments)

    def answer(self) -> Tensor:
        """See `Contender`."""
        return self._ask("answer")

    def warm_up(self, calls: int) -> None:
        """See `Contender`."""
        self._ask("warm_up", calls)

    def sample(self) -> float:
        """See `Contender`."""
        return self._ask("sample")

    def memory(self) -> Memory:
        """The most it has held since `warm_up`, and while it was built."""
        return self._ask("memory")

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
            result, error = pickle.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if error:
            raise WorkerError(f"{self.name} failed in {self._request}:\n{error}")
        return result

    def _died(self) -> WorkerError:
        status = self.process.wait()
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with {status}"
        self._messages.seek(0)
        tail = "".join(self._messages.readlines()[-TAIL:])
        return WorkerError(f"the process of {self.name} {how} in {self._request}:\n{tail}")


@contextmanager
def workers(specs: Mapping[str, Spec], threads: int, device: str = "cpu") -> Iterator[dict[str, Worker]]:
    """A worker for each contender, built; ended with the context."""
    with ExitStack() as stack:
        started = {}
        for name, spec in specs.items():
            started[name] = Worker(name, spec, threads, device)
            stack.callback(started[name].close)
        for worker in started.values():
            worker.ready()
        yield started


def compare_workers(
    contenders: Mapping[str, Worker], arguments: Any, repeats: int, **options: Any
) -> tuple[dict[str, Timing], dict[str, Memory]]:
    """`compare` of these workers, called with `arguments`, and the memory of each."""
    for worker in contenders.values():
        worker.give(arguments)
    timings = compare(contenders, repeats, warmup=0, enough=ENOUGH, **options)
    return timings, {name: worker.memory() for name, worker in contenders.items()}
