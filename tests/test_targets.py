"""Targets computed from results that are made up, and the tables and plots of such."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kernels, report, tables, targets
from benchmarks.cases import KernelCase
from benchmarks.peers import CONTENDERS
from bert_fast.benchmarking import Cost, Row, Work, measured_row, parse_case
from bert_fast.timing import Timing

PEAK = {
    "threads": 1,
    "instructions": [{"dtype": "bfloat16", "instruction": "matrix product", "gops": 395_000.0}],
    "copy_gbs": 2150.0,
}


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


def test_tables_of_a_device(tmp_path: Path) -> None:
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
