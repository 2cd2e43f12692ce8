"""residual_layer_norm: forward against the truth, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from implementations import DEVICE, FORCEABLE, Implementation
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.residual_layer_norm import reference

EPS = 1e-12  # BERT's

# Long rows come by the dozen: the error of its mean and deviation is one draw for a whole row.
SHAPES = {
    "one element, whose variance is zero": (1, 1),
    "no leading dimension": (24,),
    "narrower than any vector": (3, 5),
    "one past a vector of 16 and of 32": (4, 33),
    "MiniLM, one row more than full tiles": (17, 384),
    "BERT-base": (16, 768),
    "many short rows, several tiles": (150, 8),
    "several leading dimensions": (2, 3, 2, 10),
    "rows longer than one block": (16, 8200),
}


def inputs(implementation: Implementation, *shape: int) -> tuple[Tensor, ...]:
    """x, bias, residual, weight, layer_norm_bias."""
    x, residual = implementation.randn(*shape), implementation.randn(*shape)
    bias, weight, layer_norm_bias = (implementation.randn(shape[-1]) for _ in range(3))
    return x, bias, residual, weight, layer_norm_bias


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward(implementation: Implementation, shape: tuple[int, ...]) -> None:
    run = partial(implementation, "residual_layer_norm")
    assert_forward(run, reference, *inputs(implementation, *shape), EPS, 0.0)


def test_eps_counts(implementation: Implementation) -> None:
    run = partial(implementation, "residual_layer_norm")
    assert_forward(run, reference, *inputs(implementation, 4, 40), 0.5, 0.0)


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_magnitudes(implementation: Implementation, magnitude: float) -> None:
    x, bias, residual, weight, layer_norm_bias = inputs(implementation, 5, 40)
    run = partial(implementation, "residual_layer_norm")
    args = (x * magnitude, bias * magnitude, residual * magnitude, weight, layer_norm_bias)
    assert_forward(run, reference, *args, EPS, 0.0)


def test_a_mean_far_from_zero(implementation: Implementation) -> None:
    # The square of the mean is 10^4 times the variance: E[x^2] - E[x]^2 would lose it.
    x, bias, residual, weight, layer_norm_bias = inputs(implementation, 5, 300)
    run = partial(implementation, "residual_layer_norm")
    assert_forward(run, reference, x + 100, bias, residual, weight, layer_norm_bias, EPS, 0.0)


def test_a_constant_row_gives_the_bias(implementation: Implementation) -> None:
    _, _, _, weight, layer_norm_bias = inputs(implementation, 2, 64)
    x, bias = implementation.tensor(2.0).expand(2, 64), implementation.tensor(-1.0).expand(64)
    out = implementation("residual_layer_norm", x, bias, x, weight, layer_norm_bias, EPS, 0.0)
    assert torch.equal(out, layer_norm_bias.expand(2, 64))


def test_nan_stays_in_its_row(implementation: Implementation) -> None:
    x, *others = inputs(implementation, 7, 40)
    clean = implementation("residual_layer_norm", x, *others, EPS, 0.0)
    x[2, 3] = float("nan")
    out = implementation("residual_layer_norm", x, *others, EPS, 0.0)
    assert out[2].isnan().all()
    out[2] = clean[2]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_zero_size(implementation: Implementation, shape: tuple[int, ...]) -> None:
    out = implementation("residual_layer_norm", *inputs(implementation, *shape), EPS, 0.0)
    assert out.shape == shape
    assert out.dtype == implementation.dtype


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    run = partial(implementation, "residual_layer_norm")
    assert_forward(run, reference, *map(layout, inputs(implementation, 4, 3, 36)), EPS, 0.0)


def test_expanded(implementation: Implementation) -> None:
    x, bias, residual, weight, layer_norm_bias = inputs(implementation, 36)
    run = partial(implementation, "residual_layer_norm")
    args = (x.expand(5, 36), bias, residual.expand(5, 36), weight[:1].expand(36), layer_norm_bias)
    assert_forward(run, reference, *args, EPS, 0.0)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31() -> None:
    triton = Implementation("triton", torch.bfloat16, "cuda")
    x, bias, residual, weight, layer_norm_bias = inputs(triton, 2_200_000, 1024)
    out = triton("residual_layer_norm", x, bias, residual, weight, layer_norm_bias, EPS, 0.0)
    tail = triton("residual_layer_norm", x[-3:], bias, residual[-3:], weight, layer_norm_bias, EPS, 0.0)
    torch.testing.assert_close(out[-3:], tail)  # few rows are cut otherwise, and their sums are taken in another order


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype) -> None:
    assert_gradients(
        lambda *tensors: ops.residual_layer_norm(*tensors, impl=impl),
        lambda *tensors: reference(*tensors, EPS, 0.0),
        *inputs(Implementation("any", dtype, DEVICE), 4, 3, 20),
    )


def test_gradcheck_of_the_definition() -> None:
    tensors = [t.requires_grad_() for t in inputs(Implementation("any", torch.float64), 3, 5)]
    assert torch.autograd.gradcheck(lambda *tensors: reference(*tensors, EPS, 0.0), tensors)


def test_dropout_keeps_the_expectation_and_reaches_only_x_and_bias() -> None:
    # weight 1, bias 0, residual far larger than x: the row's statistics are the residual's, dropout moves the rest.
    residual = torch.arange(4096.0).view(1, -1) * 100
    x, zeros, ones = torch.ones(1, 4096), torch.zeros(4096), torch.ones(4096)
    out = ops.residual_layer_norm(x, zeros, residual, ones, zeros, dropout_p=0.25)
    moved = out * residual.std(unbiased=False) + residual.mean() - residual  # 0 or 1 / 0.75, up to a common shift
    kept = moved > moved.mean()
    assert 0.7 < kept.float().mean() < 0.8
    assert torch.allclose(moved[kept].mean() - moved[~kept].mean(), torch.tensor(1 / 0.75), atol=0.1)


def refused(**changes: Tensor) -> dict[str, Tensor]:
    args = {"x": torch.ones(2, 3), "bias": torch.ones(3), "residual": torch.ones(2, 3), "weight": torch.ones(3)}
    return {**args, "layer_norm_bias": torch.ones(3), **changes}


REFUSED = {
    "integers": (refused(x=torch.ones(2, 3, dtype=torch.int64)), "x is torch.int64"),
    "a scalar": (refused(x=torch.tensor(1.0)), "x is a scalar"),
    "residual's shape": (refused(residual=torch.ones(3)), r"residual has shape \(3,\), expected \(2, 3\)"),
    "bias's shape": (refused(bias=torch.ones(1)), r"bias has shape \(1,\), expected \(3,\)"),
    "weight's shape": (refused(weight=torch.ones(4)), r"weight has shape \(4,\), expected \(3,\)"),
    "layer_norm_bias's shape": (refused(layer_norm_bias=torch.ones(2)), r"layer_norm_bias has shape \(2,\)"),
    "dtypes": (refused(weight=torch.ones(3).half()), "weight is torch.float16 but x is torch.float32"),
    "devices": (refused(residual=torch.ones(2, 3, device="meta")), "residual is on meta but x is on cpu"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: dict[str, Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=f"residual_layer_norm: {match}"):
        ops.residual_layer_norm(**args)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5])
def test_impossible_dropout_is_refused(dropout_p: float) -> None:
    with pytest.raises(ValueError, match=f"dropout_p is {dropout_p}"):
        ops.residual_layer_norm(**refused(), dropout_p=dropout_p)


def test_triton_launcher_refuses_dropout() -> None:
    from bert_fast.kernels.residual_layer_norm import residual_layer_norm

    with pytest.raises(ValueError, match=r"dropout_p is 0\.1"):
        residual_layer_norm(*refused().values(), EPS, 0.1)
