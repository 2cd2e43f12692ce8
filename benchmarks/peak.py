"""What this machine can do: multiply-adds per second in each dtype, and memory copied per second.

    python -m benchmarks.peak [--threads N] [--quick]

On the CPU `peak.cpp` is compiled and run; on a GPU matrix products and copies go through PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TypedDict

import torch

from bert_fast.timing import Call, compare

SOURCE = Path(__file__).with_name("peak.cpp")


class Instruction(TypedDict):
    """One way to multiply and add: a CPU instruction, or a matrix product of PyTorch."""

    dtype: str
    instruction: str
    gops: float  # 10^9 operations per second; a multiply-add is two


class Peak(TypedDict):
    """What a machine can do."""

    threads: int
    instructions: list[Instruction]
    copy_gbs: float  # 10^9 bytes per second; a copied byte is one read and one written


def best(peak: Peak, dtype: str) -> float | None:
    """The highest rate in this dtype ("float32", "bfloat16", "int8" ...), or None where none was measured."""
    return max((i["gops"] for i in peak["instructions"] if i["dtype"] == dtype), default=None)


def measure_cpu(threads: int, quick: bool = False) -> Peak:
    """Compile `peak.cpp` with $CXX (g++ when not set), and run it on `threads` threads.

    `quick` spends milliseconds where the full run spends seconds: enough to see that it works, not to believe it.

    Raises:
        ValueError: `threads` is not positive.
        RuntimeError: the compiler or the program fails; the message is what it printed.
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}, expected at least 1")
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "peak")
        _run([*compiler(), "-O2", "-std=c++17", "-pthread", str(SOURCE), "-o", program])
        peak: Peak = json.loads(_run([program, str(threads), *(["--quick"] if quick else [])]))
    return peak


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, or g++."""
    return os.environ.get("CXX", "g++").split()


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ends with {done.returncode}:\n{done.stderr}")
    return done.stdout


def measure_cuda() -> Peak:
    """Matrix products of 8192 x 8192 and a copy of 1 GiB, of random numbers, through PyTorch, on the current GPU."""
    size, copied = 8192, 1 << 30
    instructions: list[Instruction] = []
    for dtype in ("float32", "float16", "bfloat16"):
        a, b = (torch.randn(size, size, device="cuda", dtype=getattr(torch, dtype)) for _ in range(2))
        product = compare({"product": Call(partial(torch.matmul, a, b), "cuda")})["product"]
        gops = 2 * size**3 / min(product.samples) * 1e-9
        instructions.append({"dtype": dtype, "instruction": "matrix product", "gops": gops})
    if torch.cuda.get_device_capability() >= (8, 9):
        try:
            gops = _fp8_gops(size)
            instructions.append({"dtype": "float8_e4m3fn", "instruction": "scaled matrix product", "gops": gops})
        except RuntimeError as error:  # the function is torch's own business, and has changed before
            print(f"left out: the rate of fp8 products: {error}", file=sys.stderr)
    source = torch.randint(256, (copied,), dtype=torch.uint8, device="cuda")
    copy = compare({"copy": Call(source.clone, "cuda")}, part=lambda copied: copied[:1].float())["copy"]
    copy_gbs = 2 * copied / min(copy.samples) * 1e-9
    return {"threads": torch.get_num_threads(), "instructions": instructions, "copy_gbs": copy_gbs}


def _fp8_gops(size: int) -> float:
    """Of a square product of e4m3 numbers with one scale each, sums in bfloat16 out."""
    a, b = (torch.randn(size, size, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    scaled = partial(
        torch._scaled_mm, a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )
    product = compare({"product": Call(scaled, "cuda")})["product"]
    return 2 * size**3 / min(product.samples) * 1e-9


def main() -> None:
    """Print the CPU's figures as JSON."""
    parser = argparse.ArgumentParser(description="What this machine can do.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="milliseconds instead of seconds; figures not to believe")
    arguments = parser.parse_args()
    print(json.dumps(measure_cpu(arguments.threads, arguments.quick), indent=2))


if __name__ == "__main__":
    main()
