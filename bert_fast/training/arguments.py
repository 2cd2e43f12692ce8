"""What a training run is told: transformers' arguments, ours beside them, and BERT's own defaults."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from bert_fast.training.optimizers import OPTIMIZERS
from bert_fast.training.schedules import SCHEDULES

#: What to do with a step whose loss or gradient is NaN or infinite.
ON_NAN = ("skip", "stop")

#: Arguments of transformers that ours take the place of, and those that do.
REPLACED = {"optim": "optimizer", "lr_scheduler_type": "schedule"}

#: Arguments of transformers that must stay as they are, and why.
FIXED = {
    "auto_find_batch_size": (False, "it would change the batches of a run that is resumed"),
    "average_tokens_across_devices": (True, "the gradients of several processes are those of one"),
    "lr_scheduler_kwargs": (None, "the schedules have no options"),
    "optim_args": (None, "the optimisers have no options"),
    "enable_jit_checkpoint": (False, "SIGTERM saves a checkpoint anyway"),
}


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' `TrainingArguments`, which say what the others are, with BERT's defaults (Devlin et al., 2018).

    Attributes:
        optimizer: a name of `bert_fast.training.optimizers.OPTIMIZERS`; takes the place of `optim`.
        schedule: a name of `bert_fast.training.schedules.SCHEDULES`; takes the place of `lr_scheduler_type`.
        warmup_steps: of the schedule; below 1 a fraction of all steps.
        layer_decay: what the learning rate is multiplied by from each layer to the one below it; 1 for none.
        freeze: what is not trained: "encoder" (all below the pooler and the head), "all_but_last_2" (the same without
            the last 2 layers), "gradual" (one layer more in every epoch), or names of parts, as
            "embeddings,encoder.layer.0" (`bert_fast.training.parts` has them). None trains everything.
        max_tokens_per_batch: of each process and micro-batch: batches are made by tokens and packed without padding,
            and `per_device_train_batch_size` is not used. None for transformers' batches.
        on_nan: a step with a loss or gradient that is not finite is left out and counted ("skip"), or ends the run with
            the indexes of its examples ("stop"). With float16 an overflow is the scaler's business, and counted too.
        peak_gflops: what one process's device can do, in 10^9 floating-point operations per second; the progress then
            has the fraction of it (`python -m benchmarks.peak` measures a CPU). None measures a GPU, and no CPU.
        plot_metrics: draw `metrics.svg` from `metrics.jsonl` when the run ends, if matplotlib is installed.
        ddp_find_unused_parameters: False, as BERT's heads use all their parameters; looking for others takes time.
        logging_nan_inf_filter: False, as such losses are seen to by `on_nan`.
        restore_callback_states_from_checkpoint: True, so that early stopping, too, goes on as if never interrupted.

    Raises:
        ValueError: an argument is impossible, or one that ours replace was given; the message names it and its value.
    """

    optimizer: str = field(default="adamw", metadata={"help": f"One of {', '.join(OPTIMIZERS)}."})
    schedule: str = field(default="linear", metadata={"help": f"Of the learning rate: {', '.join(SCHEDULES)}."})
    layer_decay: float = field(default=1.0, metadata={"help": "Factor of the learning rate for each layer down."})
    freeze: str | None = field(default=None, metadata={"help": "encoder, all_but_last_2, gradual, or names of parts."})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Make batches by tokens, packed without padding, instead of by examples."}
    )
    on_nan: str = field(default="skip", metadata={"help": "A step that is not finite: skip it, or stop the run."})
    peak_gflops: float | None = field(default=None, metadata={"help": "Peak of the device, for the fraction reached."})
    plot_metrics: bool = field(default=True, metadata={"help": "Draw metrics.svg when the run ends."})

    learning_rate: float = field(default=5e-5, metadata={"help": "The highest learning rate of the schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up; below 1 a fraction of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of all weights but biases and LayerNorm."})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "Added to the denominator of the optimiser's step."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples per process and micro-batch."})
    logging_steps: float = field(default=50, metadata={"help": "Steps between two lines of the log."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Needed where some are not used."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not used; see on_nan."})
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Whether callbacks go on where they were when a run is resumed."}
    )

    def __post_init__(self) -> None:
        defaults = transformers.TrainingArguments.__dataclass_fields__
        for name, ours in REPLACED.items():
            if getattr(self, name) != defaults[name].default:
                raise ValueError(f"{name} is {getattr(self, name)!r}; give {ours} instead")
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {value!r}: {reason}")
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("on_nan", self.on_nan, ON_NAN)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay is {self.layer_decay}, expected above 0 and at most 1")
        if not (self.max_steps > 0 or self.num_train_epochs > 0):
            raise ValueError(f"num_train_epochs is {self.num_train_epochs}, expected above 0")
        for name in ("max_tokens_per_batch", "peak_gflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}, expected above 0")
        for name in ("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm"):
            value = getattr(self, name)
            if value is None or not value >= 0:
                raise ValueError(f"{name} is {value}, expected at least 0")
        super().__post_init__()


def _one_of(name: str, value: str, known: object) -> None:
    if value not in known:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")  # type: ignore[arg-type]
