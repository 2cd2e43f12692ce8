"""pooling: forward against the truth, laws, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import DEVICE, FORCEABLE, Implementation
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.pooling import MODES, reference

SHAPES = {
    "one token of one channel": ([1], 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 20),
    "only empty sequences": ([0, 0], 20),
    "one token less, as many, and one more than a tile": ([15, 16, 17], 20),
    "several tiles": ([50, 2], 33),
    "MiniLM, several blocks of channels": ([4, 7], 384),
    "channels one past a block": ([3, 2], 129),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), SHAPES.values(), ids=SHAPES.keys())
def test_forward(implementation: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden = implementation.randn(sum(lengths), hidden_size)
    out = assert_forward(
        partial(implementation, "pooling"), reference, hidden, implementation.cu_seqlens(lengths), mode
    )
    assert not out[[n == 0 for n in lengths]].any()


@pytest.mark.parametrize("mode", MODES)
def test_nan_and_infinity_stay_in_their_sequence_and_channel(implementation: Implementation, mode: str) -> None:
    hidden, cu_seqlens = implementation.randn(40, 20), implementation.cu_seqlens([3, 20, 17])
    clean = implementation("pooling", hidden, cu_seqlens, mode)
    hidden[3, 4], hidden[23, 7] = float("nan"), float("inf")  # the first tokens of their sequences
    out = implementation("pooling", hidden, cu_seqlens, mode)
    assert out[1, 4].isnan()
    assert out[2, 7] == float("inf")
    out[1, 4], out[2, 7] = clean[1, 4], clean[2, 7]
    assert torch.equal(out, clean)


def test_max_sees_nan_wherever_it_is_and_infinities(implementation: Implementation) -> None:
    cu_seqlens = implementation.cu_seqlens([20, 20, 20])
    hidden = implementation.randn(60, 20)
    hidden[torch.arange(20), torch.arange(20)] = float("nan")  # channel c of sequence 0: at token c
    hidden[20:40] = -float("inf")
    hidden[45, 3], hidden[50, 3] = -float("inf"), float("inf")
    out = implementation("pooling", hidden, cu_seqlens, "max")
    assert out[0].isnan().all()
    assert (out[1] == -float("inf")).all()
    assert out[2, 3] == float("inf")
    assert torch.equal(out[2], hidden[40:].amax(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), [([], 8), ([3, 2], 0), ([0], 0)], ids=str)
def test_zero_size(implementation: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden = implementation.randn(sum(lengths), hidden_size)
    out = implementation("pooling", hidden, implementation.cu_seqlens(lengths), mode)
    assert out.shape == (len(lengths), hidden_size)
    assert out.dtype == implementation.dtype


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor], mode: str) -> None:
    hidden, cu_seqlens = layout(implementation.randn(10, 36)), layout(implementation.cu_seqlens([3, 0, 7]))
    assert_forward(partial(implementation, "pooling"), reference, hidden, cu_seqlens, mode)


def test_expanded(implementation: Implementation) -> None:
    hidden = implementation.randn(36).expand(10, 36)
    assert_forward(partial(implementation, "pooling"), reference, hidden, implementation.cu_seqlens([3, 7]), "mean")


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0.01, 100))
@pytest.mark.parametrize("mode", ["mean", "weightedmean"])
def test_weights_sum_to_one(implementation: Implementation, mode: str, lengths: list[int], value: float) -> None:
    hidden = implementation.tensor(value).expand(sum(lengths), 5)
    out = implementation("pooling", hidden, implementation.cu_seqlens(lengths), mode)
    # n additions in float32, then one rounding to the dtype.
    rtol = max(lengths) * torch.finfo(torch.float32).eps + torch.finfo(hidden.dtype).eps
    torch.testing.assert_close(out, hidden[: len(lengths)], rtol=rtol, atol=0)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.randoms(use_true_random=False))
@pytest.mark.parametrize("mode", MODES)
def test_sequences_do_not_know_of_each_other(
    implementation: Implementation, mode: str, lengths: list[int], random: Random
) -> None:
    order = random.sample(range(len(lengths)), len(lengths))
    sequences = [implementation.randn(n, 24) for n in lengths]
    out = implementation("pooling", torch.cat(sequences), implementation.cu_seqlens(lengths), mode)
    alone = [implementation("pooling", s, implementation.cu_seqlens([len(s)]), mode) for s in sequences]
    assert torch.equal(out, torch.cat(alone))
    permuted = torch.cat([sequences[i] for i in order])
    cu_seqlens = implementation.cu_seqlens([lengths[i] for i in order])
    assert torch.equal(implementation("pooling", permuted, cu_seqlens, mode), out[order])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype, mode: str) -> None:
    case = Implementation("any", dtype, DEVICE)
    cu_seqlens = case.cu_seqlens([3, 0, 7])
    assert_gradients(
        lambda hidden: ops.pooling(hidden, cu_seqlens, mode=mode, impl=impl),
        lambda hidden: reference(hidden, cu_seqlens, mode),
        case.randn(10, 20),
    )


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_of_the_definition(mode: str) -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda hidden: reference(hidden, cu_seqlens, mode), torch.randn(5, 3).double().requires_grad_()
    )


def test_definition_by_hand() -> None:
    hidden, cu_seqlens = torch.tensor([[1.0], [4.0], [-2.0], [5.0]]), torch.tensor([0, 3, 4], dtype=torch.int32)
    by_hand = {
        "cls": [1.0, 5.0],
        "mean": [1.0, 5.0],
        "max": [4.0, 5.0],
        "mean_sqrt_len_tokens": [3 / 3**0.5, 5.0],
        "weightedmean": [(1 + 8 - 6) / 6, 5.0],
    }
    assert set(by_hand) == set(MODES)
    for mode, expected in by_hand.items():
        torch.testing.assert_close(reference(hidden, cu_seqlens, mode).flatten(), torch.tensor(expected))


HIDDEN, OFFSETS = torch.ones(4, 3), torch.tensor([0, 1, 4], dtype=torch.int32)
REFUSED = {
    "integers": ((HIDDEN.int(), OFFSETS, "mean"), "hidden is torch.int32"),
    "three dimensions": ((HIDDEN[None], OFFSETS, "mean"), r"hidden has shape \(1, 4, 3\)"),
    "int64 offsets": ((HIDDEN, OFFSETS.long(), "mean"), r"cu_seqlens is torch.int64 of shape \(3,\)"),
    "offsets of two dimensions": ((HIDDEN, OFFSETS[None], "mean"), r"cu_seqlens is torch.int32 of shape \(1, 3\)"),
    "no offsets": ((HIDDEN, OFFSETS[:0], "mean"), r"cu_seqlens is torch.int32 of shape \(0,\)"),
    "devices": ((HIDDEN, OFFSETS.to("meta"), "mean"), "cu_seqlens is on meta but its rows are on cpu"),
    "an unknown mode": ((HIDDEN, OFFSETS, "median"), "mode is 'median', expected one of cls, mean, max"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: tuple[Tensor, Tensor, str], match: str) -> None:
    hidden, cu_seqlens, mode = args
    with pytest.raises(ValueError, match=f"pooling: {match}"):
        ops.pooling(hidden, cu_seqlens, mode=mode)


LIES = {
    "start": ([1, 4], "runs from 1 to 4, expected 0 to 4"),
    "end": ([0, 5], "runs from 0 to 5, expected 0 to 4"),
    "order": ([0, 3, 2, 4], "falls from 3 to 2 at index 2"),
}


@pytest.mark.parametrize(("offsets", "match"), LIES.values(), ids=LIES.keys())
def test_definition_refuses_offsets_that_do_not_fit(offsets: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=f"pooling: cu_seqlens {match}"):
        ops.pooling(HIDDEN, torch.tensor(offsets, dtype=torch.int32), impl="reference")


def test_triton_reads_nothing_past_the_tokens() -> None:
    from bert_fast.kernels.pooling import pooling

    triton = Implementation("triton", torch.float32, "cuda" if torch.cuda.is_available() else "cpu")
    hidden = triton.randn(9, 20)[:4]  # 4 tokens, and memory after them
    out = pooling(hidden, triton.tensor([-7, 2, 1, 100, 200], torch.int32), "mean")
    nothing = torch.zeros_like(hidden[0])
    torch.testing.assert_close(out, torch.stack([hidden[:2].mean(0), nothing, hidden[1:].mean(0), nothing]))
