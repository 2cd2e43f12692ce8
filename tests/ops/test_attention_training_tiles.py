"""attention in training, Triton: every shape of tile, with schedules and masks; dropout bit for bit; far offsets."""

from __future__ import annotations

import pytest
import torch
from attention_definition import Sequences, assert_attention_train
from implementations import DEVICE
from test_attention import fused
from test_attention_triton import HALF, SINGLE, far_apart
from torch import Tensor

from bert_fast.kernels import attention as forward
from bert_fast.kernels import attention_backward as backward
from bert_fast.kernels.attention import attention_train
from bert_fast.kernels.attention_backward import attention_backward
from bert_fast.ops._dropout import random_bytes, threshold

SEED = torch.tensor(2**62 + 12345)

#: Longest sequence -> lengths: one kernel for tiles of 64 and of 128 keys, two for what is longer.
LENGTHS = {64: [64, 0, 5], 128: [70, 3, 33], 150: [2, 150, 33]}


@pytest.fixture(params=["a warp", "four warps"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiles of each kind of GPU with matrix units, by what multiplies there."""
    monkeypatch.setattr(forward, "has_matrix_units", lambda device: True)
    monkeypatch.setattr(backward, "has_warpgroup_products", lambda device: request.param == "four warps")
    kind: str = request.param
    return kind


def train(grad: Tensor, qkv: list[Tensor], sequences: Sequences, schedule: Tensor | None = None) -> tuple[Tensor, ...]:
    """(out, lse, dq, dk, dv)."""
    arguments = (*sequences[:5], None, schedule, sequences.seed)
    out, lse = attention_train(*qkv, *arguments)
    return (out, lse, *attention_backward(grad, *qkv, out, lse, *arguments))


@pytest.mark.parametrize(("head_dim", "max_seqlen"), [(16, 64), (16, 128), (16, 150), (72, 64), (72, 150), (256, 128)])
def test_tiles(products: str, head_dim: int, max_seqlen: int) -> None:
    lengths = LENGTHS[max_seqlen]
    qkv, grad = fused(HALF, sum(lengths), 1, head_dim), HALF.randn(sum(lengths), 1, head_dim)
    sequences = Sequences(HALF.cu_seqlens(lengths), max_seqlen, None, head_dim**-0.5, 0.1, SEED)
    fast = train(grad, qkv, sequences)
    assert_attention_train(fast, grad, *qkv, sequences)
    schedule = forward.schedule(qkv[0], sequences.cu_seqlens, max_seqlen)
    if schedule is not None:
        scheduled = train(grad, qkv, sequences, schedule)
        assert all(torch.equal(a, b) for a, b in zip(fast, scheduled, strict=True))


@pytest.mark.parametrize("max_seqlen", [20, 100, 150])
def test_tiles_with_a_mask(products: str, max_seqlen: int) -> None:
    mask = torch.rand(2, max_seqlen, device=DEVICE) < 0.5
    mask[0, :-1], mask[0, -1] = False, True  # only the last token is seen
    tensors = [*fused(HALF, *mask.shape, 1, 16), HALF.randn(*mask.shape, 1, 16)]
    for tensor in tensors:
        tensor[~mask] = float("nan")
    *qkv, grad = (t.masked_fill(~mask[..., None, None], 0.0) for t in tensors)
    sequences = Sequences(None, max_seqlen, mask, -0.25, 0.2, SEED)
    fast = train(tensors[3], tensors[:3], sequences)
    assert_attention_train(fast, grad, *qkv, sequences)
    assert not any(t[~mask].any() for t in fast)


@pytest.mark.parametrize("max_seqlen", [40, 150])
def test_dropout_bit_for_bit(products: str, max_seqlen: int) -> None:
    """Identity matrices show where zeros are: in the forward, in the gradient of values, in that of queries."""
    lengths, n = [3, 40, 17], 64
    tokens, identity = sum(lengths), torch.zeros(sum(lengths), 2, n)
    for sequence in identity.split(lengths):
        sequence[:] = torch.eye(n)[: len(sequence), None]
    identity, flat, ones = (
        t.to(DEVICE).half() for t in (identity, torch.zeros(tokens, 2, n), torch.ones(tokens, 2, n))
    )
    arguments = (HALF.cu_seqlens(lengths), max_seqlen, None, 1.0, 0.3, None, None, SEED)
    out, lse = attention_train(flat, flat, identity, *arguments)
    _, _, dv = attention_backward(identity, flat, flat, flat, out, lse, *arguments)
    dq, _, _ = attention_backward(ones, flat, identity, ones, flat, lse, *arguments)  # delta is 0, as out is
    rows = torch.arange(tokens)
    for head in range(2):
        keep = random_bytes(SEED, rows, n, head) >= threshold(0.3)
        for begin, length in zip(arguments[0].tolist(), lengths, strict=False):
            expected = keep[begin : begin + length, :length]
            for name, weights in (("out", out), ("dq", dq), ("dv", dv)):
                square = weights[begin : begin + length, head, :length].cpu()
                assert torch.equal((square.mT if name == "dv" else square) != 0, expected), name


def test_the_same_bits_every_time(products: str) -> None:
    qkv, grad = fused(HALF, 40, 2, 16), HALF.randn(40, 2, 16)
    sequences = Sequences(HALF.cu_seqlens([40]), 150, None, 0.25, 0.1, SEED)
    first, second = (train(grad, qkv, sequences) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("max_seqlen", [3, 150])
@pytest.mark.parametrize("lengths", [[3], [2, 1]], ids=["in a sequence", "where a sequence starts"])
def test_offsets_past_32_bits(products: str, lengths: list[int], max_seqlen: int) -> None:
    far = far_apart(3)
    sequences = Sequences(HALF.cu_seqlens(lengths), max_seqlen, None, 0.25, 0.0)
    assert_attention_train(train(far, [far, far, far], sequences), *(far,) * 4, sequences)


def test_padded_is_ragged_of_one_length() -> None:
    qkv, grad = fused(SINGLE, 2, 20, 1, 8), SINGLE.randn(2, 20, 1, 8)
    sequences = Sequences(None, 20, None, 0.3, 0.5, SEED)
    padded = train(grad, qkv, sequences)
    packed = sequences._replace(cu_seqlens=SINGLE.cu_seqlens([20, 20]))
    flat = train(grad.flatten(0, 1), [t.flatten(0, 1) for t in qkv], packed)
    assert all(torch.equal(a.flatten(0, 1), b) for a, b in zip(padded, flat, strict=True))
