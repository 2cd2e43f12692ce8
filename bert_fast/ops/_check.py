"""Checks shared by the public functions of the ops: each raises ValueError naming the argument and what it got."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor


def same_kind(op: str, **tensors: Tensor | None) -> None:
    """All tensors given are floating point, on one device and of one dtype."""
    lead_name, lead = next((n, t) for n, t in tensors.items() if t is not None)
    if not lead.is_floating_point():
        raise ValueError(f"{op}: {lead_name} is {lead.dtype}, expected a floating-point tensor")
    device, dtype = lead.device, lead.dtype
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device} but {lead_name} is on {device}")
        if tensor.dtype != dtype:
            raise ValueError(f"{op}: {name} is {tensor.dtype} but {lead_name} is {dtype}")


def shape(op: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """The tensor has exactly this shape."""
    if tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {tuple(expected)}")


def cu_seqlens(op: str, offsets: Tensor, device: torch.device) -> None:
    """`offsets` is int32 of shape (batch_size + 1,) on `device` (its values: `sequence_bounds`)."""
    if offsets.dim() != 1 or offsets.numel() < 1 or offsets.dtype != torch.int32:
        raise ValueError(
            f"{op}: cu_seqlens is {offsets.dtype} of shape {tuple(offsets.shape)}, expected int32 (batch_size + 1,)"
        )
    if offsets.device != device:
        raise ValueError(f"{op}: cu_seqlens is on {offsets.device} but its rows are on {device}")


def sequence_bounds(op: str, offsets: Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """[start, end) of every sequence, read back from the device; the offsets are checked against `num_tokens`."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != num_tokens:
        raise ValueError(f"{op}: cu_seqlens runs from {values[0]} to {values[-1]}, expected 0 to {num_tokens} tokens")
    bounds = list(pairwise(values))
    for index, (start, end) in enumerate(bounds):
        if end < start:
            raise ValueError(f"{op}: cu_seqlens falls from {start} to {end} at index {index + 1}")
    return bounds


def choice(op: str, name: str, value: str, allowed: Iterable[str]) -> None:
    """`value` is one of the allowed names."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}, expected one of {', '.join(allowed)}")


def dropout(op: str, dropout_p: float, seed: Tensor | None) -> None:
    """`dropout_p` is in [0, 1], and `seed`, without which there is no dropout, an int64 scalar on the CPU."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}, expected a probability")
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() != 0 or seed.device.type != "cpu"):
        raise ValueError(
            f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)} on {seed.device}, expected an int64 scalar on cpu"
        )
    if dropout_p > 0 and seed is None:
        raise ValueError(f"{op}: dropout_p is {dropout_p} without a seed")
