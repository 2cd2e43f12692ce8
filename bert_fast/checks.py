"""Questions asked before anything runs: is every id inside its table, and are there values to look at at all?"""

from __future__ import annotations

import torch
from torch import Tensor


def is_recorded() -> bool:
    """Whether the call is being written down as a program for other inputs (torch.export, torch.onnx, torch.jit.trace).

    What depends on the values of its inputs, as packing does, would be fixed to those of the example.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


@torch.compiler.disable
def ids_in_range(name: str, ids: Tensor, size: int, ignored: int | None = None) -> None:
    """Check that every id is in [0, size), or is `ignored`.

    Raises:
        ValueError: one is not; the message has the first such value and its index.
    """
    if ids.numel() == 0 or is_recorded():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low >= 0 and high < size:
        return
    wrong = (ids < 0) | (ids >= size)
    if ignored is not None:
        wrong &= ids != ignored
    if not bool(wrong.any()):
        return
    index = tuple(wrong.nonzero()[0].tolist())
    where = index[0] if len(index) == 1 else index
    raise ValueError(f"{name} {ids[index].item()} at index {where} is out of range [0, {size})")


def is_transformed() -> bool:
    """Whether torch.func is at work (`grad`, `vmap`, ...), whose tensors have no memory that one can look at."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # it has no public name
