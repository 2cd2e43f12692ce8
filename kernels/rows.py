"""What the kernels share that read whole rows once and hold them in registers: how rows are cut, and their codes.

In a kernel rows are a tuple of parts, tiles of BLOCK_M rows and BLOCK_N channels, of 8 elements a thread: one 16-byte
load of a 16-bit dtype. With 768 or 1024 channels a warp has one row of each part, so that no warp waits for another.
"""

# mypy: allow-untyped-defs

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements a program: four such loads a thread in flight, or one where the rows are too few to give every multiprocessor
# several programs.
_TILE, _SMALL_TILE = 4096, 1024
_FEW_PROGRAMS = 512

#: The largest value of a code.
MAX_CODE = tl.constexpr(448.0)

_INFINITY_BITS = tl.constexpr(0x7F800000)
_TINY = tl.constexpr(2.0**-126)  # the smallest normal float32


def blocks(num_rows: int, width: int) -> dict[str, int]:
    """Rows of a program, channels of a part, and warps, as options of a launch."""
    whole = triton.next_power_of_2(width)
    num_warps = 8 if whole > _TILE else 4
    tile = _SMALL_TILE if num_rows * whole < _TILE * _FEW_PROGRAMS else _TILE
    part = 8 * 32 * num_warps
    block_m = max(1, min(tile // whole, part // 8))
    return {"BLOCK_M": block_m, "BLOCK_N": min(whole, part // block_m), "num_warps": num_warps}


@triton.jit
def _magnitude_bits(values):
    """The bits of |values|, float32, as int32: they order as the magnitudes do, with infinity and NaN above all."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def store_codes(parts, codes_ptr, scales_ptr, rows, in_rows, block, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store rows as float8 codes times a scale: max|row| / 448, 1 for zeros, NaN for what is not finite.

    parts: of the rows, float32, zero past WIDTH. rows (BLOCK_M, 1), in_rows: their indices, and whether there are such.
    block (1, BLOCK_N): channels of a part.
    """
    largest = _magnitude_bits(parts[0])
    for start in tl.static_range(BLOCK_N, WIDTH, BLOCK_N):
        largest = tl.maximum(largest, _magnitude_bits(parts[start // BLOCK_N]))
    largest = tl.max(largest, axis=1, keep_dims=True)
    # Divisions rounded to nearest: `/` may be off by two units, and codes at the middle of two would go the other way.
    scale = tl.maximum(tl.div_rn(largest.to(tl.float32, bitcast=True), MAX_CODE), _TINY)
    scale = tl.where(largest == 0, 1.0, tl.where(largest < _INFINITY_BITS, scale, float("nan")))
    tl.store(scales_ptr + rows, scale, mask=in_rows)
    inverse = tl.div_rn(1.0, scale)
    for start in tl.static_range(0, WIDTH, BLOCK_N):
        channels = start + block
        codes = (parts[start // BLOCK_N] * inverse).to(tl.float8e4nv)
        tl.store(codes_ptr + rows * WIDTH + channels, codes, mask=in_rows & (channels < WIDTH))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 where CPU tensors stand in for a GPU's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def sharing_programs(num_tiles: int, device: torch.device) -> int:
    """How many programs share tiles whose sums each of them keeps: program i has tiles i, i + programs, ...

    Six a multiprocessor are whole rounds of the two or three that fit on it. Which program adds up what depends on
    sizes alone, and `sum_of_programs` adds up the rest: so a sum has the same bits every time.
    """
    return min(num_tiles, 6 * _multiprocessors(device))


@triton.jit(do_not_specialize=["num_programs"])
def _sum_of_programs_kernel(sums_ptr, out_ptr, num_programs, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, num_programs, BLOCK_M):
        programs = (first + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        inside = (programs < num_programs) & (columns < width)
        total += tl.load(sums_ptr + programs * width + columns, mask=inside, other=0.0)
    tl.store(out_ptr + columns, tl.sum(total, axis=0, keep_dims=True), mask=columns < width)


def sum_of_programs(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first dimension of contiguous float32 (num_programs, ...), rounded to `dtype` once."""
    num_programs, *shape = sums.shape
    out = sums.new_empty(shape, dtype=dtype)
    with torch.cuda.device_of(sums):
        _sum_of_programs_kernel[(triton.cdiv(out.numel(), 32),)](
            sums, out, num_programs, out.numel(), BLOCK_M=64, BLOCK_N=32
        )
    return out
