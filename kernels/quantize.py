"""Products in float8 (e4m3): a scale for each row of the activations and for each output feature of the weights.

Nothing is calibrated. The kernels that make the activations quantise them too (`codes` and `scales` of their
launchers); the product is torch's.
"""

# mypy: allow-untyped-defs, disable-error-code=assignment

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels.rows import MAX_CODE, blocks, store_codes


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    num_rows,
    stride_row,
    stride,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    in_rows = rows < num_rows
    block = tl.arange(0, BLOCK_N).to(tl.int64)[None, :]
    parts = ()
    for start in tl.static_range(0, WIDTH, BLOCK_N):
        inside = in_rows & (start + block < WIDTH)
        x = tl.load(x_ptr + rows * stride_row + (start + block) * stride, mask=inside, other=0.0)
        parts = parts + (x.to(tl.float32),)
    store_codes(parts, codes_ptr, scales_ptr, rows, in_rows, block, WIDTH, BLOCK_N)


def check_codes(op: str, rows: Tensor, codes: Tensor, scales: Tensor | None) -> None:
    """ValueError unless codes and scales are such as the rows (num_rows, width) need.

    Raises:
        ValueError: `codes` is not contiguous float8_e4m3fn of the rows' shape, or `scales` not contiguous float32
            (num_rows, 1).
    """
    num_rows = math.prod(rows.shape[:-1])
    if codes.dtype != torch.float8_e4m3fn or codes.numel() != rows.numel() or not codes.is_contiguous():
        raise ValueError(
            f"{op}: codes is {codes.dtype} of shape {tuple(codes.shape)} with strides {codes.stride()}, expected "
            f"contiguous torch.float8_e4m3fn of shape {tuple(rows.shape)}"
        )
    if scales is None or scales.dtype != torch.float32 or scales.numel() != num_rows or not scales.is_contiguous():
        found = "None" if scales is None else f"{scales.dtype} of shape {tuple(scales.shape)}"
        raise ValueError(f"{op}: scales is {found}, expected contiguous torch.float32 of shape ({num_rows}, 1)")


def quantize_rows(x: Tensor, out: Tensor | None = None, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row as codes times a scale: x ~ codes * scales, to half a step of e4m3.

    Args:
        x: (rows, width), float32, float16 or bfloat16, any strides.
        out: where the codes go, contiguous float8_e4m3fn (rows, width).
        scales: where the scales go, contiguous float32 (rows, 1).

    Returns:
        The codes and the scales: max|row| / 448, 1 for a row of zeros, NaN for one that holds a NaN or an infinity.

    Raises:
        ValueError: x is not a matrix, or `out` or `scales` is not such a tensor.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize_rows: x has shape {tuple(x.shape)}, expected (rows, width)")
    num_rows, width = x.shape
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device) if out is None else out
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=x.device) if scales is None else scales
    check_codes("quantize_rows", x, codes, scales)
    if x.numel() == 0:
        return codes, scales
    shape = blocks(num_rows, width)
    with torch.cuda.device_of(x):
        _quantize_kernel[(triton.cdiv(num_rows, shape["BLOCK_M"]),)](
            x, codes, scales, num_rows, *x.stride(), WIDTH=width, **shape
        )
    return codes, scales


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of a linear module for `scaled_linear`; done once, in plain PyTorch.

    Args:
        weight: (out_features, in_features), floating point.

    Returns:
        Codes (out_features, in_features) float8_e4m3fn, and their scales (1, out_features) float32: max|row| / 448,
        1 for a row of zeros, NaN for one that holds a NaN or an infinity.

    Raises:
        ValueError: weight is no matrix, or a size of it is no multiple of 16, which the products need.
    """
    if weight.dim() != 2 or weight.shape[0] % 16 or weight.shape[1] % 16:
        raise ValueError(
            f"quantize_weight: weight has shape {tuple(weight.shape)}, expected (out_features, in_features), both "
            "multiples of 16"
        )
    rows = weight.detach().float()
    largest = rows.abs().amax(1, keepdim=True)
    scales = (largest / MAX_CODE.value).clamp_min(torch.finfo(torch.float32).tiny)
    scales = torch.where(largest > 0, scales, 1.0).where(largest.isfinite(), float("nan"))
    codes = (rows / scales).clamp(-MAX_CODE.value, MAX_CODE.value).to(torch.float8_e4m3fn)
    return codes, scales.t().contiguous()


@functools.cache
def obstacle(device: torch.device) -> str | None:
    """Why products in float8 do not run on `device`, or None where they do."""
    if device.type != "cuda":
        return f"float8 needs an NVIDIA GPU, not {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        return f"float8 needs compute capability 8.9, {torch.cuda.get_device_name(device)} has {major}.{minor}"
    return None


def scaled_linear(
    codes: Tensor,
    scales: Tensor,
    weight_codes: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(codes * scales) @ (weight_codes * weight_scales.T).T + bias, by the float8 matrix units.

    With `use_fast_accum` Hopper adds up products in about 14 bits (DeepSeek-V3, 2024, section 3.3.2); a code has 4.

    Args:
        codes, scales: (rows, in_features) float8_e4m3fn and (rows, 1) float32, as `quantize_rows` makes them.
        weight_codes, weight_scales: (out_features, in_features) and (1, out_features), as `quantize_weight` makes them.
        bias: (out_features,) in `dtype`, or None.
        dtype: of the result, float16 or bfloat16.

    Returns:
        (rows, out_features).

    Raises:
        ValueError: a dtype or shape is another.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"scaled_linear: dtype is {dtype}, expected torch.float16 or torch.bfloat16")
    out_features, in_features = weight_codes.shape
    if codes.dim() != 2 or codes.shape[1] != in_features:
        raise ValueError(f"scaled_linear: codes has shape {tuple(codes.shape)}, expected (rows, {in_features})")
    if weight_scales.shape != (1, out_features):
        raise ValueError(
            f"scaled_linear: weight_scales has shape {tuple(weight_scales.shape)}, expected (1, {out_features})"
        )
    if bias is not None and (bias.dtype != dtype or bias.shape != (out_features,)):
        raise ValueError(
            f"scaled_linear: bias is {bias.dtype} of shape {tuple(bias.shape)}, expected {dtype} ({out_features},)"
        )
    check_codes("scaled_linear", codes, codes, scales)
    if codes.shape[0] == 0:
        return torch.empty((0, out_features), dtype=dtype, device=codes.device)
    return torch._scaled_mm(
        codes,
        weight_codes.t(),
        scale_a=scales,
        scale_b=weight_scales,
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
