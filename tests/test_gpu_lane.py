"""`make gpu`, as far as it goes without a GPU: workloads, budgets, what is kept when it is killed, targets, reports."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gpu, kernels, parts, report, tables, targets
from benchmarks.budget import Budget
from benchmarks.cases import GPU_COMPILED, GPU_WORKLOADS, KERNELS, MODELS, QUICK_KERNELS, KernelCase
from benchmarks.parts import Ended, Job, Part, run_part, run_within
from benchmarks.peers import BASELINE, CONTENDERS, SUBJECT, varlen
from benchmarks.processes import ROOT, Crew, Spec, WorkerError
from benchmarks.suite import Settings, bench_kernels, measure
from bert_fast.benchmarking import Case, Cost, Row, Work, measured_row, parse_case
from bert_fast.config import BertConfig
from bert_fast.ops.attention import attention
from bert_fast.timing import Timing, relative_error

PEAK = {
    "threads": 1,
    "instructions": [{"dtype": "bfloat16", "instruction": "matrix product", "gops": 395_000.0}],
    "copy_gbs": 2150.0,
}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions of this file, in the workers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


# Workloads.


@pytest.mark.parametrize("batch_size", [1, 8, 64, 728, 4096])
def test_squad_lengths_have_one_distribution(batch_size: int) -> None:
    case = parse_case(f"squad{batch_size}")
    assert len(case.lengths) == batch_size
    assert 32 <= min(case.lengths) <= max(case.lengths) <= 384
    if batch_size > 1:
        assert sum(case.lengths) / batch_size == pytest.approx(180, abs=3 if batch_size >= 64 else 8)
        assert list(case.lengths) != sorted(case.lengths)
    assert parse_case(case.name) == case


def test_squad_lengths_reach_the_cut() -> None:
    lengths = parse_case("squad4096").lengths
    assert max(lengths) == 384
    assert 0.01 < sum(length == 384 for length in lengths) / 4096 < 0.05
    logs = torch.tensor(lengths).double().log()
    assert logs.median().item() == pytest.approx(math.log(165), abs=0.01)
    assert logs.std().item() == pytest.approx(0.45, abs=0.02)


def test_workloads_can_be_run() -> None:
    for workload in (*GPU_WORKLOADS, *GPU_COMPILED):
        assert workload.dtype in SUBJECT.cuda
        assert workload.dtype in BASELINE.cuda
        assert max(max(parse_case(case).lengths) for case in workload.cases) <= 512
        assert isinstance(MODELS[workload.model].source, BertConfig)  # nothing from the network
    compiled = {(w.model, w.dtype, case) for w in GPU_COMPILED for case in w.cases}
    assert compiled <= {(w.model, w.dtype, case) for w in GPU_WORKLOADS for case in w.cases}


def test_kernels_are_several_times_the_cache() -> None:
    for case in KERNELS:
        assert kernels.work(case).bytes >= 200e6, case  # an H200 has 60 MB


# Kernels alone.


@pytest.mark.parametrize("case", QUICK_KERNELS, ids=lambda case: f"{case.op}-{case.case}")
@pytest.mark.parametrize("name", ["torch", "bert_fast"])
def test_a_kernel_contender_gives_the_answer(case: KernelCase, name: str) -> None:
    runner = kernels.Runner(name, "cpu")
    with torch.inference_mode():
        answers = [kernels.sample(case, runner(case)).float() for _ in range(3)]
        expected = kernels.truth(case, "cpu")
    allowed = 1e-5 if case.dtype == "float32" else 2e-2
    assert relative_error(answers[0], expected) <= allowed
    assert relative_error(answers[1], expected) > 0.1  # the second set of inputs ...
    assert torch.equal(answers[2], answers[0])  # ... and the first again


def test_a_runner_given_the_same_case_anew_begins_with_the_first_inputs() -> None:
    runner, case = kernels.Runner("bert_fast", "cpu"), QUICK_KERNELS[-1]
    first = runner(case)
    assert torch.equal(runner(replace(case)), first)


def test_work_of_kernels_by_hand() -> None:
    attention_work = kernels.work(KernelCase("attention", "2x8", width=128))
    assert (attention_work.flops, attention_work.bytes) == (4 * 128 * 2 * 64, 4 * 16 * 128 * 2)
    norm = kernels.work(KernelCase("residual_layer_norm", "2x8", width=128))
    assert (norm.flops, norm.bytes, norm.case) == (0, 3 * 16 * 128 * 2, "2x8, width 128")
    assert kernels.work(KernelCase("pooling", "2x8", width=128)).bytes == (16 + 2) * 128 * 2
    assert kernels.work(KernelCase("bias_gelu", "2x8", "float32", 128)).bytes == 2 * 16 * 128 * 4
    assert kernels.work(KernelCase("embedding_layer_norm", "2x8", width=128)).bytes == 2 * 16 * 128 * 2 + 16 * 24


def test_an_unknown_kernel_is_named() -> None:
    with pytest.raises(ValueError, match="op is 'softmax'"):
        kernels.arguments(KernelCase("softmax", "2x8"), "cpu")


# The peer without padding.


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _: Tensor, longest: int, __: int) -> Tensor:
    return attention(q, k, v, cu_seqlens=cu, max_seqlen=longest, impl="reference")


def test_varlen_peer_gives_transformers_answer() -> None:
    from benchmarks.cases import build_model

    config = replace(MODELS["tiny"].source, initializer_range=0.2)
    model = build_model(config)
    inputs = Case("ragged", (3, 11, 1, 7)).inputs(config.vocab_size)
    inputs["token_type_ids"] = inputs["input_ids"] % 2
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        expected = model(**inputs).last_hidden_state
        answer = varlen.build(model, "float32", attend=_plain_attention)(inputs)
    assert relative_error(answer[real], expected[real]) < 1e-5
    assert not answer[~real].any()


def test_varlen_peer_refuses_another_activation() -> None:
    from benchmarks.cases import build_model

    model = build_model(replace(MODELS["tiny"].source, hidden_act="relu"))
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        varlen.build(model, "float32")


# Budgets, and contenders that fail.


def test_budget_is_of_the_real_clock() -> None:
    budget = Budget(0.2)
    assert 0.1 < budget.left <= 0.2
    assert budget.share(1, 3) == pytest.approx(budget.left / 4, rel=0.1)
    time.sleep(0.25)
    assert budget.left == 0.0
    assert Budget().left == math.inf


def make_ones() -> Any:
    return lambda given: torch.ones(4)


def make_slow() -> Any:
    def sleep(_: Any) -> Tensor:
        time.sleep(60)
        return torch.ones(4)

    return sleep


def make_wrong() -> Any:
    return lambda given: torch.zeros(4)


def make_failing() -> Any:
    raise KeyError("no such precision")


def make_dying() -> Any:
    return lambda given: os.kill(os.getpid(), signal.SIGKILL)


def specs(**make: Any) -> dict[str, Spec]:
    return {name: Spec(partial(function), ("test_gpu_lane",)) for name, function in make.items()}


def settings(seconds: float | None = None) -> Settings:
    return Settings(PEAK, threads=1, repeats=1, dtypes=["float32"], peers=[], budget=Budget(seconds))


def test_a_peer_that_fails_costs_only_its_own_figures() -> None:
    given = settings()
    with Crew(
        specs(transformers=make_ones, wrong=make_wrong, broken=make_failing, mortal=make_dying, bert_fast=make_ones), 1
    ) as crew:
        measured = measure(given, crew, "a case", None)
        assert measured is not None
        timings, costs = measured
        assert list(timings) == list(costs) == list(crew.specs) == ["transformers", "bert_fast"]
    reasons = "\n".join(given.left_out)
    assert len(given.left_out) == 3
    assert "a case: broken failed in build" in reasons
    assert "a case: wrong differs from transformers by a relative error" in reasons
    assert "a case: the process of mortal was ended by SIGKILL in answer" in reasons


def test_a_bert_fast_that_dies_is_started_anew_for_the_next_case() -> None:
    given = settings()
    with Crew(specs(transformers=make_ones, bert_fast=make_dying), 1) as crew:
        assert measure(given, crew, "first", None) is None
        assert measure(given, crew, "second", None) is None
    assert [reason.split(":")[0] for reason in given.left_out] == ["first", "second"]


def test_a_bert_fast_that_cannot_be_built_is_tried_once() -> None:
    given = settings()
    with Crew(specs(transformers=make_ones, bert_fast=make_failing), 1) as crew:
        assert measure(given, crew, "first", None) is None
        assert list(crew.specs) == ["transformers"]


def test_no_row_outlasts_the_budget() -> None:
    given = settings(12.0)
    start = time.monotonic()
    with Crew(specs(transformers=make_ones, bert_fast=make_slow), 1, budget=given.budget) as crew:
        assert measure(given, crew, "slow", None) is None
        assert time.monotonic() - start < 16
        assert measure(given, crew, "next", None) is None
    assert "slow: bert_fast had not finished answer when the time was up" in given.left_out[0]
    assert given.left_out[-1] == "next: no time was left"


def test_crew_says_who_cannot_be_built() -> None:
    with Crew(specs(broken=make_failing), 1) as crew, pytest.raises(WorkerError) as caught:
        crew.ready()
    assert (caught.value.contender, caught.value.request) == ("broken", "build")


def test_kernels_without_time_are_named() -> None:
    given = settings(1e-9)
    assert list(bench_kernels(given, QUICK_KERNELS[:2])) == []
    assert given.left_out == [
        "attention 3x8, width 128 bfloat16: no time was left",
        "attention mix5, width 64 float32: no time was left",
    ]


# Parts.


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


# Targets.


def _row(model: str, case: str, dtype: str, work: Work | None = None, **milliseconds: float) -> Row:
    timings = {name: Timing((1e-3 * value,), error=0.0, cosine=1.0) for name, value in milliseconds.items()}
    costs = {name: Cost(1000.0, 2000.0, host_us=50.0, latency_us=400.0) for name in milliseconds}
    batch = parse_case(case) if work is None else None
    work = work or Work(model, case, dtype, batch.num_tokens, batch.num_padded_tokens, 10**12, 10**9)
    return measured_row(timings, work, peak_gops=395_000.0, costs=costs)


def results(device: str) -> dict[str, report.Result]:
    base: dict[str, Any] = {
        "command": "python -m benchmarks.run",
        "date": "2020-01-01T00:00:00+00:00",
        "commit": None,
        "dirty": None,
        "device": device,
        "threads": 1,
        "versions": {"torch": "2.11.0"},
        "load_average": {"before": [0.0] * 3, "after": [0.0] * 3},
        "peak": PEAK,
        "sweep": [],
        "strings": [],
    }
    norm, wide = KernelCase("residual_layer_norm", "1024x128"), KernelCase("attention", "1024x128")
    rows = [
        _row("BERT-large", "squad64", "bfloat16", transformers=60.0, varlen_attn=20.0, bert_fast=16.0),
        _row("BERT-base", "squad64", "bfloat16", **{"transformers": 20.0, "torch.compile": 9.0, "bert_fast": 5.0}),
        _row("BERT-base", "1x128", "bfloat16", transformers=4.0, bert_fast=0.4),
        _row("BERT-large", "squad64", "float8_e4m3fn", bert_fast=10.0),
    ]
    kernel_rows = [
        _row("", "", "", kernels.work(norm), torch=0.5, bert_fast=0.25),
        _row("", "", "", kernels.work(wide), torch=0.5, bert_fast=0.5),
    ]
    encoder, alone = {**base, "rows": rows}, {**base, "rows": [], "kernels": kernel_rows, "left_out": ["pooling: why"]}
    return {"encoder": encoder, "kernels": alone}  # type: ignore[dict-item]


def by_name(verdicts: list[targets.Verdict]) -> dict[str, targets.Verdict]:
    return {verdict["name"]: verdict for verdict in verdicts}


def test_targets_on_an_h200() -> None:
    judged = by_name(targets.judge(results("NVIDIA H200")))
    large = judged["BERT-large, SQuAD-like lengths"]
    assert (large["required"], large["measured"], large["met"]) == (5000, pytest.approx(4000), False)
    fp8 = judged["BERT-large, SQuAD-like lengths, fp8"]
    assert (fp8["measured"], fp8["met"]) == (pytest.approx(6400), False)
    alone = judged["BERT-base, 1 x 128"]
    assert (alone["required"], alone["measured"], alone["met"]) == (0.35, pytest.approx(0.4), False)
    assert (judged["host, BERT-base, 1 x 128"]["measured"], judged["host, BERT-base, 1 x 128"]["met"]) == (50.0, True)
    # The lower of 60 / 16 and 20 / 5, and the only row that has torch.compile.
    assert judged["SQuAD-like lengths, to transformers"]["measured"] == pytest.approx(3.75)
    assert judged["SQuAD-like lengths, to torch.compile"]["measured"] == pytest.approx(1.8)
    assert judged["full batches, to transformers"]["met"] is None
    # 4 * 128 * 1024 operations for each of 131,072 tokens in 0.5 ms; three tensors of 131,072 x 1024 x 2 bytes in 0.25.
    assert judged["attention, head_dim 64, length 128"]["measured"] == pytest.approx(137.4, rel=1e-3)
    norm = judged["residual_layer_norm"]
    assert (norm["measured"], norm["met"]) == (pytest.approx(3.221, rel=1e-3), False)


def test_targets_elsewhere_are_fractions_of_its_ceilings() -> None:
    judged = by_name(targets.judge(results("Another GPU")))  # half an H200
    assert judged["BERT-large, SQuAD-like lengths"]["required"] == 2500
    assert judged["BERT-large, SQuAD-like lengths"]["met"] is True
    assert judged["BERT-base, 1 x 128"]["required"] == pytest.approx(0.7)
    assert judged["residual_layer_norm"]["required"] == pytest.approx(1.85)
    assert judged["SQuAD-like lengths, to transformers"]["required"] == 3
    assert judged["host, BERT-base, 1 x 128"]["required"] == 60


def test_targets_without_results() -> None:
    judged = targets.judge({})
    assert len(judged) == len(targets.TARGETS)
    assert {verdict["met"] for verdict in judged} == {None}
    assert targets.table(judged).count("not measured") == len(judged)


def test_target_table() -> None:
    lines = targets.table(targets.judge(results("NVIDIA H200"))).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["target", "unit", "required", "measured", "met"]
    assert cells[2] == ["BERT-large, SQuAD-like lengths", "samples/s", ">= 5000", "4000", "no"]


# Tables and plots of a GPU's results.


def test_tables_of_a_gpu(tmp_path: Path) -> None:
    result = results("NVIDIA H200")["encoder"]
    header, _, first, *_ = ([c.strip() for c in line.split("|")[1:-1]] for line in report.tables(result).splitlines())
    line = dict(zip(header, first, strict=True))
    assert line["samples/s"] == "4000"
    assert (line["TFLOP/s"], line["of peak"], line["host"], line["latency"]) == ("62.5", "16%", "50", "400")
    assert (line["to transformers"], line["best peer"], line["to best"]) == ("3.75x", "varlen_attn", "1.25x")

    path = tmp_path / "encoder.json"
    report.save(result, path)
    assert report.read(path) == result
    text = path.with_suffix(".md").read_text()
    assert "by the GPU's own clock" in text
    assert all(path.with_name(f"encoder-{name}.svg").exists() for name in ("ratios", "roofline"))


def test_table_of_kernels(tmp_path: Path) -> None:
    result = results("NVIDIA H200")["kernels"]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in report.tables(result).splitlines()]
    ours, attended = dict(zip(cells[0], cells[3], strict=True)), dict(zip(cells[0], cells[5], strict=True))
    assert (ours["kernel"], ours["contender"], ours["TFLOP/s"], ours["TB/s"]) == (
        "residual_layer_norm",
        "bert_fast",
        "",
        "3.22",
    )
    assert (ours["of copy"], ours["limit"], ours["of limit"], ours["ratio"]) == ("150%", "copy", "150%", "2.00x")
    # 68.7 GFLOP at 395 TFLOP/s take 0.17 ms, 1.07 GB at 2.15 TB/s take 0.50 ms.
    assert (attended["limit"], attended["of limit"], attended["TFLOP/s"]) == ("copy", "100%", "137.4")
    path = tmp_path / "kernels.json"
    report.save(result, path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["kernels.json", "kernels.md"]
    assert "Left out:\n\n- pooling: why\n" in path.with_suffix(".md").read_text()


def test_a_row_without_peers_has_no_ratio() -> None:
    row = _row("BERT-large", "squad64", "float8_e4m3fn", bert_fast=10.0)
    assert (tables.best_peer(row), tables.ratio_to_best(row), tables.ratio_to("transformers", row)) == (None,) * 3
    assert "|      6400 |" in tables.summary([row])


def test_without_matplotlib_there_are_tables_and_a_word(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    report.save(results("NVIDIA H200")["encoder"], tmp_path / "encoder.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["encoder.json", "encoder.md"]
    assert f"python -m benchmarks.report {tmp_path}/encoder.json" in capsys.readouterr().err


def test_every_contender_has_a_colour() -> None:
    from benchmarks import plots

    assert set(plots.COLORS) == set(CONTENDERS)
    assert len(set(plots.COLORS.values())) == len(CONTENDERS)


# The whole command.


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def quick_kernels(output: Path) -> list[str]:
    fixed = ("--quick", "--parts", "kernels", "--threads", "1", "--repeats", "200", "--peers")
    return command("benchmarks.run", *fixed, "--output", str(output))


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
        ("encoder", True),
        ("sanitizer", None),
    ]
    assert "6 passed" in stay["parts"][0]["outcome"]
    assert len(report.read(tmp_path / "kernels.json")["kernels"]) == len(QUICK_KERNELS)
    assert [row["case"] for row in report.read(tmp_path / "encoder.json")["rows"]] == list(MODELS["tiny"].cases)
    written = {f"{stem}.{kind}" for stem in ("gpu", "encoder", "kernels") for kind in ("json", "md")}
    assert {file.name for file in tmp_path.iterdir()} == {*written, "encoder-ratios.svg", "encoder-roofline.svg"}
    assert "| not measured |" in (tmp_path / "gpu.md").read_text()
    assert "sanitizer: not run: there is no GPU" in stay["left_out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "0"], "--seconds is 0.0, expected more than 0"),
        (["--parts", "dance"], "dance"),
        (["--quick"], "--quick needs --output"),
        ([], "PyTorch sees no GPU; --quick runs everything in small"),
    ],
    ids=["seconds", "part", "no output", "no GPU"],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu.main()
    assert message in capsys.readouterr().err


def test_results_of_an_earlier_stay_are_not_this_one(tmp_path: Path) -> None:
    stay: Any = {"date": "2021-01-01T00:00:00+00:00"}
    result = results("NVIDIA H200")["encoder"]
    report.write(result, tmp_path / "encoder.json")
    assert gpu.fresh(stay, tmp_path / "encoder.json") is None
    report.write({**result, "date": "2021-01-01T00:00:00+00:00"}, tmp_path / "encoder.json")
    assert gpu.fresh(stay, tmp_path / "encoder.json") is not None
    assert gpu.fresh(stay, tmp_path / "kernels.json") is None
