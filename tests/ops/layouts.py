"""The same values in memory in other ways: what an op is given when its caller slices, transposes or expands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Name of the layout -> a function from a contiguous tensor to one of the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every other element of the last dimension": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "last two dimensions swapped": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "columns of a wider tensor": lambda t: torch.cat([t + 1, t, t + 2], -1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "not at the start of its storage, nor aligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(
        t.shape
    ),
}
