"""cross_entropy_: losses and the gradient in the logits' place, against the truth; odd inputs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation, parameters
from numerics import assert_no_worse
from torch import Tensor


@pytest.fixture(scope="module", params=[p for p in parameters() if p.values[0].name == "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Triton's alone; without this fixture, that of conftest.py, the C++ ones too."""
    return request.param


SHAPES = {
    "one class, whose loss is zero": (3, 1),
    "fewer classes than a vector": (3, 5),
    "as many classes as a block of one warp": (4, 256),
    "one class more": (4, 257),
    "several blocks": (9, 1000),
    "BERT's vocabulary": (4, 30522),
}


def definition(logits: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The losses, and their gradients by the logits."""
    shifted = logits + bias
    onehot = F.one_hot(labels, logits.shape[1]).to(shifted.dtype)
    return F.cross_entropy(shifted, labels, reduction="none"), torch.softmax(shifted, -1) - onehot


def check(implementation: Implementation, logits: Tensor, bias: Tensor, labels: Tensor) -> None:
    """In place, and no worse than the definition: than in float32 for the losses, which are float32."""
    gradient = logits.clone()
    losses = implementation("cross_entropy_", gradient, bias, labels)
    true_losses, true_gradient = definition(logits.double(), bias.double(), labels)
    plain_losses, _ = definition(logits.float(), bias.float(), labels)
    _, plain_gradient = definition(logits, bias.to(logits.dtype), labels)
    assert_no_worse(losses, plain_losses, true_losses, "losses")
    assert_no_worse(gradient, plain_gradient, true_gradient, "gradient")


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_the_truth(implementation: Implementation, shape: tuple[int, int]) -> None:
    labels = torch.randint(shape[1], shape[:1], device=implementation.device)
    labels[0], labels[-1] = 0, shape[1] - 1
    check(implementation, implementation.randn(*shape) * 3, implementation.randn(shape[1]), labels)


def test_float32_bias(implementation: Implementation) -> None:
    bias = torch.randn(300, device=implementation.device)
    bias = bias.to(implementation.dtype).float()  # what plain PyTorch in 16 bits is given is the same
    check(implementation, implementation.randn(4, 300), bias, implementation.tensor([5, 0, 299, 256], torch.int64))


@pytest.mark.parametrize("offset", [-2e4, 2e4])
def test_logits_far_from_zero(implementation: Implementation, offset: float) -> None:
    logits, bias = implementation.randn(4, 300) + offset, torch.zeros(300, device=implementation.device)
    check(implementation, logits, bias, implementation.tensor([5, 0, 299, 256], torch.int64))


def test_rising_and_falling_rows(implementation: Implementation) -> None:
    """The largest logit so far changes in every block, or never."""
    ramp = torch.arange(1000.0, device=implementation.device).to(implementation.dtype) / 10
    logits = torch.stack([ramp, ramp.flip(0), -ramp, torch.zeros_like(ramp)])
    check(implementation, logits, torch.zeros_like(ramp), implementation.tensor([999, 0, 500, 3], torch.int64))


def test_classes_that_are_ruled_out(implementation: Implementation) -> None:
    logits, bias = implementation.randn(3, 600), implementation.randn(600)
    logits[:, 100:500] = -float("inf")
    check(implementation, logits, bias, implementation.tensor([0, 99, 599], torch.int64))


def test_nan_stays_in_its_row(implementation: Implementation) -> None:
    logits, bias = implementation.randn(5, 300), implementation.randn(300)
    labels = implementation.tensor([3, 0, 299, 7, 20], torch.int64)
    clean = logits.clone()
    clean_losses = implementation("cross_entropy_", clean, bias, labels)
    logits[2, 270] = float("nan")
    losses = implementation("cross_entropy_", logits, bias, labels)
    assert losses[2].isnan()
    assert logits[2].isnan().all()
    losses[2], logits[2] = clean_losses[2], clean[2]
    assert torch.equal(losses, clean_losses)
    assert torch.equal(logits, clean)


def test_labels_and_bias_with_strides(implementation: Implementation) -> None:
    logits, bias = implementation.randn(3, 20), implementation.randn(20, 2)[:, 0]
    labels = implementation.tensor([[3, -1], [0, -1], [19, -1]], torch.int64)[:, 0]
    check(implementation, logits, bias, labels)


def test_no_rows(implementation: Implementation) -> None:
    labels = implementation.tensor([], torch.int64)
    losses = implementation("cross_entropy_", implementation.randn(0, 7), implementation.randn(7), labels)
    assert (losses.shape, losses.dtype) == ((0,), torch.float32)


def test_logits_with_strides_are_refused(implementation: Implementation) -> None:
    logits, labels = implementation.randn(7, 3).T, implementation.tensor([0, 1, 2], torch.int64)
    with pytest.raises(ValueError, match=r"cross_entropy_: logits has strides \(1, 3\), expected a contiguous tensor"):
        implementation("cross_entropy_", logits, implementation.randn(7), labels)
