"""What torchrun starts in `test_many_processes.py`: runs, in the first of which a process is killed, once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny
import torch
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
