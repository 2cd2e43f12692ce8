"""End to end: transformers (SDPA, padded) against the same model through `bert_fast.accelerate`, in one run.

    python -m benchmarks.run [--models minilm base large] [--cases 1x16 mix32] [--dtype float32 bfloat16] [--threads N]
                             [--peers all | NAME ...]

measures what the machine can do, checks that the answers agree, times the contenders side by side, and writes
`benchmarks/results/<device>/encoder.json` with a table and a plot next to it. With `--strings N` it times
`SentenceTransformer.encode` against `Embedder.encode` on N texts instead, and writes `strings.json`.
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
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks import peak, report
from benchmarks.cases import MODELS, ModelCases
from benchmarks.peers import PEERS, select
from bert_fast.benchmarking import MAX_ERROR, MAX_PEER_ERROR, Row, bench_cases, format_table, load, parse_case
from bert_fast.folders import DEMO

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Measure what the command line asks for."""
    options = _options()
    load_before = list(os.getloadavg())
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = peak.measure_cuda() if options.device == "cuda" else peak.measure_cpu(options.threads)
    rows = _strings(options, machine) if options.strings else _encoders(options, machine)
    packages = [package for peer in options.peers for package in peer.packages]
    if options.strings:
        packages = ["sentence-transformers"]
    head, dirty = commit()
    device = torch.cuda.get_device_name() if options.device == "cuda" else cpu_name()
    result: report.Result = {
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "date": date,
        "commit": head,
        "dirty": dirty,
        "device": device,
        "threads": options.threads,
        "versions": versions(packages),
        "load_average": {"before": load_before, "after": list(os.getloadavg())},
        "peak": machine,
        "rows": rows,
    }
    folder = slug(device if options.device == "cuda" else f"{device} {options.threads} threads")
    file = "strings.json" if options.strings else "encoder.json"
    output = options.output or ROOT / "benchmarks" / "results" / folder / file
    report.save(result, output)
    print(format_table(rows))
    print(f"written: {output}", file=sys.stderr)


def _encoders(options: argparse.Namespace, machine: peak.Peak) -> list[Row]:
    rows: list[Row] = []
    for key in options.models:
        for dtype in options.dtype:
            peers = {
                peer.name: partial(peer.build, precision=dtype) for peer in options.peers if dtype in peer.precisions
            }
            beside = f" beside {', '.join(peers)}" if peers else ""
            print(f"timing {MODELS[key].title} in {dtype}{beside}", file=sys.stderr)
            rows += bench_cases(
                build(MODELS[key], dtype if dtype in MAX_ERROR else "float32").to(options.device),
                MODELS[key].title,
                [parse_case(text) for text in options.cases or MODELS[key].cases],
                threads=options.threads,
                repeats=options.repeats,
                peak_gops=peak.best(machine, dtype),
                precision=dtype,
                peers=peers,
            )
    return rows


def _strings(options: argparse.Namespace, machine: peak.Peak) -> list[Row]:
    from benchmarks.peers.strings import bench_strings

    gops = peak.best(machine, "float32")
    return [bench_strings(DEMO, MODELS["minilm"].title, options.strings, options.threads, options.repeats, gops)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time bert_fast against transformers, side by side.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="32x128 or mix32; the model's own when not given")
    parser.add_argument("--dtype", nargs="+", choices=MAX_PEER_ERROR, default=["float32"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=("all", *PEERS),
        metavar="PEER",
        default=[],
        help=f"also time these: all that are installed, or {', '.join(PEERS)}",
    )
    parser.add_argument(
        "--strings", type=int, metavar="N", help="time encode of N texts by sentence-transformers and by bert_fast"
    )
    parser.add_argument(
        "--output", type=Path, help="results file; benchmarks/results/<device>/encoder.json if not given"
    )
    options = parser.parse_args()
    for name in ("threads", "repeats", "strings"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name} is {value}, expected at least 1")
    if options.strings and (options.peers or options.device != "cpu"):
        parser.error("--strings compares with sentence-transformers on the CPU; it takes no --peers and no --device")
    try:
        options.peers = select(options.peers, options.device)
        if "int8" in options.dtype and not any("int8" in peer.precisions for peer in options.peers):
            raise ValueError("--dtype int8 needs --peers that have it")
        for text in options.cases or ():
            parse_case(text)
    except ValueError as error:
        parser.error(str(error))
    return options


def build(cases: ModelCases, dtype: str) -> Any:
    """The model in transformers, in eval mode; random weights are the same every time."""
    if isinstance(cases.source, str):
        return load(cases.source, dtype)
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig.from_dict(cases.source.to_dict(), attn_implementation="sdpa")
    return BertModel(config).eval().to(getattr(torch, dtype))


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
