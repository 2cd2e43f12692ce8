"""The gradients of the C++ bias_gelu: numbers, layouts, odd inputs, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import pi
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from layouts import LAYOUTS
from numerics import assert_no_worse
from torch import Tensor
from training_definitions import SHAPES, assert_same, outcome

from bert_fast import _C


def gelu_definition(approximate: str, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def assert_gelu(upstream: Tensor, x: Tensor, bias: Tensor, approximate: str) -> None:
    definition = partial(gelu_definition, approximate)
    plain = outcome(definition, upstream, x, bias)
    truth = outcome(definition, upstream.double(), x.double(), bias.double())
    fast = _C.bias_gelu_backward(upstream, x, bias, approximate)
    for name, f, p, t in zip(("dx", "dbias"), fast, plain[1:], truth[1:], strict=True):
        assert f.is_contiguous()
        assert_no_worse(f, p, t, name)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bias_gelu(cpp: Implementation, shape: tuple[int, ...], approximate: str) -> None:
    assert_gelu(cpp.randn(*shape), 2 * cpp.randn(*shape), cpp.randn(shape[-1]), approximate)


def gelu_slope(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative at float64 x as a sum of two terms, neither with the cancellation of `1 + erf` and `1 + tanh`.

    Returns:
        The terms, and the exponent of the exponential in them.
    """
    if approximate == "none":
        density = torch.exp(-x.square() / 2) / (2 * pi) ** 0.5
        return torch.erfc(-x / 2**0.5) / 2, x * density, x.square() / 2
    two_z, slope = (factor * (2 / pi) ** 0.5 * 2 for factor in (x + 0.044715 * x**3, 1 + 3 * 0.044715 * x.square()))
    return two_z.sigmoid(), x * slope * two_z.sigmoid() * (-two_z).sigmoid(), two_z.abs()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_in_the_tails(cpp: Implementation, approximate: str) -> None:
    """Where plain PyTorch gives zero or noise, the digits of the derivative are right down to -8."""
    x = torch.linspace(-8, 8, 4001).to(cpp.dtype).clamp(-8, 8)
    dx, _ = _C.bias_gelu_backward(torch.ones_like(x), x, torch.zeros_like(x), approximate)
    first, second, exponent = gelu_slope(x.double(), approximate)
    error = (16 + 4 * exponent) * 2**-24  # without FMA the exponent is rounded, to so many parts of the exponential
    allowed = error * (first.abs() + second.abs()) + torch.finfo(cpp.dtype).eps * (first + second).abs()
    assert ((dx.double() - (first + second)).abs() <= allowed).all()
    far = cpp.tensor([-1e30, -200.0, 200.0, 1e30, -float("inf"), float("inf"), float("nan")])
    dx, _ = _C.bias_gelu_backward(torch.ones_like(far), far, torch.zeros_like(far), approximate)
    limits = torch.tensor([0, 0, 1, 1, 0, 1, torch.nan])
    torch.testing.assert_close(dx.float(), limits, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_bias_gelu_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    args = (cpp.randn(4, 3, 36), cpp.randn(4, 3, 36), cpp.randn(36))
    assert_same(_C.bias_gelu_backward(*map(layout, args), "none"), _C.bias_gelu_backward(*args, "none"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_bias_gelu_zero_size(cpp: Implementation, shape: tuple[int, ...]) -> None:
    dx, dbias = _C.bias_gelu_backward(cpp.randn(*shape), cpp.randn(*shape), cpp.randn(shape[-1]), "none")
    assert dx.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[-1], dtype=cpp.dtype))


def test_bias_gelu_threads(threads: int) -> None:
    args = (torch.randn(333, 200), torch.randn(333, 200), torch.randn(200), "none")
    several = _C.bias_gelu_backward(*args)
    torch.set_num_threads(1)
    assert_same(several, _C.bias_gelu_backward(*args))


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "form": ("bias_gelu_backward", [torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), "erf"], "approximate is 'erf'"),
    "gelu's grad": ("bias_gelu_backward", [torch.ones(3), torch.ones(2, 3), torch.ones(3), "none"], "grad has shape"),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
