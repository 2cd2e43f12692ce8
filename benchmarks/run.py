"""The benchmark suite: bert_fast beside transformers and its peers, a process for each, in interleaved rounds.

    python -m benchmarks.run [--models minilm base large] [--cases 1x16 mix32] [--dtype float32 bfloat16 int8]
                             [--threads N] [--peers all | NAME ...] [--parts encoder sweep strings]
    python -m benchmarks.run --device cuda [--parts encoder compiled kernels] [--seconds N] ...

measures what the machine can do, checks every answer against transformers' in float32, times the contenders, and writes
`benchmarks/results/<device>/encoder.json` (`kernels.json` for that part alone) with its tables and plots next to it.
The file is written after every row, so a run that is killed keeps what it measured.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from benchmarks import peak, report
from benchmarks.budget import Budget
from benchmarks.cases import (
    DEFAULT_MODELS,
    GPU_COMPILED,
    GPU_WORKLOADS,
    KERNELS,
    MODELS,
    NUM_STRINGS,
    QUICK_KERNELS,
    Workload,
)
from benchmarks.peers import BASELINE, PEERS, SUBJECT, select
from benchmarks.processes import ROOT, WorkerError
from benchmarks.suite import Settings, bench_kernels, bench_strings, bench_sweep, bench_workloads, note
from bert_fast.benchmarking import Row, parse_case
from bert_fast.timing import WrongAnswerError

#: What a run can measure, by device. "compiled" is a few cases of "encoder" again, beside the peers that compile each
#: shape anew: those take part in nothing else on a GPU, where it takes them longest.
PARTS = {"cpu": ("encoder", "sweep", "strings", "kernels"), "cuda": ("encoder", "compiled", "kernels")}

RowKey = Literal["rows", "sweep", "strings", "kernels"]


def main() -> None:
    """Measure what the command line asks for."""
    options = _options()
    load_before = list(os.getloadavg())
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    budget = Budget(options.seconds)
    on_gpu = options.device == "cuda"
    machine = peak.measure_cuda() if on_gpu else peak.measure_cpu(options.threads, options.quick)
    settings = Settings(
        machine, options.threads, options.repeats, dtypes_of(options), options.peers, options.device, budget
    )
    head, dirty = commit()
    device = torch.cuda.get_device_name() if on_gpu else cpu_name()
    result: report.Result = {
        "command": shown("benchmarks.run", sys.argv[1:]),
        "date": date,
        "commit": head,
        "dirty": dirty,
        "device": device,
        "threads": options.threads,
        "versions": versions(["sentence-transformers", *(name for peer in options.peers for name in peer.packages)]),
        "load_average": {"before": load_before, "after": load_before},
        "peak": machine,
        "rows": [],
        "sweep": [],
        "strings": [],
        "kernels": [],
        "left_out": settings.left_out,
    }
    folder = slug(device if on_gpu else f"{device} {options.threads} threads")
    stem = "kernels" if options.parts == ["kernels"] else "encoder"
    output = options.output or ROOT / "benchmarks" / "results" / folder / f"{stem}.json"
    try:
        for key, row in measured(options, settings):
            place(row, result[key])
            result["load_average"]["after"] = list(os.getloadavg())
            report.write(result, output)
    except (KeyboardInterrupt, WorkerError, WrongAnswerError) as error:
        note(settings, f"the rest: {str(error) or 'interrupted'}")
    if not any((result["rows"], result["sweep"], result["strings"], result["kernels"])):
        raise SystemExit("nothing was measured, and nothing is written")
    report.save(result, output)
    print(report.tables(result))
    print(f"written: {output}", file=sys.stderr)
    if settings.left_out:
        raise SystemExit(f"{len(settings.left_out)} left out, see above")


def measured(options: argparse.Namespace, settings: Settings) -> Iterator[tuple[RowKey, Row]]:
    """The rows of every part, each with where it belongs in the result."""
    if "kernels" in options.parts:
        yield from (("kernels", row) for row in bench_kernels(settings, QUICK_KERNELS if options.quick else KERNELS))
    if "encoder" in options.parts:
        few = settings
        if options.device == "cuda":
            few = replace(settings, peers=[peer for peer in settings.peers if not peer.compiles_shapes])
        yield from (("rows", row) for row in bench_workloads(few, workloads(options, GPU_WORKLOADS)))
    if "compiled" in options.parts:
        yield from (("rows", row) for row in bench_workloads(settings, workloads(options, GPU_COMPILED)))
    if "sweep" in options.parts:
        yield from (("sweep", row) for row in bench_sweep(settings))
    if "strings" in options.parts:
        yield from (("strings", row) for row in bench_strings(settings, options.strings, options.optimum_python))


def workloads(options: argparse.Namespace, on_gpu: Sequence[Workload]) -> Sequence[Workload]:
    """What the command line asks for; on a GPU, where it asks for nothing, these."""
    if options.device == "cuda" and not (options.quick or options.models or options.cases or options.dtype):
        return on_gpu
    models = options.models or (["tiny"] if options.quick else DEFAULT_MODELS)
    dtypes = dtypes_of(options)
    return [Workload(model, dtype, tuple(options.cases or MODELS[model].cases)) for model in models for dtype in dtypes]


def dtypes_of(options: argparse.Namespace) -> Sequence[str]:
    """The precisions asked for, or else all that the device has."""
    on_cpu = options.device == "cpu"
    return options.dtype or (("float32", "bfloat16", "int8") if on_cpu else BASELINE.cuda)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time bert_fast against transformers and its peers, side by side.")
    parser.add_argument("--models", nargs="+", choices=MODELS, help=f"{' '.join(DEFAULT_MODELS)} when not given")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="32x128 or mix32; the model's own when not given")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=dict.fromkeys((*BASELINE.cpu, *BASELINE.cuda)),
        help="all that the device has when not given",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=("all", *PEERS),
        metavar="PEER",
        default=["all"],
        help=f"beside transformers: all that are installed (when not given), none, or {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=dict.fromkeys((*PARTS["cpu"], *PARTS["cuda"])),
        help="all that the device has when not given, but for kernels",
    )
    parser.add_argument("--seconds", type=float, metavar="N", help="stop then, with what was measured; no end if not")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run? Its figures mean nothing")
    parser.add_argument("--strings", type=int, metavar="N", default=NUM_STRINGS, help="texts of the part of that name")
    parser.add_argument(
        "--optimum-python",
        default=sys.executable,
        metavar="PATH",
        help="interpreter that has optimum, for the onnx and openvino back ends of sentence-transformers",
    )
    parser.add_argument(
        "--output", type=Path, help="results file; benchmarks/results/<device>/encoder.json if not given"
    )
    options = parser.parse_args()
    for name in ("threads", "repeats", "strings"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds}, expected more than 0")
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its figures are no results")
    known = PARTS[options.device]
    options.parts = options.parts or [part for part in known if part != "kernels"]
    try:
        if unknown := [part for part in options.parts if part not in known]:
            raise ValueError(f"--parts {unknown[0]}: on {options.device} there are {', '.join(known)}")
        if options.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: PyTorch sees no GPU")
        for dtype in dtypes_of(options):
            if dtype not in SUBJECT.precisions(options.device):
                raise ValueError(f"--dtype {dtype}: bert_fast has it not on {options.device}")
        options.peers = select(options.peers, options.device)
        for text in options.cases or ():
            parse_case(text)
    except ValueError as error:
        parser.error(str(error))
    return options


def place(row: Row, rows: list[Row]) -> None:
    """Put a row where an earlier one of the same case stands, which was measured beside fewer peers; or at the end."""

    def identity(row: Row) -> tuple[str, str, str]:
        return row["model"], row["case"], row["dtype"]

    same = (index for index, other in enumerate(rows) if identity(other) == identity(row))
    index = next(same, len(rows))
    rows[index : index + 1] = [row]


def shown(module: str, arguments: Sequence[str]) -> str:
    """A command as results hold it: without where they went, which is nobody else's folder."""
    kept = list(arguments)
    while "--output" in kept:
        index = kept.index("--output")
        del kept[index : index + 2]
    return shlex.join(["python", "-m", module, *kept])


def cpu_name() -> str:
    """The model name that the kernel gives, or else the architecture."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: *(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.machine()


def slug(name: str) -> str:
    """A folder's name: lower case, words joined by hyphens, trademark signs dropped."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm|c)\)", "", name.lower())).strip("-")


def commit() -> tuple[str | None, bool | None]:
    """The commit checked out, and whether anything but results differs from it; None for both outside git."""
    head = output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    status = output(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return head, None if status is None else bool(status)


def versions(packages: list[str]) -> dict[str, str | None]:
    """Of everything the figures depend on, these packages too; None for what is not there."""
    compiler = output([*peak.compiler(), "--version"])
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", *packages)},
        "compiler": compiler.splitlines()[0] if compiler else None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def output(command: list[str]) -> str | None:
    """What a command prints, or None when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
