"""attention in Triton: every shape of tile, schedules, biases of any strides, and offsets that lie."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import HAS_GPU, Implementation
from numerics import assert_forward
from torch import Tensor

from bert_fast.kernels import attention as module
from bert_fast.kernels.attention import attention
from bert_fast.kernels.attention_schedule import attention_schedule, schedule_size
from bert_fast.ops.attention import reference

DEVICE = "cuda" if HAS_GPU else "cpu"
HALF, SINGLE = Implementation("triton", torch.float16, DEVICE), Implementation("triton", torch.float32, DEVICE)

#: Longest sequence -> lengths: the tiles of each kind of batch, sequences of at most half a tile of keys among them.
LENGTHS = {
    64: [32, 64, 0, 33, 5],
    128: [64, 128, 3, 65],
    150: [150, 128, 40],  # a last block of keys that is not full, one that is, and a single one that is not
}
BIASES: dict[str, Callable[[Implementation, int, int], Tensor]] = {
    "dense, wider than needed": lambda case, heads, n: case.randn(heads, n + 3, n + 1),
    "the same for all heads": lambda case, heads, n: case.randn(n, n).expand(heads, n, n),
    # bias[head, i, j] = values[head, n - 1 - i + j]: a value for each distance
    "relative positions": lambda case, heads, n: case.randn(heads, 2 * n - 1).as_strided(
        (heads, n, n), (2 * n - 1, -1 + 2, 1)
    ),
    "a number for each head": lambda case, heads, n: case.randn(heads, 1, 1).expand(heads, n, n),
}


@pytest.fixture(params=[True, False], ids=["matrix units", "no matrix units"])
def matrix_units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The tiles of both kinds of GPU."""
    monkeypatch.setattr(module, "has_matrix_units", lambda device: request.param)
    return request.param


def fused(case: Implementation, *shape: int) -> list[Tensor]:
    """q, k, v (..., heads, head_dim) as views of one (..., 3, heads, head_dim) tensor."""
    return list(case.randn(*shape[:-2], 3, *shape[-2:]).unbind(-3))


@pytest.mark.parametrize("max_seqlen", LENGTHS)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 256])
def test_tiles(matrix_units: bool, head_dim: int, max_seqlen: int) -> None:
    check_tiles(HALF, LENGTHS[max_seqlen], head_dim, max_seqlen)


@pytest.mark.parametrize("max_seqlen", LENGTHS)
@pytest.mark.parametrize("head_dim", [16, 64, 72, 256])
def test_tiles_of_float32(head_dim: int, max_seqlen: int) -> None:
    check_tiles(SINGLE, LENGTHS[max_seqlen], head_dim, max_seqlen)


def check_tiles(case: Implementation, lengths: list[int], head_dim: int, max_seqlen: int) -> None:
    q, k, v = fused(case, sum(lengths), 1 if head_dim > 64 else 2, head_dim)
    args = (q, k, v, case.cu_seqlens(lengths), max_seqlen, None, head_dim**-0.5, 0.0)
    out = assert_forward(attention, reference, *args)
    schedule = module.schedule(q, args[3], max_seqlen)
    if schedule is not None:
        assert torch.equal(attention(*args, schedule=schedule), out)


@pytest.mark.parametrize("max_seqlen", LENGTHS)
@pytest.mark.parametrize("scale", [-0.5, 0.0, 20.0])
def test_tiles_with_a_mask(matrix_units: bool, scale: float, max_seqlen: int) -> None:
    mask = torch.rand(4, max_seqlen, device=DEVICE) < 0.5
    mask[0, :-1], mask[0, -1] = False, True  # the first block of keys is all hidden
    mask[1] = False
    tensors = fused(HALF, *mask.shape, 1, 16)
    for tensor in tensors:
        tensor[~mask] = float("nan")  # hidden tokens reach nothing
    clean = [t.masked_fill(~mask[..., None, None], 0.0) for t in tensors]
    args = (None, max_seqlen, mask, scale, 0.0)
    out = attention(*tensors, *args)
    assert torch.equal(out, assert_forward(attention, reference, *clean, *args))
    assert not out[~mask].any()


@pytest.mark.parametrize("make", BIASES.values(), ids=BIASES.keys())
@pytest.mark.parametrize("max_seqlen", LENGTHS)
def test_tiles_with_a_bias(
    matrix_units: bool, max_seqlen: int, make: Callable[[Implementation, int, int], Tensor]
) -> None:
    lengths, bias = LENGTHS[max_seqlen], make(HALF, 2, max_seqlen)
    q, k, v = fused(HALF, sum(lengths), 2, 16)
    for scale in (0.25, -0.25):
        args = (q, k, v, HALF.cu_seqlens(lengths), max_seqlen, None, scale, 0.0, bias)
        assert_forward(attention, reference, *args)


def test_padded_with_a_bias_and_a_mask(matrix_units: bool) -> None:
    mask = torch.rand(3, 70, device=DEVICE) < 0.5
    args = (*fused(HALF, 3, 70, 2, 16), None, 70, mask, 0.25, 0.0, HALF.randn(2, 70, 70))
    assert_forward(attention, reference, *args)


@pytest.mark.parametrize("max_seqlen", LENGTHS)
def test_scores_past_the_range_of_exp(matrix_units: bool, max_seqlen: int) -> None:
    lengths = LENGTHS[max_seqlen]
    q, k, v = fused(HALF, sum(lengths), 1, 16)
    args = (q * 10, k * 10, v, HALF.cu_seqlens(lengths), max_seqlen, None, 1.0, 0.0)
    assert_forward(attention, reference, *args)


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("max_seqlen", LENGTHS)
def test_nan_stays_in_its_sequence(matrix_units: bool, max_seqlen: int, scheduled: bool) -> None:
    lengths = LENGTHS[max_seqlen]
    tensors, cu_seqlens = fused(HALF, sum(lengths), 2, 16), HALF.cu_seqlens(lengths)
    block_m = module.config(tensors[0], max_seqlen)["BLOCK_M"]
    schedule = attention_schedule(cu_seqlens, sum(lengths), max_seqlen, block_m) if scheduled else None
    run = partial(attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, attention_mask=None, scale=0.25, dropout_p=0)
    clean = run(*tensors, schedule=schedule)
    for tensor in tensors:
        tensor[lengths[0] + 1, 1, 3] = float("nan")
    out = run(*tensors, schedule=schedule)
    sick = slice(lengths[0], lengths[0] + lengths[1])
    assert out[sick, 1].isnan().any(-1).all()
    out[sick, 1] = clean[sick, 1]
    assert torch.equal(out, clean)


def test_rows_past_the_last_sequence(matrix_units: bool) -> None:
    """The buffers of a captured graph are longer than the batch, and so is its list of sequences."""
    lengths = [100, 7, 130, 0, 0, 0]
    tensors = fused(HALF, sum(lengths) + 50, 2, 16)
    for tensor in tensors:
        tensor[sum(lengths) :] = float("nan")
    cu_seqlens, args = HALF.cu_seqlens(lengths), (200, None, 0.25, 0.0)
    schedule = module.schedule(tensors[0], cu_seqlens, 200)
    assert schedule is not None
    packed = [t[: sum(lengths)] for t in tensors]
    expected = assert_forward(attention, reference, *packed, cu_seqlens, *args)
    for given_schedule in (None, schedule):
        out = attention(*tensors, cu_seqlens, *args, schedule=given_schedule)
        assert torch.equal(out[: sum(lengths)], expected)


LIES = {
    "before the first row, and past the last": [-7, 3, 70, 90],
    "past the last row from the start": [50, 60, 70, 90],
    "falling": [0, 8, 3, 8],
    "far outside": [-(2**31), 2**31 - 1, -5, 2**31 - 1],
    "falling further than 32 bits hold": [0, 8, -(2**31), 8],
    "all the rows, again and again": [0, 8, 0, 8],
}


@pytest.mark.parametrize("offsets", LIES.values(), ids=LIES.keys())
@pytest.mark.parametrize("max_seqlen", [5, 64, 150])
def test_wrong_offsets_reach_nothing_outside(matrix_units: bool, offsets: list[int], max_seqlen: int) -> None:
    around = fused(HALF, 90, 2, 16)
    q, k, v = (t[20:28] for t in around)  # 8 tokens, with memory before and after
    memory = HALF.randn(90, 2, 16)
    before = memory.clone()
    bias = HALF.randn(2, max_seqlen, max_seqlen)
    cu_seqlens = HALF.tensor(offsets, torch.int32)
    sizes = module.config(q, max_seqlen)
    for schedule in (None, attention_schedule(cu_seqlens, 8, max_seqlen, sizes["BLOCK_M"])):
        out = attention(q, k, v, cu_seqlens, max_seqlen, None, 0.25, 0.0, bias, schedule, memory[20:28])
        assert torch.equal(memory[:20], before[:20])
        assert torch.equal(memory[28:], before[28:])
        assert out.isfinite().all()


def test_wrong_offsets_are_clamped() -> None:
    q, k, v = (t[:8] for t in fused(SINGLE, 90, 1, 16))
    out = attention(q, k, v, SINGLE.tensor([-7, 3, 70, 90], torch.int32), 70, None, 0.25, 0.0)
    expected = reference(q, k, v, SINGLE.tensor([0, 3, 8, 8], torch.int32), 5, None, 0.25, 0.0)
    torch.testing.assert_close(out, expected)


def far_apart(rows: int) -> Tensor:
    """(rows, 1, 16) float16 of rows 2^30 elements apart, in memory of which only these are touched."""
    size = (rows - 1) * 2**30 + 16
    if HAS_GPU:
        memory = torch.empty(size, dtype=torch.float16, device=DEVICE)
    else:
        memory = torch.frombuffer(
            mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.float16
        )
    return memory.as_strided((rows, 1, 16), (2**30, 16, 1)).copy_(HALF.randn(rows, 1, 16))


@pytest.mark.parametrize("max_seqlen", [3, 150])
@pytest.mark.parametrize("lengths", [[3], [2, 1]], ids=["in a sequence", "where a sequence starts"])
def test_offsets_past_32_bits(matrix_units: bool, lengths: list[int], max_seqlen: int) -> None:
    q = far_apart(3)
    args = (HALF.cu_seqlens(lengths), max_seqlen, None, 0.25, 0.0)
    assert_forward(attention, reference, q, q, q, *args)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=600),
    st.integers(0, 50),
    st.sampled_from([16, 64, 128]),
    st.randoms(use_true_random=False),
)
def test_schedule(lengths: list[int], rows_after: int, block_m: int, random: Random) -> None:
    lengths = [n if random.random() < 0.5 else 0 for n in lengths]
    cu_seqlens, num_tokens, max_seqlen = HALF.cu_seqlens(lengths), sum(lengths) + rows_after, max(lengths, default=0)
    starts = cu_seqlens.tolist()
    expected = [
        (starts[i], starts[i + 1], first)
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i])
        for first in range(0, lengths[i], block_m)
    ]
    schedule = attention_schedule(cu_seqlens, num_tokens, max_seqlen, block_m)
    assert schedule.shape[1] == schedule_size(len(lengths), num_tokens, max_seqlen, block_m)
    tiles = list(map(tuple, schedule.T.tolist()))
    assert tiles[: len(expected)] == expected
    assert not schedule[:, len(expected) :].any()


def test_schedule_only_where_it_can_pay() -> None:
    q = HALF.randn(300, 1, 16)
    assert module.schedule(q, HALF.cu_seqlens([200, 50, 50]), 200) is not None
    assert module.schedule(q, HALF.cu_seqlens([300]), 300) is None  # one sequence
    assert module.schedule(q, HALF.cu_seqlens([150, 150]), 150) is None  # all of one length
    assert module.schedule(q, HALF.cu_seqlens([30] * 10), 31) is None  # a tile each


def test_launcher_refuses() -> None:
    q, cu_seqlens = HALF.randn(300, 1, 16), HALF.cu_seqlens([200, 100])
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1"):
        attention(q, q, q, cu_seqlens, 200, None, 1.0, 0.1)
    with pytest.raises(ValueError, match=r"bias has shape \(1, 200, 199\), expected \(1, >= 200, >= 200\)"):
        attention(q, q, q, cu_seqlens, 200, None, 1.0, 0.0, HALF.randn(1, 200, 199))
    other = attention_schedule(cu_seqlens, 300, 200, 16)
    with pytest.raises(ValueError, match=r"schedule has shape \(3, 20\), expected \(3, \d+\)"):
        attention(q, q, q, cu_seqlens, 200, None, 1.0, 0.0, None, other)
