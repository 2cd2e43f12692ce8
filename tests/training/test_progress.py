"""Speed, the file of measurements, its plot, and what the terminal shows."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tiny
import torch

from bert_fast.benchmarking import useful_flops
from bert_fast.training.progress import (
    METRICS_FILE,
    PLOT_FILE,
    Throughput,
    cut,
    describe,
    measured_peak,
    plot,
    read,
)
from bert_fast.training.trainer import Trainer


def test_throughput_leaves_out_what_is_not_training() -> None:
    throughput = Throughput(peak_gflops=2.0)
    assert throughput.read() == {}
    start = time.perf_counter()
    throughput.restart()
    throughput.count(1000, 10**7)
    time.sleep(0.02)
    with throughput.paused():
        time.sleep(0.2)
    rates = throughput.read()
    seconds = time.perf_counter() - start - 0.2
    assert 1000 / seconds * 0.9 <= rates["tokens_per_second"] <= 1000 / 0.02
    assert rates["gflops_per_second"] == pytest.approx(rates["tokens_per_second"] * 1e-5)
    assert rates["fraction_of_peak"] == pytest.approx(rates["gflops_per_second"] / 2)


def test_the_peak_of_a_device_is_that_of_its_products() -> None:
    assert 0.1 < measured_peak(torch.device("cpu"), torch.float32, size=256) < 1e6


def test_a_log_has_the_speed_of_real_tokens(tmp_path: Path) -> None:
    rows = tiny.padded()
    arguments = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=1, peak_gflops=100.0)
    trainer = Trainer(tiny.classifier(), arguments, train_dataset=rows)
    trainer.train()
    lengths = [sum(row["attention_mask"]) for row in rows]
    lines = [line for line in read(tmp_path / METRICS_FILE) if "loss" in line]
    assert lines[-1]["tokens"] == sum(lengths)
    assert trainer.state.total_flos == 3 * useful_flops(trainer.model.config, lengths)
    for line in lines:
        assert line["fraction_of_peak"] == pytest.approx(line["gflops_per_second"] / 100)
        assert line["tokens_per_second"] > 0


def test_what_a_checkpoint_does_not_know_is_cut(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 2, 3, 4)]
    file.write_text("".join(lines) + '{"step": 5, "lo')
    cut(file, 4)
    assert file.read_text() == "".join(lines)
    cut(file, 2)
    assert file.read_text() == "".join(lines[:3])
    cut(file, 0)
    assert file.read_text() == ""


def test_a_line_for_people() -> None:
    logs = {"loss": 2.5, "learning_rate": 5e-5, "grad_norm": 1.25, "tokens_per_second": 12345.6}
    logs |= {"gflops_per_second": 45.67, "fraction_of_peak": 0.614, "skipped_steps": 0, "epoch": 1.5}
    assert describe(logs) == (
        "loss 2.5000 · lr 5.00e-05 · gradient 1.25 · tokens/s 12,346 · GFLOP/s 45.7 · of peak 61%"
    )
    assert describe({**logs, "skipped_steps": 2}).endswith("of peak 61% · skipped steps 2")
    assert describe({"train_runtime": 12.34567, "epoch": 1.5}) == "train_runtime 12.35"


def test_the_plot_has_what_there_is(tmp_path: Path) -> None:
    """Missing and null values are left out."""
    lines = [{"step": 1, "loss": 2.0, "grad_norm": None}, {"step": 2, "eval_loss": 1.5}, {"step": 2, "loss": 1.0}]
    plot(lines, tmp_path / PLOT_FILE)
    text = (tmp_path / PLOT_FILE).read_text()
    for word in ("loss", "eval_loss", "learning rate", "tokens per second"):
        assert f"<!-- {word} -->" in text, word


def test_the_bar_and_its_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny.arguments(tmp_path, disable_tqdm=False)
    Trainer(tiny.classifier(), arguments, train_dataset=tiny.padded()).train()
    printed = capsys.readouterr()
    assert "step      4 · epoch 0.80 · loss " in printed.out
    assert "4/4 [" in printed.err


def test_tensorboard_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    arguments = tiny.arguments(tmp_path / "run", report_to="tensorboard")
    Trainer(tiny.classifier(), arguments, train_dataset=tiny.padded()).train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    lines = [line for line in read(tmp_path / "run" / METRICS_FILE) if "loss" in line]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([line["loss"] for line in lines])
    assert {"train/tokens_per_second", "train/learning_rate"} <= set(events.Tags()["scalars"])


def test_what_a_crash_of_the_machine_left_does_not_stop_a_run(tmp_path: Path) -> None:
    file = tmp_path / METRICS_FILE
    file.write_bytes(b'{"step": 1}\n\0\0{"step": 2}\n{"step": 3}\n')
    cut(file, 4)
    assert file.read_bytes() == b'{"step": 1}\n'
