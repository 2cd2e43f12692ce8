"""The process of one contender: `python -m benchmarks.worker FD`, started by `benchmarks.processes`.

It serves requests, pickled pairs of a name and arguments, that come over a connection; each is answered with a pair of
a result and an error's text, one of which is None. Between requests it uses no CPU: the next contender has the cores.
"""

from __future__ import annotations

import ctypes
import gc
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.benchmarking import Cost
from bert_fast.timing import Call

#: Threads may spin for some time after a call; OpenMP runtimes have up to 0.2 s. Longer than this is a fault.
LONGEST_SPIN = 5.0

#: What `rest` looks at, in seconds, and the share of it that a process at rest may use.
REST_WINDOW, REST_SHARE = 0.005, 0.1

#: Calls of which the last one's answer is compared: on a GPU the second may be recorded, and the third is a replay.
ANSWER_CALLS = {"cpu": 1, "cuda": 3}

#: Single calls whose host time is taken: as many as fill a sample, within these bounds.
HOST_CALLS = (5, 50)


class Served:
    """The requests, each a method."""

    call: Call
    part: Callable[[Tensor], Tensor]
    build_peak: float | None = None  # megabytes

    def build(
        self, modules: Sequence[str], make: Callable[[], Callable[[Any], Tensor]], threads: int, device: str
    ) -> None:
        """Import the modules, then make the contender on so many threads; memory counts from between the two."""
        torch.set_num_threads(threads)
        for module in modules:
            import_module(module)
        self.device = device
        self.memory = GpuMemory() if device == "cuda" else Ram()
        self.memory.reset()
        self.function = make()

    def give(self, arguments: Any, part: Callable[[Tensor], Tensor]) -> None:
        """What the contender is called with from now on, and what of its answer is compared."""
        self.call = Call(partial(self.function, _on(arguments, self.device)), self.device)
        self.part = part

    @torch.inference_mode()
    def answer(self) -> Tensor:
        """Of a call like those that are timed, the part that is compared; in float32."""
        for _ in range(ANSWER_CALLS[self.device] - 1):
            self.call.answer()
        return self.part(self.call.answer().detach()).float().cpu()

    @torch.inference_mode()
    def warm_up(self, calls: int) -> None:
        """See `Contender`; the memory of calls counts from here, that of building, with its first call, up to here."""
        self.build_peak = self.build_peak or self.memory.peak()
        self.memory.reset()
        self.call.warm_up(calls)

    @torch.inference_mode()
    def sample(self) -> float:
        """See `Contender`."""
        return self.call.sample()

    @torch.inference_mode()
    def cost(self) -> Cost:
        """What this contender took beside its time; after `warm_up`."""
        assert self.build_peak is not None
        calls_mb = self.memory.peak()
        if self.device != "cuda":
            return Cost(calls_mb, self.build_peak)
        few, many = HOST_CALLS
        returned, answered = self.call.host(min(many, max(few, self.call.count)))
        return Cost(calls_mb, self.build_peak, 1e6 * returned, 1e6 * answered)


def _on(arguments: Any, device: str) -> Any:
    """The tensors of a dictionary on the device; anything else as it is."""
    if not isinstance(arguments, dict):
        return arguments
    return {name: tensor.to(device) for name, tensor in arguments.items()}


class Ram:
    """What this process holds beyond what it held when this was made: the libraries."""

    def __init__(self) -> None:
        self.libraries = _resident("VmRSS")

    def reset(self) -> None:
        """Let the highest be the present, once what is free has been given back to the system."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> float:
        """The most since `reset`, in megabytes."""
        return 1e-6 * (_resident("VmHWM") - self.libraries)


class GpuMemory:
    """What torch's allocator took from the GPU; the pools of captured graphs are in it."""

    def __init__(self) -> None:
        torch.cuda.init()  # before it the allocator keeps no statistics

    def reset(self) -> None:
        """Let the highest be the present, once what is free has been given back to the device."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """The most since `reset`, in megabytes."""
        return 1e-6 * torch.cuda.max_memory_reserved()


def _resident(field: str) -> int:
    """Bytes in RAM: "VmRSS" of now, "VmHWM" of the highest since `Ram.reset`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def rest() -> None:
    """Wait until the threads of this process sleep; RuntimeError when they do not."""
    deadline = time.monotonic() + LONGEST_SPIN
    while True:
        before = time.process_time()
        time.sleep(REST_WINDOW)
        used = (time.process_time() - before) / REST_WINDOW
        runnable = _runnable_threads()
        if used < REST_SHARE and not runnable:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"{runnable} threads still run, on {used:.1f} cores, {LONGEST_SPIN:.0f} s after its last call"
            )


def _runnable_threads() -> int:
    """Threads beside this one that run or wait for a core, which on a busy machine uses no CPU time."""
    runnable = 0
    for thread in Path("/proc/self/task").iterdir():
        if int(thread.name) != threading.get_native_id():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                runnable += thread.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "R"
    return runnable


def serve(connection: Connection) -> None:
    """Answer requests until the other end is closed."""
    served = Served()
    while True:
        try:
            name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        result, error = None, None
        try:
            result = getattr(served, name)(*arguments)
            if served.device == "cpu":  # on a GPU nothing runs when a request has been answered
                rest()
        except Exception:
            error = traceback.format_exc()
        connection.send_bytes(pickle.dumps((result, error)))


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
