"""What the kernels share that read whole rows once and hold them in registers: how rows are cut, and their codes.

In a kernel rows are a tuple of parts, tiles of BLOCK_M rows and BLOCK_N channels, of 8 elements a thread: one 16-byte
load of a 16-bit dtype. With 768 or 1024 channels a warp has one row of each part, so that no warp waits for another.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

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
