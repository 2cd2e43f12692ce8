"""What torchrun starts in `test_many_processes.py`: runs, in the first of which a process is killed, once."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
import transformers
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

import bert_fast
from bert_fast.ops import FallbackWarning
from bert_fast.training.trainer import Trainer


class Death(TrainerCallback):
    """Kills one process of the first life, with two steps saved."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def rows() -> list[dict[str, Any]]:
    """Masked words, very unevenly many; half of the texts have none."""
    examples = tiny.padded()
    for index, row in enumerate(examples):
        count = (index % 2) * (1 + index % 5)
        row["labels"] = [-100] + row["input_ids"][1 : 1 + count] + [-100] * (len(row["input_ids"]) - 1 - count)
    return examples


class Stream(IterableDataset[dict[str, Any]]):
    """Examples without numbers, of which each process gets its part of every batch."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(tiny.padded())


def classify(model: Any, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The gradients of the mean loss of labelled texts, by name."""
    batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def bert() -> Any:
    """transformers' own, accelerated; the same weights on every call."""
    torch.manual_seed(7)
    config = transformers.BertConfig(**dataclasses.asdict(tiny.config(0.0)))
    return bert_fast.accelerate(transformers.BertForSequenceClassification(config))


def sharded(folder: Path) -> None:
    """The gradients of a model whose layers are shared out, each process with every second text."""
    model, rank = bert(), torch.distributed.get_rank()
    for module in (*model.bert.encoder.layer, model):
        fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        grads = classify(model, tiny.padded()[rank::2])
    whole = {name: grad.full_tensor() for name, grad in grads.items()}
    if rank == 0:
        torch.save(whole, folder / "sharded.pt")


def main(folder: Path) -> None:
    """All runs."""
    torch.set_num_threads(1)
    arguments = tiny.arguments(
        folder / "elastic",
        max_steps=6,
        per_device_train_batch_size=2,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        ddp_timeout=60,
    )
    Trainer(tiny.masked_lm(0.0), arguments, train_dataset=rows(), callbacks=[Death]).train(resume_from_checkpoint=True)
    (folder / "restarts").write_text(os.environ["TORCHELASTIC_RESTART_COUNT"])
    arguments = tiny.arguments(folder / "tokens", max_steps=-1, num_train_epochs=2, max_tokens_per_batch=30)
    Trainer(tiny.masked_lm(), arguments, train_dataset=tiny.examples(), data_collator=tiny.masking()).train()
    arguments = tiny.arguments(folder / "stream", max_steps=2, per_device_train_batch_size=3)
    Trainer(tiny.classifier(0.0), arguments, train_dataset=Stream()).train()
    sharded(folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
