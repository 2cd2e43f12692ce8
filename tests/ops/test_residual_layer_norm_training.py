"""The C++ residual_layer_norm in training: numbers, layouts, odd inputs, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from layouts import LAYOUTS
from torch import Tensor
from training_definitions import EPS, PROBABILITIES, SHAPES, assert_same, assert_training, seed_for

from bert_fast import _C
from bert_fast.ops._dropout import dropout

RESIDUAL_NAMES = "x bias residual weight layer_norm_bias"


def residual_inputs(shape: tuple[int, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    vectors = [torch.randn(shape[-1]).to(dtype) for _ in range(3)]
    return [torch.randn(shape).to(x_dtype), vectors[0], torch.randn(shape).to(dtype), *vectors[1:]]


def residual_definition(dropout_p: float, x: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
    hidden = dropout(x + bias, dropout_p, seed_for(dropout_p)) + residual
    return F.layer_norm(hidden, hidden.shape[-1:], *norm, EPS)


def run_residual(dropout_p: float, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """out and the gradients of the inputs, in their order."""
    seed, x, weight = seed_for(dropout_p), inputs[0], inputs[3]
    out, normalized, rstd = _C.residual_layer_norm_train(*inputs, EPS, dropout_p, seed)
    assert normalized.dtype == out.dtype == weight.dtype
    assert (rstd.dtype, rstd.shape) == (torch.float32, (prod(x.shape[:-1]),))
    dx, dbias, dresidual, dweight, dnorm_bias = _C.residual_layer_norm_backward(
        upstream, normalized, rstd, weight, dropout_p, seed, x.dtype
    )
    assert (dx is dresidual) == (dropout_p == 0 and x.dtype == weight.dtype)
    return [out, dx, dbias, dresidual, dweight, dnorm_bias]


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_residual_layer_norm(cpp: Implementation, shape: tuple[int, ...], dropout_p: float) -> None:
    inputs, upstream = residual_inputs(shape, cpp.dtype, cpp.dtype), cpp.randn(*shape)
    fast = run_residual(dropout_p, upstream, inputs)
    assert_training(fast, partial(residual_definition, dropout_p), upstream, inputs, RESIDUAL_NAMES)


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
def test_residual_layer_norm_under_autocast(cpp: Implementation, dropout_p: float) -> None:
    """A product in bfloat16 beside parameters and a residual in float32."""
    shape = (37, 40)
    inputs, upstream = residual_inputs(shape, torch.bfloat16, torch.float32), torch.randn(shape)
    fast = run_residual(dropout_p, upstream, inputs)
    assert_training(fast, partial(residual_definition, dropout_p), upstream, inputs, RESIDUAL_NAMES)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_residual_layer_norm_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, upstream = residual_inputs((4, 3, 36), cpp.dtype, cpp.dtype), cpp.randn(4, 3, 36)
    expected = run_residual(0.1, upstream, inputs)
    assert_same(run_residual(0.1, layout(upstream), list(map(layout, inputs))), expected)


def test_residual_layer_norm_expanded_gradient(cpp: Implementation) -> None:
    inputs, upstream = residual_inputs((5, 36), cpp.dtype, cpp.dtype), cpp.randn(1, 1).expand(5, 36)
    assert_same(run_residual(0.1, upstream, inputs), run_residual(0.1, upstream.contiguous(), inputs))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_residual_layer_norm_zero_size(cpp: Implementation, shape: tuple[int, ...]) -> None:
    out, dx, *sums = run_residual(0.1, cpp.randn(*shape), residual_inputs(shape, cpp.dtype, cpp.dtype))
    assert out.shape == dx.shape == sums[1].shape == shape
    for vector in (sums[0], *sums[2:]):
        assert torch.equal(vector, torch.zeros(shape[-1], dtype=cpp.dtype))


def test_residual_layer_norm_nan_stays_in_its_row(cpp: Implementation) -> None:
    inputs, upstream = residual_inputs((40, 40), cpp.dtype, cpp.dtype), cpp.randn(40, 40)
    clean = run_residual(0.1, upstream, inputs)
    inputs[2][2, 3] = float("nan")
    out, dx, _, dresidual, *_ = run_residual(0.1, upstream, inputs)
    assert out[2].isnan().all()
    assert dresidual[2].isnan().all()
    assert (dx[2].isnan() | (dx[2] == 0)).all()  # zero where it was dropped
    for tensor, expected in ((out, clean[0]), (dx, clean[1]), (dresidual, clean[3])):
        tensor[2] = expected[2]
        assert torch.equal(tensor, expected)


def test_a_dropped_nan_is_zero(cpp: Implementation) -> None:
    inputs = residual_inputs((3, 20), cpp.dtype, cpp.dtype)
    clean = run_residual(1.0, torch.ones(3, 20, dtype=cpp.dtype), inputs)
    inputs[0] = torch.full_like(inputs[0], float("nan"))
    assert_same(run_residual(1.0, torch.ones(3, 20, dtype=cpp.dtype), inputs), clean)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_residual_layer_norm_threads(threads: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs, upstream = residual_inputs((333, 384), *dtypes), torch.randn(333, 384)
    several = run_residual(0.1, upstream, inputs)
    torch.set_num_threads(1)
    assert_same(several, run_residual(0.1, upstream, inputs))


def train_args(**changes: Any) -> list[Any]:
    args = {"x": torch.ones(2, 3), "bias": torch.ones(3), "residual": torch.ones(2, 3), "weight": torch.ones(3)}
    args |= {"layer_norm_bias": torch.ones(3), "eps": EPS, "dropout_p": 0.1, "seed": torch.tensor(1)}
    return list({**args, **changes}.values())


def backward_args(**changes: Any) -> list[Any]:
    args = {"grad": torch.ones(2, 3), "normalized": torch.ones(2, 3), "rstd": torch.ones(2), "weight": torch.ones(3)}
    return list({**args, "dropout_p": 0.0, "seed": None, "x_dtype": torch.float32, **changes}.values())


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "half": ("residual_layer_norm_train", train_args(residual=torch.ones(2, 3).half()), "residual is torch.float16"),
    "float32 beside bfloat16": (
        "residual_layer_norm_train",
        train_args(**{name: torch.ones(3).bfloat16() for name in ("bias", "weight", "layer_norm_bias")})[:2]
        + train_args(residual=torch.ones(2, 3).bfloat16())[2:],
        "x is torch.float32 but residual is torch.bfloat16",
    ),
    "residual's shape": ("residual_layer_norm_train", train_args(residual=torch.ones(3)), r"residual has shape \(3,\)"),
    "bias's shape": ("residual_layer_norm_train", train_args(bias=torch.ones(2)), r"bias has shape \(2,\)"),
    "an impossible probability": ("residual_layer_norm_train", train_args(dropout_p=1.5), r"dropout_p is 1\.5"),
    "no number": ("residual_layer_norm_train", train_args(dropout_p=float("nan")), "dropout_p is nan"),
    "no seed": ("residual_layer_norm_train", train_args(seed=None), r"dropout_p is 0\.1 without a seed"),
    "several seeds": ("residual_layer_norm_train", train_args(seed=torch.ones(2).long()), r"shape \(2,\), expected an"),
    "a seed of floats": ("residual_layer_norm_train", train_args(seed=torch.tensor(1.0)), "seed is torch.float32"),
    "grad's shape": ("residual_layer_norm_backward", backward_args(grad=torch.ones(3, 3)), r"grad has shape \(3, 3\)"),
    "grad's dtype": (
        "residual_layer_norm_backward",
        backward_args(grad=torch.ones(2, 3).bfloat16()),
        "grad is torch.b",
    ),
    "rstd's shape": ("residual_layer_norm_backward", backward_args(rstd=torch.ones(3)), r"rstd has shape \(3,\)"),
    "rstd's dtype": (
        "residual_layer_norm_backward",
        backward_args(rstd=torch.ones(2).double()),
        "rstd is torch.float64",
    ),
    "x_dtype": ("residual_layer_norm_backward", backward_args(x_dtype=torch.half), "x_dtype is torch.float16"),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
