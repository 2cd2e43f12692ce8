"""What this machine has, which implementation each op runs on it, and why the others were refused."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pkgutil
import platform
import warnings
from pathlib import Path

import torch

from bert_fast import __version__, engine, ops
from bert_fast.engine.gpu import refusal
from bert_fast.loading import DTYPES
from bert_fast.ops import Op, Traits

PACKAGES = ("torch", "triton", "transformers", "sentence-transformers", "tokenizers", "safetensors", "numpy")

#: What the choice is shown for: BERT's usual head, in evaluation.
TRAITS = Traits(head_dim=64)


def diagnose() -> str:
    """The report of `bert-fast doctor`."""
    return "\n\n".join([_machine(), _software(), *(_choices(device) for device in ("cpu", "cuda"))])


def _section(title: str, facts: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in facts)
    return "\n".join([title, *(f"  {name:{width}}  {value}" for name, value in facts)])


def _machine() -> str:
    facts = [("CPU", f"{_cpu_model()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads for torch")]
    facts.append(("SIMD", _simd()))
    facts.append(("packed weights", _packed()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            facts.append((f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"))
            facts.append(("", f"packed weights in {_gpu_precisions(gpu.name, (gpu.major, gpu.minor))}"))
            facts.append((f"GPU {index}'s table", _table(gpu.name)))
    else:
        facts.append(("GPU", "none that torch can use"))
    return _section("Machine", facts)


def _table(gpu: str) -> str:
    """How many shapes of products were measured on a GPU."""
    try:
        tuned = importlib.import_module("bert_fast.kernels.tuned")
    except ImportError as error:
        return f"none: {error}"
    entries = tuned.table(gpu)
    chosen = sum(config is not None for config in entries.values())
    if not entries:
        return "none: linear_gelu runs cuBLAS and a pass (`bert-fast tune` measures)"
    return f"{len(entries)} shapes of linear_gelu measured, an epilogue chosen for {chosen}"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _simd() -> str:
    try:
        extension = importlib.import_module("bert_fast._C")
    except ImportError as error:
        return f"the C++ extension cannot be loaded: {error}"
    return f"{extension.get_isa()} selected of {', '.join(extension.available_isas())} ({extension.build_info()})"


def _packed() -> str:
    """What runs an encoder on the CPU in each precision."""
    extension = ops.extension()
    if extension is None:
        return "none: the C++ extension cannot be loaded; the ops run one by one"
    isa = extension.get_isa()
    runs = {precision: "C++" for precision in engine.PRECISIONS["cpu"]}
    if isa not in ("avx512_bf16",):
        runs["bf16"] += " (bfloat16 widened to float: this instruction set cannot multiply it)"
    if isa not in ("avx512_bf16", "avx512_vnni"):
        runs["int8"] += " (16-bit products: this instruction set has no VNNI)"
    if engine.prefers_torch("bf16"):
        runs["bf16"] = "torch's products, which use the CPU's matrix unit (AMX)"
    return ", ".join(f"{precision} by {how}" for precision, how in runs.items())


def _gpu_precisions(name: str, capability: tuple[int, int]) -> str:
    """What a GPU computes an encoder in, and why not in the rest."""
    refusals = {precision: refusal(precision, name, capability) for precision in engine.PRECISIONS["cuda"]}
    runs = ", ".join(precision for precision, reason in refusals.items() if reason is None)
    return "; ".join([runs, *filter(None, refusals.values())])


def _software() -> str:
    facts = [("bert_fast", __version__), ("python", platform.python_version())]
    for package in PACKAGES:
        try:
            facts.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            facts.append((package, "not installed"))
    return _section("Software", facts)


def _ops() -> list[Op]:
    modules = (m.name for m in pkgutil.iter_modules(ops.__path__) if not m.name.startswith("_"))
    return [importlib.import_module(f"{ops.__name__}.{name}").OP for name in modules]


def _choices(device: str) -> str:
    """A table of op and dtype, and below it each refusal with where it was met."""
    all_ops = _ops()
    lines = [f"{'':24}" + "".join(f"{dtype:12}" for dtype in DTYPES)]
    refusals: dict[str, dict[str, list[str]]] = {}
    for op in all_ops:
        cells = []
        for name, dtype in DTYPES.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # the refusals are what this prints
                    selection = op.select(device, dtype, TRAITS)
            except ValueError as error:  # one is forced that cannot serve
                cells.append("none")
                refusals.setdefault(str(error), {}).setdefault(op.name, []).append(name)
                continue
            cells.append(selection.name)
            for impl, reason in selection.refusals:
                refusals.setdefault(f"{impl}: {reason}", {}).setdefault(op.name, []).append(name)
        lines.append(f"{op.name:24}" + "".join(f"{cell:12}" for cell in cells))
    if refusals:
        lines.append("refused:")
        lines += [f"  {reason}  ({_where(met, len(all_ops))})" for reason, met in refusals.items()]
    here = "" if device == "cpu" or torch.cuda.is_available() else " (there is none here; what would run)"
    return "\n".join([f"Ops on {device}{here}", *(f"  {line}".rstrip() for line in lines)])


def _where(met: dict[str, list[str]], num_ops: int) -> str:
    """The ops and dtypes of a refusal, in few words."""
    dtypes = {dtype for found in met.values() for dtype in found}
    which_ops = "every op" if len(met) == num_ops else ", ".join(met)
    which_dtypes = "" if len(dtypes) == len(DTYPES) else ": " + ", ".join(sorted(dtypes))
    return which_ops + which_dtypes
