"""bias_gelu: the gradients of the kernels against the truth, odd inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_given_gradients
from torch import Tensor


@pytest.fixture(scope="module", params=[p for p in parameters() if p.values[0].name == "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Triton's alone; without this fixture, that of conftest.py, the C++ ones too."""
    return request.param


SHAPES = {
    "one element": (1, 1),
    "no leading dimension": (24,),
    "narrower than any vector": (3, 5),
    "more tiles than programs under the interpreter": (25, 384),
    "MiniLM": (3, 1536),
    "BERT-base, in blocks of 1024": (5, 3072),
    "several leading dimensions": (2, 3, 2, 10),
    "one feature more than a block": (6, 513),
}


def check(implementation: Implementation, x: Tensor, bias: Tensor, grad: Tensor, approximate: str) -> None:
    gradients = implementation("bias_gelu_backward", grad, x, bias, approximate)
    assert gradients[0].is_contiguous()
    assert_given_gradients(gradients, lambda x, bias: F.gelu(x + bias, approximate=approximate), [x, bias], grad)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients(implementation: Implementation, shape: tuple[int, ...], approximate: str) -> None:
    x, grad = implementation.randn(*shape), implementation.randn(*shape)
    check(implementation, x, implementation.randn(shape[-1]), grad, approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_every_magnitude(implementation: Implementation, approximate: str) -> None:
    """Through the minimum at -0.75, into both tails and far beyond, a row for each sign."""
    x = implementation.tensor([[-(2.0 ** (i / 8)) for i in range(-64, 88)]])
    x = torch.cat([x, -x, torch.zeros_like(x)])
    check(implementation, x, torch.zeros_like(x[0]), implementation.randn(*x.shape), approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_nan_stays_where_it_is(implementation: Implementation, approximate: str) -> None:
    x, bias, grad = implementation.randn(9, 40), implementation.randn(40), implementation.randn(9, 40)
    dx, dbias = implementation("bias_gelu_backward", grad, x, bias, approximate)
    x[2, 3], grad[4, 5] = float("nan"), float("nan")
    dx_nan, dbias_nan = implementation("bias_gelu_backward", grad, x, bias, approximate)
    for gradient, clean, index in ((dx_nan, dx, ([2, 4], [3, 5])), (dbias_nan, dbias, ([3, 5],))):
        assert gradient[index].isnan().all()
        gradient[index] = clean[index]
        assert torch.equal(gradient, clean)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    args = [implementation.randn(4, 3, 36), implementation.randn(4, 3, 36), implementation.randn(36)]
    expected = implementation("bias_gelu_backward", *args, "none")
    assert all(map(torch.equal, implementation("bias_gelu_backward", *map(layout, args), "none"), expected))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_zero_size(implementation: Implementation, shape: tuple[int, ...]) -> None:
    x, bias = implementation.randn(*shape), implementation.randn(shape[-1])
    dx, dbias = implementation("bias_gelu_backward", x, x, bias, "none")
    assert (dx.shape, dx.dtype, dbias.shape, dbias.dtype) == (x.shape, x.dtype, bias.shape, bias.dtype)
    assert not dbias.any()
