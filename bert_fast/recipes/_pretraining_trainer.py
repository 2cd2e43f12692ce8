"""The trainer of pre-training: batches of the phase that it is in, and held-out scores for its evaluation."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bert_fast.recipes._pretraining_data import Texts
from bert_fast.recipes.held_out import Collate, held_out_scores
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.batches import TokenBudgetSampler
from bert_fast.training.phases import PhasedSampler
from bert_fast.training.trainer import Trainer


class PretrainingTrainer(Trainer):
    """A `Trainer` over the texts of one or several phases.

    Args:
        model: with a head of pre-training.
        args: how to train; `max_tokens_per_batch` is the budget of the largest phase.
        phases: texts of each phase.
        budgets: of each phase the tokens of a batch, at most, and the texts; None for any number of texts.
        steps: of each phase; not used for one phase alone.
        collate: makes batches.
        held_out: texts that `evaluate` evaluates, or None.
        collate_held_out: makes batches of them.

    Attributes:
        seconds_evaluating: so far.
    """

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        *,
        phases: Sequence[Any],
        budgets: Sequence[tuple[int, int | None]],
        steps: Sequence[int],
        collate: Collate,
        held_out: Any | None,
        collate_held_out: Collate,
        **options: Any,
    ) -> None:
        super().__init__(
            model, args, data_collator=collate, train_dataset=Texts(phases), eval_dataset=held_out, **options
        )
        self.phases, self.budgets, self.steps = phases, budgets, steps
        self.collate_held_out = collate_held_out
        self.seconds_evaluating = 0.0

    def _token_sampler(self, examples: Any, max_tokens: int) -> Any:
        if self._sampler is None:
            args = self.args
            samplers = [
                TokenBudgetSampler(
                    texts.lengths,
                    budget,
                    seed=args.seed if args.data_seed is None else args.data_seed,
                    num_replicas=args.world_size,
                    rank=args.process_index,
                    max_sequences=most,
                    drop_last=args.dataloader_drop_last,
                )
                for texts, (budget, most) in zip(self.phases, self.budgets, strict=True)
            ]
            phased = len(samplers) > 1
            self._sampler = (
                PhasedSampler(samplers, self.steps, args.gradient_accumulation_steps) if phased else samplers[0]
            )
        return self._sampler

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Scores of the texts that are held out, as `held_out.held_out_scores` names them; processes share the work.

        Raises:
            ValueError: there are no such texts.
        """
        held_out = self.eval_dataset if eval_dataset is None else eval_dataset
        if held_out is None:
            raise ValueError("no texts are held out to evaluate")
        start = time.perf_counter()
        with self.accelerator.autocast():
            scores = held_out_scores(
                self.model,
                held_out,
                self.collate_held_out,
                max_tokens=max(budget for budget, _ in self.budgets),
                seed=self.args.seed,
                progress=None if self.is_world_process_zero() and not self.args.disable_tqdm else False,
                share=(self.args.world_size, self.args.process_index),
                total=self._total,
            )
        self.seconds_evaluating += time.perf_counter() - start
        logs = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(dict(logs))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    def _total(self, sums: dict[str, float]) -> dict[str, float]:
        if self._counts_group is None:
            return sums
        values = torch.tensor(list(sums.values()), dtype=torch.float64)
        dist.all_reduce(values, group=self._counts_group)
        return dict(zip(sums, values.tolist(), strict=True))
