"""Bad input and faults of a run: each is named, and costs no more than it must."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor

from bert_fast import disk
from bert_fast.modules import BertForSequenceClassification
from bert_fast.training import checkpoints
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.training.trainer import Trainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "optimizer is 'adam', expected one of adamw, bert_adam, lamb"),
        ({"schedule": "step"}, "schedule is 'step', expected one of linear, google, constant, cosine"),
        ({"on_nan": "ignore"}, "on_nan is 'ignore', expected one of skip, stop"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0, expected above 0 and at most 1"),
        ({"max_tokens_per_batch": 0}, "max_tokens_per_batch is 0, expected above 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0, expected at least 0"),
        ({"max_grad_norm": None}, "max_grad_norm is None, expected at least 0"),
        ({"optim": "adafactor"}, "optim is 'adafactor'; give optimizer instead"),
        ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type is 'cosine'; give schedule instead"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is True, expected False: it would change the batches"),
    ],
)
def test_impossible_arguments_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_arguments_come_from_a_command_line(tmp_path: Path) -> None:
    words = (
        f"--output_dir {tmp_path} --optimizer lamb --max_tokens_per_batch 512 --resume_from_checkpoint True --use_cpu"
    )
    (arguments,) = transformers.HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words.split())
    assert (arguments.optimizer, arguments.max_tokens_per_batch) == ("lamb", 512)
    assert (arguments.adam_epsilon, arguments.weight_decay, arguments.warmup_steps) == (1e-6, 0.01, 0.1)
    trainer = Trainer(tiny.masked_lm(), arguments, train_dataset=tiny.examples(), data_collator=tiny.masking())
    trainer.args.num_train_epochs = 1
    trainer.train()
    steps = trainer.state.global_step
    trainer.train()  # goes on where it was: at the end
    assert trainer.state.global_step == steps


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match=r"args is a transformers\.training_args\.TrainingArguments, expected"):
        Trainer(tiny.masked_lm(), arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [None, 64])
def test_a_label_out_of_range_is_named_before_anything_runs(tmp_path: Path, tokens: int | None) -> None:
    rows = tiny.padded() if tokens is None else tiny.examples(labelled=True)
    rows[13]["labels"] = 7
    arguments = tiny.arguments(tmp_path, max_steps=10, max_tokens_per_batch=tokens)
    with pytest.raises(ValueError, match=r"labels 7 at index \d+ is out of range \[0, 2\), in a batch .*\b13\b"):
        Trainer(tiny.classifier(), arguments, train_dataset=rows).train()


def test_a_batch_without_labels_is_refused(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, max_tokens_per_batch=64)
    with pytest.raises(ValueError, match=r"the batch has no labels, only .*input_ids"):
        Trainer(tiny.classifier(), arguments, train_dataset=tiny.examples()).train()


def test_question_answering_of_transformers_is_not_packed(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, max_tokens_per_batch=64)
    model = transformers.BertForQuestionAnswering(transformers.BertConfig(**vars(tiny.config())))
    with pytest.raises(ValueError, match="max_tokens_per_batch is 64, but the start_positions of transformers' Bert"):
        Trainer(model, arguments, train_dataset=tiny.examples())


def test_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        Trainer(tiny.classifier(), tiny.arguments(tmp_path), train_dataset=[]).train()


class Fragile(BertForSequenceClassification):
    """Its loss is NaN where a batch holds a word."""

    word = 4 + tiny.WORDS.index("ferry")

    def forward(self, input_ids: Tensor | None = None, *args: Any, **options: Any) -> Any:
        output = super().forward(input_ids, *args, **options)
        if output.loss is not None and input_ids is not None and bool((input_ids == self.word).any()):
            output.loss = output.loss * math.nan
        return output


def fragile(folder: Path, **options: Any) -> Trainer:
    torch.manual_seed(7)
    model = Fragile(tiny.config(0.0))
    arguments = tiny.arguments(folder, max_steps=5, train_sampling_strategy="sequential", **options)
    return Trainer(model, arguments, train_dataset=[*tiny.padded()[4:8], *tiny.padded()[:8], *tiny.padded()[12:]])


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path) -> None:
    """The second of five steps: without it the parameters, the moments and the counter stay as they were."""
    trainer = fragile(tmp_path)
    before: dict[str, Tensor] = {}
    moments: list[int] = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                before.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            moments.append(int(next(iter(trainer.optimizer.state.values()))["step"]))
            if state.global_step == 2:
                for name, parameter in trainer.model.named_parameters():
                    assert torch.equal(parameter, before[name]), name

    trainer.add_callback(Look)
    trainer.train()
    lines = [line for line in read(tmp_path / METRICS_FILE) if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1]
    assert lines[1]["grad_norm"] is None
    assert lines[1]["loss"] == 0.0
    assert moments == [1, 1, 2, 3, 4]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_or_it_ends_the_run_with_its_examples(tmp_path: Path) -> None:
    message = r"step 2: the loss is not finite, with 4 sequences, .*; examples 4, 5, 6, 7$"
    with pytest.raises(FloatingPointError, match=message):
        fragile(tmp_path, on_nan="stop").train()


class Greedy(BertForSequenceClassification):
    """Wants more memory than there is, in its third step."""

    calls = 0

    def forward(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == 3:
            torch.empty(1 << 58)
        return super().forward(*args, **options)


def test_out_of_memory_says_which_batch_and_what_would_help(tmp_path: Path) -> None:
    arguments = tiny.arguments(tmp_path, max_tokens_per_batch=50)
    trainer = Trainer(Greedy(tiny.config()), arguments, train_dataset=tiny.examples(labelled=True))
    message = (
        r"out of memory in step 3, with a batch of \d sequences, \d\d tokens, the longest \d\d; examples [\d, ]+\. "
        r"What helps: a smaller max_tokens_per_batch, with more gradient_accumulation_steps .*can't allocate memory"
    )
    with pytest.raises(RuntimeError, match=message):
        trainer.train()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with `checkpoint-2` and `checkpoint-4`."""
    run(tmp_path).train()
    return tmp_path


def run(folder: Path, rows: list[dict[str, Any]] | None = None, **options: Any) -> Trainer:
    options = {"save_strategy": "steps", "save_steps": 2, "max_tokens_per_batch": 60, **options}
    rows = tiny.examples(labelled=True) if rows is None else rows
    return Trainer(tiny.classifier(), tiny.arguments(folder, **options), train_dataset=rows)


def damage(file: Path, how: str) -> str:
    """Spoil a file; what is found to be wrong."""
    if how == "missing":
        file.unlink()
        return f"{file.name} cannot be read: No such file"
    content = bytearray(file.read_bytes())
    if how == "cut":
        file.write_bytes(content[:-1])
        return f"{file.name} has {len(content) - 1} bytes, expected {len(content)}"
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"the checksum of {file.name} is not that of the manifest"


@pytest.mark.parametrize(
    ("name", "how"), [("model.safetensors", "flipped"), ("optimizer.pt", "cut"), ("rng_state.pth", "missing")]
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_used(saved: Path, name: str, how: str) -> None:
    reason = damage(saved / "checkpoint-4" / name, how)
    again = run(saved, max_steps=5)
    with pytest.warns(UserWarning, match=f"checkpoint-4 is not whole: {reason}"):
        again.train(resume_from_checkpoint=True)
    assert [line["step"] for line in read(saved / METRICS_FILE) if "loss" in line] == [1, 2, 3, 4, 5]
    assert checkpoints.defect(saved / "checkpoint-4") is None
    assert (saved / ".checkpoint-4.damaged").is_dir()


def test_no_whole_checkpoint_is_an_error_that_says_why(saved: Path) -> None:
    damage(saved / "checkpoint-4" / "optimizer.pt", "cut")
    (saved / "checkpoint-2" / checkpoints.MANIFEST).unlink()
    message = r"no checkpoint in .* is whole: checkpoint-4: optimizer.pt has .*; checkpoint-2: it has no manifest.json"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        run(saved).train(resume_from_checkpoint=True)


def test_steps_as_a_share_are_those_of_the_checkpoint(saved: Path) -> None:
    """transformers compares the two, and would warn of a difference that is none."""
    again = run(saved, max_steps=5, logging_steps=0.2)
    again.train(resume_from_checkpoint=True)
    assert again.args.logging_steps == again.state.logging_steps == 1


def test_runs_are_not_mixed(saved: Path) -> None:
    with pytest.raises(ValueError, match="has checkpoints up to checkpoint-4: go on with resume_from_checkpoint=True"):
        run(saved).train()
    with pytest.raises(checkpoints.CheckpointError, match=r"has checkpoint-4 beside .*checkpoint-2: move them away"):
        run(saved).train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    shutil.move(saved / "checkpoint-4", saved / "kept")
    run(saved, max_steps=3).train(resume_from_checkpoint=str(saved / "checkpoint-2"))
    assert [line["step"] for line in read(saved / METRICS_FILE) if "loss" in line] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("text", "data was .* and is", id="one word"),
        pytest.param("number", "data was .* and is", id="a text more"),
        pytest.param("tokens", "max_tokens_per_batch was 60 and is 50", id="another argument"),
    ],
)
def test_data_that_changed_is_found_on_resuming(saved: Path, change: str, message: str) -> None:
    rows = tiny.examples(labelled=True)
    if change == "text":
        rows[5]["input_ids"][3] += 1
    if change == "number":
        rows.append(rows[0])
    options = {"max_tokens_per_batch": 50 if change == "tokens" else 60, "max_steps": 6}
    with pytest.raises(ValueError, match=message):
        run(saved, rows, **options).train(resume_from_checkpoint=True)
    run(saved, rows, **options, ignore_data_skip=True).train(resume_from_checkpoint=True)
    assert (saved / "checkpoint-6").is_dir()


def test_a_torchrun_that_may_hang_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps one store over restarts if it was not told otherwise."""
    trainer = run(tmp_path, max_steps=1)
    for name, value in {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    trainer.train()
    assert "set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment" in caplog.text


def test_a_folder_without_checkpoints_is_begun(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, max_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 1
    assert "has no checkpoint: the run starts from the beginning" in caplog.text


def test_a_damaged_manifest_is_a_defect_whatever_the_damage(tmp_path: Path) -> None:
    """It has no checksum of its own, but a bit changed in any byte of it is found."""
    folder = tmp_path / "checkpoint-1"
    with checkpoints.staged(folder) as staging:
        (staging / "model.bin").write_bytes(b"weights")
    manifest = folder / checkpoints.MANIFEST
    whole = manifest.read_bytes()
    assert checkpoints.defect(folder) is None
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert checkpoints.defect(folder) is not None, (place, manifest.read_bytes())


def test_pruning_leaves_the_newest_and_the_best(tmp_path: Path) -> None:
    folders = [tmp_path / f"checkpoint-{step}" for step in (2, 4, 10, 12)]
    for folder in folders:
        folder.mkdir()
    checkpoints.prune(tmp_path, 2, [folders[3], folders[0]])
    assert checkpoints.listed(tmp_path) == [folders[0], folders[3]]
    checkpoints.prune(tmp_path, None, [folders[3]])
    assert checkpoints.listed(tmp_path) == [folders[0], folders[3]]


def test_a_lock_outlives_no_process(tmp_path: Path) -> None:
    """The file of a dead holder does not matter, nor what it says."""
    (tmp_path / disk.LOCK).write_text(f"process {os.getpid()} on nowhere")
    taken = pytest.raises(RuntimeError, match=f"process {os.getpid()} on")
    with disk.locked(tmp_path), taken, disk.locked(tmp_path):
        pass
    ending, end = os.pipe()
    with disk.locked(tmp_path):
        child = os.fork()
        if not child:  # a worker that persists has the file open when the run is over
            os.close(end)
            os.read(ending, 1)
            os._exit(0)
    with disk.locked(tmp_path):
        pass
    os.close(end)
    os.close(ending)
    os.waitpid(child, 0)
