"""The trainer of a task: what it evaluates is the task's own metrics, on the fast path."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from bert_fast.recipes._splits import Split, judged
from bert_fast.recipes.predict import Collate, run
from bert_fast.tasks._task import Output, Prediction, Task
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.trainer import Trainer


class TaskTrainer(Trainer):
    """A `Trainer` whose evaluation is the metrics and the loss of the task, under the names `eval_...`.

    Args:
        model: with the task's head.
        args: how to train.
        task: what is learnt.
        train: what it is learnt from.
        validation: what `evaluate` evaluates; None for nothing.
        collate: makes batches.

    Attributes:
        seconds_evaluating: so far.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        task: Task,
        train: Split,
        validation: Split | None,
        collate: Collate,
        **options: Any,
    ) -> None:
        held_out = None if validation is None else validation.features.inputs
        super().__init__(
            model, args, data_collator=collate, train_dataset=train.features.inputs, eval_dataset=held_out, **options
        )
        self.task, self.validation, self.collate = task, validation, collate
        self.seconds_evaluating = 0.0

    def judged(self, split: Split) -> tuple[list[Prediction], dict[str, float]]:
        """See `_splits.judged`; the processes share the work, and all get all of it."""
        features, world, rank = split.features, self.args.world_size, self.args.process_index
        share = replace(features, inputs=features.inputs[rank::world], owners=features.owners[rank::world])
        bar = None if self.is_world_process_zero() and not self.args.disable_tqdm else False
        assert self.model is not None
        outputs = run(self.model, self.task, share, progress=bar, collate=self.collate)
        if self._counts_group is not None:
            shares: list[list[Output]] = [[] for _ in range(world)]
            dist.all_gather_object(shares, outputs, group=self._counts_group)
            outputs = [shares[number % world][number // world] for number in range(len(features.inputs))]
        return judged(self.task, split, outputs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The metrics of the validation examples.

        Raises:
            ValueError: there are none; or `metric_for_best_model` is not one of the metrics.
        """
        if self.validation is None:
            raise ValueError("there are no validation examples to evaluate")
        start = time.perf_counter()
        _, metrics = self.judged(self.validation)
        seconds = time.perf_counter() - start
        self.seconds_evaluating += seconds
        wanted = self.args.metric_for_best_model
        if wanted is not None and wanted.removeprefix("eval_") not in metrics:
            why = ""
            if wanted.removeprefix("eval_") == "loss":
                why = "; the loss of this task is that of a batch, or no example has one, and there is no mean of it"
            raise ValueError(f"metric_for_best_model is {wanted!r}, expected one of {', '.join(metrics)}{why}")
        logs = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        logs[f"{metric_key_prefix}_runtime"] = seconds
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs
