"""How the kernels that read rows once, and hold them in registers, share them out among programs."""

import triton

_MAX_BLOCK_N = 8192  # channels of a row held in registers

# Elements a program: 32 for each of its 128 threads, so that each has four 16-byte loads of a 16-bit dtype in flight; 8
# where the rows are too few to give every multiprocessor several such programs.
_TILE, _SMALL_TILE = 4096, 1024
_FEW_PROGRAMS = 512


def blocks(num_rows: int, width: int) -> dict[str, int]:
    """Rows and channels of a program's tile, and its warps; the tile is a whole row wide up to 8192 channels."""
    block_n = min(triton.next_power_of_2(width), _MAX_BLOCK_N)
    tile = _TILE if num_rows * block_n >= _TILE * _FEW_PROGRAMS else _SMALL_TILE
    return {"BLOCK_M": max(1, tile // block_n), "BLOCK_N": block_n, "num_warps": 8 if block_n > 4096 else 4}
