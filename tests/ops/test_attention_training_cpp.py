"""attention in training, C++: forward with dropout, lse and gradients against the truth, laws, odd inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attention_definition import Sequences, assert_attention_train, check, train
from implementations import Implementation, parameters
from layouts import LAYOUTS
from test_attention import RAGGED, fused, masks
from torch import Tensor


def has_own_kernels(implementation: Implementation) -> bool:
    """avx512_vnni trains with avx512's kernels, and avx512_bf16 has others in bfloat16 only."""
    isa, is_float = implementation.isa, implementation.dtype == torch.float32
    return implementation.name == "cpp" and isa != "avx512_vnni" and not (isa == "avx512_bf16" and is_float)


pytestmark = pytest.mark.parametrize(
    "implementation", [p for p in parameters() if has_own_kernels(p.values[0])], indirect=True
)

SEED = torch.tensor(-(2**40) - 7)  # both words of the key

# Beyond those of the forward: blocks of 56 queries, whose gradients of keys add up, drawn 16 at a time.
LENGTHS = {
    **RAGGED,
    "as many queries as a block, one more, two blocks and one more": ([56, 57, 113], 1, 8),
    "an odd number of keys and of channels": ([33], 2, 7),
}


def ragged(implementation: Implementation, lengths: list[int], scale: float, dropout_p: float) -> Sequences:
    return Sequences(implementation.cu_seqlens(lengths), max(lengths), None, scale, dropout_p, seed_of(dropout_p))


def seed_of(dropout_p: float) -> Tensor | None:
    return SEED if dropout_p > 0 else None


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(("lengths", "heads", "head_dim"), LENGTHS.values(), ids=LENGTHS.keys())
def test_ragged(
    implementation: Implementation, lengths: list[int], heads: int, head_dim: int, dropout_p: float
) -> None:
    sequences = ragged(implementation, lengths, head_dim**-0.5, dropout_p)
    check(implementation, fused(implementation, sum(lengths), heads, head_dim), sequences)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("masked", [False, True])
def test_padded(implementation: Implementation, masked: bool, dropout_p: float) -> None:
    mask = masks(implementation)
    sequences = Sequences(None, 40, mask if masked else None, 0.25, dropout_p, seed_of(dropout_p))
    fast = check(implementation, fused(implementation, len(mask), 40, 2, 16), sequences)
    if masked:
        assert not any(t[~mask].any() for t in fast)


def test_all_is_dropped(implementation: Implementation) -> None:
    fast = check(implementation, fused(implementation, 20, 2, 8), ragged(implementation, [3, 17], 0.3, 1.0))
    assert not any(t.any() for t in (fast[0], *fast[2:]))


def test_without_dropout_it_is_the_forward_for_inference(implementation: Implementation) -> None:
    qkv, sequences = fused(implementation, 70, 2, 32), ragged(implementation, [70], 0.2, 0.0)
    out, _ = implementation("attention_train", *qkv, *sequences.arguments)
    expected = implementation("attention", *qkv, *sequences[:5])
    tolerance = 0 if implementation.dtype == torch.float32 else 2**-7  # for bfloat16 inference has rough powers of 2
    torch.testing.assert_close(out, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_any_scale(implementation: Implementation, scale: float) -> None:
    check(implementation, fused(implementation, 23, 1, 8), ragged(implementation, [23], scale, 0.1))


def test_scores_past_the_range_of_exp(implementation: Implementation) -> None:
    q, k, v = fused(implementation, 70, 1, 16)
    check(implementation, [q * 10, k * 10, v], ragged(implementation, [70], 1.0, 0.0))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    grad, *qkv = (layout(implementation.randn(10, 2, 12)) for _ in range(4))
    sequences = ragged(implementation, [3, 7], 0.3, 0.1)
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
    assert base.shape == (*shape[:-2], 3, *shape[-2:])
    assert base.is_contiguous()
    for index, grad in enumerate(grads):
        assert grad._base is base
        assert grad.data_ptr() == base.select(-3, index).data_ptr()
        assert grad.stride() == base.select(-3, index).stride()


def test_no_sequences(implementation: Implementation) -> None:
    qkv, sequences = fused(implementation, 0, 2, 8), Sequences(implementation.cu_seqlens([]), 0, None, 1.0)
    assert [t.numel() for t in train(implementation, qkv[0], qkv, sequences)] == [0] * 5


def test_the_same_bits_on_any_number_of_threads(implementation: Implementation) -> None:
    lengths = [130, 1, 70, 0, 90]
    qkv, grad = fused(implementation, sum(lengths), 3, 32), implementation.randn(sum(lengths), 3, 32)
    sequences = ragged(implementation, lengths, 0.2, 0.1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(train(implementation, grad, qkv, sequences))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_sequence_has_the_mask_of_its_place(implementation: Implementation) -> None:
    lengths = [20, 35, 9]
    qkv, grad = fused(implementation, 64, 2, 16), implementation.randn(64, 2, 16)
    together = train(implementation, grad, qkv, ragged(implementation, lengths, 0.3, 0.2))
    # The same tokens with the same numbers, padded: a row of 64 of which the middle is seen.
    mask = implementation.tensor([[20 <= i < 55 for i in range(64)]], torch.bool)
    sequences = Sequences(None, 64, mask, 0.3, 0.2, SEED)
    alone = train(implementation, grad[None], [t[None] for t in qkv], sequences)
    # Its keys have other columns there, so only the statistics before dropout are the same.
    assert torch.equal(alone[1][0, 20:55], together[1][20:55])
    assert not torch.equal(alone[0][0, 20:55], together[0][20:55])


def test_nan_stays_in_its_sequence_and_head(implementation: Implementation) -> None:
    tensors = [*fused(implementation, 60, 2, 16), implementation.randn(60, 2, 16)]
    sequences = ragged(implementation, [10, 33, 17], 0.25, 0.1)
    clean = train(implementation, tensors[3], tensors[:3], sequences)
    for tensor in tensors:
        tensor[20, 1, 3] = float("nan")
    poisoned = train(implementation, tensors[3], tensors[:3], sequences)
    for got, expected in zip(poisoned, clean, strict=True):
        assert got[20, 1].isnan().any()
        got[10:43, 1] = expected[10:43, 1]
        assert torch.equal(got, expected)


def test_nan_in_a_hidden_token_is_not_seen(implementation: Implementation) -> None:
    mask = masks(implementation)
    tensors = [*fused(implementation, len(mask), 40, 2, 16), implementation.randn(len(mask), 40, 2, 16)]
    sequences = Sequences(None, 40, mask, 0.25, 0.1, SEED)
    clean = train(implementation, tensors[3], tensors[:3], sequences)
    for tensor in tensors:
        tensor[~mask] = float("nan")
    poisoned = train(implementation, tensors[3], tensors[:3], sequences)
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))
