"""Contenders of training, in processes of their own: whole steps of a model, by transformers and by bert_fast."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.cases import MODELS, TrainCase
from benchmarks.processes import Spec, Worker, whole
from benchmarks.steps import Batch, Steps
from benchmarks.worker import Ram
from bert_fast import accelerate, modules
from bert_fast.benchmarking import Cost
from bert_fast.config import BertConfig
from bert_fast.folders import resolve
from bert_fast.loading import read_config
from bert_fast.training import kept_memory

DROPOUT, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-5, 1.0

#: Task -> the class of the model, by transformers' name and by ours.
CLASSES = {"classification": "BertForSequenceClassification", "mlm": "BertForMaskedLM"}


@dataclass(frozen=True)
class Trainee:
    """One way to train.

    Attributes:
        name: what tables call it.
        model: "transformers", "compiled", "accelerated" or "own".
        layout: one of `steps.LAYOUTS`.
        dtype: of the products: "bfloat16" is autocast, over float32 parameters.
    """

    name: str
    model: str
    layout: str = "padded"
    dtype: str = "float32"

    @property
    def compiled(self) -> bool:
        """Whether it compiles first, for a minute or more."""
        return self.model == "compiled"

    def spec(self, device: str) -> Spec:
        """How its process makes it."""
        return Spec(partial(Training, self, device), ("transformers.models.bert.modeling_bert", "benchmarks.training"))


#: What ratios are to, and what decides whether a case is measured at all.
BASELINE, SUBJECT = "transformers", "bert_fast"

_CPU = (
    Trainee(BASELINE, "transformers"),
    Trainee("transformers grouped", "transformers", "grouped"),
    Trainee("torch.compile", "compiled"),
    Trainee("torch.compile grouped", "compiled", "grouped"),
    Trainee(SUBJECT, "accelerated"),
    Trainee("bert_fast packed", "accelerated", "packed"),
    Trainee("bert_fast own", "own", "packed"),
    Trainee("bert_fast bf16", "accelerated", dtype="bfloat16"),
    Trainee("bert_fast packed bf16", "accelerated", "packed", "bfloat16"),
    Trainee("bert_fast own bf16", "own", "packed", "bfloat16"),
)

#: Every contender by name, by device; on a GPU all run in bfloat16.
TRAINEES: dict[str, dict[str, Trainee]] = {
    "cpu": {trainee.name: trainee for trainee in _CPU},
    "cuda": {t.name: replace(t, dtype="bfloat16") for t in _CPU if t.dtype == "float32"},
}

#: Those that run when none is named: as many as ten minutes on two cores, and a stay on a GPU, have time for.
DEFAULT_TRAINEES = {
    "cpu": (*(name for name, t in TRAINEES["cpu"].items() if t.layout != "packed"), "bert_fast own"),
    "cuda": ("transformers", "transformers grouped", "bert_fast", "bert_fast own"),
}


@dataclass(frozen=True)
class Request:
    """What a contender's process is called with.

    Attributes:
        case: what it trains, on one set of weights for all.
        what: "exact": loss and norm of the gradient of the first batch, without dropout, in float32; "compared": the
            same in the contender's dtype; "steps": the losses of a step on each batch; "activations": the megabytes
            that a step holds at most beyond the model, the gradients and the state of the optimiser.
        first: the batch that answers are compared on.
        batches: of the steps.
    """

    case: TrainCase
    what: str
    first: Batch
    batches: list[Batch]


class Training:
    """A contender in its process: called with a `Request`."""

    model: nn.Module
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    trained = False

    def __init__(self, trainee: Trainee, device: str) -> None:
        self.trainee, self.device = trainee, device
        self.case: TrainCase | None = None
        self.request: Request | None = None
        if self.is_ours:  # as its trainer does
            self._memory = kept_memory()
            self._memory.__enter__()

    @torch.inference_mode(False)  # the worker measures under it
    def __call__(self, request: Request) -> Tensor:
        """What the request asks for, a vector."""
        if request.case != self.case:
            self._build(request.case)
        if request is not self.request:
            self.request, self.first = request, self._on_device(request.first)
            self.batches = [self._on_device(batch) for batch in request.batches]
        if request.what == "steps":
            return torch.stack([self.step(batch) for batch in self.batches])
        if request.what == "activations":
            return torch.tensor([self.activations()])
        if self.trained:  # answers are those of the weights that all begin with
            self.model.load_state_dict(build(request.case, "transformers").state_dict())
            self.trained = False
        return self.compared(self.first, torch.float32 if request.what == "exact" else self._dtype)

    def step(self, batch: Batch, keep_gradients: bool = False) -> Tensor:
        """Forward, backward, clip, AdamW; the loss. Gradients are freed, or kept as zeros."""
        self.trained = True
        loss = self._loss(self.run, batch, self._dtype)
        loss.backward()
        clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=not keep_gradients)
        return loss.detach()

    def compared(self, batch: Batch, dtype: torch.dtype) -> Tensor:
        """(2,): loss and norm of the gradient without dropout; nothing changes.

        torch.compile is compared before it compiles, which it would have to do for this alone.
        """
        dropouts = [module for module in self.model.modules() if isinstance(module, nn.Dropout)]
        for dropout in dropouts:
            dropout.p = 0.0
        loss = self._loss(self.model, batch, dtype)
        loss.backward()
        norm = clip_grad_norm_(self.parameters, MAX_GRAD_NORM)
        self.optimizer.zero_grad()
        for dropout in dropouts:
            dropout.p = DROPOUT
        return torch.stack([loss.detach().float(), norm.float()])

    def activations(self) -> float:
        """The most that a step on the largest batch holds beyond model, gradients and optimiser, in megabytes.

        Gradients stay after it, as zeros, so that they count neither where they are there nor where not yet.
        """
        largest = max(self.batches, key=lambda batch: batch["input_ids"].numel())
        self.step(largest, keep_gradients=True)
        peak = Peak(self.device)
        self.step(largest, keep_gradients=True)
        self.optimizer.zero_grad()
        return peak.megabytes()

    @property
    def is_ours(self) -> bool:
        """Whether it trains on our kernels."""
        return self.trainee.model in ("accelerated", "own")

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.trainee.dtype)

    def _loss(self, run: Callable[..., Any], batch: Batch, dtype: torch.dtype) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return run(**batch, **self.options).loss

    def _build(self, case: TrainCase) -> None:
        if self.case is not None:  # the memory of the case before, first
            del self.model, self.run, self.parameters, self.optimizer
            gc.collect()
        self.case, self.trained = case, False
        self.model = build(case, self.trainee.model).to(self.device).train()
        self.run: Callable[..., Any] = self.model
        if self.trainee.compiled:
            self.run = torch.compile(self.model, dynamic=True)  # one for the shapes of all batches
        self.options = {"loss_only": True} if self.is_ours and case.task == "mlm" else {}  # nobody reads the logits
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, LEARNING_RATE, weight_decay=0.01, fused=True)

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class Peak:
    """The most memory since this was made, beyond what was held then; what is free has been given back first."""

    def __init__(self, device: str) -> None:
        self.device = device
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Ram().reset()
            self.ram = Ram()

    def megabytes(self) -> float:
        """Until now."""
        if self.device == "cuda":
            return 1e-6 * (torch.cuda.max_memory_allocated() - self.before)
        return self.ram.peak()


def config_of(case: TrainCase) -> BertConfig:
    """The sizes of the model that the case trains."""
    source = MODELS[case.model].source
    return read_config(resolve(source)) if isinstance(source, str) else source


def build(case: TrainCase, kind: str) -> nn.Module:
    """A model for the case, always with the same weights; `kind` is that of a `Trainee`."""
    model = _transformers(case)
    if kind == "accelerated":
        return accelerate(model)
    if kind == "own":
        own: nn.Module = getattr(modules, CLASSES[case.task])(BertConfig.from_dict(model.config.to_dict()))
        own.load_state_dict(model.state_dict())
        return own
    return model


def _transformers(case: TrainCase) -> Any:
    import transformers

    model_class = getattr(transformers, CLASSES[case.task])
    source = MODELS[case.model].source
    options = {"hidden_dropout_prob": DROPOUT, "attention_probs_dropout_prob": DROPOUT, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    if isinstance(source, str):
        return model_class.from_pretrained(resolve(source), dtype=torch.float32, **options)
    return model_class(transformers.BertConfig.from_dict(source.to_dict(), **options))


@dataclass(frozen=True)
class Relative:
    """What of an answer is compared: its values over the expected ones, so that each of them counts the same."""

    expected: Tensor

    def __call__(self, answer: Tensor) -> Tensor:
        """(2,) -> (2,)."""
        return answer.cpu() / self.expected

    @property
    def right(self) -> Tensor:
        """What is left of the expected answer: ones."""
        return torch.ones_like(self.expected)


class TrainingWorker(Worker):
    """The process of a trainee, given `Steps`: they are laid out as it takes them, before anything is timed."""

    def give(self, arguments: Steps, part: Callable[[Tensor], Tensor] = whole) -> None:
        """The texts that it trains on from now on, and what of the answer is compared."""
        layout = TRAINEES[self.device][self.name].layout
        first = "padded" if layout == "grouped" else layout
        self._steps = Request(arguments.case, "steps", arguments.first(first), arguments.batches(layout))
        self._part = part
        super().give(self._steps)

    def answer(self) -> Tensor:
        """Loss and norm of the gradient of the first batch, without dropout."""
        return self._once("compared", self._part)

    def exact(self) -> Tensor:
        """The same in float32, whole."""
        return self._once("exact")

    def cost(self) -> Cost:
        """With the memory of a step's activations."""
        return replace(super().cost(), activations_mb=float(self._once("activations")))

    def _once(self, what: str, part: Callable[[Tensor], Tensor] = whole) -> Tensor:
        super().give(replace(self._steps, what=what), part)
        answer = super().answer()
        super().give(self._steps)
        return answer
