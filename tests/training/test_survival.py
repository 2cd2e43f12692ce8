"""Runs that are killed, starved, terminated and restarted: nothing is lost, and they go on where they were."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import runs
import tiny
import torch
from torch import Tensor
from transformers import TrainerCallback

from bert_fast.training import checkpoints
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.training.trainer import Trainer


class InterruptedRunError(Exception):
    """Ends a run in the test."""


def draw_masks(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As transformers' `DataCollatorForLanguageModeling` does, other masks each time."""
    ids = torch.tensor([feature["input_ids"] for feature in features])
    return {"input_ids": ids, "labels": ids.masked_fill(torch.rand(ids.shape) > 0.3, -100)}


class Interrupt(TrainerCallback):
    """Ends a run at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedRunError


def losses(output_dir: Path) -> list[tuple[int, float, float]]:
    return [
        (line["step"], line["loss"], line["grad_norm"]) for line in read(output_dir / METRICS_FILE) if "loss" in line
    ]


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        pytest.param({"max_tokens_per_batch": 40}, True, id="by tokens, in the middle of an epoch"),
        pytest.param(
            {"max_tokens_per_batch": 40, "gradient_accumulation_steps": 2, "save_steps": 2}, True, id="accumulated"
        ),
        pytest.param({"per_device_train_batch_size": 4}, False, id="transformers' batches, at the end of an epoch"),
        pytest.param({"per_device_train_batch_size": 6}, False, id="transformers' batches, in the middle of one"),
        pytest.param(
            {"max_tokens_per_batch": 40, "logging_steps": 4, "optimizer": "lamb", "dataloader_num_workers": 1},
            True,
            id="a mean over steps before and after, another optimiser, a worker",
        ),
        pytest.param(
            {"per_device_train_batch_size": 6, "save_steps": 2},
            "drawn",
            id="a collator that draws from torch's generator",
        ),
    ],
)
def test_an_interrupted_run_has_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any], masks: bool | str
) -> None:
    """Bit for bit, dropout on."""

    def trainer(name: str) -> Trainer:
        options_ = {"max_steps": 8, "save_strategy": "steps", "save_steps": 5, "schedule": "cosine", **options}
        arguments = tiny.arguments(tmp_path / name, **options_)
        if masks == "drawn":
            return Trainer(tiny.masked_lm(), arguments, train_dataset=tiny.padded(), data_collator=draw_masks)
        if masks:
            return Trainer(
                tiny.masked_lm(), arguments, train_dataset=tiny.examples(), data_collator=tiny.masking(seed=3)
            )
        return Trainer(tiny.classifier(), arguments, train_dataset=tiny.padded(), data_collator=None)

    whole = trainer("whole")
    whole.train()
    first = trainer("parts")
    first.add_callback(Interrupt(6))
    with pytest.raises(InterruptedRunError):
        first.train()
    again = trainer("parts")
    torch.rand(5)  # whatever else draws random numbers between the runs
    again.train(resume_from_checkpoint=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(again.model.get_parameter(name), parameter, rtol=0, atol=0, msg=name)
    assert again.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert again.state.epoch == whole.state.epoch


@pytest.fixture(scope="module")
def deaths(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("deaths")
    assert runs.run(runs.train, folder / "before", 1, runs.SAVING) == 0
    assert runs.run(runs.die_everywhere, folder, folder / "report.json") == 0
    return json.loads((folder / "report.json").read_text())


def test_a_save_may_be_killed_at_any_change_of_the_disk(deaths: list[dict[str, Any]]) -> None:
    """kill -9; then a whole checkpoint is found, the run goes on from it, and nothing is left lying about."""
    for death in deaths:
        assert death["signal"] in (signal.SIGKILL, signal.SIGXFSZ), death
        assert death["whole"], death
        status, left = death["resumed"]
        assert status == 0, death
        assert "checkpoint-2" in left, death
        assert not [name for name in left if name.startswith(".")], death


def test_every_phase_of_a_save_was_killed(deaths: list[dict[str, Any]]) -> None:
    operations = [death["operation"] for death in deaths]
    assert operations[: len(runs.SIZES)] == [f"file of {size}" for size in runs.SIZES]
    for phase in (
        "os.mkdir .checkpoint-2.saving",
        "open config.json",
        "open trainer_state.json",
        "open manifest.json",
        "os.rename .checkpoint-2.saving",
        "os.rename checkpoint-1",
        "os.remove manifest.json",
        "os.rmdir .checkpoint-1.old",
    ):
        assert phase in operations, (phase, operations)
    whole = dict(zip(operations, (death["whole"] for death in deaths), strict=True))
    assert whole["os.rename .checkpoint-2.saving"] == ["checkpoint-1"]
    assert whole["os.rename checkpoint-1"] == ["checkpoint-1", "checkpoint-2"]
    assert whole["os.remove manifest.json"] == ["checkpoint-2"]


@pytest.mark.parametrize(
    "num_bytes",
    [pytest.param(1_000, id="the model does not fit"), pytest.param(100_000, id="the optimiser does not")],
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, num_bytes: int) -> None:
    output_dir, report = tmp_path / "run", tmp_path / "report"
    assert runs.run(runs.train_in_little_space, output_dir, num_bytes, report) == 0
    message = report.read_text()
    assert message.startswith(f"checkpoint-2 could not be saved in {output_dir}: "), message
    assert message.endswith("; checkpoint-1 stayed as before"), message
    assert [path.name for path in output_dir.glob("*checkpoint*")] == ["checkpoint-1"]
    assert checkpoints.defect(output_dir / "checkpoint-1") is None


def test_sigterm_saves_and_exits_with_0_and_meanwhile_nobody_else_may_use_the_folder(tmp_path: Path) -> None:
    process = runs.start(runs.train, tmp_path, 1_000_000, {})
    deadline = time.monotonic() + 60
    while not (tmp_path / METRICS_FILE).exists() or len(read_whole(tmp_path)) < 3:
        assert process.is_alive()
        assert time.monotonic() < deadline, "the run did not start"
        time.sleep(0.02)
    with pytest.raises(RuntimeError, match=rf"another run has .* \(process {process.pid} on .*\)"):
        runs.trainer(tmp_path).train()
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    last = checkpoints.last_whole(tmp_path)
    assert last is not None
    step = checkpoints.step_of(last)
    assert step >= 3
    again = runs.trainer(tmp_path, max_steps=step + 2)
    again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in read(tmp_path / METRICS_FILE) if "loss" in line] == list(range(1, step + 3))


def read_whole(output_dir: Path) -> list[str]:
    """Lines of a file that somebody is writing."""
    return re.findall(".*\n", (output_dir / METRICS_FILE).read_text())
