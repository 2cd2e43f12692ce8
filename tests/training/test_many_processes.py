"""torchrun, really started, with two processes on the CPU (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import many
import pytest
import tiny
import torch

import bert_fast
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.training.trainer import Trainer

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have written; one of them was killed on the way."""
    folder = tmp_path_factory.mktemp("many")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    paths = os.pathsep.join([str(HERE), str(Path(bert_fast.__file__).parent.parent)])
    done = subprocess.run(
        [*command, str(HERE / "many.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert (folder / "restarts").read_text() == "1", "no process was killed"
    return folder


def test_two_processes_have_the_losses_and_gradients_of_one(folder: Path, tmp_path: Path) -> None:
    """Though some batches have no labels, one process was killed, and both went on from a checkpoint."""
    arguments = tiny.arguments(tmp_path, max_steps=6, per_device_train_batch_size=4)
    one = Trainer(tiny.masked_lm(0.0), arguments, train_dataset=many.rows())
    one.train()
    expected, lines = ([x for x in read(f / METRICS_FILE) if "loss" in x] for f in (tmp_path, folder / "elastic"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line, one_line in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(one_line["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(one_line["grad_norm"], rel=1e-4)
        assert line["tokens"] == one_line["tokens"]
    trained = bert_fast.from_pretrained(folder / "elastic" / "checkpoint-6", head="masked_lm")
    for name, parameter in one.model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), parameter, rtol=1e-3, atol=1e-5, msg=name)


def test_two_processes_share_batches_by_tokens(folder: Path) -> None:
    """Every text once in each epoch."""
    last = [line for line in read(folder / "tokens" / METRICS_FILE) if "loss" in line][-1]
    assert last["tokens"] == 2 * sum(len(row["input_ids"]) for row in tiny.examples())
    assert last["epoch"] == 2.0


def test_a_stream_is_shared_out(folder: Path, tmp_path: Path) -> None:
    """Two processes have the losses that one has of the same batches."""
    arguments = tiny.arguments(tmp_path, max_steps=2, per_device_train_batch_size=6)
    Trainer(tiny.classifier(0.0), arguments, train_dataset=many.Stream()).train()
    expected, lines = ([x for x in read(f / METRICS_FILE) if "loss" in x] for f in (tmp_path, folder / "stream"))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_sharded_layers_have_the_gradients_of_one_process(folder: Path) -> None:
    """FSDP2: the mean of what the processes have of their texts."""
    found = torch.load(folder / "sharded.pt")
    for name, grad in many.classify(many.bert(), tiny.padded()).items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6, msg=name)
