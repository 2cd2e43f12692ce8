"""The inner loop of every matrix product, as the compiler left it: the multiply-adds of a tile, and nothing spilt."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")

#: Multiply-adds that one vector of a tile takes in one step: the instruction, and how many of it.
FMA = r"vfmadd(132|213|231)ps"
MULTIPLY_ADDS = {
    ("avx2", "Fp32"): (FMA, 1),
    ("avx2", "Bf16"): (FMA, 2),
    ("avx2", "Int8"): ("vpmaddwd", 2),
    ("avx512", "Fp32"): (FMA, 1),
    ("avx512", "Bf16"): (FMA, 2),
    ("avx512", "Int8"): ("vpmaddwd", 2),
    ("avx512_vnni", "Fp32"): (FMA, 1),
    ("avx512_vnni", "Bf16"): (FMA, 2),
    ("avx512_vnni", "Int8"): ("vpdpbusd", 1),
    ("avx512_bf16", "Fp32"): (FMA, 1),
    ("avx512_bf16", "Bf16"): ("vdpbf16ps", 1),
    ("avx512_bf16", "Int8"): ("vpdpbusd", 1),
    # What the backward of attention reads by columns.
    ("avx2", "Transposed<Fp32>"): (FMA, 1),
    ("avx512", "Transposed<Fp32>"): (FMA, 1),
    ("avx512_bf16", "Transposed<Fp32>"): (FMA, 1),
    ("avx512_bf16", "Transposed<Bf16>"): ("vdpbf16ps", 1),
}


@dataclass(frozen=True)
class Tile:
    """One instance of run_tile: `rows` by `vectors` sums, with an epilogue."""

    isa: str
    kind: str
    rows: int
    vectors: int
    epilogue: str


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str

    @property
    def mnemonic(self) -> str:
        return re.sub(r"^(\{\w+\} )", "", self.text).split()[0]


def functions(path: Path) -> dict[str, list[Instruction]]:
    """Each function of a library or an object file, by its demangled name."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", "--demangle", "-M", "intel", str(path)]
    result: dict[str, list[Instruction]] = {}
    name = ""
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = header[1]
            result[name] = []
        elif name and (instruction := re.match(r"\s*([0-9a-f]+):\s+(\S.*)$", line)):
            result[name].append(Instruction(int(instruction[1], 16), instruction[2]))
    return result


def loops(function: list[Instruction]) -> Iterator[list[Instruction]]:
    """What lies between a backward jump and its target."""
    for instruction in function:
        jump = re.match(r"j\w+\s+([0-9a-f]+)", instruction.text)
        if jump and function[0].address <= int(jump[1], 16) <= instruction.address:
            yield [i for i in function if int(jump[1], 16) <= i.address <= instruction.address]


def inner_loop(function: list[Instruction], multiply_add: str, least: int) -> list[Instruction]:
    """The shortest loop with `least` multiply-adds or more."""
    found = [loop for loop in loops(function) if count(loop, multiply_add) >= least]
    assert found, f"no loop has {least} of {multiply_add}"
    return min(found, key=len)


def count(loop: list[Instruction], mnemonic: str) -> int:
    return sum(re.fullmatch(mnemonic, instruction.mnemonic) is not None for instruction in loop)


def spills(function: list[Instruction], loop: list[Instruction]) -> list[str]:
    """Instructions of the loop that use the stack: by rsp, or by rbp where that is the frame pointer."""
    has_frame = any(re.match(r"mov\s+rbp,rsp", instruction.text) for instruction in function)
    pattern = r"\[r[sb]p" if has_frame else r"\[rsp"
    return [instruction.text for instruction in loop if re.search(pattern, instruction.text)]


@cache
def tiles() -> dict[Tile, list[Instruction]]:
    """run_tile of the built extension, in each of its forms."""
    path = importlib.import_module("bert_fast._C").__file__
    assert path is not None
    result = {}
    for name, body in functions(Path(path)).items():
        form = re.match(
            r"void (\w+)::run_tile<((?:Transposed<)?\w+>?), (\d+), (\d+), \w+, ([^(]+)>\(",
            re.sub(r"bert_fast::(\w+::(?!run_tile))?", "", name).replace(" >", ">"),
        )
        if form and form[1] != "scalar":
            result[Tile(form[1], form[2], int(form[3]), int(form[4]), form[5])] = body
    return result


@pytest.mark.parametrize(("isa", "kind"), MULTIPLY_ADDS, ids="-".join)
def test_full_tiles_stay_in_registers(isa: str, kind: str) -> None:
    forms = [tile for tile in tiles() if (tile.isa, tile.kind) == (isa, kind)]
    if not tiles():
        pytest.skip("the extension was built for another architecture than x86-64, or stripped")
    full = max(tile.rows for tile in forms)
    mnemonic, each = MULTIPLY_ADDS[isa, kind]
    for tile in forms:
        if tile.rows == full:
            expected = each * tile.rows * tile.vectors
            loop = inner_loop(tiles()[tile], mnemonic, expected)
            assert count(loop, mnemonic) == expected, tile
            assert spills(tiles()[tile], loop) == [], tile


def test_every_form_is_there() -> None:
    if not tiles():
        pytest.skip("the extension was built for another architecture than x86-64, or stripped")
    assert {(tile.isa, tile.kind) for tile in tiles()} == set(MULTIPLY_ADDS)
    # The products of training have no eight-bit form, and AVX-512 with VNNI runs those of AVX-512.
    of_training = {(tile.isa, tile.kind) for tile in tiles() if "StoreSum" in tile.epilogue}
    expected = {(isa, kind) for isa, kind in MULTIPLY_ADDS if kind in ("Fp32", "Bf16") and isa != "avx512_vnni"}
    assert of_training == expected


BAD = r"""
#include "dispatch.h"
#include "target.h"
BERT_FAST_TARGET_BEGIN("avx2,fma")
#define BERT_FAST_ISA avx2
#include "vec/avx2.h"
#include "kernels/product.h"
namespace bert_fast::avx2 {
struct Out {
  float* out;
  template <int M, int N>
  BERT_FAST_INLINE void store(int64_t, int64_t, const Vec (&sums)[M][N]) const {
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) avx2::store(out + (i * N + j) * LANES, sums[i][j]);
  }
};
template void run_tile<Fp32, ROWS, 2, NoFetch, Out>(const float*, int64_t, const float*, int64_t, int64_t, int64_t,
                                                     NoFetch, const Out&);
}
BERT_FAST_TARGET_END
"""


@pytest.mark.parametrize(("rows", "is_spilt"), [(6, False), (10, True)])
def test_a_tile_too_large_is_noticed(tmp_path: Path, rows: int, is_spilt: bool) -> None:
    """Ten rows by two vectors need twenty registers of sixteen."""
    compiler = shutil.which("g++")
    if compiler is None or not tiles():
        pytest.skip("needs g++ for x86-64")
    (tmp_path / "bad.cpp").write_text(BAD.replace("ROWS", str(rows)))
    csrc = Path(__file__).parent.parent / "csrc"
    command = [compiler, "-std=c++17", "-O3", "-ffp-contract=off", f"-I{csrc}", "-c", "bad.cpp", "-o", "bad.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (function,) = (body for name, body in functions(tmp_path / "bad.o").items() if "run_tile" in name)
    loop = inner_loop(function, FMA, 2 * rows)
    assert count(loop, FMA) == 2 * rows
    assert bool(spills(function, loop)) == is_spilt
