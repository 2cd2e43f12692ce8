"""The packing kernels compile for the GPUs of 2018 to 2025, spill nothing, and rows move 16 bytes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, re, sys
import torch
from compile_kernels import AbsentGpu, resources
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from bert_fast.kernels import packing

driver.set_active(AbsentGpu(int(sys.argv[1])))
launch = JITFunction.run

def compile_only(self, *args, grid, warmup, **options):
    kernel = launch(self, *args, grid=grid, warmup=True, **options)
    widths = map(int, re.findall(r"ld\\.global(?:\\.\\w+)*?\\.v(\\d)\\.b32", kernel.asm["ptx"]))
    row = {"kernel": self.fn.__name__, "widest_load": 4 * max(widths, default=1), **resources(kernel.asm["cubin"])}
    print(json.dumps(row))

JITFunction.run = compile_only
for mask, given, seq_len in ((None, False, 128), (torch.int64, True, 128), (torch.bool, False, 2000)):
    ids = torch.zeros((4, seq_len), dtype=torch.int64)
    batch = packing.Ids(
        ids, None if mask is None else ids.to(mask), ids if given else None, ids[:1].expand(ids.shape), 30522, 2, 512
    )
    report, rows = packing.inspect(batch), torch.zeros(512, dtype=torch.int32)
    inverse = torch.zeros(4 * seq_len + 4, dtype=torch.int32)
    packing.pack(batch, report, rows, rows, rows, rows, inverse=inverse)
    packing.pack(batch, report, rows, rows, rows, rows, index=rows.long())
    packing.pack(batch, report, rows, rows, rows)
for dtype in (torch.float16, torch.float32):
    packing.unpack(torch.zeros(512, 768, dtype=dtype), rows, torch.zeros(512, 768, dtype=dtype))
"""


@pytest.mark.parametrize("compute_capability", [75, 80, 90, 100])
def test_they_compile_as_meant(compute_capability):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    places = [str(Path(__file__).parent), os.getcwd(), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(compute_capability)],
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, places))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} == {"_inspect_kernel", "_pack_kernel", "_unpack_kernel"}
    for row in rows:
        assert row["spilled_bytes"] == 0, row
        if row["kernel"] == "_unpack_kernel":
            assert row["widest_load"] == 16, row
