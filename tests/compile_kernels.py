"""Compile the Triton kernels for GPUs that are not there.

    python tests/compile_kernels.py COMPUTE_CAPABILITY [--sweep]   a JSON object a line: what was compiled, into what
    python tests/compile_kernels.py --write                        all of them, kept in benchmarks/results/compile.json

The launchers run on CPU tensors, so that each kernel is compiled with the very specialisation (constants, divisibility
of pointers and strides, warps, stages) that they would launch; only the launch itself is left out.

A new kernel needs a function here, of its launcher's name, that makes the launcher's arguments, and lines in `cases`.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

#: sm_75 (Turing), sm_80 (Ampere; Ada runs it too), sm_90 (Hopper), sm_100 (Blackwell).
COMPUTE_CAPABILITIES = (75, 80, 90, 100)

#: What is kept of every case, by `key`.
COUNTS = ("registers", "spilled_bytes", "shared_bytes")
KEPT = Path(__file__).parent.parent / "benchmarks" / "results" / "compile.json"

#: Arguments that differ from call to call: of a kernel compiled for their values there would be several.
VARYING = {"num_rows", "num_tokens", "num_places", "num_tiles", "batch_size", "padded_batch_size", "capacity"}
VARYING |= {"seq_len", "max_seqlen", "size", "num_programs", "table_rows", "padding_idx", "seed", "threshold", "tiles"}

#: Of dropout, which the kernels of training are compiled with.
DROPOUT = (0.1, torch.tensor(1 << 40))

NUM_TOKENS, NUM_ROWS, MODES = 512, 8192, ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean")


class AbsentGpu:
    """What Triton asks of its driver up to the launch."""

    def __init__(self, compute_capability: int) -> None:
        self.target = GPUTarget("cuda", compute_capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps what it compiled by device

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


def bias_gelu_backward(dtype: torch.dtype, approximate: str, features: int) -> list[Any]:
    x = torch.empty(NUM_ROWS, features, dtype=dtype)
    return [x, x, x[0], approximate]


def residual_layer_norm_train(dtype: torch.dtype, hidden_size: int) -> list[Any]:
    return [*residual_layer_norm(dtype, hidden_size)[:6], *DROPOUT]


def residual_layer_norm_backward(dtype: torch.dtype, hidden_size: int) -> list[Any]:
    rows = torch.empty(NUM_ROWS, hidden_size, dtype=dtype)
    return [rows, rows, torch.empty(NUM_ROWS), rows[0], *DROPOUT, dtype]


def embedding_layer_norm_train(dtype: torch.dtype, hidden_size: int) -> list[Any]:
    return [*embedding_layer_norm(dtype, hidden_size)[:9], *DROPOUT]


def embedding_layer_norm_backward(dtype: torch.dtype, hidden_size: int) -> list[Any]:
    ids, rows = torch.zeros(NUM_ROWS, dtype=torch.int64), torch.empty(NUM_ROWS, hidden_size, dtype=dtype)
    return [rows, ids, ids, ids, rows, torch.empty(NUM_ROWS), rows[0], 30522, 512, 2, *DROPOUT, 0]


def cross_entropy_(dtype: torch.dtype, num_classes: int) -> list[Any]:
    return [torch.empty(64, num_classes, dtype=dtype), torch.empty(num_classes), torch.zeros(64, dtype=torch.int64)]


def pooling_backward(dtype: torch.dtype, mode: str) -> list[Any]:
    hidden, cu_seqlens, _ = pooling(dtype, mode)
    return [hidden[:1], hidden, cu_seqlens, mode]


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
    last = [head_dim**-0.5, 0.0]
    if form in ("padded", "masked"):
        qkv = [t.unflatten(0, (-1, seq_len)) for t in qkv]
        mask = torch.ones(qkv[0].shape[:2], dtype=torch.bool) if form == "masked" else None
        return [*qkv, None, seq_len, mask, *last, None, None]
    cu_seqlens = torch.arange(0, NUM_TOKENS + 1, seq_len, dtype=torch.int32)
    bias = torch.empty(12, seq_len, seq_len, dtype=dtype) if form == "biased" else None
    schedule = None
    if form == "scheduled":
        block_m = importlib.import_module("bert_fast.kernels.attention").config(qkv[0], seq_len)["BLOCK_M"]
        size = importlib.import_module("bert_fast.kernels.attention_schedule").schedule_size
        tiles = size(len(cu_seqlens) - 1, NUM_TOKENS, seq_len, block_m)
        schedule = torch.zeros(3, tiles, dtype=torch.int32)
    return [*qkv, cu_seqlens, seq_len, None, *last, bias, schedule]


def attention_train(dtype: torch.dtype, form: str, head_dim: int, seq_len: int) -> list[Any]:
    *arguments, _, bias, schedule = attention(dtype, form, head_dim, seq_len)
    dropout_p, seed = DROPOUT
    return [*arguments, dropout_p, bias, schedule, seed]


def attention_backward(dtype: torch.dtype, form: str, head_dim: int, seq_len: int, dropout: bool) -> list[Any]:
    q, k, v, *others = attention_train(dtype, form, head_dim, seq_len)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:-1])
    others[4:] = others[4:] if dropout else [0.0, None, others[6], None]
    return [out, q, k, v, out, lse, *others]


def attention_schedule(dtype: torch.dtype, block_m: int) -> list[Any]:
    return [torch.tensor([0, NUM_TOKENS], dtype=torch.int32), NUM_TOKENS, NUM_TOKENS, block_m]


def attention_probabilities(dtype: torch.dtype, form: str, head_dim: int, seq_len: int) -> list[Any]:
    q, k, _, cu_seqlens, _, _, scale, _, bias, _ = attention(dtype, form, head_dim, seq_len)
    return [q, k, cu_seqlens, seq_len, [1], scale, bias]


def ids_of(mask: torch.dtype, form: str, seq_len: int) -> Any:
    """A padded batch of 4 texts: "all" of its tokens, "masked" ones, or "masked" ones with types given, too."""
    ids = torch.zeros(4, seq_len, dtype=torch.int64)
    types, positions = (ids, ids[:1].expand(ids.shape)) if form == "typed" else (None, None)
    packing = importlib.import_module("bert_fast.kernels.packing")
    return packing.Ids(ids, None if form == "all" else ids.to(mask), types, positions, 30522, 2, 512)


def inspect(mask: torch.dtype, form: str, seq_len: int) -> list[Any]:
    return [ids_of(mask, form, seq_len)]


def pack(mask: torch.dtype, form: str, seq_len: int, counted: bool, wanted: str) -> list[Any]:
    blocks_a_row = importlib.import_module("bert_fast.kernels.packing").blocks(seq_len)[1]
    report = torch.zeros(2, 4 * blocks_a_row, dtype=torch.int32) if counted else None
    rows = torch.zeros(4 * seq_len, dtype=torch.int32)
    places = {"nothing": [], "index": [rows[:5], rows.long()], "inverse": [rows[:5], None, rows]}[wanted]
    return [ids_of(mask, form, seq_len), report, rows, rows, rows, *places]


def unpack(dtype: torch.dtype, hidden_size: int) -> list[Any]:
    rows = torch.empty(NUM_TOKENS, hidden_size, dtype=dtype)
    return [rows, torch.zeros(NUM_TOKENS, dtype=torch.int32), torch.empty_like(rows)]


def cases(dtypes: list[torch.dtype], sweep: bool) -> Iterator[tuple[Any, ...]]:
    """Function above that makes the arguments, dtype, and the rest of its arguments.

    With `sweep` every shape of tile, else what BERT-base runs.
    """
    half, heads = torch.float16, ((d, n) for d in (16, 32, 64, 128, 256) for n in (64, 128, 512))
    if sweep:
        for dtype in dtypes:
            yield from ((bias_gelu, dtype, approximate) for approximate in ("none", "tanh"))
            yield from ((op, dtype, n) for op in (residual_layer_norm, embedding_layer_norm) for n in (384, 1024, 9000))
            yield from ((op, dtype, mode) for op in (pooling, pooling_backward) for mode in MODES)
            yield unpack, dtype, 1024
        yield from ((residual_layer_norm_train, half, n) for n in (384, 1024, 5120))
        yield from ((residual_layer_norm_backward, half, n) for n in (384, 1024, 5120))
        yield from ((op, half, 1024) for op in (embedding_layer_norm_train, embedding_layer_norm_backward))
        yield from ((bias_gelu_backward, half, "tanh", n) for n in (1536, 4096))
        yield from ((cross_entropy_, half, n) for n in (1000, 300_000))
        for mask, (form, seq_len) in itertools.product((torch.bool, torch.float32), (("typed", 64), ("masked", 2000))):
            yield inspect, mask, form, seq_len
            yield from ((pack, mask, form, seq_len, True, wanted) for wanted in ("index", "inverse"))
        for head_dim, seq_len in ((64, 64), (64, 128), (64, 512), (128, 64), (128, 512), (256, 512)):
            yield attention_train, half, "masked", head_dim, seq_len
            yield attention_backward, half, "masked" if seq_len == 512 else "ragged", head_dim, seq_len, True
        for dtype, (head_dim, seq_len) in itertools.product(dtypes, heads):
            yield attention, dtype, "biased", head_dim, seq_len
            yield attention, dtype, "masked" if seq_len == 512 else "scheduled", head_dim, seq_len
            if seq_len != 128:  # its tiles are those of attention, of the shortest and of the longest sequences
                yield attention_probabilities, dtype, "biased", head_dim, seq_len
        return
    for dtype in dtypes:
        yield from [(bias_gelu, dtype, "none"), (residual_layer_norm, dtype, 768)]
        yield from ((op, dtype, 768) for op in (residual_layer_norm_train, residual_layer_norm_backward))
        yield bias_gelu_backward, dtype, "none", 3072
        yield from ((attention, dtype, "ragged", 64, seq_len) for seq_len in (64, 128, 512))
    yield from [(bias_gelu, half, "tanh"), (embedding_layer_norm, half, 768), (pooling, half, "max")]
    yield from [
        (pooling, half, "weightedmean"),
        (embedding_layer_norm_train, half, 768),
        (embedding_layer_norm_backward, half, 768),
        (pooling_backward, half, "max"),
        (cross_entropy_, half, 30522),
        (attention_train, half, "ragged", 64, 512),
        (attention_backward, half, "ragged", 64, 512, True),
        (attention_backward, torch.float32, "ragged", 64, 512, True),
        (attention, half, "masked", 32, 512),
        (attention, half, "ragged", 32, 128),
        (attention_schedule, half, 128),
        (attention_probabilities, half, "ragged", 64, 512),
        (inspect, torch.int64, "masked", 128),
        (pack, torch.int64, "all", 128, False, "nothing"),
        (pack, torch.int64, "masked", 32, False, "inverse"),
        (pack, torch.int64, "masked", 128, True, "inverse"),
        (unpack, half, 768),
    ]


def key(row: dict[str, Any]) -> str:
    """The name of a case in compile.json."""
    return " ".join(map(str, [row["op"], row["dtype"], *row["options"]]))


def cases_by_gpu(compute_capability: int, sweep: bool) -> Iterator[tuple[Any, ...]]:
    """More of them, of what not every GPU has: products with an epilogue from 8.0 on, float8 from 9.0 on."""
    shared_bytes = (227 if compute_capability >= 90 else 99) * 1024
    candidates = importlib.import_module("bert_fast.kernels.linear_gelu").candidates(compute_capability, shared_bytes)
    if sweep and compute_capability >= 80:
        yield attention_backward, torch.float32, "masked", 256, 512, True
    if sweep:
        yield from ((linear_gelu, torch.float16, 1024, "none", *config) for config in candidates)
        yield from ((linear_gelu, torch.float16, 72, "tanh", *config) for config in candidates[-1:])
    else:
        yield from (
            (linear_gelu, torch.bfloat16, 768, "none", *config) for config in (*candidates[:1], *candidates[-1:])
        )
        yield (residual_layer_norm, torch.float16, 768, False, 16)
        # What BERT trains with: sequences of one tile, those of two kernels, with and without dropout.
        yield from ((attention_train, torch.bfloat16, "ragged", 64, seq_len) for seq_len in (64, 128, 512))
        yield from ((attention_backward, torch.bfloat16, "ragged", 64, seq_len, True) for seq_len in (64, 128, 512))
        yield attention_backward, torch.bfloat16, "scheduled", 64, 256, False
    if compute_capability >= 90:
        yield from ((op, torch.float16, 768, True) for op in (residual_layer_norm, embedding_layer_norm))
        yield from [
            (bias_gelu, torch.bfloat16 if sweep else torch.float16, "none", True),
            (quantize_rows, torch.float16, 3072),
        ]


#: Module and name of the launcher, where they are not those of the function above.
LAUNCHERS = {
    "linear_gelu": ("linear_gelu", "by_epilogue"),
    "quantize_rows": ("quantize", "quantize_rows"),
    "cross_entropy_": ("cross_entropy", "cross_entropy_"),
    **{f"{op}_train": (op, f"{op}_train") for op in ("residual_layer_norm", "embedding_layer_norm", "attention")},
    **{op: ("packing", op) for op in ("inspect", "pack", "unpack")},
}


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: the kernels keep nothing there but what ptxas spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {"registers": found["REG"], "spilled_bytes": found["STACK"] + found["LOCAL"]}


def specialised(kernel: Any) -> list[str]:
    """Those of the `VARYING` arguments whose value, or that it is divisible by 16, a kernel was compiled for."""
    names, constants = kernel.src.fn.arg_names, kernel.src.constants
    given = (path for path, value in constants.items() if value is not None)
    known = (path for path in kernel.src.attrs if constants.get(path, path) is not None)  # None has attributes too
    return sorted({names[path[0]] for path in (*known, *given)} & VARYING)


@contextmanager
def compiling_only(compiled: list[Any]) -> Iterator[None]:
    """Launches append what they compiled, and launch nothing."""
    launch = JITFunction.run

    @functools.wraps(launch)
    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(launch(self, *args, grid=grid, warmup=True, **options))

    JITFunction.run = compile_only
    yield
    JITFunction.run = launch


def compile_cases(compute_capability: int, sweep: bool) -> Iterator[dict[str, Any]]:
    """What the compiler made of every case: of the launcher's first kernel by the op's name, of others by their own."""
    driver.set_active(AbsentGpu(compute_capability))
    # CPU tensors stand in for those of the absent GPU.
    importlib.import_module("bert_fast.kernels.attention").has_matrix_units = lambda device: compute_capability >= 80
    backward = importlib.import_module("bert_fast.kernels.attention_backward")
    backward.has_warpgroup_products = lambda device: compute_capability >= 90

    dtypes = [torch.float16, torch.float32] + [torch.bfloat16] * (compute_capability >= 80 and not sweep)
    compiled: list[Any] = []
    seen: set[int] = set()
    for make, dtype, *options in itertools.chain(cases(dtypes, sweep), cases_by_gpu(compute_capability, sweep)):
        op = make.__name__
        module, launcher = LAUNCHERS.get(op, (op, op))
        with compiling_only(compiled):
            getattr(importlib.import_module(f"bert_fast.kernels.{module}"), launcher)(*make(dtype, *options))
        first, *others = compiled
        compiled.clear()
        yield {"op": op, "dtype": str(dtype).removeprefix("torch."), "options": options, **result(first)}
        for kernel in others:
            if id(kernel) not in seen:  # several launchers end with the same one
                seen.add(id(kernel))
                name = kernel.metadata.name.removeprefix("_").removesuffix("_kernel")
                yield {"op": name, "dtype": str(dtype).removeprefix("torch."), "options": options, **result(kernel)}


def result(kernel: Any) -> dict[str, Any]:
    """What a kernel needs, and what is told by its code."""
    ptx = kernel.asm["ptx"]
    return {
        **resources(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "specialised": specialised(kernel),
        "divisions": sorted(set(re.findall(r"\bdiv\.\w+\.f32", ptx))),
        "high_products": ptx.count("mul.hi.u32"),
        "loads": kernel.asm["ttgir"].count("tt.load"),
        "widest_load": max(map(int, re.findall(r"ld\.global(?:\.\w+)*?\.v(\d)\.b32", ptx)), default=1) * 4,
        "matrix_instructions": sorted(set(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx))),
    }


def write() -> None:
    """Compile everything for every GPU and keep the counts, a line each."""
    parts = [f'"triton": {json.dumps(triton.__version__)}', f'"counts": {json.dumps(COUNTS)}']
    for compute_capability in COMPUTE_CAPABILITIES:
        rows = [row for sweep in (False, True) for row in compile_cases(compute_capability, sweep)]
        counts = {key(row): [row[count] for count in COUNTS] for row in rows}
        lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(counts.items()))
        parts.append(f'"sm_{compute_capability}": {{\n{lines}\n  }}')
    KEPT.write_text("{\n  " + ",\n  ".join(parts) + "\n}\n")


if __name__ == "__main__":
    if "--write" in sys.argv:
        write()
    else:
        for row in compile_cases(int(sys.argv[1]), "--sweep" in sys.argv):
            print(json.dumps(row), flush=True)
