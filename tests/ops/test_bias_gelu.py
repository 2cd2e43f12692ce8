"""bias_gelu: forward against the truth, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from implementations import DEVICE, FORCEABLE, HAS_GPU, Implementation
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.bias_gelu import APPROXIMATIONS, reference

SHAPES = {
    "one element": (1, 1),
    "no leading dimension": (7,),
    "narrower than any vector": (3, 5),
    "one past a vector of 16 and of 32": (4, 33),
    "MiniLM's feed-forward, two column blocks": (3, 1536),
    "more rows than one tile": (150, 40),
    "several leading dimensions": (2, 3, 2, 10),
}


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward(implementation: Implementation, shape: tuple[int, ...], approximate: str) -> None:
    x, bias = implementation.randn(*shape) * 2, implementation.randn(shape[-1])
    assert_forward(lambda *args: implementation("bias_gelu", *args), reference, x, bias, approximate)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_tails_large_values_and_zeros(implementation: Implementation, approximate: str) -> None:
    values = implementation.tensor([0.0, 1e-3, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 20.0, 1e3, 3e4])
    bias = implementation.tensor([0.0])
    eps = torch.finfo(values.dtype).eps
    positive, negative = (implementation("bias_gelu", x[:, None], bias, approximate)[:, 0] for x in (values, -values))
    truth = reference(values.double(), bias.double(), approximate)
    torch.testing.assert_close(positive.double(), truth, rtol=2 * eps, atol=0)
    # Below zero 1 + erf cancels: the error is that of the terms, which are of size |x|, and nothing is left past 6.
    error = (negative.double() - reference(-values.double(), bias.double(), approximate)).abs()
    assert (error <= 2 * eps * values.double().clamp_max(6)).all()


def test_the_polynomial_of_the_16_bit_kernel_is_as_exact_as_it_says() -> None:
    from bert_fast.kernels.bias_gelu import bias_gelu as kernel

    x = torch.linspace(-9, 0, 4097, device=DEVICE).half()
    out = torch.empty_like(x, dtype=torch.float32)  # so that nothing is rounded to 16 bits
    kernel(x[:, None], x.new_zeros(1), "none", out[:, None])
    truth = reference(x.double(), x.new_zeros(1).double(), "none")
    error, relative = (out - truth).abs(), ((out - truth) / truth).abs()
    assert error.max() < (1.7e-7 if HAS_GPU else 1.3e-7)  # a GPU's exp2 may be off by 2^-22 of at most 0.17
    assert relative[(x > -4) & (x < 0)].max() < 6e-5
    assert relative[(x > -6) & (x < 0)].max() < 1e-3


def test_nan_and_infinity_stay_in_their_element(implementation: Implementation) -> None:
    x, bias = implementation.randn(6, 40), implementation.randn(40)
    clean = implementation("bias_gelu", x, bias, "none")
    x[2, 3], x[4, 39] = float("nan"), float("inf")
    out = implementation("bias_gelu", x, bias, "none")
    assert out[2, 3].isnan()
    assert out[4, 39] == float("inf")
    out[2, 3], out[4, 39] = clean[2, 3], clean[4, 39]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_zero_size(implementation: Implementation, shape: tuple[int, ...]) -> None:
    out = implementation("bias_gelu", implementation.randn(*shape), implementation.randn(shape[-1]), "none")
    assert out.shape == shape
    assert out.dtype == implementation.dtype


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    x, bias = layout(implementation.randn(4, 3, 36)), layout(implementation.randn(36))
    assert_forward(lambda *args: implementation("bias_gelu", *args), reference, x, bias, "none")


def test_expanded(implementation: Implementation) -> None:
    x, bias = implementation.randn(36).expand(5, 36), implementation.randn(1).expand(36)
    assert_forward(lambda *args: implementation("bias_gelu", *args), reference, x, bias, "none")


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype, approximate: str) -> None:
    assert_gradients(
        lambda x, bias: ops.bias_gelu(x, bias, approximate=approximate, impl=impl),
        lambda x, bias: reference(x, bias, approximate),
        torch.randn(4, 3, 20).to(DEVICE, dtype),
        torch.randn(20).to(DEVICE, dtype),
    )


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gradcheck_of_the_definition(approximate: str) -> None:
    x, bias = torch.randn(3, 5).double().requires_grad_(), torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, bias: reference(x, bias, approximate), (x, bias))


REFUSED = {
    "integers": ((torch.ones(2, 3, dtype=torch.int64), torch.ones(3)), "x is torch.int64"),
    "a scalar": ((torch.tensor(1.0), torch.ones(1)), "x is a scalar"),
    "bias of another length": ((torch.ones(2, 3), torch.ones(4)), r"bias has shape \(4,\), expected \(3,\)"),
    "bias of another rank": ((torch.ones(2, 3), torch.ones(2, 3)), r"bias has shape \(2, 3\), expected \(3,\)"),
    "dtypes": ((torch.ones(2, 3), torch.ones(3).double()), "bias is torch.float64 but x is torch.float32"),
    "devices": ((torch.ones(2, 3), torch.ones(3, device="meta")), "bias is on meta but x is on cpu"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: tuple[Tensor, ...], match: str) -> None:
    with pytest.raises(ValueError, match=f"bias_gelu: {match}"):
        ops.bias_gelu(*args)


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="approximate is 'fast', expected one of none, tanh"):
        ops.bias_gelu(torch.ones(2, 3), torch.ones(3), approximate="fast")
