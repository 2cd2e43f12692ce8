"""pooling: the gradient of the kernels against the truth, odd inputs."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_given_gradients

from bert_fast.ops.pooling import MODES, reference


@pytest.fixture(scope="module", params=[p for p in parameters() if p.values[0].name == "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Triton's alone; without this fixture, that of conftest.py, the C++ ones too."""
    return request.param


SHAPES = {
    "one token of one channel": ([1], 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 20),
    "several tiles": ([130, 2], 33),
    "MiniLM, several blocks of channels": ([4, 7], 384),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), SHAPES.values(), ids=SHAPES.keys())
def test_gradient(implementation: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden, grad = implementation.randn(sum(lengths), hidden_size), implementation.randn(len(lengths), hidden_size)
    cu_seqlens = implementation.cu_seqlens(lengths)
    dhidden = implementation("pooling_backward", grad, hidden, cu_seqlens, mode)
    assert dhidden.is_contiguous()
    assert_given_gradients([dhidden], lambda hidden: reference(hidden, cu_seqlens, mode), [hidden], grad)


def test_ties_share_the_gradient_of_the_maximum(implementation: Implementation) -> None:
    """Also where all is minus infinity."""
    hidden = implementation.randn(200, 20).sign()
    hidden[150:] = -float("inf")
    cu_seqlens, grad = implementation.cu_seqlens([150, 50]), implementation.randn(2, 20)
    dhidden = implementation("pooling_backward", grad, hidden, cu_seqlens, "max")
    assert_given_gradients([dhidden], lambda hidden: reference(hidden, cu_seqlens, "max"), [hidden], grad)


@pytest.mark.parametrize("mode", MODES)
def test_nan_stays_in_its_sequence_and_channel(implementation: Implementation, mode: str) -> None:
    hidden, cu_seqlens = implementation.randn(9, 20), implementation.cu_seqlens([3, 4, 2])
    grad = implementation.randn(3, 20)
    hidden[4, 5], grad[2, 7] = float("nan"), float("nan")
    dhidden = implementation("pooling_backward", grad, hidden, cu_seqlens, mode)
    assert_given_gradients([dhidden], lambda hidden: reference(hidden, cu_seqlens, mode), [hidden], grad)
    assert dhidden[7:, 7].isnan().any()
    assert dhidden[3:7, 5].isnan().all() == (mode == "max")


@pytest.mark.parametrize("mode", MODES)
def test_rows_after_the_last_sequence_are_zero(implementation: Implementation, mode: str) -> None:
    hidden, grad, cu_seqlens = implementation.randn(300, 20), implementation.randn(2, 20), [3, 7]
    hidden[10:] = float("nan")
    dhidden = implementation("pooling_backward", grad, hidden, implementation.cu_seqlens(cu_seqlens), mode)
    expected = implementation("pooling_backward", grad, hidden[:10], implementation.cu_seqlens(cu_seqlens), mode)
    assert torch.equal(dhidden[:10], expected)
    assert not dhidden[10:].any()


@pytest.mark.parametrize("mode", MODES)
def test_layouts(implementation: Implementation, mode: str) -> None:
    grad, hidden, cu_seqlens = implementation.randn(2, 36), implementation.randn(10, 36), [3, 7]
    offsets = implementation.cu_seqlens(cu_seqlens)
    expected = implementation("pooling_backward", grad, hidden, offsets, mode)
    for layout in LAYOUTS.values():
        dhidden = implementation("pooling_backward", layout(grad), layout(hidden), layout(offsets), mode)
        assert torch.equal(dhidden, expected)


@pytest.mark.parametrize(("lengths", "hidden_size"), [([], 8), ([3, 2], 0), ([0], 4)], ids=str)
def test_zero_size(implementation: Implementation, lengths: list[int], hidden_size: int) -> None:
    hidden, grad = implementation.randn(sum(lengths), hidden_size), implementation.randn(len(lengths), hidden_size)
    dhidden = implementation("pooling_backward", grad, hidden, implementation.cu_seqlens(lengths), "mean")
    assert (dhidden.shape, dhidden.dtype) == (hidden.shape, hidden.dtype)
