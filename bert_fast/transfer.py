"""Between the host and a GPU without waiting for what is queued there. On a CPU there is nothing to move."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Item = TypeVar("Item")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, by way of pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(pieces: Iterable[tuple[Item, Tensor]]) -> Iterator[tuple[Item, NDArray[Any]]]:
    """The same pieces with their tensors as arrays, in order.

    A piece on a GPU comes one late: its copy is queued behind its computation, and awaited when the next piece has been
    queued, so that the GPU is never idle while the host reads.
    """
    waiting: tuple[Item, Tensor, torch.cuda.Event] | None = None
    for item, tensor in pieces:
        if not tensor.is_cuda:
            yield item, tensor.numpy()
            continue
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(tensor.device))
        before, waiting = waiting, (item, copy, done)
        if before is not None:
            yield _arrived(*before)
    if waiting is not None:
        yield _arrived(*waiting)


def _arrived(item: Item, copy: Tensor, done: torch.cuda.Event) -> tuple[Item, NDArray[np.generic]]:
    done.synchronize()
    return item, copy.numpy()
