"""Every Triton kernel compiles for the GPUs of 2018 to 2025, and the compiler makes of it what was meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import triton
from compile_kernels import COMPUTE_CAPABILITIES, KEPT, key

#: Bytes of shared memory that one block may take. 80 stands for sm_86 and sm_89 too, which have less than sm_80.
SHARED_BYTES = {75: 64 * 1024, 80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

#: What multiplies 16-bit tiles there.
MATRIX_INSTRUCTION = {75: [], 80: ["mma.sync"], 90: ["wgmma.mma_async"], 100: ["tcgen05.mma"]}


def compiled(compute_capability: int) -> list[dict[str, Any]]:
    """What `compile_kernels.py` says. The first call begins with all GPUs, as many at once as there are cores."""
    return _all_compiled()[compute_capability].result()


@cache
def _all_compiled() -> dict[int, Future[list[dict[str, Any]]]]:
    pool = ThreadPoolExecutor(os.cpu_count())
    return {capability: pool.submit(_compile, capability) for capability in COMPUTE_CAPABILITIES}


def _compile(compute_capability: int, *flags: str) -> list[dict[str, Any]]:
    """In a process of its own, as here the kernels are the interpreter's."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), str(compute_capability), *flags],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


#: Bytes a thread may spill: ptxas puts a register or two aside to keep one more program on a multiprocessor.
MOST_SPILLED_BYTES = 8
#: But in the gradients of attention at head_dim 256, whose sums take half of all registers, and without matrix units.
MOST_SPILLED_BYTES_OF_LARGE = 400


#: Registers by which a compilation may differ from the one that is kept.
REGISTERS = 8
#: Reads of ids, and of tensors with channels, each of which a kernel reads once however often it uses it.
LOADS = {"residual_layer_norm": (0, 5), "embedding_layer_norm": (3, 5), "bias_gelu": (0, 2), "quantize_rows": (0, 1)}
LOADS |= {"residual_layer_norm_train": (0, 5), "embedding_layer_norm_train": (3, 5)}
LOADS |= {"residual_layer_norm_backward": (0, 4), "embedding_layer_norm_backward": (0, 4), "bias_gelu_backward": (1, 2)}
#: What divides as the interpreter does: means of equal values, and scales whose codes lie between two.
EXACT_DIVISIONS = {"residual_layer_norm", "embedding_layer_norm", "quantize_rows"}
EXACT_DIVISIONS |= {"residual_layer_norm_train", "embedding_layer_norm_train", "pooling_backward"}
#: What loads 16 bytes at once. (Not cross_entropy_: rows of 30522 are not so aligned.)
WIDE_LOADS = {"bias_gelu", "residual_layer_norm", "embedding_layer_norm", "quantize_rows", "unpack", "pieces", "tables"}
WIDE_LOADS |= {"sum_of_programs", "residual_layer_norm_train", "residual_layer_norm_backward", "bias_gelu_backward"}
WIDE_LOADS |= {"embedding_layer_norm_train", "embedding_layer_norm_backward"}
#: High halves of products in one call of Philox, which decides about all of a thread's neighbours.
HIGH_PRODUCTS = 14


def check(rows: list[dict[str, Any]], compute_capability: int) -> None:
    kept = json.loads(KEPT.read_text())
    for row in rows:
        if kept["triton"] == triton.__version__:
            registers, *expected = kept[f"sm_{compute_capability}"][key(row)]
            assert [row["spilled_bytes"], row["shared_bytes"]] == expected, row
            assert abs(row["registers"] - registers) <= REGISTERS, row
        large = row["op"].startswith("attention_backward") and (row["options"][1] == 256 or compute_capability < 80)
        assert row["spilled_bytes"] <= (MOST_SPILLED_BYTES_OF_LARGE if large else MOST_SPILLED_BYTES), row
        assert row["shared_bytes"] <= SHARED_BYTES[compute_capability], row
        if row["op"].startswith("attention") and row["op"] != "attention_schedule":
            expected = [] if row["dtype"] == "float32" else MATRIX_INSTRUCTION[compute_capability]
            assert row["matrix_instructions"] == expected, row
        assert row["specialised"] == [], row
        if row["op"] in EXACT_DIVISIONS and row["options"] != ["cls"]:  # which takes no mean
            assert "div.rn.f32" in row["divisions"], row
        if row["op"] == "linear_gelu":
            assert row["matrix_instructions"] == MATRIX_INSTRUCTION[compute_capability], row
        if row["op"] in WIDE_LOADS:
            assert row["widest_load"] == 16, row  # lost when the divisibility of pointers and strides is


def test_what_is_kept_is_complete() -> None:
    kept = json.loads(KEPT.read_text())
    assert {f"sm_{compute_capability}" for compute_capability in COMPUTE_CAPABILITIES} == kept.keys() - {
        "triton",
        "counts",
    }


@pytest.mark.parametrize("compute_capability", SHARED_BYTES)
def test_kernels_compile_as_meant(compute_capability: int) -> None:
    rows = compiled(compute_capability)
    expected = {"attention", "attention_probabilities", "attention_schedule", "bias_gelu", "embedding_layer_norm"}
    expected |= {"pooling", "residual_layer_norm", "inspect", "pack", "unpack"}
    expected |= {f"{op}_layer_norm_{way}" for op in ("residual", "embedding") for way in ("train", "backward")}
    expected |= {"bias_gelu_backward", "pooling_backward", "cross_entropy_", "sum_of_programs", "pieces", "tables"}
    expected |= {"attention_train", "attention_backward", "attention_backward_keys"}
    expected |= {"linear_gelu"} if compute_capability >= 80 else set()
    expected |= {"quantize_rows"} if compute_capability >= 90 else set()
    assert {row["op"] for row in rows} == expected
    check(rows, compute_capability)
    for row in rows:
        if row["op"] in LOADS:
            # A part of the row is a load; few rows are in one part, and so is what is cut by elements.
            parts = 1 if 16 in row["options"] or ("bias_gelu" in row["op"] and True not in row["options"]) else 3
            ids, tensors = LOADS[row["op"]]
            assert row["loads"] == ids + parts * tensors, row
            calls = parts * (2 if row["dtype"] == "float32" else 1)  # 8 neighbours in 16 bits, twice 4 in float32
            assert row["high_products"] <= HIGH_PRODUCTS * calls, row


@pytest.mark.slow
def test_every_shape_of_tile_compiles() -> None:
    """For the GPU that is tuned for; each of the others takes as long again."""
    check(_compile(90, "--sweep"), 90)
