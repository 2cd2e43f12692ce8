"""linear_gelu: both ways against the truth, every configuration, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import HAS_GPU, Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.bias_gelu import APPROXIMATIONS
from bert_fast.ops.linear_gelu import reference

TRITON = [parameter for parameter in parameters() if parameter.values[0].name == "triton"]
#: dtypes of the product with an epilogue here; the interpreter treats bfloat16 wrongly.
EPILOGUE = [p for p in TRITON if p.values[0].dtype != torch.float32]
FORCEABLE = ("reference", "triton") if HAS_GPU else ("reference",)

# rows, in_features, out_features
SHAPES = {
    "one element": (1, 1, 1),
    "narrower than any vector": (3, 5, 7),
    "one text of MiniLM": (16, 384, 1536),
    "one past every tile of rows, columns and depth": (257, 129, 257),
    "one row, several tiles of columns": (1, 64, 600),
    "several groups of tiles of 64 rows": (600, 32, 40),
}


def inputs(implementation: Implementation, rows: int, in_features: int, out_features: int) -> tuple[Tensor, ...]:
    """x, weight, bias; the products are of the size of one."""
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(implementation.device, implementation.dtype)
    return implementation.randn(rows, in_features), weight, implementation.randn(out_features)


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("triton", TRITON)
def test_forward(triton: Implementation, shape: tuple[int, int, int], approximate: str) -> None:
    assert_forward(lambda *args: triton("linear_gelu", *args), reference, *inputs(triton, *shape), approximate)


def configs() -> list[Any]:
    """Of the candidates, those that this machine's GPU has room for; all under the interpreter."""
    from bert_fast.kernels import linear_gelu

    if not HAS_GPU:
        return list(linear_gelu.CONFIGS)
    return list(linear_gelu.candidates_on(torch.device("cuda", 0)))


def by_epilogue(triton: Implementation, config: Any) -> Callable[..., Tensor]:
    from bert_fast.kernels import linear_gelu

    def run(x: Tensor, weight: Tensor, bias: Tensor, approximate: str) -> Tensor:
        out = x.new_empty(x.shape[0], weight.shape[0])
        return linear_gelu.by_epilogue(x, weight, bias, approximate, out, config)

    return run


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("triton", EPILOGUE)
def test_epilogue(triton: Implementation, shape: tuple[int, int, int]) -> None:
    assert_forward(by_epilogue(triton, configs()[-1]), reference, *inputs(triton, *shape), "none")


@pytest.mark.parametrize("triton", EPILOGUE)
def test_every_configuration(triton: Implementation) -> None:
    arguments = inputs(triton, *SHAPES["one past every tile of rows, columns and depth"])
    for config in configs():
        assert_forward(by_epilogue(triton, config), reference, *arguments, "none")


@pytest.mark.parametrize("triton", EPILOGUE)
def test_epilogue_of_googles_form(triton: Implementation) -> None:
    arguments = inputs(triton, 70, 96, 130)
    assert_forward(by_epilogue(triton, configs()[-1]), reference, *arguments, "tanh")


@pytest.mark.parametrize("triton", EPILOGUE)
def test_epilogue_over_rows_of_a_wider_tensor(triton: Implementation) -> None:
    x, weight, bias = inputs(triton, 70, 96, 130)
    wide, wide_weight = torch.cat([x + 1, x, x], 1)[:, 96:192], torch.cat([weight, weight], 1)[:, 96:]
    assert_forward(by_epilogue(triton, configs()[-1]), reference, wide, wide_weight, bias, "none")


@pytest.mark.parametrize("triton", EPILOGUE)
def test_epilogue_keeps_nan_and_infinity_in_their_row(triton: Implementation) -> None:
    x, weight, bias = inputs(triton, 70, 96, 130)
    run = by_epilogue(triton, configs()[-1])
    clean = run(x, weight, bias, "none")
    x[3, 5], bias[7] = float("nan"), float("inf")
    out = run(x, weight, bias, "none")
    assert out[3].isnan().all()
    others = [i for i in range(70) if i != 3]
    assert (out[others, 7] == float("inf")).all()
    assert torch.equal(out[others, 8:], clean[others, 8:])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("triton", TRITON)
def test_layouts(triton: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    x, weight, bias = (layout(t) for t in inputs(triton, 12, 36, 20))
    assert_forward(lambda *args: triton("linear_gelu", *args), reference, x, weight, bias, "none")


@pytest.mark.parametrize("shape", [(0, 8, 4), (3, 0, 4), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("triton", TRITON)
def test_zero_size(triton: Implementation, shape: tuple[int, int, int]) -> None:
    rows, in_features, out_features = shape
    x, weight, bias = (
        triton.randn(rows, in_features),
        triton.randn(out_features, in_features),
        triton.randn(out_features),
    )
    assert_forward(lambda *args: triton("linear_gelu", *args), reference, x, weight, bias, "none")


@pytest.mark.parametrize("triton", TRITON)
def test_leading_dimensions_and_out(triton: Implementation) -> None:
    x, weight, bias = inputs(triton, 24, 36, 20)
    expected = triton("linear_gelu", x, weight, bias, "none")
    out = torch.empty_like(expected).view(2, 3, 4, 20)
    assert triton("linear_gelu", x.view(2, 3, 4, 36), weight, bias, "none", out) is out
    assert torch.equal(out.view(24, 20), expected)


@pytest.mark.gpu
def test_offsets_past_2_to_the_31() -> None:
    triton = Implementation("triton", torch.bfloat16, "cuda")
    x, weight, bias = inputs(triton, 2_200_000, 64, 1024)
    run = by_epilogue(triton, configs()[0])
    assert torch.equal(run(x, weight, bias, "none")[-3:], run(x[-3:], weight, bias, "none"))


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype, approximate: str) -> None:
    assert_gradients(
        lambda *tensors: ops.linear_gelu(*tensors, approximate=approximate, impl=impl),
        lambda *tensors: reference(*tensors, approximate),
        *inputs(Implementation("any", dtype, "cuda" if HAS_GPU else "cpu"), 12, 20, 9),
    )


@pytest.mark.parametrize("approximate", APPROXIMATIONS)
def test_gradcheck_of_the_definition(approximate: str) -> None:
    tensors = [t.requires_grad_() for t in inputs(Implementation("any", torch.float64), 3, 5, 4)]
    assert torch.autograd.gradcheck(lambda *tensors: reference(*tensors, approximate), tensors)


def test_on_a_cpu_the_definition_runs() -> None:
    x, weight, bias = inputs(Implementation("any", torch.float32), 3, 5, 4)
    assert torch.equal(ops.linear_gelu(x, weight, bias), reference(x, weight, bias, "none"))


REFUSED = {
    "integers": ((torch.ones(2, 3, dtype=torch.int64), torch.ones(4, 3), torch.ones(4)), "x is torch.int64"),
    "a scalar": ((torch.tensor(1.0), torch.ones(4, 3), torch.ones(4)), r"x has shape \(\), expected \(\.\.\., 3\)"),
    "rows of another length": ((torch.ones(2, 4), torch.ones(4, 3), torch.ones(4)), r"x has shape \(2, 4\)"),
    "no matrix": ((torch.ones(2, 3), torch.ones(3), torch.ones(4)), r"weight has shape \(3,\), expected \(out_feat"),
    "bias of another length": ((torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)), r"bias has shape \(3,\)"),
    "dtypes": ((torch.ones(2, 3), torch.ones(4, 3).half(), torch.ones(4)), "weight is torch.float16 but x"),
    "devices": ((torch.ones(2, 3), torch.ones(4, 3, device="meta"), torch.ones(4)), "weight is on meta but x"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: tuple[Tensor, ...], match: str) -> None:
    with pytest.raises(ValueError, match=f"linear_gelu: {match}"):
        ops.linear_gelu(*args)


def test_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="approximate is 'fast', expected one of none, tanh"):
        ops.linear_gelu(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4), approximate="fast")
