"""CUDA graphs of forwards: a forward is recorded once for each bucket of sizes, and then started by one call.

An eager forward of BERT-base is some 84 launches, each of which costs the host 5 to 11 microseconds; a short text takes
the GPU less than that. A graph runs on the same memory every time and for the same sizes, so sizes are rounded up to
buckets: the rows past the tokens hold token 0 of no sequence, and what is computed there is never looked at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from bert_fast import ops

#: Rows are in multiples of this, so that the kernels meet one kind of size.
ROW_STEP = 16

#: What the launches of a layer cost, in floating-point operations: 7 of up to 11 microseconds at 600 TFLOP/s, which is
#: about what the products of an H200 reach. A forward with more to do than that is not held up by its launches.
FLOPS_OF_LAUNCHES = 46e9

#: And the most tokens of a graph whatever the model: what a graph's memory grows with.
MAX_GRAPH_TOKENS = 16384

#: Graphs kept at a time; the one not used for longest goes.
MAX_GRAPHS = 64

#: Sizes of which it is remembered how often they were met.
MAX_COUNTED = 1024

#: A bucket is recorded when it is met this often: recording takes as long as some forwards, which sizes that never come
#: again would not give back.
RECORD_AT = 2

Key = TypeVar("Key", bound=Hashable)
Graph = TypeVar("Graph")
Memory = TypeVar("Memory")
Result = TypeVar("Result")


class Bucket(NamedTuple):
    """The sizes a forward is launched for: at least those of its batch.

    Attributes:
        num_tokens: rows, a multiple of `ROW_STEP`.
        batch_size: sequences; those past the batch's are empty.
        max_seqlen: of the longest sequence.
    """

    num_tokens: int
    batch_size: int
    max_seqlen: int

    @classmethod
    def exact(cls, num_tokens: int, batch_size: int, max_seqlen: int) -> Bucket:
        """For a forward that is launched once."""
        return cls(_round_up(num_tokens, ROW_STEP), batch_size, max_seqlen)

    @classmethod
    def rounded(cls, num_tokens: int, batch_size: int, max_seqlen: int) -> Bucket:
        """For a forward that is recorded.

        Tokens in eight steps an octave: n in (2^k, 2^(k+1)] goes to the next multiple of max(16, 2^k / 8), so that less
        than an eighth is wasted above 128 tokens. Sequences, which only add empty programs, to the next power of 2; the
        longest to one from 64 on, where the attention kernel changes its tiles.
        """
        octave = 1 << max((num_tokens - 1).bit_length() - 1, 0)
        step = max(ROW_STEP, octave // 8)
        return cls(_round_up(num_tokens, step), _power_of_2(batch_size), max(64, _power_of_2(max_seqlen)))


def _round_up(value: int, step: int) -> int:
    return max(1, -(-value // step)) * step


def _power_of_2(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def graph_tokens(hidden_size: int, intermediate_size: int) -> int:
    """The most tokens of a forward of such a model that its launches hold up; 0 layers or 100, it is the same."""
    flops_of_a_token = 2 * (4 * hidden_size**2 + 2 * hidden_size * intermediate_size)
    return min(int(FLOPS_OF_LAUNCHES / max(flops_of_a_token, 1)), MAX_GRAPH_TOKENS)


class GraphCache(Generic[Key, Graph]):
    """What was recorded, by key, the least recently used going first; and how often the other keys were met."""

    def __init__(self, capacity: int = MAX_GRAPHS, counted: int = MAX_COUNTED) -> None:
        self._capacity, self._counted = capacity, counted
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._counts: OrderedDict[Key, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Key) -> Graph | None:
        """The graph of a key, or None."""
        graph = self._graphs.get(key)
        if graph is not None:
            self._graphs.move_to_end(key)
        return graph

    def is_due(self, key: Key) -> bool:
        """Count a use of a key without a graph: whether it has been met often enough to get one."""
        count = self._counts[key] = self._counts.pop(key, 0) + 1
        if len(self._counts) > self._counted:
            self._counts.popitem(last=False)
        return count >= RECORD_AT

    def put(self, key: Key, graph: Graph) -> None:
        """Keep a graph, in the place of the one not used for longest if there are too many."""
        self._counts.pop(key, None)
        self._graphs[key] = graph
        if len(self._graphs) > self._capacity:
            self._graphs.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._graphs.clear()
        self._counts.clear()


class Recorder(Protocol):
    """How work of the device is recorded, and who may start what was recorded when."""

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """A function that does again what `run` did, in the same memory, and the result that it writes.

        Raises:
            RuntimeError: `run` cannot be recorded.
        """

    def begin(self) -> None:
        """Before a replay: the work that is queued from here on comes after all replays before."""

    def end(self) -> None:
        """After it, and after its result was read: marks their end."""

    def wait(self) -> None:
        """Until every replay has run."""

    def renew(self) -> None:
        """For when all that was recorded is gone: what comes next gets memory of its own."""


class CudaRecorder:
    """CUDA graphs with one pool of memory: replays must not overlap, which `begin` and `end` see to on the device.

    Args:
        device: of the graphs.
    """

    #: PyTorch records one graph at a time in a process.
    _recording = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = torch.cuda.Event()
        self.renew()

    def record(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        with self._recording:
            # Triton compiles and cuBLAS gets its handle before anything is recorded. On the caller's stream: cuBLAS has
            # a workspace for each stream, and that of the recording one, which graphs go on using, is to come from
            # their pool. PyTorch drops it with the first graph that goes (pytorch#193402); nobody else gets it there.
            run()
            with torch.cuda.stream(self._stream):
                # Not torch.cuda.graph, which empties the allocator's cache. Other threads may use the GPU meanwhile.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    result = run()
                finally:
                    graph.capture_end()
        return graph.replay, result

    def begin(self) -> None:
        """See `Recorder`."""
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def end(self) -> None:
        """See `Recorder`."""
        self._done.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        """See `Recorder`."""
        self._done.synchronize()

    def renew(self) -> None:
        """See `Recorder`."""
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()  # PyTorch refuses one whose graphs are all gone


class _Recorded(NamedTuple, Generic[Memory]):
    inputs: Memory
    replay: Callable[[], None]
    result: Tensor


class Graphs(Generic[Key, Memory]):
    """Forwards recorded by key. Safe to use from several threads and streams: one forward is queued at a time.

    Args:
        recorder: records.
        make_inputs: makes the memory that the forward of a key reads.
        forward: the forward of a key over such memory.
    """

    def __init__(
        self, recorder: Recorder, make_inputs: Callable[[Key], Memory], forward: Callable[[Key, Memory], Tensor]
    ) -> None:
        self._recorder, self._make_inputs, self._forward = recorder, make_inputs, forward
        self._cache: GraphCache[Key, _Recorded[Memory]] = GraphCache()
        self._lock = threading.Lock()
        self._records = True  # until it fails

    def run(self, key: Key, fill: Callable[[Memory], None], take: Callable[[Tensor], Result]) -> Result | None:
        """Replay the forward of a key: `take` of its result, or None where it is not recorded.

        Args:
            key: of the forward.
            fill: queues the writing of the inputs.
            take: queues the reading of the result, and returns no part of its memory.
        """
        with self._lock:
            recorded = self._cache.get(key)
            if recorded is None:
                if not self._records or not self._cache.is_due(key):
                    return None
                self._recorder.wait()  # for the graph, too, that will go to make room
            self._recorder.begin()  # recording, too, runs in the memory that replays share
            try:
                recorded = recorded or self._record(key)
                if recorded is None:
                    return None
                fill(recorded.inputs)
                recorded.replay()
                return take(recorded.result)
            finally:
                self._recorder.end()

    def clear(self) -> None:
        """Give back the memory of all graphs."""
        with self._lock:
            self._recorder.wait()
            self._cache.clear()
            self._recorder.renew()

    def _record(self, key: Key) -> _Recorded[Memory] | None:
        # A caller's inference mode would make tensors of them that other callers may not write to.
        with torch.inference_mode(False), torch.no_grad():
            try:
                inputs = self._make_inputs(key)
                recorded = _Recorded(inputs, *self._recorder.record(lambda: self._forward(key, inputs)))
            except RuntimeError as error:  # out of memory, too
                self._records = False
                reason = str(error.__context__ or error).partition("\n")[0]  # not that the recording ended badly
                ops.warn_of_fallback(f"CUDA graphs are off, every kernel is launched by itself: {reason}")
                return None
        self._cache.put(key, recorded)
        return recorded
