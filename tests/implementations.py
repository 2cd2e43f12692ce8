"""Every fused implementation that this machine can run, as parameters for the tests of the ops."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

HAS_GPU = torch.cuda.is_available()

#: This machine's fastest device, and the names that the public functions take in `impl=` there.
DEVICE = "cuda" if HAS_GPU else "cpu"
FORCEABLE = ("reference", "triton") if HAS_GPU else ("reference", "cpp")

#: Without a GPU Triton runs under its interpreter, on CPU tensors; there it treats bfloat16 wrongly.
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16) if HAS_GPU else (torch.float32, torch.float16)


@dataclass(frozen=True)
class Implementation:
    """One implementation, at one dtype, called straight at its launcher: `implementation("bias_gelu", *args)`.

    Attributes:
        name: "triton" or "cpp".
        isa: instruction set of the C++ one.
        dtype, device: of its tensors.
    """

    name: str
    dtype: torch.dtype
    device: str = "cpu"
    isa: str | None = None

    def __call__(self, op: str, *args: Any, **options: Any) -> Any:
        """Run the op's launcher. In Triton `<op>_train` is in the file of `op`, `<op>_backward` in one of its own."""
        file = op.removesuffix("_train").rstrip("_")
        module = f"bert_fast.kernels.{file}" if self.name == "triton" else "bert_fast._C"
        return getattr(importlib.import_module(module), op)(*args, **options)

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers in this implementation's dtype, on its device."""
        return torch.randn(shape).to(self.device, self.dtype)

    def tensor(self, values: Any, dtype: torch.dtype | None = None) -> Tensor:
        """`values` as a tensor on this implementation's device, in its dtype if none is given."""
        return torch.tensor(values, device=self.device, dtype=dtype or self.dtype)

    def cu_seqlens(self, lengths: list[int]) -> Tensor:
        """(len(lengths) + 1,) int32 offsets of sequences of these lengths."""
        return self.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], torch.int32)


def parameters() -> list[Any]:
    """One pytest parameter for each implementation and dtype; a missing extension is one that fails."""
    triton = [Implementation("triton", dtype, "cuda" if HAS_GPU else "cpu") for dtype in _TRITON_DTYPES]
    cpp = [Implementation("cpp", dtype, isa=isa) for isa in _isas() for dtype in (torch.float32, torch.bfloat16)]
    return [pytest.param(i, id="-".join(filter(None, (i.name, i.isa, str(i.dtype)[6:])))) for i in triton + cpp]


def _isas() -> list[str]:
    try:
        return importlib.import_module("bert_fast._C").available_isas()
    except ImportError:
        return ["missing"]
