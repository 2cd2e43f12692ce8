"""float8: codes and scales of the kernels against their definition, and the product against dequantised float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from implementations import HAS_GPU, Implementation, parameters
from layouts import LAYOUTS
from torch import Tensor

from bert_fast.ops.bias_gelu import reference as bias_gelu
from bert_fast.ops.embedding_layer_norm import reference as embedding_layer_norm
from bert_fast.ops.residual_layer_norm import reference as residual_layer_norm

FLOAT8 = torch.float8_e4m3fn
#: Whose kernels make the codes.
TRITON = [parameter for parameter in parameters() if parameter.values[0].name == "triton"]
DEVICE = "cuda" if HAS_GPU else "cpu"

WIDTHS = {"one code": 1, "narrower than any vector": 5, "MiniLM": 384, "BERT-base, wide": 3072, "two blocks": 8200}


@pytest.fixture(autouse=True)
def _interpreter_rounds_to_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter drops the carry when it rounds to e4m3 (126.2 becomes 64): torch rounds in its place.

    So the kernels are tested up to the conversion, which on a GPU is one instruction.
    """
    if not HAS_GPU:
        import triton.language as tl
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(values: Any, source: Any, target: Any, mode: Any) -> Any:
            if target != tl.float8e4nv:
                return convert(values, source, target, mode)
            assert source == tl.float32
            return torch.from_numpy(values.copy()).to(FLOAT8).view(torch.uint8).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)


@pytest.fixture(params=[False, True], ids=["few rows", "many rows"])
def _rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in one part, or in several as where there are many of them."""
    from bert_fast.kernels import rows

    if request.param:
        monkeypatch.setattr(rows, "_FEW_PROGRAMS", 0)


def empty_codes(*shape: int) -> tuple[Tensor, Tensor]:
    """Codes and scales that hold NaN until a kernel writes them."""
    codes = torch.full(shape, float("nan"), device=DEVICE).to(FLOAT8)
    return codes, torch.full((codes.numel() // shape[-1], 1), float("nan"), device=DEVICE)


def assert_quantized(codes: Tensor, scales: Tensor, rows: Tensor, slack: float = 0.0) -> None:
    """codes * scales is within half a step of e4m3 of the rows, plus `slack` of a row's largest value."""
    assert codes.dtype == FLOAT8
    rows, codes, scales = rows.double().view(codes.shape).flatten(0, -2), codes.double().flatten(0, -2), scales.double()
    largest = rows.abs().amax(1, keepdim=True)
    expected = torch.where(largest > 0, largest / 448, 1.0)
    assert torch.allclose(scales, expected, rtol=1e-6 + slack, atol=0)
    # Three bits of fraction: a step is 2^-3 of the power of two below a value, and 2^-9 below 2^-6.
    half_step = torch.maximum(rows.abs() / 16, scales * 2**-10)
    assert ((codes * scales - rows).abs() <= half_step * (1 + 1e-6) + slack * largest).all()
    assert (codes.abs().amax(1) == torch.where(largest > 0, 448.0, 0.0)[:, 0]).all()


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS.keys())
@pytest.mark.parametrize("triton", TRITON)
def test_rows(triton: Implementation, width: int) -> None:
    from bert_fast.kernels.quantize import quantize_rows

    x = triton.randn(7, width) * torch.logspace(-3, 3, 7, device=triton.device)[:, None].to(triton.dtype)
    assert_quantized(*quantize_rows(x), x)
    codes, scales = empty_codes(7, width)
    assert quantize_rows(x, codes, scales)[0] is codes
    assert_quantized(codes, scales, x)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("triton", TRITON)
def test_layouts(triton: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    from bert_fast.kernels.quantize import quantize_rows

    x = layout(triton.randn(5, 36))
    assert_quantized(*quantize_rows(x), x)


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype up to 448, so that a row of them has the scale 1."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return values[values.float().abs() <= 448][None]


def test_every_float16_is_rounded_to_nearest_even() -> None:
    from bert_fast.kernels.quantize import quantize_rows

    x = every_value(torch.float16).to(DEVICE)
    codes, scales = quantize_rows(x)
    assert scales.item() == 1
    assert torch.equal(codes.float(), x.float().to(FLOAT8).float())


@pytest.mark.parametrize("triton", TRITON)
def test_zeros_tiny_and_huge_rows(triton: Implementation) -> None:
    from bert_fast.kernels.quantize import quantize_rows

    x = triton.randn(4, 40)
    info = torch.finfo(triton.dtype)
    x[0] = 0
    x[1] = info.smallest_normal * (1 + x[1].abs())
    x[2] = info.max
    codes, scales = quantize_rows(x)
    assert scales[0].item() == 1
    assert not codes[0].float().any()
    assert (codes[2].float() == 448).all()
    assert scales[2].item() == pytest.approx(info.max / 448)
    dequantized = codes.double() * scales
    assert torch.allclose(dequantized[1], x[1].double(), rtol=0, atol=float(x[1].max()) * 0.07 + 2.0**-127)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("triton", TRITON)
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(triton: Implementation, value: float) -> None:
    from bert_fast.kernels.quantize import quantize_rows

    x = triton.randn(5, 40)
    clean, clean_scales = quantize_rows(x)
    x[2, 3] = value
    codes, scales = quantize_rows(x)
    assert (codes[2].float() * scales[2]).isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(codes.view(torch.uint8)[others], clean.view(torch.uint8)[others])
    assert torch.equal(scales[others], clean_scales[others])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_zero_size(shape: tuple[int, int]) -> None:
    from bert_fast.kernels.quantize import quantize_rows

    codes, scales = quantize_rows(torch.empty(shape, device=DEVICE))
    assert codes.shape == shape
    assert scales.shape == (shape[0], 1)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("shape", [(17, 384), (3, 5), (2, 3, 40), (2, 8200)], ids=str)
@pytest.mark.parametrize("triton", TRITON)
def test_residual_layer_norm(triton: Implementation, shape: tuple[int, ...]) -> None:
    x, residual = triton.randn(*shape), triton.randn(*shape)
    bias, weight, layer_norm_bias = (triton.randn(shape[-1]) for _ in range(3))
    arguments = (x, bias, residual, weight, layer_norm_bias, 1e-12, 0.0)
    plain = triton("residual_layer_norm", *arguments)
    codes, scales = empty_codes(*shape)
    out = triton("residual_layer_norm", *arguments, None, codes, scales)
    assert torch.equal(out, plain)
    truth = residual_layer_norm(*(a.double() if isinstance(a, Tensor) else a for a in arguments))
    assert_quantized(codes, scales, truth, slack=2e-6)  # what float32 loses in a LayerNorm


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("hidden_size", [384, 5, 8200])
@pytest.mark.parametrize("triton", TRITON)
def test_embedding_layer_norm(triton: Implementation, hidden_size: int) -> None:
    ids = triton.tensor([[3, 1, 0], [2, 3, 3]], torch.int64)
    tables = [triton.randn(4, hidden_size) for _ in range(3)]
    arguments = (ids, ids, ids, *tables, triton.randn(hidden_size), triton.randn(hidden_size), 1e-12, 0.0)
    plain = triton("embedding_layer_norm", *arguments)
    codes, scales = empty_codes(2, 3, hidden_size)
    out = triton("embedding_layer_norm", *arguments, codes, scales)
    assert torch.equal(out, plain)
    double = (a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    assert_quantized(codes, scales, embedding_layer_norm(*double), slack=2e-6)


@pytest.mark.usefixtures("_rows")
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(6, 1536), (3, 5), (2, 3, 40), (2, 8200)], ids=str)
@pytest.mark.parametrize("triton", TRITON)
def test_bias_gelu(triton: Implementation, shape: tuple[int, ...], approximate: str) -> None:
    x, bias = triton.randn(*shape) * 2, triton.randn(shape[-1])
    truth = bias_gelu(x.double(), bias.double(), approximate)
    plain = triton("bias_gelu", x, bias, approximate)
    codes, scales = empty_codes(*shape)
    assert triton("bias_gelu", x, bias, approximate, None, codes, scales) is codes
    assert_quantized(codes, scales, truth, slack=1e-6)  # what float32 loses in a GELU
    again, again_scales = empty_codes(*shape)
    out = triton("bias_gelu", x, bias, approximate, x, again, again_scales)
    assert torch.equal(out, plain)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(again_scales, scales)


def test_weights() -> None:
    from bert_fast.kernels.quantize import quantize_weight

    weight = torch.randn(48, 32) * torch.logspace(-3, 3, 48)[:, None]
    weight[5] = 0
    codes, scales = quantize_weight(weight)
    assert scales.shape == (1, 48)
    assert_quantized(codes, scales.t(), weight)
    weight[7, 1] = float("inf")
    codes, scales = quantize_weight(weight)
    assert (codes[7].float() * scales[0, 7]).isnan().all()
    assert scales[0].isfinite().sum() == 47


@pytest.mark.gpu
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 7, 16, 300])
def test_product(rows: int, dtype: torch.dtype, has_bias: bool) -> None:
    from bert_fast.kernels.quantize import obstacle, quantize_rows, quantize_weight, scaled_linear

    if reason := obstacle(torch.device(DEVICE, 0)):
        pytest.skip(reason)
    assert_product(*product(rows, dtype, has_bias, quantize_rows, quantize_weight, scaled_linear), dtype)


@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_product_as_torch_has_it_on_the_cpu(rows: int) -> None:
    """The layouts, shapes and dtypes that `scaled_linear` hands on; a GPU asks for more of them (`test_product`)."""
    from bert_fast.kernels.quantize import quantize_weight, scaled_linear

    def plain_quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
        scales = x.float().abs().amax(1, keepdim=True) / 448
        return (x.float() / scales).to(FLOAT8), scales

    parts = product(rows, torch.bfloat16, True, plain_quantize_rows, quantize_weight, scaled_linear, "cpu")
    assert_product(*parts, torch.bfloat16)


def product(
    rows: int,
    dtype: torch.dtype,
    has_bias: bool,
    quantize_rows: Callable[[Tensor], tuple[Tensor, Tensor]],
    quantize_weight: Callable[[Tensor], tuple[Tensor, Tensor]],
    scaled_linear: Callable[..., Tensor],
    device: str = DEVICE,
) -> tuple[Tensor, Tensor]:
    """The product in `dtype`, and that of the dequantised operands in float64."""
    x, weight = torch.randn(rows, 768, device=device).to(dtype), torch.randn(384, 768, device=device).to(dtype)
    bias = torch.randn(384, device=device).to(dtype) if has_bias else None
    codes, scales = quantize_rows(x)
    weight_codes, weight_scales = quantize_weight(weight)
    truth = (codes.double() * scales) @ (weight_codes.double() * weight_scales.t()).t()
    return scaled_linear(codes, scales, weight_codes, weight_scales, bias, dtype), truth + (bias if has_bias else 0)


def assert_product(out: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """The sums of float8 products may be of 14 bits; then the result is rounded."""
    assert out.dtype == dtype
    assert out.shape == truth.shape
    if out.numel():
        bound = 2**-9 * truth.abs().amax() + torch.finfo(dtype).eps * truth.abs()
        assert ((out.double() - truth).abs() <= bound).all()


def codes_of(rows: int, width: int) -> Tensor:
    return torch.zeros(rows, width).to(FLOAT8)


REFUSED = {
    "an input dimension": (dict(codes=codes_of(2, 16)), r"codes has shape \(2, 16\), expected \(rows, 32\)"),
    "no codes": (dict(codes=torch.zeros(2, 32)), "codes is torch.float32"),
    "scales of another shape": (dict(scales=torch.ones(3, 1)), r"scales is torch.float32 of shape \(3, 1\)"),
    "scales of another dtype": (dict(scales=torch.ones(2, 1).half()), "scales is torch.float16"),
    "no scales": (dict(scales=None), "scales is None"),
    "weight's scales": (
        dict(weight_scales=torch.ones(48, 1)),
        r"weight_scales has shape \(48, 1\), expected \(1, 48\)",
    ),
    "float32": (dict(dtype=torch.float32), "dtype is torch.float32, expected torch.float16 or torch.bfloat16"),
    "bias of another dtype": (dict(bias=torch.zeros(48)), "bias is torch.float32"),
    "bias of another length": (
        dict(bias=torch.zeros(1, dtype=torch.bfloat16)),
        r"bias is torch.bfloat16 of shape \(1,\)",
    ),
}


@pytest.mark.parametrize(("changes", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], match: str) -> None:
    from bert_fast.kernels.quantize import scaled_linear

    arguments = dict(codes=codes_of(2, 32), scales=torch.ones(2, 1), weight_codes=codes_of(48, 32))
    arguments |= dict(weight_scales=torch.ones(1, 48), bias=None, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"scaled_linear: {match}"):
        scaled_linear(**(arguments | changes))


def test_refused_by_the_kernels() -> None:
    from bert_fast.kernels.bias_gelu import bias_gelu as kernel
    from bert_fast.kernels.quantize import obstacle, quantize_rows, quantize_weight

    x = torch.zeros(2, 32)
    with pytest.raises(ValueError, match=r"quantize_rows: x has shape \(32,\), expected \(rows, width\)"):
        quantize_rows(x[0])
    with pytest.raises(ValueError, match=r"quantize_rows: codes is torch.float8_e4m3fn of shape \(2, 16\)"):
        quantize_rows(x, codes_of(2, 16))
    with pytest.raises(ValueError, match=r"bias_gelu: codes is torch\.int8"):
        kernel(x, x[0], "none", None, x.to(torch.int8), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"quantize_weight: weight has shape \(2, 32\).*multiples of 16"):
        quantize_weight(x)
    assert obstacle(torch.device("cpu")) == "float8 needs an NVIDIA GPU, not cpu"
