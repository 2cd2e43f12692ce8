"""Which instruction sets the extension takes and refuses."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest

KNOWN = ["scalar", "avx2", "avx512", "avx512_vnni", "avx512_bf16"]


def test_each_known_one_is_taken_or_refused_by_name() -> None:
    extension = importlib.import_module("bert_fast._C")
    available = extension.available_isas()
    assert available == [isa for isa in KNOWN if isa in available]
    before = extension.get_isa()
    for isa in KNOWN:
        if isa in available:
            extension.set_isa(isa)
            assert extension.get_isa() == isa
        else:
            with pytest.raises(ValueError, match=f"instruction set '{isa}' is not available on this machine"):
                extension.set_isa(isa)
    extension.set_isa(before)


@pytest.mark.parametrize("isa", [*KNOWN, "avx512_amx"])
def test_the_environment_forces_one(isa: str) -> None:
    available = importlib.import_module("bert_fast._C").available_isas()
    done = subprocess.run(
        [sys.executable, "-c", "import torch, bert_fast._C as c; print(c.get_isa())"],
        capture_output=True,
        text=True,
        env={**os.environ, "BERT_FAST_ISA": isa},
        timeout=100,
    )
    if isa in available:
        assert done.stdout.strip() == isa, done.stderr
    else:
        assert done.returncode != 0
        assert f"instruction set '{isa}' is not available on this machine, which has: scalar" in done.stderr
