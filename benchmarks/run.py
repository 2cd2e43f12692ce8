"""The benchmark suite: bert_fast beside transformers and its peers, a process for each, in interleaved rounds.

    python -m benchmarks.run [--models minilm base large] [--cases 1x16 mix32] [--dtype float32 bfloat16 int8]
                             [--threads N] [--peers all | NAME ...] [--parts encoder sweep strings]

measures what the machine can do, checks every answer against transformers' in float32, times the contenders, and writes
`benchmarks/results/<device>/encoder.json` with its tables and plots next to it.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks import peak, report
from benchmarks.cases import DEFAULT_MODELS, MODELS, NUM_STRINGS
from benchmarks.peers import BASELINE, PEERS, SUBJECT, select
from benchmarks.processes import ROOT, WorkerError
from benchmarks.suite import Settings, bench_encoder, bench_strings, bench_sweep
from bert_fast.benchmarking import parse_case
from bert_fast.timing import WrongAnswerError

#: What a run can measure; on a GPU only the first.
PARTS = ("encoder", "sweep", "strings")


def main() -> None:
    """Measure what the command line asks for."""
    options = _options()
    load_before = list(os.getloadavg())
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = peak.measure_cuda() if options.device == "cuda" else peak.measure_cpu(options.threads)
    settings = Settings(machine, options.threads, options.repeats, options.dtype, options.peers, options.device)
    head, dirty = commit()
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    result: report.Result = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
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
    }
    try:
        if "encoder" in options.parts:
            for key in options.models:
                result["rows"] += bench_encoder(settings, MODELS[key], options.cases or MODELS[key].cases)
        if "sweep" in options.parts:
            result["sweep"] += bench_sweep(settings)
        if "strings" in options.parts:
            result["strings"] += bench_strings(settings, options.strings, options.optimum_python)
        failure = None
    except (WrongAnswerError, WorkerError) as error:
        if not result["rows"]:
            raise SystemExit(f"nothing written: {error}") from None
        failure = error  # what was measured before is kept
    result["load_average"]["after"] = list(os.getloadavg())
    folder = slug(device if options.device == "cuda" else f"{device} {options.threads} threads")
    output = options.output or ROOT / "benchmarks" / "results" / folder / "encoder.json"
    report.save(result, output)
    print(report.tables(result))
    print(f"written: {output}", file=sys.stderr)
    if failure is not None:
        raise SystemExit(f"stopped there: {failure}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time bert_fast against transformers and its peers, side by side.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=DEFAULT_MODELS)
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="32x128 or mix32; the model's own when not given")
    parser.add_argument("--dtype", nargs="+", choices=BASELINE.cpu, help="all that the device has when not given")
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="all that the device has when not given")
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
    on_cpu = options.device == "cpu"
    options.parts = options.parts or (PARTS if on_cpu else PARTS[:1])
    options.dtype = options.dtype or (("float32", "bfloat16", "int8") if on_cpu else BASELINE.cuda)
    try:
        if not on_cpu and set(options.parts) != {"encoder"}:
            raise ValueError(f"--parts {' '.join(options.parts)}: on {options.device} only encoder can be measured")
        for dtype in options.dtype:
            if dtype not in SUBJECT.precisions(options.device):
                raise ValueError(f"--dtype {dtype}: bert_fast has it not on {options.device}")
        options.peers = select(options.peers, options.device)
        for text in options.cases or ():
            parse_case(text)
    except ValueError as error:
        parser.error(str(error))
    return options


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
    head = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    status = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!benchmarks/results"])
    return head, None if status is None else bool(status)


def versions(packages: list[str]) -> dict[str, str | None]:
    """Of everything the figures depend on, these packages too; None for what is not there."""
    compiler = _output([*peak.compiler(), "--version"])
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


def _output(command: list[str]) -> str | None:
    """What a command prints, or None when it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
