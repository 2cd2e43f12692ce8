"""transformers' `Trainer` with our optimisers, schedules and batches, exact gradients, and faults that are named."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import has_length

from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.batches import PackingCollator, TokenBudgetSampler
from bert_fast.training.durable import DurableTrainer
from bert_fast.training.faults import is_out_of_memory, out_of_memory
from bert_fast.training.freezing import GradualUnfreezing, freeze, train_head, train_last_layers
from bert_fast.training.inspection import FACTS, Facts, InspectingCollator, Inspector, fingerprint, step_flops
from bert_fast.training.masking import IndexedDataset
from bert_fast.training.optimizers import make_optimizer, parameter_groups
from bert_fast.training.progress import MetricsFile, Progress, Throughput, measured_peak
from bert_fast.training.schedules import make_schedule

#: `freeze` of the arguments for all but the last k layers: this and k.
LAST = "all_but_last_"


@dataclass(frozen=True)
class _Step:
    """Sums over all micro-batches of a step, of all processes."""

    num_labels: int
    num_pairs: int
    tokens: int
    flops: int
    terminating: bool


class Trainer(DurableTrainer):
    """Trains a BERT: ours, a transformers one, or one that `bert_fast.accelerate` was given.

    The loop, evaluation, mixed precision, early stopping and the choice of the best checkpoint are transformers'. Ours:

    - **Gradients of the whole batch.** The loss of a step is the mean over all labels that are not ignored, of all its
      micro-batches and processes. So neither `gradient_accumulation_steps` nor the number of processes changes the
      gradients. (For question answering the mean is over the examples whose start lies in the text.) Where all labels
      are ignored the loss and the gradients are 0; the optimiser still takes its step.
    - **Batches by tokens**, without padding, with `max_tokens_per_batch`.
    - **Optimisers, schedules, freezing** by the names of `TrainingArguments`.
    - **Runs that survive**, as `DurableTrainer` says: `train(resume_from_checkpoint=True)` goes on where the last whole
      checkpoint was saved, bit for bit on one device in deterministic mode. SIGTERM saves and exits with status 0.
    - **Faults**: labels out of range, a step that is not finite (`on_nan`) and want of memory name their examples.
    - **Progress**: tokens per second of real tokens and the useful part of the peak, in the log, on the terminal, in
      `metrics.jsonl` of the output folder, and a plot of it.

    Args:
        model: as for transformers' `Trainer`.
        args: how to train.
        options: everything else that transformers' `Trainer` takes. `compute_loss_func`, if given, gives the mean over
            the labels of its micro-batch, as models do.

    Raises:
        TypeError: the arguments are not `bert_fast.training.arguments.TrainingArguments`.
        ValueError: several GPUs in one process; what is to be frozen is unknown.
    """

    #: `compute_loss` weighs micro-batches itself.
    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: TrainingArguments, **options: Any) -> None:
        if not isinstance(args, TrainingArguments):
            raise TypeError(
                f"args is a {type(args).__module__}.{type(args).__name__}, expected ours: {TrainingArguments}"
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one for each with torchrun --nproc_per_node {args.n_gpu}, or "
                "choose one with CUDA_VISIBLE_DEVICES=0"
            )
        self._unfreezing = _frozen(model, args.freeze)
        if self._unfreezing is not None:
            args.ddp_find_unused_parameters = True
        if args.max_tokens_per_batch is not None and options.get("data_collator") is None:
            most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            options["data_collator"] = PackingCollator(max_position_embeddings=most)
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = False  # the loss of every model is the mean of its micro-batch
        if args.label_names is None and (others := getattr(model, "other_labels", ())):
            self.label_names = [*(["labels"] if "next_sentence_label" in others else []), *others]
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress)
        self.add_callback(MetricsFile)
        self.add_callback(_Counting(self))
        self._inspector = Inspector(model)
        self._sampler: TokenBudgetSampler | None = None
        self._digest: str | None = None
        self._step, self._micro_batches = _Step(0, 0, 0, 0, False), list[tuple[Tensor, Facts]]()
        self._facts = Facts((), (), 0)
        # Counts are summed on the CPU, so that no process waits for what its GPU still has to do.
        self._counts_group = dist.new_group(backend="gloo") if args.world_size > 1 else None
        self.throughput = Throughput(self._peak())

    # Data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches by tokens, or transformers' own, with the facts about each."""
        examples: Any = self.train_dataset
        if examples is None or isinstance(examples, IterableDataset):
            if self.args.max_tokens_per_batch is not None:
                raise ValueError("max_tokens_per_batch needs a train_dataset with a length")
            return super().get_train_dataloader()
        if not len(examples):
            raise ValueError("train_dataset is empty")
        dataset = IndexedDataset(examples)
        if self.args.max_tokens_per_batch is None:
            return self._get_dataloader(
                dataset, "Training", self._train_batch_size, lambda _: self._get_train_sampler(), is_training=True
            )
        loader = DataLoader(
            dataset,
            batch_sampler=self._token_sampler(examples, self.args.max_tokens_per_batch),
            collate_fn=self._get_collator_with_removed_columns(self.data_collator, "Training"),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            generator=torch.Generator().manual_seed(self.args.seed),  # else each epoch would take from torch's own
        )
        return prepare_data_loader(
            loader, self.accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )

    def _token_sampler(self, examples: Any, max_tokens: int) -> TokenBudgetSampler:
        if self._sampler is None:
            self._sampler = TokenBudgetSampler(
                [len(examples[index]["input_ids"]) for index in range(len(examples))],
                max_tokens,
                seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
                num_replicas=self.args.world_size,
                rank=self.args.process_index,
                drop_last=self.args.dataloader_drop_last,
            )
        return self._sampler

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            self._signature_columns += getattr(self.model, "other_labels", ())  # type: ignore[operator]

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        columns = self._signature_columns if self.args.remove_unused_columns else None
        if description != "Training" and hasattr(data_collator, "set_epoch"):
            data_collator = copy.deepcopy(data_collator)  # whose epoch stays, and its masks with it
            data_collator.set_epoch(0)
        return InspectingCollator(data_collator, columns, self._inspector)

    def _get_dataloader(self, dataset: Any, description: str, *others: Any, **options: Any) -> Any:
        if description != "Training" and has_length(dataset) and not isinstance(dataset, IterableDataset):
            dataset = IndexedDataset(dataset)
        return super()._get_dataloader(dataset, description, *others, **options)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the facts out of what the model gets."""
        inputs = dict(inputs)
        self._facts = inputs.pop(FACTS, None) or self._inspector.facts(inputs)
        return super()._prepare_inputs(inputs)

    # The order of the data, and the place in it

    def order(self) -> dict[str, Any]:
        """See `DurableTrainer`."""
        args = self.args
        if self._digest is None and has_length(self.train_dataset):
            self._digest = fingerprint(self.train_dataset)
        order = {"data": self._digest, "seed": args.seed, "data_seed": args.data_seed}
        if hasattr(self.data_collator, "seed"):
            order["seed of the masks"] = self.data_collator.seed
        names = ["max_tokens_per_batch", "dataloader_drop_last"]
        if args.max_tokens_per_batch is None:
            names += ["world_size", "per_device_train_batch_size", "gradient_accumulation_steps"]
            names += ["train_sampling_strategy"]
        return order | {name: getattr(args, name) for name in names}

    def position(self) -> dict[str, Any]:
        """See `DurableTrainer`."""
        if self._sampler is None:
            return super().position()
        state = {**self._sampler.state_dict(), "start_batch": self.batches_done}
        if self.batches_done == self._sampler.num_batches():
            state |= {"epoch": self._sampler.epoch + 1, "start_batch": 0, "earlier": []}
        return state

    def go_to(self, position: dict[str, Any], place: tuple[int, int]) -> tuple[int, int]:
        """See `DurableTrainer`; with another number of processes these share what is left of the epoch."""
        if self._sampler is None:
            return place
        same = position["num_replicas"] == self.args.world_size
        self._sampler.load_state_dict({**position, "start_batch": 0} if same else position)
        return position["epoch"], position["start_batch"] if same else 0

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """transformers' numbers of epochs and steps; by tokens the epochs have different numbers of batches."""
        if self._sampler is not None:
            self._sampler.set_epoch(0)
        epochs, per_epoch, *others, in_epoch, max_steps = super().set_initial_training_values(args, dataloader)
        if self._sampler is not None and args.max_steps > 0:
            epochs = sys.maxsize
        elif self._sampler is not None:
            steps = [self._steps(self._sampler.num_batches(epoch)) for epoch in range(epochs)]
            part = args.num_train_epochs - (epochs - 1)
            max_steps = sum(steps[:-1]) + math.ceil(part * steps[-1])
        return epochs, per_epoch, *others, in_epoch, max_steps

    def _steps(self, num_batches: int) -> int:
        return math.ceil(num_batches / self.args.gradient_accumulation_steps)

    def _run_epoch(self, *, epoch: int, **options: Any) -> None:  # type: ignore[override]
        if self.state.global_step >= self.state.max_steps:  # resumed at its end
            self.control.should_training_stop = True
            return
        followers: tuple[Any, ...] = (self._sampler, self.data_collator, self._unfreezing)
        for follower in followers:
            if hasattr(follower, "set_epoch"):
                follower.set_epoch(epoch)
        resumed = options["resume_from_checkpoint"] is not None and epoch == options["epochs_trained"]
        self.batches_done = options["steps_trained_in_current_epoch"] if resumed else 0
        if self._sampler is not None:
            options["steps_in_epoch"] = self._sampler.num_batches()
            options["num_update_steps_per_epoch"] = self._steps(options["steps_in_epoch"])
        super()._run_epoch(epoch=epoch, **options)

    # Optimiser and schedule

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimiser of the arguments, over the parameters that are trained."""
        if self.optimizer is None:
            args, trained = self.args, self.model if model is None else model
            assert trained is not None
            groups = parameter_groups(
                trained, args.learning_rate, weight_decay=args.weight_decay, layer_decay=args.layer_decay
            )
            self.optimizer = make_optimizer(
                args.optimizer,
                groups,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the arguments."""
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(
                self.args.schedule,
                self.create_optimizer() if optimizer is None else optimizer,
                total_steps=num_training_steps,
                warmup_steps=min(self.args.get_warmup_steps(num_training_steps), num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # A step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of a step, and what they are together, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts = [batch.get(FACTS) or self._inspector.facts(batch) for batch in batches]
        flops = sum(step_flops(getattr(self.model, "config", None), batch.lengths) for batch in facts)
        sums = [
            sum(batch.num_labels for batch in facts),
            sum(batch.num_pairs for batch in facts),
            sum(batch.num_tokens for batch in facts),
            flops,
            int(self._signals.requested),
        ]
        if self._counts_group is not None:
            counts = torch.tensor(sums, dtype=torch.int64)
            dist.all_reduce(counts, group=self._counts_group)
            sums = counts.tolist()
        num_labels, num_pairs, num_tokens, flops, signals = sums
        self._step = _Step(num_labels, num_pairs, num_tokens, flops, terminating=signals > 0)
        self._micro_batches.clear()
        return batches, None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """Not used: `_Step` has it."""

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The loss of a micro-batch, as its part of the step's, and its gradients; 0 for one that is not finite."""
        if missing := [name for name in self.label_names if name not in inputs]:
            raise ValueError(
                f"the batch has no {', '.join(missing)}, only {', '.join(n for n in inputs if n != FACTS)}"
            )
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            by_tokens = self.args.max_tokens_per_batch is not None
            raise out_of_memory(error, self.state.global_step + 1, self._facts, by_tokens) from error
        self.batches_done += 1
        self._micro_batches.append((loss, self._facts))
        return torch.where(loss.isfinite(), loss, 0.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean over the labels of a batch in evaluation; in training its part of the mean over all of the step.

        0 where all labels are ignored.
        """
        facts, step = self._facts, self._step
        if facts.num_labels:
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
        else:
            targets = {"labels", "start_positions", "end_positions", "next_sentence_label"}
            outputs = model(**{name: value for name, value in inputs.items() if name not in targets})
            loss = outputs[0].float().mean() * 0
        if not model.training:
            step, scale = _Step(facts.num_labels, facts.num_pairs, 0, 0, False), 1
        else:
            scale = self.args.world_size  # which averages the gradients
        share = scale * facts.num_labels / max(step.num_labels, 1)
        weighted = loss * share
        if facts.num_pairs:
            # The other term of pre-training, of which `loss` has the mean as well, unless no token was to be predicted.
            pairs = F.cross_entropy(outputs["seq_relationship_logits"].float(), inputs["next_sentence_label"].view(-1))
            weighted = weighted + pairs * (scale * facts.num_pairs / step.num_pairs - share)
        # The factor is 1, or NaN for a loss that is not finite: then all gradients are, on every process.
        weighted = weighted * (1 + 0 * weighted.detach())
        return (weighted, outputs) if return_outputs else weighted

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients; where it is not finite, the step is left out, or the run ends."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not math.isfinite(float(grad_norm)):
            scaler = self.accelerator.scaler
            bad = [facts for loss, facts in self._micro_batches if not math.isfinite(float(loss))]
            if self.args.on_nan == "stop" and (bad or scaler is None):
                what = "the loss is not finite" if bad else "the loss is finite here, but the gradients are not"
                batches = "; ".join(map(str, bad or [facts for _, facts in self._micro_batches]))
                raise FloatingPointError(f"step {self.state.global_step + 1}: {what}, with {batches}")
            self.skipped_steps += 1
            if scaler is None:  # which would leave the step out itself
                model.zero_grad()
        return grad_norm

    # What is told

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Useful ones of the micro-batch just trained on."""
        return step_flops(getattr(self.model, "config", None), self._facts.lengths)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Not used: `_Counting` counts them."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As transformers, with the speed, the tokens so far and the steps left out so far."""
        if "loss" in logs:
            logs |= self.throughput.read()
            logs |= {"tokens": self.state.num_input_tokens_seen, "skipped_steps": self.skipped_steps}
        super().log(logs, start_time)

    def _evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with self.throughput.paused():
            return super()._evaluate(*args, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.throughput.paused():
            super()._save_checkpoint(model, trial)

    def _peak(self) -> float | None:
        """Of all processes together."""
        peak = self.args.peak_gflops
        if peak is None and self.args.device.type == "cuda":
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else torch.float32
            peak = measured_peak(self.args.device, dtype)
        return None if peak is None else peak * self.args.world_size


class _Counting(TrainerCallback):
    """Counts what was done, and passes on that the run is to end."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.trainer.throughput.restart()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count."""
        step = self.trainer._step
        state.num_input_tokens_seen += step.tokens
        self.trainer.throughput.count(step.tokens, step.flops)
        self.trainer.terminating = step.terminating


def _frozen(model: nn.Module, what: str | None) -> GradualUnfreezing | None:
    """Freeze what the arguments say."""
    if what is None:
        return None
    if what == "gradual":
        return GradualUnfreezing(model)
    if what == "encoder":
        train_head(model)
    elif what.startswith(LAST) and what.removeprefix(LAST).isdecimal():
        train_last_layers(model, int(what.removeprefix(LAST)))
    else:
        freeze(model, *what.split(","))
    return None
