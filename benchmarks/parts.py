"""The parts of a stay on a GPU machine (`benchmarks.gpu`): the command of each, and what its output says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypedDict

from benchmarks.peers import PEERS
from benchmarks.processes import ROOT
from benchmarks.training import BASELINE, SUBJECT

SANITIZER = "compute-sanitizer"

#: What bert_fast is timed beside on a GPU, besides transformers, where it is there.
GPU_PEERS = ("varlen_attn", "torch.compile")

#: Seconds that a part which was asked to end may take for it, and the last characters of its output that are kept.
GRACE, TAIL = 8.0, 30_000


@dataclass(frozen=True)
class Job:
    """What the commands depend on: "cuda" or "cpu", tiny sizes or not, and where results go."""

    device: str
    quick: bool
    folder: Path


class PartReport(TypedDict):
    """What became of a part."""

    name: str
    ok: bool | None  # None when it could not be run here
    outcome: str
    seconds: float
    limit: float
    command: str
    output: str  # the end of it


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its status, None if it was out of time, and all it printed."""

    status: int | None
    seconds: float
    output: str


@dataclass(frozen=True)
class Part:
    """A part of the stay.

    Attributes:
        weight: its seconds where all have 480; its share of whatever there is.
        command: what to run in so many seconds; or a string, why it cannot be run.
        verdict: whether it went well, None where it cannot be run, and what to say of it.
        environment: variables that its process has beside this one's.
    """

    name: str
    weight: float
    command: Callable[[Job, float], list[str] | str]
    verdict: Callable[[Ended], tuple[bool | None, str]]
    environment: tuple[tuple[str, str], ...] = ()


def run_part(part: Part, job: Job, limit: float) -> PartReport:
    """Run a part for at most `limit` seconds: it is to end by itself, else it is interrupted, else it is killed."""
    command = part.command(job, max(1.0, limit - 2 * GRACE))
    if isinstance(command, str):
        return _report(part, limit, ok=None, outcome=f"not run: {command}")
    ended = run_within(command, max(1.0, limit - GRACE), dict(part.environment))
    ok, outcome = part.verdict(ended)
    said = anonymous(outcome, job.folder), anonymous(ended.output[-TAIL:], job.folder)
    return _report(part, limit, ok, said[0], ended.seconds, anonymous(shlex.join(command), job.folder), said[1])


def anonymous(text: str, folder: Path) -> str:
    """Without the folders of this machine, which are nobody else's."""
    names = {sys.executable: "python", str(folder): "FOLDER", str(ROOT): ".", sys.prefix: "PREFIX"}
    for name, instead in names.items():
        text = text.replace(name, instead)
    return text


def _report(
    part: Part, limit: float, ok: bool | None, outcome: str, seconds: float = 0.0, command: str = "", output: str = ""
) -> PartReport:
    return {
        "name": part.name,
        "ok": ok,
        "outcome": outcome,
        "seconds": seconds,
        "limit": limit,
        "command": command,
        "output": output,
    }


def run_within(
    command: list[str], seconds: float, environment: dict[str, str] | None = None, grace: float = GRACE
) -> Ended:
    """Run a command in the repository; when the time is up it is interrupted, then it and all it started is killed."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(environment or {})},
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest then prints its summary, the suite its tables
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        took = time.monotonic() - start
        output.seek(0)
        return Ended(status, took, output.read())


def _benchmark(job: Job, seconds: float, stem: str, *names: str) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.run", "--device", job.device, "--parts", *names]
    if job.quick:
        dtype = "bfloat16" if job.device == "cuda" else "float32"
        command += ["--quick", "--repeats", "1", "--threads", "1", "--dtype", dtype]
    present = [name for name in GPU_PEERS if job.device == "cuda" and PEERS[name].missing() is None]
    command += ["--peers", *present]
    return [*command, "--seconds", f"{seconds:.0f}", "--output", str(job.folder / f"{stem}.json")]


def _kernels(job: Job, seconds: float) -> list[str]:
    return _benchmark(job, seconds, "kernels", "kernels")


def _encoder(job: Job, seconds: float) -> list[str]:
    return _benchmark(job, seconds, "encoder", "encoder", *(["compiled"] if job.device == "cuda" else []))


def _train(job: Job, seconds: float) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.train", "--device", job.device]
    if job.quick:
        command += ["--quick", "--repeats", "1", "--threads", "1", "--contenders", BASELINE, SUBJECT]
    return [*command, "--seconds", f"{seconds:.0f}", "--output", str(job.folder / "train.json")]


def benchmark_verdict(ended: Ended) -> tuple[bool, str]:
    """Of `benchmarks.run` and `benchmarks.train`."""
    left_out = len(re.findall(r"^left out: ", ended.output, re.MULTILINE))
    also = f", {left_out} left out" if left_out else ""
    if ended.status is None:
        return False, f"stopped after {ended.seconds:.0f} s{also}"
    if ended.status == 0:
        return True, f"done{also}"
    return False, f"exit status {ended.status}{also}: {_last_line(ended.output)}"


def _pytest(job: Job, folder: str, selection: str, *arguments: str) -> list[str] | str:
    if find_spec("pytest") is None:
        return "pytest is not installed"
    where = ["tests/ops/test_bias_gelu.py" if job.quick else folder]
    keywords = "triton and zero_size" if job.quick else selection
    fixed = ["-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return [sys.executable, "-m", "pytest", *where, "-k", keywords, *fixed, *arguments]


def _tests(job: Job, seconds: float) -> list[str] | str:
    # Those marked gpu, and all that run a Triton kernel, whose names do not always say so. Compiling needs no GPU.
    chosen = "gpu or triton or packing or quantize or 16_bit or its_gradient or test_measure"
    chosen += " or test_every_float16 or test_the_polynomial"
    workers = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") and not job.quick else []
    return _pytest(job, "tests", f"({chosen}) and not test_triton_compile", *workers)


def tests_verdict(ended: Ended) -> tuple[bool, str]:
    """Of pytest -v, also of one that did not come to its end."""
    lines = [line for line in ended.output.splitlines() if line.startswith(("tests/", "[gw")) and "::" in line]
    outcomes = [found[1] for line in lines if (found := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line))]
    errors = len(re.findall(r"^ERROR tests/[^ ]*\.py( |$)", ended.output, re.MULTILINE))  # files that cannot be read
    counts = Counter(outcome.lower() for outcome in outcomes)
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no test ran"
    if errors:
        said += f", {errors} files could not be collected"
    failed = [line for line in lines if "FAILED" in line or "ERROR" in line]
    named = "".join(f"; {' '.join(line.split())}" for line in failed[:20])
    ok = ended.status == 0 and bool(counts["passed"])
    stopped = f"stopped after {ended.seconds:.0f} s, " if ended.status is None else ""
    return ok, f"{stopped}{said}{named}"


def _sanitizer(job: Job, seconds: float) -> list[str] | str:
    if job.device != "cuda":
        return "there is no GPU"
    program = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if program is None:
        return f"{SANITIZER} is not installed"
    selection = "triton and float16 and not bfloat16 and (forward or ragged or zero_size or padded)"
    tests = _pytest(job, "tests/ops", selection, "-x")
    if isinstance(tests, str):
        return tests
    return [program, "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "99", *tests]


def sanitizer_verdict(ended: Ended) -> tuple[bool | None, str]:
    """Of compute-sanitizer: does it work here, how many errors did it find, in how many tests."""
    ran = len(re.findall(r"::.*\bPASSED\b", ended.output))
    found = re.findall(r"^========= ERROR SUMMARY: (\d+) error", ended.output, re.MULTILINE)
    invalid = len(re.findall(r"^========= (?:Invalid|Misaligned|Out-of-range)", ended.output, re.MULTILINE))
    errors = max([invalid, *map(int, found)])
    if errors:
        return False, f"{errors} errors under memcheck, {ran} tests passed"
    if ended.status is None:
        return ran > 0, f"stopped after {ended.seconds:.0f} s, no error under memcheck in {ran} tests"
    refusal = re.search(r"^========= (.*(?:not supported|Unable to).*)", ended.output, re.MULTILINE)
    if refusal or not found:
        return None, f"{SANITIZER} does not work here: {refusal[1] if refusal else _last_line(ended.output)}"
    if ended.status:
        return False, f"exit status {ended.status}, no error under memcheck in {ran} tests: {_last_line(ended.output)}"
    return True, f"no error under memcheck in {ran} tests"


def _last_line(output: str) -> str:
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")


#: In the order of value; but the encoder late, whose last rows, beside torch.compile, take all there is.
PARTS = (
    Part("tests", 100, _tests, tests_verdict),
    Part("kernels", 75, _kernels, benchmark_verdict),
    Part("train", 90, _train, benchmark_verdict),
    Part("encoder", 160, _encoder, benchmark_verdict),
    # Without torch's own allocator every tensor ends where its allocation ends, and what is past it is noticed.
    Part("sanitizer", 55, _sanitizer, sanitizer_verdict, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)),
)
