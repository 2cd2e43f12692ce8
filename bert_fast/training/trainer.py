"""transformers' `Trainer` with our optimisers, schedules and batches, exact gradients, and faults that are named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback

from bert_fast import drop_in
from bert_fast.heads import Head
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.batched import BatchedTrainer
from bert_fast.training.faults import is_out_of_memory, out_of_memory
from bert_fast.training.freezing import GradualUnfreezing, freeze, train_head, train_last_layers
from bert_fast.training.inspection import FACTS, Facts, step_flops
from bert_fast.training.optimizers import make_optimizer, parameter_groups
from bert_fast.training.progress import MetricsFile, Progress, Throughput, measured_peak
from bert_fast.training.schedules import make_schedule

if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):  # it would divide the gradients once more
    raise ImportError(f"bert_fast.training needs transformers 5.20 or newer, found {transformers.__version__}")

#: `freeze` of the arguments for all but the last k layers: this and k.
LAST = "all_but_last_"

#: Names of what a model compares its answer with.
TARGETS = frozenset({"labels", "next_sentence_label", "start_positions", "end_positions"})


@dataclass(frozen=True)
class _Step:
    """Sums over all micro-batches of a step, of all processes."""

    num_labels: int
    num_pairs: int
    sequences: int
    tokens: int
    flops: int
    terminating: bool


class Trainer(BatchedTrainer):
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
        TypeError: the arguments are not `bert_fast.training.TrainingArguments`.
        ValueError: several GPUs in one process; what is to be frozen is unknown.
    """

    #: `compute_loss` weighs micro-batches itself.
    loss_is_scaled_for_ga = True

    def __init__(self, model: nn.Module, args: TrainingArguments, **options: Any) -> None:
        if not isinstance(args, TrainingArguments):
            kind = f"{type(args).__module__}.{type(args).__name__}"
            raise TypeError(f"args is a {kind}, expected bert_fast.training.TrainingArguments")
        if args.n_gpu > 1:
            raise ValueError(
                f"{args.n_gpu} GPUs in one process: start one for each with torchrun --nproc_per_node {args.n_gpu}, or "
                "choose one with CUDA_VISIBLE_DEVICES=0"
            )
        unfreezing = _frozen(model, args.freeze)
        if unfreezing is not None:
            args.ddp_find_unused_parameters = True
        super().__init__(model, args, **options)
        self.model_accepts_loss_kwargs = False  # the loss of every model is the mean of its micro-batch
        if args.label_names is None and isinstance(model, Head):
            spans = "start_positions" in model.other_labels
            self.label_names = [*([] if spans else ["labels"]), *model.other_labels]
        if unfreezing is not None:
            self.followers.append(unfreezing)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(Progress)
        self.add_callback(MetricsFile)
        self.add_callback(_Counting(self))
        self._step, self._micro_batches = _Step(0, 0, 0, 0, 0, False), list[tuple[Tensor, Facts]]()
        self._facts = Facts((), (), 0)
        self._evaluates_loss_only = False
        # Counts are summed on the CPU, so that no process waits for what its GPU still has to do.
        self._counts_group = dist.new_group(backend="gloo") if args.world_size > 1 else None
        self.throughput = Throughput(self._peak())

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

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Take the facts out of what the model gets."""
        inputs = dict(inputs)
        self._facts = inputs.pop(FACTS, None) or self.inspector.facts(inputs)
        return super()._prepare_inputs(inputs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of a step, and what they are together, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        facts = [batch.get(FACTS) or self.inspector.facts(batch) for batch in batches]
        flops = sum(self._flops(batch) for batch in facts)
        sums = [
            sum(batch.num_labels for batch in facts),
            sum(batch.num_pairs for batch in facts),
            sum(len(batch.lengths) for batch in facts),
            sum(batch.num_tokens for batch in facts),
            flops,
            int(self._signals.requested),
        ]
        if self._counts_group is not None:
            counts = torch.tensor(sums, dtype=torch.int64)
            dist.all_reduce(counts, group=self._counts_group)
            sums = counts.tolist()
        num_labels, num_pairs, sequences, num_tokens, flops, signals = sums
        self._step = _Step(num_labels, num_pairs, sequences, num_tokens, flops, terminating=signals > 0)
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
        """In evaluation the mean over the labels of a batch; in training its part of the mean over all of the step.

        0 where all labels are ignored.
        """
        facts, step, scale = self._facts, self._step, self.args.world_size  # DDP divides the gradients by that
        if not model.training:
            step, scale = _Step(facts.num_labels, facts.num_pairs, 0, 0, 0, False), 1
        options: dict[str, Any] = {"loss_only": True} if self._needs_loss_only(model) else {}
        if isinstance(self.model, Head) and self.compute_loss_func is None and self.label_smoother is None:
            # The second loss of pre-training is a mean over the pairs of the batch; this divisor weighs it with them.
            pairs = facts.num_pairs / step.num_pairs if step.num_pairs else 1.0
            outputs = model(**inputs, num_items_in_batch=max(step.num_labels, 1) * pairs, **options)
            loss = outputs[0] * (scale * pairs)
        else:
            loss, outputs = self._weighed(model, inputs, options, scale, step)
        # The factor is 1, or NaN for a loss that is not finite: then all gradients are, on every process.
        loss = loss * (1 + 0 * loss.detach())
        return (loss, outputs) if return_outputs else loss

    def _weighed(
        self, model: nn.Module, inputs: dict[str, Any], options: dict[str, Any], scale: int, step: _Step
    ) -> tuple[Tensor, Any]:
        """The mean that a model gives, which knows nothing of the step, times its part of the step's labels."""
        facts = self._facts
        if facts.num_labels:
            loss, outputs = super().compute_loss(model, {**inputs, **options}, return_outputs=True)
        else:  # the mean over none is NaN
            outputs = model(**{name: value for name, value in inputs.items() if name not in TARGETS})
            loss = outputs[0].float().mean() * 0
        part = scale * facts.num_labels / max(step.num_labels, 1)
        if not facts.num_pairs:
            return loss * part, outputs
        # The loss of pre-training has the mean over pairs in it, unless no word was to be predicted.
        pairs = F.cross_entropy(outputs["seq_relationship_logits"].float(), inputs["next_sentence_label"].view(-1))
        return loss * part + pairs * (scale * facts.num_pairs / step.num_pairs - part), outputs

    def _needs_loss_only(self, model: nn.Module) -> bool:
        """Whether nobody reads the logits, and the model can leave them out."""
        if not (model.training or self._evaluates_loss_only):
            return False
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return False
        inner = self.model
        if not isinstance(inner, PreTrainedModel) or type(inner).__name__ not in drop_in.HOSTS:
            return isinstance(inner, Head)
        return drop_in.is_accelerated(inner) and not self._facts.num_pairs

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """As transformers, without logits where only the loss is wanted."""
        self._evaluates_loss_only = prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

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
        return self._flops(self._facts)

    def _flops(self, facts: Facts) -> int:
        model: Any = self.model
        shapes = model.shapes if isinstance(model, Head) else (getattr(model, "config", None),)
        return sum(step_flops(shape, facts.lengths) for shape in shapes)

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
