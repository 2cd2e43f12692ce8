"""attention: forward against the truth, laws, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import DEVICE, FORCEABLE, Implementation
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients, assert_no_worse
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.attention import reference

# lengths, heads, head_dim. Triton's tiles under the interpreter are 32 x 32, 16 x 16 past a head_dim of 128.
RAGGED = {
    "one token, one channel": ([1], 1, 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 2, 16),
    "only empty sequences": ([0, 0], 2, 16),
    "one token less, as many, and one more than a tile": ([31, 32, 33], 1, 16),
    "several tiles of keys, the last one full": ([96], 1, 32),
    "MiniLM's heads": ([7, 40], 12, 32),
    "BERT's head_dim": ([20, 3], 2, 64),
    "head_dim below the smallest tile": ([9, 2], 3, 5),
    "head_dim no power of two": ([35], 2, 24),
    "head_dim one past a power of two": ([17], 1, 65),
    "head_dim 256, the largest of Triton's": ([18, 2], 1, 256),
}

# Which tokens of 40 there are.
MASKS = {
    "all": lambda i: i >= 0,
    "right padding": lambda i: i < 33,
    "left padding": lambda i: i >= 35,  # the first tile of keys is all hidden
    "holes": lambda i: i % 3 != 1,
    "one token": lambda i: i == 38,
    "none": lambda i: i < 0,
}


def fused(implementation: Implementation, *shape: int) -> list[Tensor]:
    """q, k, v as one projection gives them: views of a (..., 3, heads, head_dim) tensor, for a shape without the 3."""
    return list(implementation.randn(*shape[:-2], 3, *shape[-2:]).unbind(-3))


def masks(implementation: Implementation) -> Tensor:
    """(len(MASKS), 40) bool."""
    return torch.stack([keep(torch.arange(40)) for keep in MASKS.values()]).to(implementation.device)


@pytest.mark.parametrize(("lengths", "heads", "head_dim"), RAGGED.values(), ids=RAGGED.keys())
def test_ragged(implementation: Implementation, lengths: list[int], heads: int, head_dim: int) -> None:
    q, k, v = fused(implementation, sum(lengths), heads, head_dim)
    args = (q, k, v, implementation.cu_seqlens(lengths), max(lengths), None, head_dim**-0.5, 0.0)
    assert_forward(partial(implementation, "attention"), reference, *args)


@pytest.mark.parametrize(("lengths", "heads", "head_dim"), RAGGED.values(), ids=RAGGED.keys())
def test_padded(implementation: Implementation, lengths: list[int], heads: int, head_dim: int) -> None:
    q, k, v = fused(implementation, 2, max(lengths), heads, head_dim)
    args = (q, k, v, None, max(lengths), None, head_dim**-0.5, 0.0)
    assert_forward(partial(implementation, "attention"), reference, *args)


def test_masks(implementation: Implementation) -> None:
    mask = masks(implementation)
    q, k, v = fused(implementation, len(mask), 40, 2, 16)
    args = (q, k, v, None, 40, mask, 0.25, 0.0)
    out = assert_forward(partial(implementation, "attention"), reference, *args)
    assert not out[~mask].any()


def test_mask_of_any_strides(implementation: Implementation) -> None:
    mask = masks(implementation)
    q, k, v = fused(implementation, len(mask), 40, 1, 8)
    expected = implementation("attention", q, k, v, None, 40, mask, 0.25, 0.0)
    transposed = mask.T.contiguous().T
    assert torch.equal(implementation("attention", q, k, v, None, 40, transposed, 0.25, 0.0), expected)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
@pytest.mark.parametrize("masked", [False, True])
def test_any_scale(implementation: Implementation, scale: float, masked: bool) -> None:
    mask = masks(implementation) if masked else None
    q, k, v = fused(implementation, len(MASKS), 40, 1, 8)
    assert_forward(partial(implementation, "attention"), reference, q, k, v, None, 40, mask, scale, 0.0)


def test_scores_past_the_range_of_exp(implementation: Implementation) -> None:
    # Scores of about 10^3: without subtracting the maximum, and a new one per tile, exp overflows.
    q, k, v = fused(implementation, 70, 1, 16)
    args = (q * 10, k * 10, v, implementation.cu_seqlens([70]), 70, None, 1.0, 0.0)
    assert_forward(partial(implementation, "attention"), reference, *args)


def test_nan_stays_in_its_sequence(implementation: Implementation) -> None:
    tensors, cu_seqlens = fused(implementation, 60, 2, 16), implementation.cu_seqlens([10, 33, 17])
    clean = implementation("attention", *tensors, cu_seqlens, 33, None, 0.25, 0.0)
    for tensor in tensors:
        tensor[20, 1, 3] = float("nan")  # a token of the middle sequence, one head
    out = implementation("attention", *tensors, cu_seqlens, 33, None, 0.25, 0.0)
    assert out[10:43, 1].isnan().any(-1).all()  # as every query of that head sees the key
    out[10:43, 1] = clean[10:43, 1]
    assert torch.equal(out, clean)


def test_nan_in_a_hidden_token_is_not_seen(implementation: Implementation) -> None:
    mask = masks(implementation)
    tensors = fused(implementation, len(mask), 40, 2, 16)
    clean = implementation("attention", *tensors, None, 40, mask, 0.25, 0.0)
    for tensor in tensors:
        tensor[~mask] = float("nan")
    assert torch.equal(implementation("attention", *tensors, None, 40, mask, 0.25, 0.0), clean)


@pytest.mark.parametrize("shape", [(0, 2, 8), (4, 0, 8), (4, 2, 0)], ids=str)
def test_zero_size_ragged(implementation: Implementation, shape: tuple[int, ...]) -> None:
    cu_seqlens = implementation.cu_seqlens([shape[0]])
    out = implementation("attention", *fused(implementation, *shape), cu_seqlens, shape[0], None, 1.0, 0.0)
    assert out.shape == shape
    assert out.dtype == implementation.dtype


def test_no_sequences(implementation: Implementation) -> None:
    q, k, v = fused(implementation, 0, 2, 8)
    assert implementation("attention", q, k, v, implementation.cu_seqlens([]), 0, None, 1.0, 0.0).shape == (0, 2, 8)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (3, 0, 2, 8), (3, 4, 0, 8), (3, 4, 2, 0)], ids=str)
def test_zero_size_padded(implementation: Implementation, shape: tuple[int, ...], masked: bool) -> None:
    mask = torch.ones(shape[:2], dtype=torch.bool, device=implementation.device) if masked else None
    out = implementation("attention", *fused(implementation, *shape), None, shape[1], mask, 1.0, 0.0)
    assert out.shape == shape
    assert out.dtype == implementation.dtype


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    run = partial(implementation, "attention")
    q, k, v = (layout(implementation.randn(10, 2, 12)) for _ in range(3))
    assert_forward(run, reference, q, k, v, layout(implementation.cu_seqlens([3, 7])), 7, None, 0.3, 0.0)
    q, k, v = (layout(implementation.randn(2, 5, 2, 12)) for _ in range(3))
    assert_forward(run, reference, q, k, v, None, 5, None, 0.3, 0.0)


def test_heads_before_tokens_and_a_slice_of_a_longer_batch(implementation: Implementation) -> None:
    q, k = implementation.randn(2, 3, 9, 8).transpose(1, 2), implementation.randn(2, 20, 3, 8)[:, 4:13]
    v = implementation.randn(9, 3, 8).expand(2, 9, 3, 8)
    assert_forward(partial(implementation, "attention"), reference, q, k, v, None, 9, None, 0.3, 0.0)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_sequences_do_not_know_of_each_other(
    implementation: Implementation, lengths: list[int], random: Random
) -> None:
    def attend(sequences: list[list[Tensor]]) -> list[Tensor]:
        """Outputs of the sequences, each [q, k, v], in one call."""
        sizes = [len(q) for q, _, _ in sequences]
        q, k, v = (torch.cat(tensors) for tensors in zip(*sequences, strict=True))
        out = implementation("attention", q, k, v, implementation.cu_seqlens(sizes), 50, None, 0.3, 0.0)
        return list(out.split(sizes))

    sequences = [fused(implementation, n, 2, 12) for n in lengths]
    together = attend(sequences)
    order = random.sample(range(len(lengths)), len(lengths))
    permuted = attend([sequences[i] for i in order])
    for index, sequence in enumerate(sequences):
        assert torch.equal(together[index], attend([sequence])[0])
        assert torch.equal(together[index], permuted[order.index(index)])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(1, 4), st.integers(1, 45), st.floats(0, 1))
def test_padded_is_ragged_packed(implementation: Implementation, batch_size: int, seq_len: int, kept: float) -> None:
    mask = (torch.rand(batch_size, seq_len) < kept).to(implementation.device)
    q, k, v = fused(implementation, batch_size, seq_len, 2, 12)
    padded = implementation("attention", q, k, v, None, seq_len, mask, 0.3, 0.0)
    packed, lengths = [t[mask] for t in (q, k, v)], mask.sum(1).tolist()
    args = (implementation.cu_seqlens(lengths), max(lengths), None, 0.3, 0.0)
    assert_no_worse(padded[mask], reference(*packed, *args), reference(*(t.double() for t in packed), *args))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients_ragged(impl: str, dtype: torch.dtype) -> None:
    case = Implementation("any", dtype, DEVICE)
    cu_seqlens = case.cu_seqlens([7, 0, 12])
    assert_gradients(
        lambda *qkv: ops.attention(*qkv, cu_seqlens=cu_seqlens, scale=0.3, impl=impl),
        lambda *qkv: reference(*qkv, cu_seqlens, 12, None, 0.3, 0.0),
        *fused(case, 19, 2, 12),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients_masked(impl: str, dtype: torch.dtype) -> None:
    case = Implementation("any", dtype, DEVICE)
    mask = masks(case)
    assert_gradients(
        lambda *qkv: ops.attention(*qkv, attention_mask=mask, scale=0.3, impl=impl),
        lambda *qkv: reference(*qkv, None, 40, mask, 0.3, 0.0),
        *fused(case, len(mask), 40, 2, 12),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_bias_and_its_gradient(padded: bool) -> None:
    case = Implementation("any", torch.float32, DEVICE)
    qkv = [t.to(case.device) for t in fused(case, *((2, 9) if padded else (16,)), 2, 12)]
    options = {"attention_mask": masks(case)[:2, :9]} if padded else {"cu_seqlens": case.cu_seqlens([9, 0, 7])}
    given = (options.get("cu_seqlens"), 9, options.get("attention_mask"), 0.3, 0.0)
    assert_gradients(
        lambda *leaves: ops.attention(*leaves[:3], **options, scale=0.3, bias=leaves[3]),
        lambda *leaves: reference(*leaves[:3], *given, leaves[3]),
        *qkv,
        case.randn(2, 11, 9),
    )


def test_definition_of_bias_is_pytorchs() -> None:
    q, k, v = fused(Implementation("any", torch.float64), 2, 5, 3, 8)
    bias = torch.randn(3, 5, 5, dtype=torch.float64)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=bias).transpose(1, 2)
    torch.testing.assert_close(reference(q, k, v, None, 5, None, 8**-0.5, 0.0, bias), expected)


def test_cpp_refuses_a_bias() -> None:
    with pytest.raises(ValueError, match="attention: cpp is forced but has no bias"):
        ops.attention(*(PADDED,) * 3, bias=torch.ones(1, 3, 3), impl="cpp")


def test_no_schedule_on_the_cpu() -> None:
    assert ops.attention_schedule(PACKED, OFFSETS, 4) is None


@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients_do_not_see_nan_in_a_hidden_token(impl: str) -> None:
    case = Implementation("any", torch.float32, DEVICE)
    mask, upstream = masks(case), case.randn(len(MASKS), 40, 1, 8)
    qkv = fused(case, *upstream.shape)

    def gradients(*leaves: Tensor) -> tuple[Tensor, ...]:
        out = ops.attention(*(t.requires_grad_() for t in leaves), attention_mask=mask, impl=impl)
        return torch.autograd.grad(out, leaves, upstream)

    clean = gradients(*(t.clone() for t in qkv))
    poisoned = gradients(*(t.masked_fill(~mask[..., None, None], float("nan")) for t in qkv))
    for got, expected in zip(poisoned, clean, strict=True):
        assert torch.equal(got, expected)
        assert not got[~mask].any()


@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_the_definition(masked: bool) -> None:
    qkv = [t.requires_grad_() for t in fused(Implementation("any", torch.float64), 3, 4, 1, 3)]
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]], dtype=torch.bool) if masked else None
    assert torch.autograd.gradcheck(lambda *qkv: reference(*qkv, None, 4, mask, 0.5, 0.0), qkv)


def test_definition_is_pytorchs_attention() -> None:
    q, k, v = fused(Implementation("any", torch.float64), 2, 5, 3, 8)
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    torch.testing.assert_close(reference(q, k, v, None, 5, None, 8**-0.5, 0.0), expected)


def test_defaults_of_scale_and_max_seqlen() -> None:
    q, k, v = fused(Implementation("any", torch.float32), 9, 2, 16)
    cu_seqlens = torch.tensor([0, 2, 9], dtype=torch.int32)
    out = ops.attention(q, k, v, cu_seqlens=cu_seqlens)
    assert torch.equal(out, ops.attention(q, k, v, cu_seqlens=cu_seqlens, max_seqlen=7, scale=0.25))


PADDED, PACKED, OFFSETS = torch.ones(2, 3, 1, 4), torch.ones(6, 1, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
KEEP = torch.ones(2, 3, dtype=torch.bool)
META_KEEP, META_OFFSETS = KEEP.to("meta"), OFFSETS.to("meta")
REFUSED: dict[str, tuple[tuple[Tensor, ...], dict[str, Any], str]] = {
    "integers": ((PADDED.int(),) * 3, {}, "q is torch.int32"),
    "k's shape": ((PADDED, PADDED[:1], PADDED), {}, r"k has shape \(1, 3, 1, 4\), expected \(2, 3, 1, 4\)"),
    "v's shape": ((PADDED, PADDED, PADDED[..., :3]), {}, r"v has shape \(2, 3, 1, 3\), expected \(2, 3, 1, 4\)"),
    "dtypes": ((PADDED, PADDED, PADDED.half()), {}, "v is torch.float16 but q is torch.float32"),
    "devices": ((PADDED, PADDED.to("meta"), PADDED), {}, "k is on meta but q is on cpu"),
    "padded, three dimensions": ((PACKED,) * 3, {}, r"q has shape \(6, 1, 4\), expected \(batch_size, seq_len"),
    "ragged, four dimensions": ((PADDED,) * 3, {"cu_seqlens": OFFSETS}, r"q has shape \(2, 3, 1, 4\), expected \(num_"),
    "mask and offsets": (
        (PACKED,) * 3,
        {"cu_seqlens": OFFSETS, "attention_mask": KEEP},
        "attention_mask and cu_seqlens are both given",
    ),
    "mask's shape": (
        (PADDED,) * 3,
        {"attention_mask": KEEP.T},
        r"attention_mask has shape \(3, 2\), expected \(2, 3\)",
    ),
    "mask's dtype": ((PADDED,) * 3, {"attention_mask": KEEP.long()}, "attention_mask is torch.int64, expected bool"),
    "mask's device": ((PADDED,) * 3, {"attention_mask": META_KEEP}, "attention_mask is on meta but q is on cpu"),
    "offsets' dtype": ((PACKED,) * 3, {"cu_seqlens": OFFSETS.long()}, "cu_seqlens is torch.int64"),
    "offsets' device": (
        (PACKED,) * 3,
        {"cu_seqlens": META_OFFSETS, "max_seqlen": 4},
        "cu_seqlens is on meta but its rows are on cpu",
    ),
    "bias's shape": ((PADDED,) * 3, {"bias": torch.ones(2, 3, 3)}, r"bias has shape \(2, 3, 3\), expected \(1, >= 3"),
    "short bias": ((PADDED,) * 3, {"bias": torch.ones(1, 3, 2)}, r"bias has shape \(1, 3, 2\), expected \(1, >= 3"),
    "bias's dtype": ((PADDED,) * 3, {"bias": torch.ones(1, 3, 3).half()}, "bias is torch.float16 but q is"),
    "schedule's shape": (
        (PACKED,) * 3,
        {"cu_seqlens": OFFSETS, "schedule": OFFSETS},
        r"schedule is torch.int32 of shape \(3,\)",
    ),
    "schedule's device": (
        (PACKED,) * 3,
        {"cu_seqlens": OFFSETS, "schedule": torch.zeros(3, 2, dtype=torch.int32, device="meta")},
        "schedule is on meta but q is on cpu",
    ),
    "schedule, padded": (
        (PADDED,) * 3,
        {"schedule": torch.zeros(3, 2, dtype=torch.int32)},
        "schedule is given without cu_seqlens",
    ),
    "impossible dropout": ((PADDED,) * 3, {"dropout_p": -0.5}, "dropout_p is -0.5"),
}


@pytest.mark.parametrize(("qkv", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(qkv: tuple[Tensor, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"attention: {match}"):
        ops.attention(*qkv, **options)


LIES = {
    "start": ([1, 6], "runs from 1 to 6, expected 0 to 6"),
    "end": ([0, 7], "runs from 0 to 7, expected 0 to 6"),
    "order": ([0, 4, 3, 6], "falls from 4 to 3 at index 2"),
}


@pytest.mark.parametrize(("offsets", "match"), LIES.values(), ids=LIES.keys())
def test_definition_refuses_offsets_that_do_not_fit(offsets: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=f"attention: cu_seqlens {match}"):
        ops.attention(*(PACKED,) * 3, cu_seqlens=torch.tensor(offsets, dtype=torch.int32), impl="reference")
