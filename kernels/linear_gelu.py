"""gelu(x @ weight.T + bias), in one of two ways: one Triton product with an epilogue, or cuBLAS and a pass over memory.

Which way is the faster depends on the GPU and the shape; `bert-fast tune` measures it, `tuned.py` knows it. Without a
measurement cuBLAS and the pass run.
"""

# mypy: allow-untyped-defs

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import tuned
from bert_fast.kernels.bias_gelu import bias_gelu, gelu


class Config(NamedTuple):
    """A way to cut the product: rows, columns and depth of a program's tile, its warps, and tiles in flight."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that the tiles of x and weight take, of 16-bit dtypes."""
        return 2 * (self.block_m + self.block_n) * self.block_k * self.num_stages


#: The configurations that are measured. The GELU of a tile takes the plain units about half as long as the matrix units
#: take for its product (in_features 768). Tiles of 128 x 128 leave room for a second program on a multiprocessor, whose
#: product runs meanwhile; 128 x 256 reads less per product; the narrow ones give few rows to all multiprocessors.
CONFIGS = (
    Config(128, 256, 64, 8, 3),
    Config(128, 256, 64, 8, 4),
    Config(256, 128, 64, 8, 3),
    Config(128, 128, 64, 4, 3),
    Config(128, 128, 64, 8, 3),
    Config(64, 256, 64, 4, 2),
    Config(64, 128, 64, 4, 4),
    Config(64, 64, 128, 4, 3),
    Config(64, 32, 128, 4, 4),
)

_GROUP_M = 8  # tiles of rows that go through all columns together, so that both operands of neighbours are in L2


def candidates(compute_capability: int, shared_bytes: int) -> tuple[Config, ...]:
    """The configurations that a GPU can run: of compute capability 80 (8.0) on, with so much shared memory a program.

    Below 8.0 Triton multiplies without the matrix units.
    """
    return tuple(c for c in CONFIGS if compute_capability >= 80 and c.shared_bytes <= shared_bytes)


def candidates_on(device: torch.device) -> tuple[Config, ...]:
    """The configurations that this GPU, which is there, can run."""
    major, minor = torch.cuda.get_device_capability(device)
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return candidates(10 * major + minor, properties["max_shared_mem"])


@triton.jit(do_not_specialize=["num_rows"])
def _linear_gelu_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    out_features,
    stride_x_row,
    stride_weight_row,
    IN_FEATURES: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Programs go down GROUP_M tiles of rows, then to the next tile of columns.
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(out_features, BLOCK_N)
    group, within = tl.program_id(0) // (GROUP_M * tiles_n), tl.program_id(0) % (GROUP_M * tiles_n)
    group_m = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    rows = (group * GROUP_M + within % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // group_m * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)

    # Past the last row the last one is read again, so that the loop needs no mask; its products are not stored.
    x_rows = x_ptr + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * stride_x_row
    weight_rows = weight_ptr + tl.minimum(columns, out_features - 1).to(tl.int64)[None, :] * stride_weight_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, IN_FEATURES, BLOCK_K):
        channels = start + depth
        if IN_FEATURES % BLOCK_K == 0:
            x = tl.load(x_rows + channels[None, :])
            weight = tl.load(weight_rows + channels[:, None])
        else:
            x = tl.load(x_rows + channels[None, :], mask=(channels < IN_FEATURES)[None, :], other=0.0)
            weight = tl.load(weight_rows + channels[:, None], mask=(channels < IN_FEATURES)[:, None], other=0.0)
        acc = tl.dot(x, weight, acc)

    in_columns = columns < out_features
    bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)
    out = gelu(acc + bias[None, :], TANH, True).to(out_ptr.dtype.element_ty)
    out_rows = out_ptr + rows.to(tl.int64)[:, None] * out_features
    tl.store(out_rows + columns[None, :], out, mask=(rows < num_rows)[:, None] & in_columns[None, :])


def by_epilogue(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, out: Tensor, config: Config) -> Tensor:
    """One product in Triton that ends in the GELU; arguments as of `linear_gelu`, matrices of a 16-bit dtype.

    Returns:
        `out`, contiguous (rows, out_features).
    """
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    num_tiles = triton.cdiv(num_rows, config.block_m) * triton.cdiv(out_features, config.block_n)
    with torch.cuda.device_of(x):
        _linear_gelu_kernel[(num_tiles,)](
            x,
            weight,
            bias,
            out,
            num_rows,
            out_features,
            x.stride(0),
            weight.stride(0),
            IN_FEATURES=in_features,
            TANH=approximate == "tanh",
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            GROUP_M=_GROUP_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out


def by_pass(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, out: Tensor) -> Tensor:
    """cuBLAS, then bias and GELU in place; arguments as of `linear_gelu`, matrices."""
    torch.mm(x, weight.t(), out=out)
    return bias_gelu(out, bias, approximate, out)


@functools.cache
def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def chosen(gpu: str, dtype: torch.dtype, in_features: int, out_features: int, num_rows: int) -> Config | None:
    """The configuration that was the fastest for so many rows, or None for cuBLAS and the pass.

    Raises:
        ValueError: the table has an entry that is no configuration of this version.
    """
    name = tuned.key("linear_gelu", dtype, in_features, out_features, tuned.bucket(num_rows))
    entry = tuned.table(gpu).get(name)
    if entry is None:
        return None
    config = next((c for c in CONFIGS if list(c) == entry), None)
    if config is None:
        raise ValueError(f"linear_gelu: the table of {gpu} has {entry} for {name!r}; measure again: bert-fast tune")
    return config


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, approximate: str, out: Tensor | None = None) -> Tensor:
    """gelu(x @ weight.T + bias), with sums and GELU in float32.

    Args:
        x: (..., in_features), float32, float16 or bfloat16.
        weight: (out_features, in_features), x's dtype.
        bias: (out_features,), x's dtype.
        approximate: "none" (erf) or "tanh".
        out: where the result goes: contiguous (..., out_features), shares no memory with x and weight.

    Returns:
        A contiguous tensor (..., out_features) of x's dtype.
    """
    out_features, in_features = weight.shape
    out = x.new_empty((*x.shape[:-1], out_features)) if out is None else out
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, in_features) if in_features else x.new_empty((out.numel() // out_features, 0))
    matrix, bias = out.view(-1, out_features), bias.contiguous()
    config = None
    if x.device.type == "cuda" and x.dtype != torch.float32:
        config = chosen(_gpu_name(x.device), x.dtype, in_features, out_features, rows.shape[0])
    if config is None:
        by_pass(rows, weight, bias, approximate, matrix)
    else:
        rows, weight = (t if t.stride(1) == 1 else t.contiguous() for t in (rows, weight))
        by_epilogue(rows, weight, bias, approximate, matrix, config)
    return out
