"""A caller's batch on its way into the memory that a forward on a GPU reads: checked, packed, without needless waits.

Three kinds of batch, each with the sizes that the host has to know before anything is launched. Of a batch on the CPU
the host knows everything; it is checked there, and goes over in one copy. The ids of a batch on the device are checked
there: what was found comes back in one small copy, which the host awaits after the forward is queued, or before it
where the number of tokens is unknown. Ids are brought inside their tables on the way, so that whatever they are no
forward reads what is not there.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_fast.checks import ids_in_range
from bert_fast.engine.graphs import Bucket
from bert_fast.inputs import BertInputs, TableSizes
from bert_fast.ops import _check
from bert_fast.ragged import Padding, Ragged

MAX_PLACES = 2**31 - 1  # rows are numbered in int32


class CheckedRagged(Ragged):
    """A batch whose ids are known to be inside their tables."""


class Inputs:
    """The memory that a forward reads: ids in the first table's row 0 of no sequence, until it is filled.

    Args:
        bucket: its sizes.
        device: where it is.

    Attributes:
        memory: (3 * num_tokens + batch_size + 1,) int32, all of the following.
        input_ids, position_ids, token_type_ids: (num_tokens,).
        cu_seqlens: (batch_size + 1,).
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        ids = 3 * bucket.num_tokens
        self.memory = torch.zeros(ids + bucket.batch_size + 1, dtype=torch.int32, device=device)
        self.input_ids, self.position_ids, self.token_type_ids = self.memory[:ids].view(3, -1).unbind()
        self.cu_seqlens = self.memory[ids:]


class Batch(Protocol):
    """A batch of one of the kinds below.

    Attributes:
        num_tokens, batch_size, max_seqlen: its sizes, or at least as much.
    """

    num_tokens: int
    batch_size: int
    max_seqlen: int

    def fill(self, inputs: Inputs) -> None:
        """Queue the writing of its tokens; `inputs` is at least as large."""

    def check(self) -> None:
        """ValueError if an id is outside its table, for after `fill`; waits for the device if it has to be asked."""


class HostBatch:
    """A packed batch on the CPU.

    Args:
        ragged: the batch.
        sizes: of the tables.

    Raises:
        ValueError: it is not a batch, or an id is outside its table.
    """

    def __init__(self, ragged: Ragged, sizes: TableSizes) -> None:
        _check.cu_seqlens("encoder", ragged.cu_seqlens, torch.device("cpu"))
        self._cu_seqlens = ragged.cu_seqlens.numpy()
        self._ids = [
            _host_ids("input_ids", ragged.input_ids, ragged, sizes.vocab_size),
            _host_ids("position_ids", ragged.position_ids, ragged, sizes.max_position_embeddings),
            _host_ids("token_type_ids", ragged.token_type_ids, ragged, sizes.type_vocab_size),
        ]
        self.num_tokens, self.batch_size = ragged.input_ids.shape[0], len(self._cu_seqlens) - 1
        offsets = self._cu_seqlens
        lengths = offsets[1:] - offsets[:-1]
        if offsets[0] != 0 or offsets[-1] != self.num_tokens or lengths.min(initial=0) < 0:
            _check.sequence_bounds("encoder", ragged.cu_seqlens, self.num_tokens)
        self.max_seqlen = int(lengths.max(initial=0))

    def fill(self, inputs: Inputs) -> None:
        """See `Batch`."""
        pinned = inputs.memory.is_cuda  # PyTorch uses pinned memory again only once the copies from it are done
        staging = torch.empty(inputs.memory.shape, dtype=torch.int32, pin_memory=pinned)
        array, num_rows, num_tokens = staging.numpy(), inputs.input_ids.shape[0], self.num_tokens
        rows, cu_seqlens = array[: 3 * num_rows].reshape(3, num_rows), array[3 * num_rows :]
        for row, ids in zip(rows, self._ids, strict=True):
            row[:num_tokens] = ids
        rows[:, num_tokens:] = 0
        cu_seqlens[: self.batch_size + 1] = self._cu_seqlens
        cu_seqlens[self.batch_size + 1 :] = num_tokens
        inputs.memory.copy_(staging, non_blocking=True)

    def check(self) -> None:
        """See `Batch`; it was checked before."""


def _check_packed(name: str, ids: Tensor, ragged: Ragged) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"encoder: {name} is {ids.dtype}, expected int64 or int32")
    _check.shape("encoder", name, ids, ragged.input_ids.shape[:1])


def _host_ids(name: str, ids: Tensor, ragged: Ragged, size: int) -> NDArray[Any]:
    """The ids of a packed batch as an array, checked."""
    _check_packed(name, ids, ragged)
    array = ids.numpy()
    unsigned = array.view(np.uint64 if ids.dtype == torch.int64 else np.uint32)  # what is negative is large
    if len(array) and unsigned.max() >= size:
        ids_in_range(name, ids, size)
    return array


class DeviceBatch:
    """A packed batch on the device. Its `cu_seqlens` are not checked: whatever they are, kernels stay inside the rows.

    Args:
        ragged: the batch.
        sizes: of the tables.
        may_wait: whether the device may be asked about the ids, that is, nobody is recording a graph.

    Raises:
        ValueError: shapes or dtypes do not match.
    """

    def __init__(self, ragged: Ragged, sizes: TableSizes, may_wait: bool) -> None:
        from bert_fast.kernels import packing

        ids = [ragged.input_ids, ragged.position_ids, ragged.token_type_ids]
        _check.cu_seqlens("encoder", ragged.cu_seqlens, ragged.input_ids.device)
        for name, one in zip(("input_ids", "position_ids", "token_type_ids"), ids, strict=True):
            _check_packed(name, one, ragged)
        self._ragged, self._sizes = ragged, sizes
        self.num_tokens, self.batch_size = ids[0].shape[0], ragged.cu_seqlens.shape[0] - 1
        self.max_seqlen = ragged.max_seqlen
        self._ids = packing.Ids(ids[0][None], None, ids[2][None], ids[1][None], *sizes[:3])
        self._asks = may_wait and not isinstance(ragged, CheckedRagged)
        self._report: _Report | None = None

    def fill(self, inputs: Inputs) -> None:
        """See `Batch`."""
        from bert_fast.kernels import packing

        report = packing.pack(self._ids, None, inputs.input_ids, inputs.token_type_ids, inputs.position_ids)
        if self._asks:
            self._report = _Report(report)
        inputs.cu_seqlens[: self.batch_size + 1].copy_(self._ragged.cu_seqlens)
        inputs.cu_seqlens[self.batch_size + 1 :] = self.num_tokens

    def check(self) -> None:
        """See `Batch`."""
        if self._report is not None and self._report.outside():
            ragged, sizes = self._ragged, self._sizes
            ids_in_range("input_ids", ragged.input_ids, sizes.vocab_size)
            ids_in_range("position_ids", ragged.position_ids, sizes.max_position_embeddings)
            ids_in_range("token_type_ids", ragged.token_type_ids, sizes.type_vocab_size)
            raise _changed()


class PaddedBatch:
    """A padded batch on the device.

    Args:
        inputs: the caller's; `input_ids`, and no `cu_seq_lens_q`.
        sizes: of the tables.
        may_wait: whether the device may be asked, that is, nobody is recording a graph. If not, the batch is run at its
            full size and its ids are not checked.
        exact: ask for the number of tokens, however few places there are.

    Attributes:
        inverse: (batch_size * seq_len + batch_size,) int32, for `packing.unpack`; filled by `fill`.

    Raises:
        ValueError: it is not a batch; or, where the device had to be asked at once, an id is outside its table.
    """

    def __init__(self, inputs: BertInputs, sizes: TableSizes, may_wait: bool, exact: bool = False) -> None:
        from bert_fast.kernels import packing

        tokens, types, positions = inputs.placed(sizes)
        mask = inputs.attention_mask
        self.batch_size, self.seq_len = tokens.shape
        num_places = tokens.numel()
        if num_places > MAX_PLACES:
            raise ValueError(f"input_ids has {num_places} elements, expected at most {MAX_PLACES}")
        self._inputs, self._sizes = inputs, sizes
        self._ids = packing.Ids(tokens, mask, types, positions, *sizes[:3])
        self._may_wait = may_wait
        self._report: _Report | None = None
        self._counts: Tensor | None = None
        self.inverse = torch.empty(num_places + self.batch_size, dtype=torch.int32, device=tokens.device)
        self.num_tokens, self.max_seqlen = num_places, self.seq_len
        # Few places are run at their full size: products of so few rows take as long as reading the weights does.
        if num_places and (exact or (mask is not None and num_places > packing.FEW_PLACES)):
            self._counts = packing.inspect(self._ids)
            if may_wait:
                self._report = _Report(self._counts)
                self.check()
                lengths = self._report.kept().reshape(self.batch_size, -1).sum(1)
                self.num_tokens, self.max_seqlen = int(lengths.sum()), int(lengths.max())

    def fill(self, inputs: Inputs) -> None:
        """See `Batch`."""
        report = self._pack(inputs, inverse=self.inverse)
        if self._may_wait and self._report is None:
            self._report = _Report(report)

    def _pack(self, inputs: Inputs, **places: Tensor) -> Tensor:
        from bert_fast.kernels import packing

        return packing.pack(
            self._ids,
            self._counts,
            inputs.input_ids,
            inputs.token_type_ids,
            inputs.position_ids,
            inputs.cu_seqlens,
            **places,
        )

    def check(self) -> None:
        """See `Batch`."""
        if self._report is not None and self._report.outside():
            self._inputs.checked(self._sizes)  # raises
            raise _changed()

    def to_ragged(self) -> tuple[Ragged, Padding]:
        """The packed batch and the way back; `exact` must have been asked for.

        Raises:
            ValueError: the device may not be asked how many tokens the mask keeps.
        """
        if not self._may_wait and self._inputs.attention_mask is not None:
            raise ValueError(
                "a CUDA graph is being captured, and the host has to know how many tokens attention_mask keeps: "
                "give the batch without one"
            )
        num_tokens = self.num_tokens
        inputs = Inputs(Bucket.exact(num_tokens, self.batch_size, self.max_seqlen), self.inverse.device)
        is_full = num_tokens == self.batch_size * self.seq_len
        places = {} if is_full else {"index": self.inverse.new_empty(inputs.input_ids.shape[0], dtype=torch.int64)}
        self._pack(inputs, **places)
        ragged = CheckedRagged(
            input_ids=inputs.input_ids[:num_tokens],
            position_ids=inputs.position_ids[:num_tokens],
            token_type_ids=inputs.token_type_ids[:num_tokens],
            cu_seqlens=inputs.cu_seqlens,
            max_seqlen=self.max_seqlen,
        )
        return ragged, Padding(self.batch_size, self.seq_len, None if is_full else places["index"][:num_tokens])


def _changed() -> ValueError:
    return ValueError("an id was out of range, and no longer is: the batch is written to while it is read")


class _Report:
    """What `packing.inspect` found, on its way to the host.

    Args:
        counts: of `packing.inspect`.
    """

    def __init__(self, counts: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if counts.is_cuda:
            self._counts = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
            self._counts.copy_(counts, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(counts.device))
        else:
            self._counts = counts

    def _wait(self) -> NDArray[np.int32]:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._counts.numpy()

    def kept(self) -> NDArray[np.int32]:
        """(num_blocks,): tokens."""
        return self._wait()[0]

    def outside(self) -> bool:
        """Whether an id is outside its table."""
        return bool(self._wait()[1].any())
