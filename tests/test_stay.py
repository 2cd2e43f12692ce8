"""One stay on a GPU machine, as far as it goes without: its parts, its time, and what is kept when it is killed.

The words by which the stay chooses its tests stand in no name here: these are not among them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, parts, report, tables
from benchmarks.cases import MODELS, QUICK_KERNELS, QUICK_TRAINING
from benchmarks.parts import Ended, Job, Part, run_part, run_within
from benchmarks.processes import ROOT


def lives(process: int) -> bool:
    """Whether a process is there, and not dead without anybody having asked for its status."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_command_that_takes_too_long_is_ended_with_all_it_started() -> None:
    program = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, lambda *_: print('interrupted', flush=True))\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True)\n"
        "while True: time.sleep(0.1)\n"
    )
    ended = run_within([sys.executable, "-c", program], 1.5, grace=1.0)
    assert ended.status is None
    assert 1.5 <= ended.seconds < 10
    child, said = ended.output.split()
    assert said == "interrupted"
    deadline = time.monotonic() + 5
    while lives(int(child)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_part_that_cannot_be_run_says_why(tmp_path: Path) -> None:
    part = Part("sanitizer", 1, lambda job, seconds: "there is no GPU", parts.sanitizer_verdict)
    outcome = run_part(part, Job("cpu", True, tmp_path), 10)
    assert (outcome["ok"], outcome["outcome"]) == (None, "not run: there is no GPU")


TESTS_OUTPUT = """\
[gw0] [ 50%] PASSED tests/ops/test_pooling.py::test_forward[triton-float16]
[gw1] [ 75%] FAILED tests/ops/test_pooling.py::test_layouts[triton-float16]
tests/ops/test_pooling.py::test_expanded[triton-float16] SKIPPED (no)    [100%]
FAILED tests/ops/test_pooling.py::test_layouts[triton-float16] - assert False
ERROR tests/test_batching.py
"""


@pytest.mark.parametrize(
    ("ended", "ok", "outcome"),
    [
        (Ended(1, 5, TESTS_OUTPUT), False, "1 passed, 1 failed, 1 skipped, 1 files could not be collected; [gw1]"),
        (Ended(None, 5, TESTS_OUTPUT), False, "stopped after 5 s, 1 passed"),
        (Ended(0, 5, TESTS_OUTPUT.splitlines()[0]), True, "1 passed"),
        (Ended(5, 5, "no tests ran"), False, "no test ran"),
    ],
    ids=["failures", "out of time", "passed", "nothing"],
)
def test_verdict_on_tests(ended: Ended, ok: bool, outcome: str) -> None:
    found, said = parts.tests_verdict(ended)
    assert found is ok
    assert said.startswith(outcome)


PASSED = "tests/ops/test_pooling.py::test_forward[triton-float16] PASSED [ 50%]\n"


@pytest.mark.parametrize(
    ("ended", "ok", "outcome"),
    [
        (Ended(0, 5, f"{PASSED}========= ERROR SUMMARY: 0 errors\n"), True, "no error under memcheck in 1 tests"),
        (
            Ended(99, 5, f"{PASSED}========= ERROR SUMMARY: 3 errors\n"),
            False,
            "3 errors under memcheck, 1 tests passed",
        ),
        (Ended(None, 5, f"{PASSED}========= Invalid __global__ read of size 4 bytes\n"), False, "1 errors"),
        (Ended(None, 5, PASSED), True, "stopped after 5 s, no error under memcheck in 1 tests"),
        (Ended(None, 5, ""), False, "stopped after 5 s"),
        (
            Ended(1, 5, "========= Error: Device not supported\n========= ERROR SUMMARY: 0 errors\n"),
            None,
            "compute-sanitizer does not work here: Error: Device not supported",
        ),
        (Ended(1, 5, "bad interpreter\n"), None, "compute-sanitizer does not work here: bad interpreter"),
        (Ended(1, 5, f"{PASSED}========= ERROR SUMMARY: 0 errors\n"), False, "exit status 1, no error under memcheck"),
    ],
    ids=["clean", "errors", "errors, out of time", "out of time", "never began", "refused", "broken", "test failed"],
)
def test_verdict_on_the_sanitizer(ended: Ended, ok: bool | None, outcome: str) -> None:
    found, said = parts.sanitizer_verdict(ended)
    assert found is ok
    assert said.startswith(outcome)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def quick_kernels(output: Path) -> list[str]:
    fixed = ("--quick", "--parts", "kernels", "--threads", "1", "--repeats", "20", "--peers")
    return command("benchmarks.run", *fixed, "--output", str(output))


@pytest.mark.slow
def test_killed_in_mid_run_it_leaves_what_it_measured(tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    process = subprocess.Popen(quick_kernels(output), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not output.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    rows = report.read(output).get("kernels", [])
    assert 1 <= len(rows) < len(QUICK_KERNELS)
    report.save(report.read(output), output)  # what benchmarks.report does, elsewhere
    assert tables.kernel_table(rows, report.read(output)["peak"]) in output.with_suffix(".md").read_text()


def processes_of(folder: Path) -> list[int]:
    """Those that have the folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(folder).encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
    return [process for process in found if lives(process)]


@pytest.mark.slow
def test_terminated_it_ends_what_it_started_and_leaves_its_record(tmp_path: Path) -> None:
    stay = subprocess.Popen(
        command("benchmarks.gpu", "--quick", "--parts", "kernels", "--output", str(tmp_path)),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        # A process that is about to ask git looks like two, before there is a record.
        while len(processes_of(tmp_path)) < 2 or not (tmp_path / "gpu.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        stay.terminate()
        assert stay.wait(20) == 143
    finally:
        stay.kill()
        stay.wait()
    assert processes_of(tmp_path) == []
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"] == []
    assert "No part has ended yet." in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_the_whole_stay_in_small(tmp_path: Path) -> None:
    done = subprocess.run(
        command("benchmarks.gpu", "--quick", "--seconds", "400", "--output", str(tmp_path)),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    stay = json.loads((tmp_path / "gpu.json").read_text())
    assert [(part["name"], part["ok"]) for part in stay["parts"]] == [
        ("tests", True),
        ("kernels", True),
        ("train", True),
        ("encoder", True),
        ("sanitizer", None),
    ]
    assert "6 passed" in stay["parts"][0]["outcome"]
    assert len(report.read(tmp_path / "kernels.json")["kernels"]) == len(QUICK_KERNELS)
    assert [row["case"] for row in report.read(tmp_path / "encoder.json")["rows"]] == list(MODELS["tiny"].cases)
    assert len(report.read(tmp_path / "train.json")["train"]) == len(QUICK_TRAINING)
    written = {f"{stem}.{kind}" for stem in ("gpu", "encoder", "kernels", "train") for kind in ("json", "md")}
    assert {file.name for file in tmp_path.iterdir()} == {*written, "encoder-ratios.svg", "encoder-roofline.svg"}
    assert "| not measured |" in (tmp_path / "gpu.md").read_text()
    assert "sanitizer: not run: there is no GPU" in stay["left_out"]
    for file in tmp_path.glob("*.*[dn]"):  # .md, .json
        for folder in (tmp_path, ROOT, sys.prefix):
            assert str(folder) not in file.read_text(), file.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds is 0.0, expected more than 0"),
        (["--parts", "dance"], "dance"),
        (["--quick"], "--quick needs --output"),
        ([], "PyTorch sees no GPU; --quick runs everything in small"),
    ],
    ids=["seconds", "part", "no output", "nothing to run on"],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert message in capsys.readouterr().err


def record(date: str) -> gpu.Stay:
    return {
        "command": "python -m benchmarks.gpu",
        "date": date,
        "commit": None,
        "dirty": None,
        "device": "Some device",
        "machine": {"tools": "none"},
        "versions": {"torch": "2.11.0"},
        "seconds": 480.0,
        "missing": {"xdist": "the tests run one after another"},
        "parts": [],
        "targets": [],
        "left_out": [],
    }


def kernels_only(date: str) -> report.Result:
    values: Any = {key: [] for key in report.Measurement.__required_keys__}
    peak = {"threads": 1, "instructions": [], "copy_gbs": 1.0}
    return {**values, "date": date, "device": "Some device", "peak": peak, "kernels": [], "left_out": ["pooling: why"]}


def test_results_of_an_earlier_stay_are_not_this_one(tmp_path: Path) -> None:
    stay = record("2021-01-01T00:00:00+00:00")
    report.write(kernels_only("2020-12-31T23:59:59+00:00"), tmp_path / "kernels.json")
    assert gpu.written(stay, tmp_path) == {}
    report.write(kernels_only(stay["date"]), tmp_path / "kernels.json")
    assert list(gpu.written(stay, tmp_path)) == ["kernels"]


def test_a_part_that_was_killed_gets_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Path] = []
    monkeypatch.setattr(report, "save", lambda result, path: saved.append(path))
    stay, path = record("2021-01-01T00:00:00+00:00"), tmp_path / "kernels.json"
    report.write(kernels_only(stay["date"]), path)
    gpu.write(stay, tmp_path)
    assert saved == [path]
    path.with_suffix(".md").write_text("tables")
    gpu.write(stay, tmp_path)
    assert saved == [path]
    os.utime(path, (time.time() + 1,) * 2)  # another row, after the tables
    gpu.write(stay, tmp_path)
    assert saved == [path, path]
    text = (tmp_path / "gpu.md").read_text()
    assert "- xdist is not there: the tests run one after another\n- pooling: why\n" in text
    assert json.loads((tmp_path / "gpu.json").read_text())["left_out"] == stay["left_out"]


@pytest.mark.slow
def test_the_stay_does_not_select_its_own_tests() -> None:
    job = Job("cuda", False, Path("unused"))
    command = parts.PARTS[0].command(job, 10)
    assert not isinstance(command, str)
    done = subprocess.run([*command, "--collect-only", "-qq"], cwd=ROOT, capture_output=True, text=True)
    chosen = [line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line]
    assert {"tests/ops/test_attention.py", "tests/ops/test_pooling.py", "tests/test_packing.py"} <= set(chosen)
    others = ("stay", "targets", "crew", "workloads", "train_benchmark", "triton_compile", "packing_compile")
    assert not set(chosen) & {f"tests/test_{name}.py" for name in others}
