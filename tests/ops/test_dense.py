"""dense: product and gradients against the truth at every instruction set, invariance, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from implementations import DEVICE, FORCEABLE, Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients, assert_no_worse
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.dense import OP, reference

#: There is no Triton form: a GPU's products are cuBLAS's.
on_cpu = pytest.mark.parametrize(
    "implementation", [p for p in parameters() if p.values[0].name == "cpp"], indirect=True
)
#: Weights in x's dtype, and as autocast has them.
both_weights = pytest.mark.parametrize("weight_dtype", ["x's", "float32"])

# (rows, in_features, out_features)
SHAPES = {
    "one of everything": (1, 1, 1),
    "one row": (1, 24, 96),
    "no dimension a multiple of anything, odd sums": (5, 33, 31),
    "sums of two blocks in float32, one in bfloat16": (17, 400, 40),
    "sums of three blocks in bfloat16, the last with half a pair": (9, 1701, 24),
    "three blocks of tokens in the weights' gradient, odd": (901, 40, 36),
    "more columns than a part has, both ways": (20, 390, 420),
    "more rows than a part has": (1400, 8, 9),
    "rows whose starts share a set of the cache": (20, 1024, 40),
}


def arguments(implementation: Implementation, shape: tuple[int, ...], weight_dtype: str) -> list[Any]:
    """x, weight, bias and an upstream gradient."""
    *leading, in_features, out_features = shape
    if weight_dtype == "float32" and implementation.dtype == torch.float32:
        pytest.skip("the same as x's")
    x = implementation.randn(*leading, in_features)
    dtype = torch.float32 if weight_dtype == "float32" else x.dtype
    weight, bias = torch.randn(out_features, in_features).to(dtype), torch.randn(out_features).to(dtype)
    return [x, weight, bias, implementation.randn(*leading, out_features)]


def gradients(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Of the definition."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    return torch.autograd.grad(reference(*leaves), leaves, grad)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_all(implementation: Implementation, args: list[Any]) -> list[Tensor]:
    """The product and its three gradients."""
    x, weight, bias, grad = args
    out = implementation("dense", x, weight, bias)
    return [out, *implementation("dense_backward", grad, x, weight, True, True, True)]


def assert_all_equal(actual: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, e in zip(("out", "dx", "dweight", "dbias"), actual, expected, strict=True):
        assert torch.equal(a, e), name


# ------------------------------------------------------------------------------------------------------------- numbers


@both_weights
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@on_cpu
def test_against_the_truth(implementation: Implementation, shape: tuple[int, int, int], weight_dtype: str) -> None:
    x, weight, bias, grad = arguments(implementation, shape, weight_dtype)
    assert_forward(lambda *args: implementation("dense", *args), reference, x, weight, bias)
    fast = implementation("dense_backward", grad, x, weight, True, True, True)
    plain = gradients(x, weight, bias, grad)
    truth = gradients(*(t.double() for t in (x, weight, bias, grad)))
    for name, f, p, t in zip(("dx", "dweight", "dbias"), fast, plain, truth, strict=True):
        assert f.is_contiguous(), name
        assert_no_worse(f, p, t, name=name)


@on_cpu
def test_no_bias_is_a_bias_of_zeros(implementation: Implementation) -> None:
    x, weight, bias, _ = arguments(implementation, (7, 40, 33), "x's")
    none = implementation("dense", x, weight, None)
    assert torch.equal(none, implementation("dense", x, weight, torch.zeros_like(bias)))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@on_cpu
def test_what_is_not_needed_is_none(implementation: Implementation, needed: tuple[bool, ...]) -> None:
    x, weight, bias, grad = arguments(implementation, (900, 40, 33), "x's")
    expected = run_all(implementation, [x, weight, bias, grad])[1:]
    for need, got, e in zip(needed, implementation("dense_backward", grad, x, weight, *needed), expected, strict=True):
        assert torch.equal(got, e) if need else got is None


@on_cpu
def test_small_integers_are_exact(implementation: Implementation) -> None:
    """Every product and sum fits bfloat16: what is added twice or left out shows."""
    x, weight, bias, grad = (
        torch.randint(-1, 2, shape).to(implementation.dtype) for shape in ((90, 50), (70, 50), (70,), (90, 70))
    )
    out, dx, dweight, dbias = run_all(implementation, [x, weight, bias, grad])
    assert torch.equal(out.double(), x.double() @ weight.double().T + bias.double())
    assert torch.equal(dx.double(), grad.double() @ weight.double())
    assert torch.equal(dweight.double(), grad.double().T @ x.double())
    assert torch.equal(dbias.double(), grad.double().sum(0))


@on_cpu
def test_nan_stays_in_its_row(implementation: Implementation) -> None:
    args = arguments(implementation, (40, 51, 37), "x's")
    clean = run_all(implementation, args)
    x, grad = args[0].clone(), args[3].clone()
    x[11, 50], grad[21, 36] = float("nan"), float("inf")
    out, dx, dweight, dbias = run_all(implementation, [x, *args[1:3], grad])
    assert out[11].isnan().all()
    assert not dx[21].isfinite().any()
    assert dweight[:, 50].isnan().all()
    assert not dweight[36].isfinite().any()
    assert dbias[36] == float("inf")
    out[11], dx[21], dweight[:, 50], dbias[36] = clean[0][11], clean[1][21], clean[2][:, 50], clean[3][36]
    dweight[36] = clean[2][36]
    assert_all_equal([out, dx, dweight, dbias], clean)


# ---------------------------------------------------------------------------------------------------------- invariance


@pytest.mark.parametrize("shape", [(150, 200, 70), (3, 70, 400), (400, 40, 40)], ids=str)
@on_cpu
def test_any_number_of_threads_gives_the_same_bits(implementation: Implementation, shape: tuple[int, ...]) -> None:
    args = arguments(implementation, shape, "x's")
    with threads(1):
        expected = run_all(implementation, args)
    for count in (2, 3, 7):
        with threads(count):
            assert_all_equal(run_all(implementation, args), expected)


@on_cpu
def test_a_row_has_the_same_bits_alone(implementation: Implementation) -> None:
    x, weight, bias, grad = arguments(implementation, (60, 200, 40), "x's")
    out, dx, *_ = run_all(implementation, [x, weight, bias, grad])
    for row in (0, 31, 59):
        alone = slice(row, row + 1)
        assert torch.equal(implementation("dense", x[alone], weight, bias), out[alone])
        assert torch.equal(
            implementation("dense_backward", grad[alone], x[alone], weight, True, False, False)[0], dx[alone]
        )


@on_cpu
def test_several_python_threads_at_once(implementation: Implementation) -> None:
    cases = [arguments(implementation, (30 + i, 400, 70 + i), "x's") for i in range(6)]
    expected = [run_all(implementation, args) for args in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(3):
            for actual, e in zip(pool.map(lambda args: run_all(implementation, args), cases), expected, strict=True):
                assert_all_equal(actual, e)


# ---------------------------------------------------------------------------------------------------------- odd inputs


@both_weights
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@on_cpu
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor], weight_dtype: str) -> None:
    args = arguments(implementation, (4, 3, 36, 33), weight_dtype)
    assert_all_equal(run_all(implementation, [layout(a) for a in args]), run_all(implementation, args))


@on_cpu
def test_expanded_and_negated(implementation: Implementation) -> None:
    x, weight, bias, grad = arguments(implementation, (5, 36, 33), "x's")
    rows = [x[:1].expand(5, 36), weight, bias[:1].expand(33), grad[:1].expand(5, 33)]
    assert_all_equal(run_all(implementation, rows), run_all(implementation, [t.contiguous() for t in rows]))
    negated = [torch._neg_view(t) for t in (x, weight, bias, grad)]
    assert_all_equal(run_all(implementation, negated), run_all(implementation, [-t for t in (x, weight, bias, grad)]))


@both_weights
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
@on_cpu
def test_no_rows(implementation: Implementation, leading: tuple[int, ...], weight_dtype: str) -> None:
    args = arguments(implementation, (*leading, 8, 5), weight_dtype)
    out, dx, dweight, dbias = run_all(implementation, args)
    assert (out.shape, out.dtype) == ((*leading, 5), implementation.dtype)
    assert (dx.shape, dx.dtype) == ((*leading, 8), implementation.dtype)
    assert torch.equal(dweight, torch.zeros_like(args[1]))
    assert torch.equal(dbias, torch.zeros_like(args[2]))
    (sums,) = implementation("dense_backward", args[3], args[0], args[1], False, False, True)[2:]
    assert torch.equal(sums, dbias)


@on_cpu
def test_one_dimension(implementation: Implementation) -> None:
    x, weight, bias, grad = arguments(implementation, (1, 40, 33), "x's")
    flat = run_all(implementation, [x[0], weight, bias, grad[0]])
    assert [tuple(t.shape) for t in flat] == [(33,), (40,), (33, 40), (33,)]
    assert_all_equal([flat[0][None], flat[1][None], *flat[2:]], run_all(implementation, [x, weight, bias, grad]))


# ------------------------------------------------------------------------------------------------------------- refusals

X, WEIGHT, BIAS, GRAD = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), torch.ones(2, 4)
REFUSED = {
    "x of integers": ((X.long(), WEIGHT, BIAS), "x is torch.int64"),
    "x in float16": ((X.half(), WEIGHT, BIAS), "x is torch.float16, expected torch.float32 or torch.bfloat16"),
    "a narrow weight beside float32": ((X, WEIGHT.bfloat16(), BIAS), "weight is torch.bfloat16 but x is torch.float32"),
    "a wide weight": ((X, WEIGHT.double(), BIAS), "weight is torch.float64"),
    "a weight that is no matrix": ((X, BIAS, BIAS), r"weight has shape \(4,\), expected \(out_features, in_features\)"),
    "no features": ((X[:, :0], WEIGHT[:, :0], BIAS), r"weight has shape \(4, 0\)"),
    "x of another width": ((X[:, :2], WEIGHT, BIAS), r"x has shape \(2, 2\), expected \(..., 3\)"),
    "x a scalar": ((torch.tensor(1.0), WEIGHT, BIAS), r"x has shape \(\), expected \(..., 3\)"),
    "bias of another length": ((X, WEIGHT, torch.ones(3)), r"bias has shape \(3,\), expected \(4,\)"),
    "bias in x's dtype, not weight's": ((X.bfloat16(), WEIGHT, BIAS.bfloat16()), "bias is torch.bfloat16"),
    "x elsewhere": ((X.to("meta"), WEIGHT, BIAS), "x is on meta"),
    "weight elsewhere": ((X, WEIGHT.to("meta"), BIAS), "weight is on meta"),
    "bias elsewhere": ((X, WEIGHT, BIAS.to("meta")), "bias is on meta"),
}
REFUSED_BACKWARD = {
    "a gradient of another shape": ((GRAD[:1], X, WEIGHT), r"grad has shape \(1, 4\), expected \(2, 4\)"),
    "a gradient of another dtype": ((GRAD.bfloat16(), X, WEIGHT), "grad is torch.bfloat16 but x is torch.float32"),
    "a gradient elsewhere": ((GRAD.to("meta"), X, WEIGHT), "grad is on meta"),
    "x of another width": ((GRAD, X[:, :2], WEIGHT), r"x has shape \(2, 2\)"),
    "a narrow weight beside float32": ((GRAD, X, WEIGHT.bfloat16()), "weight is torch.bfloat16"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: tuple[Tensor, ...], match: str) -> None:
    from bert_fast._C import dense

    with pytest.raises(ValueError, match=f"dense: {match}"):
        dense(*args)


@pytest.mark.parametrize(("args", "match"), REFUSED_BACKWARD.values(), ids=REFUSED_BACKWARD.keys())
def test_refused_backward(args: tuple[Tensor, ...], match: str) -> None:
    from bert_fast._C import dense_backward

    with pytest.raises(ValueError, match=f"dense_backward: {match}"):
        dense_backward(*args, True, True, True)


# --------------------------------------------------------------------------------------------------------------- the op


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    if impl not in ("reference", *(i.name for i in OP.impls)):
        pytest.skip(f"has no {impl} form")
    if (dtype, weight_dtype) == (torch.float32, torch.bfloat16):
        pytest.skip("refused: test_refused")
    inputs = [torch.randn(4, 3, 20).to(DEVICE, dtype)]
    inputs += [torch.randn(*shape).to(DEVICE, weight_dtype) for shape in ((33, 20), (33,))]
    assert_gradients(lambda *args: ops.dense(*args, impl=impl), reference, *inputs)


def test_gradcheck_of_the_definition() -> None:
    inputs = [torch.randn(*shape).double().requires_grad_() for shape in ((3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(reference, inputs)


def test_frozen_weights_get_no_gradient() -> None:
    x, weight, bias = torch.randn(3, 5, requires_grad=True), torch.randn(4, 5), torch.randn(4, requires_grad=True)
    ops.dense(x, weight, bias).square().sum().backward()
    assert weight.grad is None
    assert x.grad is not None
    assert bias.grad is not None


OP_REFUSED = {
    "dtypes": ((X, WEIGHT.double(), BIAS.double()), "x is torch.float32 but|weight is torch.float64 but"),
    "widths": ((X[:, :2], WEIGHT, BIAS), r"x has shape \(2, 2\) and weight \(4, 3\)"),
    "bias": ((X, WEIGHT, torch.ones(3)), r"bias has shape \(3,\), expected \(4,\)"),
}


@pytest.mark.parametrize(("args", "match"), OP_REFUSED.values(), ids=OP_REFUSED.keys())
def test_the_op_refuses(args: tuple[Tensor, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.dense(*args)
