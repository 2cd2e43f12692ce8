"""Compile the Triton kernels for a GPU that is not there: `python compile_kernels.py COMPUTE_CAPABILITY [--sweep]`.

The launchers run on CPU tensors, so that each kernel is compiled with the very specialisation (constants, divisibility
of pointers and strides, warps, stages) that they would launch; only the launch itself is left out. One JSON object a
line: what was compiled, and what the compiler made of it.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

NUM_TOKENS, NUM_ROWS, MODES = 512, 8192, ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean")


class AbsentGpu:
    """What Triton asks of its driver up to the launch."""

    def __init__(self, compute_capability: int) -> None:
        self.target = GPUTarget("cuda", compute_capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def float8(rows: int, width: int) -> list[Tensor]:
    return [torch.empty(rows, width, dtype=torch.float8_e4m3fn), torch.empty(rows, 1)]


def bias_gelu(dtype: torch.dtype, approximate: str, quantized: bool = False) -> list[Any]:
    arguments = [torch.empty(NUM_ROWS, 3072, dtype=dtype), torch.empty(3072, dtype=dtype), approximate]
    return [*arguments, None, *float8(NUM_ROWS, 3072)] if quantized else arguments


def residual_layer_norm(
    dtype: torch.dtype, hidden_size: int, quantized: bool = False, rows: int = NUM_ROWS
) -> list[Any]:
    x, vector = torch.empty(rows, hidden_size, dtype=dtype), torch.empty(hidden_size, dtype=dtype)
    arguments = [x, vector, x, vector, vector, 1e-12, 0.0]
    return [*arguments, None, *float8(rows, hidden_size)] if quantized else arguments


def embedding_layer_norm(dtype: torch.dtype, hidden_size: int, quantized: bool = False) -> list[Any]:
    ids, table = torch.zeros(NUM_ROWS, dtype=torch.int64), torch.empty(NUM_ROWS, hidden_size, dtype=dtype)
    vector = torch.empty(hidden_size, dtype=dtype)
    arguments = [ids, ids, ids, table, table, table, vector, vector, 1e-12, 0.0]
    return [*arguments, *float8(NUM_ROWS, hidden_size)] if quantized else arguments


def quantize_rows(dtype: torch.dtype, width: int) -> list[Any]:
    return [torch.empty(NUM_ROWS, width, dtype=dtype)]


def linear_gelu(dtype: torch.dtype, in_features: int, approximate: str, *config: int) -> list[Any]:
    x, weight = torch.empty(NUM_ROWS, in_features, dtype=dtype), torch.empty(3072, in_features, dtype=dtype)
    bias, out = torch.empty(3072, dtype=dtype), torch.empty(NUM_ROWS, 3072, dtype=dtype)
    return [x, weight, bias, approximate, out, importlib.import_module("bert_fast.kernels.linear_gelu").Config(*config)]


def pooling(dtype: torch.dtype, mode: str) -> list[Any]:
    return [torch.empty(NUM_TOKENS, 768, dtype=dtype), torch.tensor([0, NUM_TOKENS], dtype=torch.int32), mode]


def attention(dtype: torch.dtype, form: str, head_dim: int, seq_len: int) -> list[Any]:
    qkv: list[Tensor] = list(torch.empty(NUM_TOKENS, 3, 12, head_dim, dtype=dtype).unbind(1))
    if form == "ragged":
        cu_seqlens = torch.arange(0, NUM_TOKENS + 1, seq_len, dtype=torch.int32)
        return [*qkv, cu_seqlens, seq_len, None, head_dim**-0.5, 0.0]
    qkv = [t.unflatten(0, (-1, seq_len)) for t in qkv]
    mask = torch.ones(qkv[0].shape[:2], dtype=torch.bool) if form == "masked" else None
    return [*qkv, None, seq_len, mask, head_dim**-0.5, 0.0]


def cases(dtypes: list[torch.dtype], sweep: bool) -> Iterator[tuple[Any, ...]]:
    """Function above that makes the arguments, dtype, and the rest of its arguments."""
    for dtype in dtypes:
        if sweep:
            yield from ((bias_gelu, dtype, approximate) for approximate in ("none", "tanh"))
            yield from ((op, dtype, n) for op in (residual_layer_norm, embedding_layer_norm) for n in (384, 1024, 9000))
            yield from ((pooling, dtype, mode) for mode in MODES)
            for form in ("ragged", "masked"):
                yield from ((attention, dtype, form, d, n) for d in (16, 24, 64, 128, 256) for n in (64, 512))
        else:
            yield from [
                (bias_gelu, dtype, "none"),
                (residual_layer_norm, dtype, 768),
                (attention, dtype, "ragged", 64, 512),
            ]
    if not sweep:
        half = torch.float16
        yield from [(bias_gelu, half, "tanh"), (embedding_layer_norm, half, 768), (pooling, half, "max")]
        yield from [
            (pooling, half, "weightedmean"),
            (attention, half, "masked", 32, 512),
            (attention, half, "ragged", 32, 64),
        ]


def cases_by_gpu(compute_capability: int, sweep: bool) -> Iterator[tuple[Any, ...]]:
    """More of them, of what not every GPU has: products with an epilogue from 8.0 on, float8 from 9.0 on."""
    shared_bytes = (227 if compute_capability >= 90 else 99) * 1024
    candidates = importlib.import_module("bert_fast.kernels.linear_gelu").candidates(compute_capability, shared_bytes)
    if sweep:
        yield from ((linear_gelu, torch.float16, 1024, "none", *config) for config in candidates)
        yield from ((linear_gelu, torch.float16, 72, "tanh", *config) for config in candidates[-1:])
    else:
        yield from (
            (linear_gelu, torch.bfloat16, 768, "none", *config) for config in (*candidates[:1], *candidates[-1:])
        )
        yield (residual_layer_norm, torch.float16, 768, False, 16)
    if compute_capability >= 90:
        yield from ((op, torch.float16, 768, True) for op in (residual_layer_norm, embedding_layer_norm))
        yield from [
            (bias_gelu, torch.bfloat16 if sweep else torch.float16, "none", True),
            (quantize_rows, torch.float16, 3072),
        ]


#: Module and name of the launcher, where they are not those of the function above.
LAUNCHERS = {"linear_gelu": ("linear_gelu", "by_epilogue"), "quantize_rows": ("quantize", "quantize_rows")}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: the kernels keep nothing there but what ptxas spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def main(compute_capability: int, sweep: bool) -> None:
    """Compile every case and print what came of it."""
    driver.set_active(AbsentGpu(compute_capability))
    launch, compiled = JITFunction.run, []

    @functools.wraps(launch)
    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    # CPU tensors stand in for those of the absent GPU.
    importlib.import_module("bert_fast.kernels.attention")._has_matrix_units = lambda device: compute_capability >= 80

    dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * (compute_capability >= 80 and not sweep)
    for make, dtype, *options in chain(cases(dtypes, sweep), cases_by_gpu(compute_capability, sweep)):
        op = make.__name__
        module, launcher = LAUNCHERS.get(op, (op, op))
        getattr(importlib.import_module(f"bert_fast.kernels.{module}"), launcher)(*make(dtype, *options))
        kernel = compiled.pop()
        ptx = kernel.asm["ptx"]
        row = {
            "op": op,
            "dtype": str(dtype).removeprefix("torch."),
            "options": options,
            **resources(kernel.asm["cubin"]),
            "shared_bytes": kernel.metadata.shared,
            "loads": kernel.asm["ttgir"].count("tt.load"),
            "widest_load": max(map(int, re.findall(r"ld\.global(?:\.\w+)*?\.v(\d)\.b32", ptx)), default=1) * 4,
            "matrix_instructions": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), "--sweep" in sys.argv)
