"""Work in several processes whose results come in the order of the work, whoever did it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

#: What `setup` gave in this process.
_state: Any = None


def map_in_order(
    function: Callable[[Any, Any], Any],
    items: Iterable[Any],
    num_workers: int,
    setup: Callable[..., Any],
    *arguments: Any,
) -> Generator[tuple[Any, Any], None, None]:
    """Each item and its `function(state, item)`, in order.

    At most two items a worker are ahead of the result that is waited for, so that memory does not grow with the items.
    After an error the workers finish what they are at. Where the generator is interrupted or closed, they end at once:
    what they write must be whole or not there. Whoever may be interrupted while he has a result closes the generator
    (`contextlib.closing`), and does not leave it to the end of the process, which waits for the workers.

    Args:
        function: of a module, as `setup` is, for processes that are started afresh.
        items: read in this process.
        num_workers: 1 does everything in this process.
        setup: `setup(*arguments)` is called once in each process, and gives the state.
        *arguments: of `setup`.

    Raises:
        ChildProcessError: a worker was killed.
    """
    if num_workers == 1:
        state = setup(*arguments)
        yield from ((item, function(state, item)) for item in items)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in whatever state they are
    theirs, ours = context.Pipe(duplex=False)  # whose end tells the workers to end
    with ours, ProcessPoolExecutor(num_workers, context, _begin, (theirs, setup, arguments)) as pool:
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for item in items:
                with _without_interrupts():
                    waiting.append((item, pool.submit(_call, function, item)))
                if len(waiting) > 2 * num_workers:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "a worker process was killed, as the system does when memory runs out: use fewer workers"
            ) from error
        except (KeyboardInterrupt, GeneratorExit):
            ours.close()  # or the pool would wait for what is being done
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin(end: Connection, setup: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    global _state
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_end_with, args=(end,), daemon=True).start()
    _state = setup(*arguments)


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside never get SIGINT: the parent gets it, too, and ends them."""
    resource_tracker.ensure_running()  # as it starts, it lets SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with(end: Connection) -> None:
    """With the pipe, which the parent closes; or with the parent: a worker would wait for work for ever."""
    wait([end])
    os._exit(1)


def _result(item: Any, future: Future[Any]) -> tuple[Any, Any]:
    return item, future.result()


def _call(function: Callable[[Any, Any], Any], item: Any) -> Any:
    return function(_state, item)
