"""attention in training, Triton: forward with dropout, lse and gradients against the truth, laws, odd inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_definition import Sequences, assert_attention_train, attention_train, check, train
from implementations import Implementation, parameters
from layouts import LAYOUTS
from test_attention import fused, masks
from torch import Tensor

pytestmark = pytest.mark.parametrize(
    "implementation", [p for p in parameters() if p.values[0].name == "triton"], indirect=True
)

SEED = torch.tensor(-(2**40) - 7)  # both words of the key

# lengths, heads, head_dim. Tiles under the interpreter are of 32 rows, 64 at a head_dim of 64, that meet 16 at once.
LENGTHS = {
    "one token, one channel": ([1], 1, 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 2, 16),
    "one token less, as many, and one more than a tile": ([31, 32, 33], 1, 16),
    "several tiles of keys and of queries": ([70], 1, 8),
    "BERT's head_dim": ([20, 1, 3], 2, 64),
    "head_dim no power of two, below and above": ([17, 2], 2, 24),
    "head_dim 256, the largest": ([18], 1, 256),
}


def ragged(implementation: Implementation, lengths: list[int], scale: float, dropout_p: float) -> Sequences:
    seed = SEED if dropout_p > 0 else None
    return Sequences(implementation.cu_seqlens(lengths), max(lengths), None, scale, dropout_p, seed)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("lengths", "heads", "head_dim"), LENGTHS.values(), ids=LENGTHS.keys())
def test_ragged(
    implementation: Implementation, lengths: list[int], heads: int, head_dim: int, dropout_p: float
) -> None:
    sequences = ragged(implementation, lengths, head_dim**-0.5, dropout_p)
    check(implementation, fused(implementation, sum(lengths), heads, head_dim), sequences)


def test_padded(implementation: Implementation) -> None:
    check(implementation, fused(implementation, 2, 35, 2, 16), Sequences(None, 35, None, 0.25, 0.3, SEED))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_masks(implementation: Implementation, dropout_p: float) -> None:
    mask = masks(implementation)
    sequences = Sequences(None, 40, mask, 0.25, dropout_p, SEED if dropout_p else None)
    fast = check(implementation, fused(implementation, len(mask), 40, 1, 16), sequences)
    assert not any(t[~mask].any() for t in fast)


def test_all_is_dropped(implementation: Implementation) -> None:
    fast = check(implementation, fused(implementation, 20, 2, 8), ragged(implementation, [3, 17], 0.3, 1.0))
    assert not any(t.any() for t in (fast[0], *fast[2:]))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_any_scale(implementation: Implementation, scale: float) -> None:
    check(implementation, fused(implementation, 23, 1, 8), ragged(implementation, [23], scale, 0.1))


def test_scores_past_the_range_of_exp(implementation: Implementation) -> None:
    # Most probabilities are 0 or 1. Their gradients vanish as differences of equal numbers, up to 50, with errors of
    # these: a score of 10^3 has one of 10^-4, and so has what it is the exponent of.
    q, k, v = fused(implementation, 40, 1, 16)
    qkv, grad, sequences = [q * 10, k * 10, v], implementation.randn(40, 1, 16), ragged(implementation, [40], 1.0, 0.0)
    fast = train(implementation, grad, qkv, sequences)
    leaves = [t.double().requires_grad_() for t in qkv]
    out, lse = attention_train(leaves[0], leaves[1], leaves[2], sequences)
    expected = (out, lse, *torch.autograd.grad(out, leaves, grad.double()))
    for got, truth in zip(fast, expected, strict=True):
        assert (got.double() - truth).abs().max() <= 0.1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    grad, *qkv = (layout(implementation.randn(30, 2, 12)) for _ in range(4))
    sequences = ragged(implementation, [3, 27], 0.3, 0.1)
    out, lse = implementation("attention_train", *qkv, *sequences.arguments)
    grads = implementation("attention_backward", grad, *qkv, layout(out), layout(lse), *sequences.arguments)
    assert_attention_train((out, lse, *grads), grad, *qkv, sequences)


@pytest.mark.parametrize("shape", [(5, 2, 8), (2, 5, 2, 8), (0, 2, 8), (5, 0, 8), (5, 2, 0), (0, 5, 2, 8)], ids=str)
def test_gradients_are_views_of_one_tensor(implementation: Implementation, shape: tuple[int, ...]) -> None:
    qkv = fused(implementation, *shape)
    offsets = implementation.cu_seqlens([shape[0]]) if len(shape) == 3 else None
    sequences = Sequences(offsets, shape[-3], None, 1.0, 0.1, SEED)
    out, lse, *grads = train(implementation, torch.ones_like(qkv[0]), qkv, sequences)
    assert out.shape == shape
    assert (lse.shape, lse.dtype) == (shape[:-1], torch.float32)
    base = grads[0]._base
    assert base is not None
    assert (base.shape, base.dtype) == ((*shape[:-2], 3, *shape[-2:]), qkv[0].dtype)
    assert base.is_contiguous()
    for index, grad in enumerate(grads):
        assert grad._base is base
        part = base.select(-3, index)
        assert (grad.shape, grad.stride(), grad.storage_offset()) == (shape, part.stride(), part.storage_offset())


@pytest.mark.parametrize("lengths", [[], [0, 0], [3, 4]], ids=["no sequence", "empty ones", "fewer tokens than rows"])
def test_rows_past_the_last_sequence(implementation: Implementation, lengths: list[int]) -> None:
    rows, tokens = 60, sum(lengths)  # each program that clears takes more than a row
    tensors = [*fused(implementation, rows, 2, 80), implementation.randn(rows, 2, 80)]
    for tensor in tensors:
        tensor[tokens:] = float("nan")
    sequences = Sequences(implementation.cu_seqlens(lengths), max(lengths, default=0), None, 0.1, 0.1, SEED)
    fast = train(implementation, tensors[3], tensors[:3], sequences)
    assert not any(t[tokens:].any() for t in fast[2:])
    if tokens:
        *qkv, grad = (t[:tokens] for t in tensors)
        assert_attention_train(tuple(t[:tokens] for t in fast), grad, *qkv, sequences)


def test_nan_stays_in_its_sequence_and_head(implementation: Implementation) -> None:
    tensors = [*fused(implementation, 40, 2, 16), implementation.randn(40, 2, 16)]
    sequences = ragged(implementation, [10, 18, 12], 0.25, 0.1)
    clean = train(implementation, tensors[3], tensors[:3], sequences)
    for tensor in tensors:
        tensor[20, 1, 3] = float("nan")
    poisoned = train(implementation, tensors[3], tensors[:3], sequences)
    for got, expected in zip(poisoned, clean, strict=True):
        assert got[20, 1].isnan().any()
        got[10:28, 1] = expected[10:28, 1]
        assert torch.equal(got, expected)


def test_nan_in_a_hidden_token_is_not_seen(implementation: Implementation) -> None:
    mask = masks(implementation)[1:4]  # padding on either side, and holes
    tensors = [*fused(implementation, len(mask), 40, 1, 16), implementation.randn(len(mask), 40, 1, 16)]
    sequences = Sequences(None, 40, mask, 0.25, 0.0)
    clean = train(implementation, tensors[3], tensors[:3], sequences)
    for tensor in tensors:
        tensor[~mask] = float("nan")
    poisoned = train(implementation, tensors[3], tensors[:3], sequences)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


def test_nan_in_a_token_is_not_seen_in_hidden_ones(implementation: Implementation) -> None:
    mask = masks(implementation)[3:4]
    tensors = [*fused(implementation, 1, 40, 1, 16), implementation.randn(1, 40, 1, 16)]
    for tensor in tensors:
        tensor[0, 0] = float("nan")
    fast = train(implementation, tensors[3], tensors[:3], Sequences(None, 40, mask, 0.25, 0.1, SEED))
    assert all(t[mask].isnan().any() and not t[~mask].any() for t in fast)


def test_wrong_offsets_are_clamped(implementation: Implementation) -> None:
    grad, *qkv = (implementation.randn(30, 1, 16)[:8] for _ in range(4))  # with memory after them
    wrong = Sequences(implementation.tensor([-7, 3, 70, 90], torch.int32), 70, None, 0.25, 0.1, SEED)
    right = wrong._replace(cu_seqlens=implementation.tensor([0, 3, 8, 8], torch.int32))
    fast, expected = (train(implementation, grad, qkv, sequences) for sequences in (wrong, right))
    assert all(torch.equal(a, b) for a, b in zip(fast, expected, strict=True))


def test_refused(implementation: Implementation) -> None:
    qkv, sequences = fused(implementation, 300, 1, 8), ragged(implementation, [200, 100], 1.0, 0.1)
    out, lse = qkv[0], implementation.randn(300, 1).float()
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 without a seed"):
        implementation("attention_train", *qkv, *sequences._replace(seed=None).arguments)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 without a seed"):
        implementation("attention_backward", out, *qkv, out, lse, *sequences._replace(seed=None).arguments)
    bias, wrong = torch.zeros(1, 200, 200), torch.zeros(3, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"attention_backward: bias has shape \(1, 200, 200\), expected None"):
        implementation("attention_backward", out, *qkv, out, lse, *sequences[:5], bias, None, SEED)
    with pytest.raises(ValueError, match=r"schedule has shape \(3, 1\), expected \(3, \d+\)"):
        implementation("attention_backward", out, *qkv, out, lse, *sequences[:5], None, wrong, SEED)
