"""linear: packing, forward against the truth at every precision and epilogue, exactness, invariance, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from implementations import Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_no_worse
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.linear import ACTIVATIONS, PRECISIONS, PackedWeight, quantize, reference, unpack

#: What follows the product; `arguments` makes its tensors.
EPILOGUES = ("bias", *ACTIVATIONS, "residual", "residual and LayerNorm", "LayerNorm")
EPS = 1e-12

#: Weights are packed for the CPU: no Triton here.
on_cpu = pytest.mark.parametrize(
    "implementation", [p for p in parameters() if p.values[0].name == "cpp"], indirect=True
)

# (rows, in_features, out_features)
SHAPES = {
    "one input feature": (1, 1, 8),
    "one row": (1, 64, 96),
    "no dimension a multiple of a panel": (5, 33, 31),
    "more rows than one tile, one column past a panel": (33, 40, 65),
    "MiniLM's second feed-forward product, few rows": (16, 1536, 384),
    "more rows than one block": (150, 64, 40),
    "BERT-base's longest sum": (20, 3072, 64),
    "rows whose starts share a set of the cache": (12, 2048, 256),
}


def packed(precision: str, out_features: int, in_features: int) -> PackedWeight:
    weight = torch.randn(out_features, in_features) / in_features**0.5
    return PackedWeight.pack(weight, torch.randn(out_features), precision=precision)


def arguments(x: Tensor, weight: PackedWeight, epilogue: str) -> list[Any]:
    """The arguments of the definition."""
    residual = norm_weight = norm_bias = None
    if "residual" in epilogue:
        residual = torch.randn(*x.shape[:-1], weight.out_features).to(x.dtype)
    if "LayerNorm" in epilogue:
        norm_weight, norm_bias = torch.randn(2, weight.out_features).to(x.dtype)
    activation = epilogue if epilogue in ACTIVATIONS else None
    sizes = (weight.out_features, weight.in_features)
    return [x, weight.panels, weight.vectors, *sizes, activation, residual, norm_weight, norm_bias, EPS]


def in_dtype(args: list[Any], dtype: torch.dtype) -> list[Any]:
    """The same values with all but the packed weights in `dtype`."""
    return [a.to(dtype) if isinstance(a, Tensor) and i not in (1, 2) else a for i, a in enumerate(args)]


def assert_right(fast: Tensor, args: list[Any]) -> None:
    """No worse than the definition in x's dtype, or in bfloat16 where that is the precision.

    In int8 the exact GELU has an error that only disappears beside a rounding to bfloat16 or less.
    """
    x, panels, activation = args[0], args[1], args[5]
    is_bfloat16 = panels.dtype == torch.bfloat16 or (panels.dtype == torch.int8 and activation == "gelu")
    plain_dtype = torch.bfloat16 if is_bfloat16 else x.dtype
    assert fast.is_contiguous()
    plain = reference(*in_dtype(args, plain_dtype)).to(x.dtype)
    assert_no_worse(fast, plain, reference(*in_dtype(args, torch.float64)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@on_cpu
def test_forward(implementation: Implementation, shape: tuple[int, int, int], precision: str, epilogue: str) -> None:
    rows, in_features, out_features = shape
    args = arguments(implementation.randn(rows, in_features), packed(precision, out_features, in_features), epilogue)
    assert_right(implementation("linear", *args), args)


@on_cpu
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 9), max_size=3),
    in_features=st.integers(1, 100),
    out_features=st.integers(1, 100),
    precision=st.sampled_from(list(PRECISIONS)),
    epilogue=st.sampled_from(EPILOGUES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(
    implementation: Implementation,
    leading: list[int],
    in_features: int,
    out_features: int,
    precision: str,
    epilogue: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    args = arguments(
        implementation.randn(*leading, in_features), packed(precision, out_features, in_features), epilogue
    )
    fast = implementation("linear", *args)
    assert fast.shape == (*leading, out_features)
    assert fast.dtype == implementation.dtype
    assert fast.isfinite().all()
    truth = reference(*in_dtype(args, torch.float64))
    if fast.numel() and "LayerNorm" not in epilogue:  # the LayerNorm of a few columns magnifies any error
        rounds = implementation.dtype == torch.bfloat16 or (precision == "bf16" and epilogue in ACTIVATIONS)
        allowed = 1e-2 if rounds else 2e-4 if (precision, epilogue) == ("int8", "gelu") else 1e-5
        assert (fast.double() - truth).abs().max() <= allowed * (1 + truth.abs().max())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("in_features", [36, 64])  # padded, and used as it lies
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@on_cpu
def test_layouts(
    implementation: Implementation, layout: Callable[[Tensor], Tensor], in_features: int, precision: str
) -> None:
    args = arguments(
        implementation.randn(4, 3, in_features), packed(precision, 40, in_features), "residual and LayerNorm"
    )
    expected = implementation("linear", *args)
    others = [layout(a) if isinstance(a, Tensor) and i not in (1, 2) else a for i, a in enumerate(args)]
    assert torch.equal(implementation("linear", *others), expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@on_cpu
def test_expanded(implementation: Implementation, precision: str) -> None:
    row = implementation.randn(64)
    args = arguments(row.expand(5, 64), packed(precision, 40, 64), "bias")
    assert torch.equal(implementation("linear", *args), implementation("linear", row, *args[1:]).expand(5, 40))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
@on_cpu
def test_no_rows(implementation: Implementation, shape: tuple[int, ...], precision: str) -> None:
    for epilogue in EPILOGUES:
        out = implementation("linear", *arguments(implementation.randn(*shape), packed(precision, 5, 8), epilogue))
        assert out.shape == (*shape[:-1], 5)
        assert out.dtype == implementation.dtype


@on_cpu
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 70),
    with_residual=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_8_bit_integers_are_exact(
    implementation: Implementation, rows: int, in_features: int, out_features: int, with_residual: bool, seed: int
) -> None:
    """Rows from 0 to 255 have a scale of 1, as have weights to 127; the sums fit a float, and all of them are right."""
    torch.manual_seed(seed)
    x = torch.randint(0, 256, (rows, in_features)).float()
    weight = torch.randint(-127, 128, (out_features, in_features)).float()
    if in_features > 1:
        x[:, 0], x[:, -1] = 0, 255
    weight[:, 0] = 127
    bias = torch.randint(-9, 10, (out_features,)).float()
    exact = (x.double() @ weight.double().T + bias.double()).to(implementation.dtype)
    residual = torch.zeros(rows, out_features).to(implementation.dtype) if with_residual else None
    packed_weight = PackedWeight.pack(weight, bias, precision="int8")
    args = (packed_weight.panels, packed_weight.vectors, out_features, in_features)
    assert torch.equal(
        implementation("linear", x.to(implementation.dtype), *args, None, residual, None, None, EPS), exact
    )


# ---------------------------------------------------------------------------------------------------- rows on their own


@on_cpu
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 300),
    in_features=st.integers(1, 300),
    out_features=st.integers(1, 300),
    precision=st.sampled_from(list(PRECISIONS)),
    epilogue=st.sampled_from(EPILOGUES),
    data=st.data(),
)
def test_a_row_has_the_same_bits_alone_and_in_any_batch(
    implementation: Implementation,
    rows: int,
    in_features: int,
    out_features: int,
    precision: str,
    epilogue: str,
    data: st.DataObject,
) -> None:
    args = arguments(implementation.randn(rows, in_features), packed(precision, out_features, in_features), epilogue)
    with threads(1):
        expected = implementation("linear", *args)
    with threads(2):
        assert torch.equal(implementation("linear", *args), expected)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    for first, last in ((begin, end), (begin, begin + 1)):
        part = [a[first:last] if i in (0, 6) and a is not None else a for i, a in enumerate(args)]
        for count in (1, 2):
            with threads(count):
                assert torch.equal(implementation("linear", *part), expected[first:last])


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("precision", PRECISIONS)
@on_cpu
def test_many_and_few_rows_have_the_same_bits(implementation: Implementation, precision: str, epilogue: str) -> None:
    # At two threads 40 rows share the columns, 400 rows the rows.
    args = arguments(implementation.randn(400, 384), packed(precision, 416, 384), epilogue)
    few = [a[:40] if i in (0, 6) and a is not None else a for i, a in enumerate(args)]
    with threads(2):
        assert torch.equal(implementation("linear", *few), implementation("linear", *args)[:40])


def test_many_callers_at_once() -> None:
    weight, inputs = packed("int8", 200, 300), [torch.randn(rows, 300) for rows in range(1, 65)]
    expected = [ops.linear(x, weight, activation="gelu") for x in inputs]
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(lambda x: ops.linear(x, weight, activation="gelu"), inputs))
    assert all(map(torch.equal, results, expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("precision", PRECISIONS)
@on_cpu
def test_what_is_not_finite_stays_in_its_row(
    implementation: Implementation, precision: str, epilogue: str, value: float
) -> None:
    args = arguments(implementation.randn(7, 40), packed(precision, 33, 40), epilogue)
    clean = implementation("linear", *args)
    args[0][2, 3] = value
    out = implementation("linear", *args)
    if precision == "int8":
        assert out[2].isnan().all()
    else:
        assert not out[2].isfinite().all()
    out[2] = clean[2]
    assert torch.equal(out, clean)


# ------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("shape", [(1, 1), (31, 33), (64, 96), (70, 5)], ids=str)
def test_packing_rounds_as_documented(shape: tuple[int, int]) -> None:
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    weight[0] = 0.0  # a row without a largest element
    largest = weight.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    rounded = {
        "fp32": weight.double(),
        "bf16": weight.bfloat16().double(),
        "int8": (weight * (1 / scale)).round().double() * scale.double(),
    }
    for precision, expected in rounded.items():
        packed_weight = PackedWeight.pack(weight, bias, precision=precision)
        args = (packed_weight.panels, packed_weight.vectors, *shape)
        assert torch.equal(unpack(*args, torch.float64), expected)
        assert torch.equal(packed_weight.vectors[0, : shape[0]], bias)
        # Beyond the matrix there is nothing.
        assert packed_weight.panels.count_nonzero() == expected.count_nonzero()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_bytes_do_not_depend_on_the_cpu(precision: str) -> None:
    from bert_fast import _C

    weight, bias = torch.randn(70, 45), torch.randn(70)
    before = _C.get_isa()
    try:
        all_bytes = []
        for isa in _C.available_isas():
            _C.set_isa(isa)
            p = PackedWeight.pack(weight, bias, precision=precision)
            all_bytes.append(p.panels.view(torch.uint8).flatten().tolist() + p.vectors.flatten().tolist())
    finally:
        _C.set_isa(before)
    assert all(b == all_bytes[0] for b in all_bytes)


def test_a_packed_weight_says_what_it_is() -> None:
    weight = packed("int8", 33, 40)
    assert (weight.out_features, weight.in_features, weight.precision) == (33, 40, "int8")
    assert weight.nbytes == 64 * 64 + 3 * 64 * 4
    assert repr(weight) == "PackedWeight(out_features=33, in_features=40, precision='int8', nbytes=4864)"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_copies_and_pickles(precision: str) -> None:
    weight, x = packed(precision, 33, 40), torch.randn(3, 40)
    expected = ops.linear(x, weight)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    others = (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.load(file, weights_only=False))
    for other in others:
        assert other.panels.data_ptr() != weight.panels.data_ptr()
        assert torch.equal(ops.linear(x, other), expected)


def test_without_bias_and_from_other_dtypes() -> None:
    weight = torch.randn(5, 7).bfloat16()
    x = torch.randn(2, 7)
    with_zeros = PackedWeight.pack(weight, torch.zeros(5).bfloat16())
    for other in (
        PackedWeight.pack(weight),
        PackedWeight.pack(weight.double()),
        PackedWeight.pack(weight.T.contiguous().T),
    ):
        assert torch.equal(ops.linear(x, other), ops.linear(x, with_zeros))


def test_weights_that_are_not_finite_stay_in_their_column() -> None:
    weight = torch.randn(5, 7)
    weight[2, 3] = float("inf")
    for precision in PRECISIONS:
        out = ops.linear(torch.randn(4, 7), PackedWeight.pack(weight, precision=precision))
        assert (~out.isfinite()).nonzero()[:, 1].unique().tolist() == [2]


PACKING_REFUSED = {
    "integers": ((torch.ones(2, 3, dtype=torch.int64),), {}, r"weight is torch\.int64"),
    "a vector": ((torch.ones(3),), {}, r"weight has shape \(3,\)"),
    "nothing": ((torch.ones(0, 3),), {}, r"weight has shape \(0, 3\)"),
    "bias's shape": ((torch.ones(2, 3), torch.ones(3)), {}, r"bias has shape \(3,\), expected \(2,\)"),
    "bias's dtype": ((torch.ones(2, 3), torch.ones(2).half()), {}, r"bias is torch\.float16"),
    "device": ((torch.ones(2, 3, device="meta"),), {}, "weight is on meta, expected cpu"),
    "precision": ((torch.ones(2, 3),), {"precision": "int4"}, "precision is 'int4', expected one of fp32, bf16, int8"),
    "a sum too long": (
        (torch.ones(1, 70_000),),
        {"precision": "int8"},
        "int8 takes up to 65793 in_features, not 70000",
    ),
}


@pytest.mark.parametrize(("args", "options", "match"), PACKING_REFUSED.values(), ids=PACKING_REFUSED.keys())
def test_packing_refused(args: tuple[Tensor, ...], options: dict[str, str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PackedWeight.pack(*args, **options)


# ------------------------------------------------------------------------------------------------ definition, gradients


def test_8_bit_rows_are_within_half_a_step() -> None:
    x = torch.randn(50, 70).double()
    step = (x.amax(1) - x.amin(1)) / 255
    assert ((quantize(x) - x).abs() <= 0.5001 * step[:, None]).all()
    constant = torch.full((1, 4), 3.5)
    assert torch.equal(quantize(constant), constant)


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_gradcheck_of_the_definition(epilogue: str) -> None:
    args = in_dtype(arguments(torch.randn(3, 6), packed("fp32", 5, 6), epilogue), torch.float64)
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and i not in (1, 2)]

    def function(*tensors: Tensor) -> Tensor:
        full = list(args)
        for i, tensor in zip(wanted, tensors, strict=True):
            full[i] = tensor
        return reference(*full)

    assert torch.autograd.gradcheck(function, [args[i].requires_grad_() for i in wanted])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_pass_through_the_rounding(precision: str) -> None:
    weight = packed(precision, 5, 6)
    x, residual = (torch.randn(3, n, requires_grad=True) for n in (6, 5))
    upstream = torch.randn(3, 5)
    grad_x, grad_residual = torch.autograd.grad(ops.linear(x, weight, residual=residual), (x, residual), upstream)
    matrix = unpack(weight.panels, weight.vectors, 5, 6, torch.float32)
    rounds = precision == "bf16"  # as the cast of x back and forth does
    torch.testing.assert_close(grad_x, upstream @ matrix, rtol=2**-8 if rounds else 1e-5, atol=1e-5)
    assert torch.equal(grad_residual, upstream)


# ------------------------------------------------------------------------------------------------------------- refusals

WEIGHT = PackedWeight(torch.zeros(1, 32, 32, 1), torch.zeros(3, 32), 5, 3)
X = torch.ones(2, 3)
NORM = (torch.ones(5), torch.ones(5), EPS)

REFUSED = {
    "integers": ((X.long(), WEIGHT), {}, r"x is torch\.int64"),
    "a scalar": ((torch.tensor(1.0), WEIGHT), {}, r"x has shape \(\), expected \(\.\.\., 3\)"),
    "features": ((torch.ones(2, 4), WEIGHT), {}, r"x has shape \(2, 4\), expected \(\.\.\., 3\)"),
    "device": ((X.to("meta"), WEIGHT), {}, "weight is on cpu but x is on meta"),
    "an activation unknown": ((X, WEIGHT), {"activation": "silu"}, "activation is 'silu', expected one of gelu"),
    "residual's shape": ((X, WEIGHT), {"residual": X}, r"residual has shape \(2, 3\), expected \(2, 5\)"),
    "residual's dtype": ((X, WEIGHT), {"residual": torch.ones(2, 5).half()}, r"residual is torch\.float16 but x is"),
    "gain's shape": ((X, WEIGHT), {"layer_norm": (X[0], NORM[1], EPS)}, r"layer_norm weight has shape \(3,\)"),
    "norm's bias": ((X, WEIGHT), {"layer_norm": (NORM[0], X[0], EPS)}, r"layer_norm bias has shape \(3,\)"),
    "no bias": ((X, WEIGHT), {"layer_norm": (NORM[0], None, EPS)}, "one of norm_weight and norm_bias is given"),
    "eps not finite": ((X, WEIGHT), {"layer_norm": (*NORM[:2], float("nan"))}, "eps is nan"),
    "eps negative": ((X, WEIGHT), {"layer_norm": (*NORM[:2], -1.0)}, "eps is -1"),
    "activation and residual": (
        (X, WEIGHT),
        {"activation": "gelu", "residual": torch.ones(2, 5)},
        "activation is 'gelu' with a residual",
    ),
    "activation and LayerNorm": ((X, WEIGHT), {"activation": "relu", "layer_norm": NORM}, "activation is 'relu' with"),
    "panels of another matrix": (
        (X, PackedWeight(torch.zeros(1, 32, 32, 1), torch.zeros(3, 32), 33, 3)),
        {},
        r"weight has panels of .*, which no packing of \(33, 3\) gives",
    ),
    "panels not dense": (
        (X, PackedWeight(torch.zeros(1, 1, 1, 1).expand(1, 32, 32, 1), torch.zeros(3, 32), 5, 3)),
        {},
        r"weight has panels of .*, which no packing of \(5, 3\) gives",
    ),
    "vectors too short": (
        (X, PackedWeight(WEIGHT.panels, torch.zeros(3, 5), 5, 3)),
        {},
        "weight has panels of .*, which no packing of",
    ),
    "panels of doubles": (
        (X, PackedWeight(WEIGHT.panels.double(), WEIGHT.vectors, 5, 3)),
        {},
        "weight has panels of .*, which no packing of",
    ),
}


@pytest.mark.parametrize(("args", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: tuple[Any, ...], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=f"linear: {match}"):
        ops.linear(*args, **options)
    if args[0].device.type == "cpu":  # the extension refuses it by itself
        from bert_fast._C import linear

        x, weight = args
        norm_weight, norm_bias, eps = options.get("layer_norm", (None, None, EPS))
        with pytest.raises(ValueError, match="linear: "):
            linear(
                x, weight.panels, weight.vectors, weight.out_features, weight.in_features, options.get("activation"),
                options.get("residual"), norm_weight, norm_bias, eps,
            )  # fmt: skip


def test_dtypes_without_kernels_take_the_definition() -> None:
    weight, x = packed("int8", 5, 6), torch.randn(2, 6).double()
    args = arguments(x, weight, "gelu")
    assert torch.equal(ops.linear(x, weight, activation="gelu"), reference(*args))
    with pytest.raises(ValueError, match="linear: cpp is forced but takes float32, bfloat16, not float64"):
        ops.linear(x, weight, impl="cpp")
