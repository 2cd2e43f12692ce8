"""The error measure of the house: a fast result is judged by what plain PyTorch gets wrong in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_no_worse(fast: Tensor, plain: Tensor, truth: Tensor, name: str = "result") -> None:
    """`fast` is at most twice as far from `truth` as `plain` is, plus one unit in the last place (ulp).

    `plain` is the definition run in fast's dtype, `truth` the definition in float64 on the same (rounded) inputs.
    Comparing one element's error with plain's error in that very element would be unsound: both are draws from a
    distribution, and where plain happens to be exact any other correct order of additions would fail. What is
    comparable is the distribution, and errors scale with the magnitude of a row (the last dimension). So, with errors
    in units of the row's largest |truth|:

    - every element is within 2 * (plain's worst error over the tensor) + 1 ulp of the element, which catches a few
      bad elements, in small rows as well as in large ones;
    - the root mean square is within 2 * plain's + 1 ulp, which catches a result that is a little wrong everywhere.

    Where the truth does not fit the dtype (NaN, infinity, overflow) fast holds just that, and elsewhere it is finite.
    Rows whose truth is all zero are zero.
    """
    assert fast.dtype == plain.dtype, f"{name}: dtype is {fast.dtype}, plain's is {plain.dtype}"
    assert fast.shape == plain.shape == truth.shape, f"{name}: {fast.shape}, {plain.shape}, {truth.shape}"
    assert truth.dtype == torch.float64, f"{name}: truth is {truth.dtype}"
    if fast.numel() == 0:
        return
    expected = truth.to(fast.dtype)
    fits = expected.isfinite()
    torch.testing.assert_close(fast[~fits], expected[~fits], rtol=0, atol=0, equal_nan=True, msg=f"{name}: not finite")
    assert fast[fits].isfinite().all(), f"{name}: {int((~fast[fits].isfinite()).sum())} elements are not finite"

    magnitude = torch.where(fits, truth, 0.0).abs()
    row = magnitude.amax(-1, keepdim=True) if truth.dim() else magnitude
    unit = torch.where(row > 0, row, 1.0)
    ulp = _ulp(magnitude, fast.dtype)
    fast_error = torch.where(fits, (fast.double() - truth).abs(), 0.0)
    plain_error = torch.where(fits & plain.isfinite(), (plain.double() - truth).abs(), 0.0) / unit

    bound = 2 * plain_error.max() * row + ulp
    excess = fast_error / bound
    if excess.max() > 1:
        index = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
        raise AssertionError(
            f"{name}: {int((excess > 1).sum())} of {excess.numel()} elements are too far from the truth; the worst, at "
            f"{index}, is {fast[index].item()!r}, plain {plain[index].item()!r}, truth {truth[index].item()!r}, "
            f"{excess.max():.2f} times the error allowed"
        )
    fast_rms, plain_rms, ulp_rms = (_rms(error) for error in (fast_error / unit, plain_error, ulp / unit))
    assert fast_rms <= 2 * plain_rms + ulp_rms, (
        f"{name}: root mean square error {fast_rms:.3g}, plain {plain_rms:.3g}, one ulp {ulp_rms:.3g} "
        "(relative to the largest element of each row)"
    )


def assert_forward(run: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any) -> Tensor:
    """`run(*args)` is contiguous and no worse than `reference(*args)`; returns it."""
    fast = run(*args)
    assert fast.is_contiguous(), f"strides {fast.stride()} for shape {tuple(fast.shape)}"
    assert_no_worse(fast, reference(*args), reference(*map(to_double, args)))
    return fast


def assert_gradients(run: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """The gradients of `run` by each of `inputs`, under a random upstream gradient, are no worse than reference's."""
    upstream = torch.randn_like(reference(*inputs))
    assert_given_gradients(_gradients(run, inputs, upstream), reference, inputs, upstream)


def assert_given_gradients(
    fast: Sequence[Tensor], reference: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> None:
    """`fast`, a gradient for each of `inputs` under `upstream`, are no worse than `reference`'s."""
    plain = _gradients(reference, inputs, upstream)
    truth = _gradients(reference, [t.double() for t in inputs], upstream.double())
    for index, (f, p, t) in enumerate(zip(fast, plain, truth, strict=True)):
        assert_no_worse(f, p, t, name=f"gradient of input {index}")


def to_double(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor) -> Sequence[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves, upstream)


def _ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance between neighbours of `dtype` at each of the float64 `magnitude` >= 0."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.clamp_min(info.tiny))  # in [2^(exponent - 1), 2^exponent)
    return torch.ldexp(torch.full_like(magnitude, info.eps), exponent - 1)


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()
