"""One stay on a GPU machine: everything that only such a machine can tell, in one command and a few minutes.

    python -m benchmarks.gpu [--seconds 465] [--output FOLDER] [--parts NAME ...] [--quick]

needs nothing but the packages of the interpreter that runs it: no network, no virtual environment. Each part is a
process with a limit of its own, the most telling first; what one leaves of its time the next ones have. Into
`benchmarks/results/<gpu>/`, or FOLDER, go

    gpu.json, gpu.md              the machine, what became of each part (tests, kernels, train, encoder, sanitizer), the
                                  targets
    encoder.json, .md, -*.svg     forward passes beside the peers (`benchmarks.run --parts encoder compiled`)
    kernels.json, .md             kernels alone (`benchmarks.run --parts kernels`)
    train.json, .md               steps of training beside transformers (`benchmarks.train`)

each written whole, after every part and every row: whoever ends the run at any moment has what was measured until then.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

import torch

from benchmarks import parts, report, run, targets
from benchmarks.budget import Budget
from benchmarks.parts import PARTS, Job, PartReport
from benchmarks.peers import PEERS
from benchmarks.processes import ROOT
from bert_fast.benchmarking import markdown_table

#: Of a whole stay; with the imports before and the plots after it, that makes eight minutes.
DEFAULT_SECONDS = 465

#: What a stay can do without, and what is then missing.
OPTIONAL = {
    "matplotlib": "no plots; elsewhere: python -m benchmarks.report FOLDER/encoder.json",
    "xdist": "the tests run one after another (pytest-xdist)",
    "pytest": "no tests, and no kernels under compute-sanitizer",
    "hypothesis": "test files that need it are not run",
}


class Stay(TypedDict):
    """What `gpu.json` holds."""

    command: str
    date: str  # UTC, ISO 8601
    commit: str | None
    dirty: bool | None
    device: str
    machine: dict[str, str]
    versions: dict[str, str | None]
    seconds: float  # that it was given
    missing: dict[str, str]  # package or peer -> what is not done for want of it
    parts: list[PartReport]
    targets: list[targets.Verdict]
    left_out: list[str]


def main() -> None:
    """Run the parts that the command line asks for; exit status 1 if a part failed."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the part that runs is ended with this process
    budget = Budget(options.seconds)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else run.cpu_name()
    folder = options.output or ROOT / "benchmarks" / "results" / run.slug(name)
    head, dirty = run.commit()
    stay: Stay = {
        "command": run.shown("benchmarks.gpu", sys.argv[1:]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": head,
        "dirty": dirty,
        "device": name,
        "machine": machine(device),
        "versions": run.versions(["numpy", "pytest"]),
        "seconds": options.seconds,
        "missing": missing(),
        "parts": [],
        "targets": [],
        "left_out": [],
    }
    print(_head(stay), flush=True)
    write(stay, folder)
    chosen = [part for part in PARTS if part.name in options.parts]
    for index, part in enumerate(chosen):
        limit = budget.share(part.weight, sum(later.weight for later in chosen[index + 1 :]))
        print(f"{part.name}: up to {limit:.0f} s", file=sys.stderr, flush=True)
        stay["parts"].append(parts.run_part(part, Job(device, options.quick, folder), limit))
        print(f"{part.name}: {stay['parts'][-1]['outcome']}", file=sys.stderr, flush=True)
        write(stay, folder)
    print(markdown(stay))
    for result in written(stay, folder).values():
        print(report.tables(result), end="\n\n")
    print(f"written: {folder}", file=sys.stderr)
    if any(part["ok"] is False for part in stay["parts"]):
        raise SystemExit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests and benchmarks of a GPU machine, in a few minutes.")
    names = [part.name for part in PARTS]
    parser.add_argument("--seconds", type=float, default=DEFAULT_SECONDS, help=f"of it all; {DEFAULT_SECONDS} if not")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="benchmarks/results/<gpu> when not given")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="all when not given")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes, on the CPU where there is no GPU: does it run?"
    )
    options = parser.parse_args()
    if not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds}, expected more than 0")
    if not (options.quick or torch.cuda.is_available()):
        parser.error("PyTorch sees no GPU; --quick runs everything in small on this CPU")
    if options.quick and options.output is None:
        parser.error("--quick needs --output: its figures are no results")
    return options


def missing() -> dict[str, str]:
    """What is not there, and what is not done for want of it."""
    packages = {name: what for name, what in OPTIONAL.items() if find_spec(name) is None}
    peers = {name: reason for name in parts.GPU_PEERS if (reason := PEERS[name].missing())}
    return {**packages, **peers}


def machine(device: str) -> dict[str, str]:
    """What there is to know of the machine; what a tool cannot say is missing."""
    known = {"tools": ", ".join(tool for tool in ("nvidia-smi", parts.SANITIZER) if shutil.which(tool)) or "none"}
    if device == "cpu":
        return {**known, "gpu": "none"}
    gpu = torch.cuda.get_device_properties(0)
    fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,memory.used"
    smi = run.output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])
    return {
        **known,
        "gpu": gpu.name,
        "gpus": str(torch.cuda.device_count()),
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": str(gpu.multi_processor_count),
        "memory": f"{gpu.total_memory * 1e-9:.1f} GB",
        "cuda": str(torch.version.cuda),
        **({"nvidia-smi": smi} if smi else {}),
    }


def write(stay: Stay, folder: Path) -> None:
    """Write the record and its text, with what the parts have written until now."""
    results = written(stay, folder)
    for stem, result in results.items():
        path = folder / f"{stem}.json"
        text = path.with_suffix(".md")
        if not text.exists() or text.stat().st_mtime < path.stat().st_mtime:  # the part was killed between two rows
            report.save(result, path)
    stay["targets"] = targets.judge(results)
    stay["left_out"] = [
        *(f"{name} is not there: {what}" for name, what in stay["missing"].items()),
        *(f"{part['name']}: {part['outcome']}" for part in stay["parts"] if part["ok"] is None),
        *(sentence for result in results.values() for sentence in result.get("left_out", [])),
    ]
    report.write_whole(json.dumps(stay, indent=2) + "\n", folder / "gpu.json")
    report.write_whole(markdown(stay), folder / "gpu.md")


def written(stay: Stay, folder: Path) -> dict[str, report.Result]:
    """The results of this stay by the stem of their file; not those that an earlier one left."""
    paths = {stem: folder / f"{stem}.json" for stem in ("encoder", "kernels", "train")}
    there = {stem: report.read(path) for stem, path in paths.items() if path.exists()}
    return {stem: result for stem, result in there.items() if result["date"] >= stay["date"]}


def _head(stay: Stay) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in stay["versions"].items() if version)
    commit = f"commit {stay['commit'][:12]}" if stay["commit"] else "no commit"
    facts = "\n".join(f"    {name}: {' / '.join(value.splitlines())}" for name, value in stay["machine"].items())
    return f"{stay['device']}, {commit}{' with changes' if stay['dirty'] else ''}; {versions}.\n\n{facts}\n"


def markdown(stay: Stay) -> str:
    """The record as a text: the machine, the parts, the targets, and what is missing."""
    lines = [
        {
            "part": part["name"],
            "seconds": f"{part['seconds']:.0f}",
            "of": f"{part['limit']:.0f}",
            "ok": {True: "yes", False: "no", None: ""}[part["ok"]],
        }
        for part in stay["parts"]
    ]
    outcomes = "".join(f"- {part['name']}: {part['outcome']}\n" for part in stay["parts"])
    left_out = "".join(f"- {' '.join(sentence.split())[:400]}\n" for sentence in stay["left_out"])
    return "\n".join(
        [
            _head(stay),
            f"    {stay['command']}\n",
            f"{markdown_table(lines)}\n\n{outcomes}" if lines else "No part has ended yet.\n",
            f"{targets.table(stay['targets'])}\n",
            "Targets are those of one H200; on another GPU the same fractions of its own ceilings.\n",
            *([f"Left out:\n\n{left_out}"] if left_out else []),
        ]
    )


if __name__ == "__main__":
    main()
