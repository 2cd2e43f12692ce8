"""The error measure accepts what it must and rejects what it must; fresh memory is NaN."""

from __future__ import annotations

import pytest
import torch
from numerics import assert_no_worse
from torch import Tensor


def softmax_product(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(plain, truth) of an expression that loses some digits on the way, (64, 48), rows of very unlike magnitude."""
    scores, values = torch.randn(64, 200).to(dtype), torch.randn(200, 48).to(dtype)
    magnitudes = (10.0 ** torch.arange(-2, 2).repeat_interleave(16)[:, None]).to(dtype)

    def run(scores: Tensor, values: Tensor, magnitudes: Tensor) -> Tensor:
        return torch.softmax(scores * 3, dim=-1) @ values * magnitudes

    return run(scores, values, magnitudes), run(scores.double(), values.double(), magnitudes.double())


DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_accepts_plain_and_the_rounded_truth(dtype: torch.dtype) -> None:
    plain, truth = softmax_product(dtype)
    assert_no_worse(plain, plain, truth)
    assert_no_worse(truth.to(dtype), plain, truth)
    assert_no_worse(plain, truth.to(dtype), plain.double())  # plain may be exact, and fast with it


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_where_plain_is_exact_is_no_trap(dtype: torch.dtype) -> None:
    plain, truth = softmax_product(dtype)
    lucky = plain.clone()
    lucky[::2] = truth[::2].to(dtype)
    assert_no_worse(plain, lucky, truth)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_errors_spread_everywhere(dtype: torch.dtype) -> None:
    plain, truth = softmax_product(dtype)
    fast = (truth + 5 * (plain.double() - truth)).to(dtype)
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse(fast, plain, truth)


@pytest.mark.parametrize("row", [0, 63], ids=["smallest row", "largest row"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rejects_one_bad_element(dtype: torch.dtype, row: int) -> None:
    plain, truth = softmax_product(dtype)
    relative = ((plain.double() - truth).abs() / truth.abs().amax(-1, keepdim=True)).max()
    fast = plain.clone()
    fast[row, 7] = truth[row, 7] + 4 * relative * truth[row].abs().max()
    with pytest.raises(AssertionError, match=rf"1 of 3072 elements .* at \({row}, 7\)"):
        assert_no_worse(fast, plain, truth)


def test_rejects_a_bias_that_no_single_element_shows() -> None:
    truth = torch.rand(100, 100, dtype=torch.float64) + 1
    plain = truth.float()
    plain[0, 0] += 1e-4  # plain's one bad element must not excuse all of fast's
    with pytest.raises(AssertionError, match="root mean square"):
        assert_no_worse((truth + 2e-5).float(), plain, truth)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rejects_nan_and_infinity_in_place_of_a_number(bad: float) -> None:
    plain, truth = softmax_product(torch.float32)
    fast = plain.clone()
    fast[3, 4] = bad
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(fast, plain, truth)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("special", "wrong"), [(NAN, 1.0), (NAN, INF), (INF, -INF), (INF, NAN), (-INF, 1.0)])
def test_asks_for_nan_and_infinity_where_the_truth_has_them(special: float, wrong: float) -> None:
    plain, truth = softmax_product(torch.float32)
    plain[3, 4] = truth[3, 4] = special
    fast = plain.clone()
    assert_no_worse(fast, plain, truth)
    fast[3, 4] = wrong
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(fast, plain, truth)


def test_overflow_of_the_dtype_is_infinity_and_plains_own_is_no_excuse() -> None:
    truth = torch.tensor([[7e4, 1.0, 2.0]], dtype=torch.float64)
    plain = torch.tensor([[float("inf"), float("inf"), 2.0]], dtype=torch.float16)
    assert_no_worse(truth.half(), plain, truth)
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse(plain, plain, truth)


def test_a_row_of_zeros_is_zero() -> None:
    plain, truth = softmax_product(torch.float32)
    plain[5] = truth[5] = 0
    fast = plain.clone()
    fast[5, 0] = 1e-9
    with pytest.raises(AssertionError, match="1 of"):
        assert_no_worse(fast, plain, truth)


@pytest.mark.parametrize(
    ("fast", "match"),
    [(torch.zeros(2, 3), "shape|Size"), (torch.zeros(3, 2, dtype=torch.float16), "dtype")],
    ids=["shape", "dtype"],
)
def test_rejects_another_shape_or_dtype(fast: Tensor, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        assert_no_worse(fast, torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_fresh_memory_is_nan(dtype: torch.dtype) -> None:
    like = torch.zeros(4, 5, dtype=dtype)
    fresh = [
        torch.empty(4, 5, dtype=dtype),
        torch.empty_like(like),
        like.new_empty(4, 5),
        torch.empty_strided((4, 5), (1, 4), dtype=dtype),
        torch.ops.aten.empty.memory_format([4, 5], dtype=dtype),  # at::empty of C++ is this op
    ]
    for tensor in fresh:
        assert tensor.isnan().all()
