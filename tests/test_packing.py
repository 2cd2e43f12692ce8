"""Packing on the device: what it writes is what `ragged.pack` gives, for any mask, and it never writes elsewhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import HAS_GPU
from torch import Tensor

from bert_fast.kernels import packing
from bert_fast.ragged import pack

DEVICE = "cuda" if HAS_GPU else "cpu"
SIZES = (80, 2, 3000)  # rows of the tables
GUARD = -7  # what is in memory that must not be written


def tensor(shape, high, dtype=torch.int64):
    return torch.randint(0, high, shape).to(DEVICE, dtype)


def batch(shape, mask=None, types=None, positions=None, ids=None):
    return packing.Ids(tensor(shape, 80) if ids is None else ids, mask, types, positions, *SIZES)


def packed(ids: packing.Ids, num_tokens: int, extra_sequences: int = 0) -> dict[str, Tensor]:
    """Everything that `pack` writes, with a guard behind each."""
    batch_size, seq_len = ids.input_ids.shape
    sizes = {
        "input_ids": num_tokens,
        "token_type_ids": num_tokens,
        "position_ids": num_tokens,
        "cu_seqlens": batch_size + extra_sequences + 1,
        "index": num_tokens,
        "inverse": batch_size * seq_len + batch_size,
    }
    memory = {
        name: torch.full((size + 64,), GUARD, device=DEVICE, dtype=torch.int64 if name == "index" else torch.int32)
        for name, size in sizes.items()
    }
    report = packing.inspect(ids)
    arguments = {name: memory[name][:size] for name, size in sizes.items()}
    assert packing.pack(ids, report, **arguments) is report
    before = {name: written.clone() for name, written in memory.items()}
    if ids.attention_mask is None or ids.input_ids.numel() <= packing.FEW_PLACES:  # counts by itself
        for written in memory.values():
            written.fill_(GUARD)
        assert torch.equal(packing.pack(ids, None, **arguments), report)
    for name, size in sizes.items():
        assert (memory[name][size:] == GUARD).all(), f"{name} was written past its end"
        assert torch.equal(memory[name], before[name]), name
    return {name: memory[name][:size] for name, size in sizes.items()}


def check(ids: packing.Ids) -> None:
    """`inspect`, `pack` and `unpack` against the CPU's packing."""
    batch_size, seq_len = ids.input_ids.shape
    mask = torch.ones(batch_size, seq_len, dtype=torch.bool) if ids.attention_mask is None else ids.attention_mask != 0
    host = [None if t is None else t.cpu() for t in ids[:4]]
    ragged, padding = pack(host[0], mask.cpu(), *host[2:])
    num_tokens = len(ragged.input_ids)
    kept, outside = packing.inspect(ids)
    assert int(kept.sum()) == num_tokens
    assert not outside.any()
    got = packed(ids, num_tokens, extra_sequences=3)
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert got[name].tolist() == getattr(ragged, name).tolist(), name
    assert got["cu_seqlens"].tolist() == [*ragged.cu_seqlens.tolist(), *[num_tokens] * 3]
    places = torch.arange(num_tokens) if padding.indices is None else padding.indices
    assert got["index"].tolist() == places.tolist()

    rows = torch.randn(num_tokens, 24).to(DEVICE)
    out = torch.empty((batch_size * seq_len + batch_size, 24), device=DEVICE)
    packing.unpack(rows, got["inverse"], out)
    padded, first = out.cpu().split([batch_size * seq_len, batch_size])
    assert torch.equal(padded.view(batch_size, seq_len, 24), padding.pad(rows.cpu()))
    for row, start, end in zip(first, ragged.cu_seqlens[:-1], ragged.cu_seqlens[1:], strict=True):
        assert torch.equal(row, rows[start].cpu() if end > start else torch.zeros(24))


SHAPES = {
    "one place": (1, 1),
    "a block, exactly": (3, 16),
    "one more than a block": (2, 1025),
    "three blocks a row": (2, 2100),
    "more rows than a program adds up at once": (40, 5),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("masked", [True, False])
def test_shapes(shape, masked):
    check(batch(shape, tensor(shape, 2) if masked else None, tensor(shape, 2), tensor(shape, 3000)))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), batch_size=st.integers(1, 6), seq_len=st.integers(1, 40))
def test_any_mask(data, batch_size, seq_len):
    """Left padding, holes and rows without a token among them."""
    rows = st.lists(st.booleans(), min_size=seq_len, max_size=seq_len)
    mask = data.draw(st.lists(rows, min_size=batch_size, max_size=batch_size))
    check(batch((batch_size, seq_len), torch.tensor(mask, device=DEVICE)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32])
def test_masks_of_every_dtype(dtype):
    mask = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]])
    check(batch((3, 4), mask.to(DEVICE, dtype)))
    if dtype.is_floating_point or dtype == torch.int64:
        check(batch((3, 4), (mask * -0.5 if dtype.is_floating_point else mask * -3).to(DEVICE, dtype)))


def test_strides_and_int32():
    shape = (3, 20)
    positions = tensor((1, 20), 3000).expand(shape)
    ids = tensor((20, 3), 80, torch.int32).t()
    check(batch(shape, tensor((3, 60), 2)[:, ::3], tensor((3, 40), 2)[:, ::2], positions, ids))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_place(shape):
    ids = batch(shape, tensor(shape, 2))
    got = packed(ids, 4, extra_sequences=2)
    assert packing.inspect(ids).shape == (2, 0)
    assert not got["cu_seqlens"].any()
    assert (got["inverse"] == -1).all()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", ["input_ids", "token_type_ids", "position_ids"])
@pytest.mark.parametrize("value", [-1, "size", 2**31 + 5, -(2**63)])
def test_ids_outside_are_found_and_brought_inside(name, value, masked):
    """Under the mask, too, as the CPU path does."""
    shape, field = (3, 1030), ("input_ids", "token_type_ids", "position_ids").index(name)
    tensors = [tensor(shape, size) for size in SIZES]
    tensors[field][2, 1027] = SIZES[field] if value == "size" else value
    mask = torch.zeros(shape, device=DEVICE) if masked else None
    ids = packing.Ids(tensors[0], mask, tensors[1], tensors[2], *SIZES)
    outside = packing.inspect(ids)[1]
    assert outside.tolist() == [0, 0, 0, 0, 0, 1]
    got = packed(ids, 0 if masked else 3 * 1030)
    for written, size in zip((got["input_ids"], got["token_type_ids"], got["position_ids"]), SIZES, strict=True):
        assert ((written >= 0) & (written < size)).all()


def test_a_mask_that_grows_between_the_kernels_writes_nothing_past_the_end():
    mask = torch.zeros((2, 30), device=DEVICE)
    mask[:, :4] = 1
    ids = batch((2, 30), mask)
    report = packing.inspect(ids)
    mask.fill_(1)
    memory = torch.full((3, 40), GUARD, device=DEVICE, dtype=torch.int32)
    packing.pack(ids, report, *memory[:, :8])
    assert (memory[:, 8:] == GUARD).all()


@pytest.mark.parametrize("hidden_size", [1, 16, 2500])  # a channel, less than a block of them, more
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_unpack_converts_and_reads_no_row_that_is_not_there(dtype, hidden_size):
    rows = torch.randn(10, hidden_size + 8, device=DEVICE)[:4, :hidden_size]  # strided
    inverse = torch.tensor([3, -1, 0, 4, 100], device=DEVICE, dtype=torch.int32)
    out = torch.empty((5, hidden_size), device=DEVICE, dtype=dtype)
    packing.unpack(rows, inverse, out)
    expected = torch.zeros(5, hidden_size, device=DEVICE)
    expected[0], expected[2] = rows[3], rows[0]
    assert torch.equal(out, expected.to(dtype))
