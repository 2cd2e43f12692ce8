"""The GPU's encoder: fused weights, batches packed on the device, and short forwards replayed as CUDA graphs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.encoder import first_tokens
from bert_fast.engine.batches import Batch, CheckedRagged, DeviceBatch, HostBatch, Inputs, PaddedBatch
from bert_fast.engine.graphs import Bucket, CudaRecorder, Graphs, Recorder, graph_tokens
from bert_fast.engine.layers import Layers
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.ragged import Padding, Ragged

Result = TypeVar("Result")

#: What the attention kernel takes.
MAX_HEAD_DIM = 256

#: The lowest compute capability of a precision, and what its products need.
CAPABILITIES = {"bf16": ((8, 0), "bfloat16"), "fp8": ((8, 9), "fp8")}


class _Work(NamedTuple):
    """What is recorded: a forward of these sizes, and what becomes of its rows."""

    bucket: Bucket
    modes: tuple[str, ...] = ()  # of pooling; none leaves the rows as they are
    normalize: bool = False


def refusal(precision: str, name: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU cannot compute in a precision, and what to use instead; or None."""
    lowest, what = CAPABILITIES.get(precision, ((0, 0), ""))
    if capability >= lowest:
        return None
    instead = "fp16" if capability < CAPABILITIES["bf16"][0] else "bf16"
    gpu = f"{name} (sm_{capability[0]}{capability[1]})"
    return f"precision is {precision!r}, but {gpu} has no {what} products: use precision={instead!r}"


def _explained(method: Callable[..., Result]) -> Callable[..., Result]:
    """A forward without gradients that, out of memory, gives back the graphs' and says what would help."""

    @functools.wraps(method)
    def guarded(self: GpuEngine, *args: Any, **kwargs: Any) -> Result:
        try:
            with torch.no_grad():
                return method(self, *args, **kwargs)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
        if self._graphs is not None:  # here, because until here the error held what had been allocated
            self._graphs.clear()
        raise torch.OutOfMemoryError(
            f"no memory is left on {self.device} for this forward: a smaller batch, a precision of fewer bits and "
            f"free_originals=True take less ({reason})"
        )

    return guarded


class GpuEngine:
    """The encoder on a GPU. Safe to call from several threads and streams.

    The results are those of the caller's current stream. Forwards whose launches would hold them up are recorded as
    CUDA graphs when their bucket of sizes is met for the second time (`graphs`). Where the caller records a graph
    himself, the kernels are launched into his, and ids cannot be checked.

    Args:
        bert: has `embeddings` and `encoder` with a Hugging Face checkpoint's names, all of one dtype (float32, float16
            or bfloat16), on a GPU.
        hidden_act: one of `activation.ACTIVATIONS`.
        num_heads: attention heads, of up to `MAX_HEAD_DIM` channels.
        precision: "fp32", "fp16", "bf16" or "fp8".
        recorder: records the graphs; None for CUDA's on a GPU, and for none elsewhere, where Triton's interpreter runs
            the kernels.

    Raises:
        ValueError: the GPU has no such products, and the message says what to use instead; or the caller is recording a
            graph, in which the weights would be packed whenever it is replayed, and not before.
    """

    def __init__(
        self, bert: Any, hidden_act: str, num_heads: int, precision: str, recorder: Recorder | None = None
    ) -> None:
        table = bert.embeddings.word_embeddings.weight
        self.device = table.device
        if table.is_cuda:
            gpu = torch.cuda.get_device_properties(self.device)
            if reason := refusal(precision, gpu.name, (gpu.major, gpu.minor)):
                raise ValueError(reason)
            if self._is_captured():
                raise ValueError(
                    "a CUDA graph is being captured, and the weights of the model are not packed: call it once before"
                )
        self.precision = precision
        self._dtype, self._sizes = table.dtype, TableSizes.of(bert.embeddings)
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(table):
            self._layers = Layers(bert, hidden_act, num_heads, precision)
            if recorder is None and table.is_cuda:
                recorder = CudaRecorder(self.device)
        if table.is_cuda:  # the first forward may come on another stream than this one
            torch.cuda.current_stream(self.device).synchronize()
        intermediate_size = bert.encoder.layer[0].intermediate.dense.weight.shape[0] if bert.encoder.layer else 0
        self._graph_tokens = graph_tokens(self._layers.hidden_size, intermediate_size)
        self._recorded_rows: Tensor | None = None  # where every recorded forward puts its rows
        self._graphs: Graphs[_Work, Inputs] | None = None
        if recorder is not None:
            # Bound methods would be a cycle, and the memory of a GPU is not to wait for the collector of those.
            this = weakref.proxy(self)
            self._graphs = Graphs(
                recorder,
                lambda work: this._recordable_inputs(work),
                lambda work, inputs: this._recordable(work, inputs),
            )

    def pack(self, inputs: BertInputs) -> tuple[Ragged, Padding]:
        """See `Engine`."""
        if _is_packed(inputs):
            return inputs.checked(self._sizes).to_ragged()
        return self._padded_batch(inputs, exact=True).to_ragged()

    @_explained
    def rows(self, ragged: Ragged, hidden_states: list[Tensor] | None = None) -> Tensor:
        """See `Engine`."""
        batch = self._batch(ragged)
        num_tokens = batch.num_tokens
        if hidden_states is None:
            return self._run(batch, _Work, lambda rows, shared: rows[:num_tokens].to(self._dtype, copy=shared))
        hidden_states.extend(state[:num_tokens].to(self._dtype) for state in self._states(batch))
        return hidden_states[-1]

    @_explained
    def vectors(self, ragged: Ragged, modes: Sequence[str], normalize: bool) -> Tensor:
        """See `Engine`."""
        batch = self._batch(ragged)
        work = partial(_Work, modes=tuple(modes), normalize=normalize)
        return self._run(batch, work, lambda out, shared: out[: batch.batch_size].to(torch.float32, copy=shared))

    @_explained
    def padded(self, inputs: BertInputs, want_states: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
        """See `Engine`."""
        if _is_packed(inputs):
            ragged, padding = self.pack(inputs)
            states: list[Tensor] = []
            rows = self.rows(ragged, states if want_states else None)
            return padding.pad(rows), first_tokens(rows, ragged), [padding.pad(state) for state in states]
        batch = self._padded_batch(inputs)
        if want_states:
            unpacked = [self._unpack(batch, state) for state in self._states(batch)]
            return *unpacked[-1], [state for state, _ in unpacked]
        return *self._run(batch, _Work, lambda rows, shared: self._unpack(batch, rows)), []

    def _padded_batch(self, inputs: BertInputs, exact: bool = False) -> PaddedBatch:
        self._check_device(inputs.input_ids)
        return PaddedBatch(inputs, self._sizes, not self._is_captured(), exact)

    def _batch(self, ragged: Ragged) -> Batch:
        if isinstance(ragged, CheckedRagged) or ragged.input_ids.device.type != "cpu":
            self._check_device(ragged.input_ids)
            return DeviceBatch(ragged, self._sizes, not self._is_captured())
        if self._is_captured():
            raise ValueError(f"a CUDA graph is being captured, and input_ids is on the CPU: move it to {self.device}")
        return HostBatch(ragged, self._sizes)

    def _check_device(self, input_ids: Tensor | None) -> None:
        if input_ids is not None and input_ids.device != self.device:
            raise ValueError(f"input_ids is on {input_ids.device} but the model is on {self.device}")

    def _is_captured(self) -> bool:
        """Whether the caller records a graph: the device must not be waited for."""
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _run(self, batch: Batch, work_of: Callable[[Bucket], _Work], take: Callable[[Tensor, bool], Result]) -> Result:
        """`take(result, shared)` of a forward; `shared` is whether other forwards will write to the result's memory."""
        sizes = batch.num_tokens, batch.batch_size, batch.max_seqlen
        result: Result | None = None
        if self._graphs is not None and batch.num_tokens <= self._graph_tokens and not self._is_captured():
            work = work_of(Bucket.rounded(*sizes))
            result = self._graphs.run(work, batch.fill, lambda out: take(out, True))
        if result is None:
            result = take(self._launch(batch, work_of(Bucket.exact(*sizes))), False)
        batch.check()
        return result

    def _states(self, batch: Batch) -> list[Tensor]:
        """The embeddings and the rows of every layer."""
        states: list[Tensor] = []
        self._launch(batch, _Work(Bucket.exact(batch.num_tokens, batch.batch_size, batch.max_seqlen)), states)
        batch.check()
        return states

    def _launch(self, batch: Batch, work: _Work, states: list[Tensor] | None = None) -> Tensor:
        inputs = Inputs(work.bucket, self.device)
        batch.fill(inputs)
        return self._forward(work, inputs, states)

    def _forward(
        self, work: _Work, inputs: Inputs, states: list[Tensor] | None = None, out: Tensor | None = None
    ) -> Tensor:
        from bert_fast.kernels.pooling import pooling

        ids = (inputs.input_ids, inputs.position_ids, inputs.token_type_ids)
        rows = self._layers(*ids, inputs.cu_seqlens, work.bucket.max_seqlen, states, out)
        if not work.modes:
            return rows
        vectors = torch.cat([pooling(rows, inputs.cu_seqlens, mode).float() for mode in work.modes], dim=1)
        return F.normalize(vectors, dim=1) if work.normalize else vectors

    def _recordable_inputs(self, work: _Work) -> Inputs:
        if self._recorded_rows is None:
            num_rows = Bucket.rounded(self._graph_tokens, 1, 1).num_tokens
            shape = (num_rows, self._layers.hidden_size)
            self._recorded_rows = torch.empty(shape, dtype=self._layers.dtype, device=self.device)
        return Inputs(work.bucket, self.device)

    def _recordable(self, work: _Work, inputs: Inputs) -> Tensor:
        assert self._recorded_rows is not None, "made with the inputs"
        return self._forward(work, inputs, out=self._recorded_rows[: work.bucket.num_tokens])

    def _unpack(self, batch: PaddedBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(batch_size, seq_len, hidden_size) and the first tokens, (batch_size, hidden_size)."""
        from bert_fast.kernels.packing import unpack

        out = torch.empty((batch.inverse.shape[0], rows.shape[1]), dtype=self._dtype, device=self.device)
        unpack(rows, batch.inverse, out)
        num_places = batch.batch_size * batch.seq_len
        return out[:num_places].view(batch.batch_size, batch.seq_len, rows.shape[1]), out[num_places:]


def _is_packed(inputs: BertInputs) -> bool:
    return inputs.cu_seq_lens_q is not None or inputs.input_ids is None
