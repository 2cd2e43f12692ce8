"""The trainer of a student that learns from a teacher (Hinton et al., 2015, and those named in `imitation`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_fast.heads import Head
from bert_fast.inputs import BertInputs
from bert_fast.losses import IGNORED_LABEL
from bert_fast.ragged import Padding, Ragged
from bert_fast.training import imitation
from bert_fast.training.arguments import TrainingArguments
from bert_fast.training.trainer import TARGETS, Trainer

#: The heads that can be taught, and what their logits are of.
HEADS = {
    "BertForSequenceClassification": "texts",
    "BertForMultipleChoice": "texts",
    "BertForTokenClassification": "tokens",
    "BertForQuestionAnswering": "spans",
}


@dataclass(frozen=True)
class Weights:
    """What the parts of the loss are multiplied by; a part of weight 0 is not computed.

    Attributes:
        logits: of the difference from the teacher's logits: T^2 KL(teacher || student) of the classes, of each label
            where several may apply, of the tokens that a span may start and end at; the squared error of a regression.
        labels: of the loss that training without a teacher has; it needs labels.
        hidden: of the squared error of hidden states, the embeddings among them, each beside the teacher's of the same
            depth; the mean over these pairs. Where the student is narrower, a matrix that is learned, the same for all
            states, brings its states to the teacher's width (TinyBERT).
        attention: of the difference of the relations between the queries, the keys and the values of the last layers
            (MiniLMv2), the mean of the three.

    Raises:
        ValueError: a weight is negative, or all are 0.
    """

    logits: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in values.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"the weight of {name} is {value}, expected at least 0")
        if not any(values.values()):
            raise ValueError(f"the weights of {', '.join(values)} are all 0: there is nothing to learn")


class Said(NamedTuple):
    """What a model says of a batch, without its padding.

    Attributes:
        logits: (texts, classes) or (num_tokens, classes); of spans two (num_tokens,), for start and end.
        states: the embeddings and the rows of every layer, each (num_tokens, hidden_size); None if nobody asked.
    """

    logits: tuple[Tensor, ...]
    states: tuple[Tensor, ...] | None = None


class DistillationTrainer(Trainer):
    """A `Trainer` whose model, the student, learns from what a teacher says of the same batches.

    The teacher runs in evaluation mode, without gradients, on the engine over packed weights. Where only its logits are
    wanted they are kept from the first epoch on: later ones do not run it. Evaluation is that of `Trainer`.

    Examples need labels only if `weights.labels` is above 0. Every part of the loss is a mean over all of a step, its
    micro-batches and processes, as `Trainer` has it.

    Args:
        model: the student: a head of `bert_fast.modules` for texts, tokens, choices or spans.
        args: how to train.
        teacher: a model with the same head, as many outputs, and the same vocabulary.
        weights: of the parts of the loss.
        temperature: that logits are divided by.
        options: everything else that `Trainer` takes.

    Raises:
        ValueError: student and teacher do not fit each other; the message says why.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        teacher: nn.Module,
        weights: Weights,
        temperature: float = 2.0,
        **options: Any,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected above 0")
        self.reads = _checked(model, teacher)
        self.student: Any = model
        self.teacher: Any = teacher.eval().requires_grad_(False)
        self.weights, self.temperature = weights, temperature
        super().__init__(model, args, **options)
        self.teacher.to(self.args.device)
        if not weights.labels and self.train_dataset is not None:
            self.label_names = [name for name in self.label_names if name in self.train_dataset[0]]
        shape: Any = self.student.config
        of_teacher: Any = self.teacher.config
        self._pairs = imitation.matching_states(shape.num_hidden_layers, of_teacher.num_hidden_layers)
        self._relation_heads = imitation.relation_heads(shape, of_teacher)
        self._kept: dict[int, tuple[Tensor, ...]] = {}
        self._parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._parts_since = 0

    def train(self, *args: Any, **options: Any) -> Any:
        """As `Trainer.train`; the matrix that widens hidden states is the student's only while it lasts."""
        widths = self.student.config.hidden_size, self.teacher.config.hidden_size
        widens = self.weights.hidden > 0 and widths[0] != widths[1]
        if widens:
            parameter = next(self.student.parameters())
            self.student.widening = nn.Linear(*widths, bias=False, device=parameter.device, dtype=parameter.dtype)
            nn.init.normal_(self.student.widening.weight, std=widths[0] ** -0.5)
        try:
            return super().train(*args, **options)
        finally:
            if widens:
                del self.student.widening

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the weighed sum of the parts, as this micro-batch's share of the step's means."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        weights, step, config = self.weights, self._step, self.student.config
        given = {name: value for name, value in inputs.items() if name not in TARGETS}
        ragged, padding = _without_padding(given, config)
        wants_states = bool(weights.hidden or weights.attention)
        lesson = self._lesson(given, padding, wants_states)
        options: dict[str, Any] = {"output_hidden_states": True} if wants_states else {}
        if weights.labels:
            options |= {**inputs, "num_items_in_batch": max(step.num_labels, 1)}
        outputs = model(**(given | options))
        said = _said(self.reads, outputs, padding, wants_states)
        parts: dict[str, Tensor] = {}
        if weights.labels:
            parts["labels"] = outputs.loss
        if weights.logits:
            parts["logits"] = self._of_logits(said, lesson, inputs, padding)
        if said.states is not None and lesson.states is not None:
            if weights.hidden:
                parts["hidden"] = self._of_states(said.states, lesson.states).sum() / step.tokens
            if weights.attention:
                differences = self._of_relations(said.states, lesson.states, ragged.cu_seqlens)
                parts["attention"] = differences.sum() / step.tokens
        scale = self.args.world_size  # DDP divides the gradients by that
        loss = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum() * scale
        for name, part in parts.items():
            self._parts[f"loss_{name}"] += part.detach() * scale
        loss = loss * (1 + 0 * loss.detach())  # as in `Trainer`: not finite means no step
        return (loss, outputs) if return_outputs else loss

    def _of_logits(self, said: Said, lesson: Said, inputs: Mapping[str, Any], padding: Padding) -> Tensor:
        """A scalar."""
        temperature, step = self.temperature, self._step
        if self.reads == "spans":
            lengths = list(self._facts.lengths)
            spans = zip(said.logits, lesson.logits, strict=True)
            ends = [imitation.span_divergence(a, b, lengths, temperature).sum() for a, b in spans]
            return torch.stack(ends).mean() / step.sequences
        (student,), (teacher,) = said.logits, lesson.logits
        problem = self.student.config.problem_type
        if self.reads == "tokens" and "labels" in inputs:  # of the others nobody has taught the teacher anything
            taught = padding.pack(inputs["labels"]) != IGNORED_LABEL
            differences = imitation.class_divergence(student[taught], teacher[taught], temperature)
            rows = max(step.num_labels, 1)
        elif self.reads == "tokens":
            differences, rows = imitation.class_divergence(student, teacher, temperature), step.tokens
        elif problem == "regression" or student.shape[-1] == 1:
            differences, rows = imitation.squared_error(student, teacher), step.sequences
        elif problem == "multi_label_classification":
            differences, rows = imitation.label_divergence(student, teacher, temperature), step.sequences
        else:
            # A text of several choices is several sequences.
            choices = len(self._facts.lengths) // max(student.shape[0], 1)
            differences, rows = imitation.class_divergence(student, teacher, temperature), step.sequences // choices
        return differences.sum() / rows

    def _of_states(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
        """(num_tokens,)."""
        widen = getattr(self.student, "widening", nn.Identity())
        pairs = zip(student, self._pairs, strict=True)
        return torch.stack([imitation.squared_error(widen(state), teacher[place]) for state, place in pairs]).mean(0)

    def _of_relations(self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], cu_seqlens: Tensor) -> Tensor:
        """(num_tokens,)."""
        theirs = [model.bert.encoder.layer[-1].attention.self for model in (self.student, self.teacher)]
        differences = []
        for name in ("query", "key", "value"):
            a, b = (getattr(layer, name)(states[-2]) for layer, states in zip(theirs, (student, teacher), strict=True))
            differences.append(imitation.relation_divergence(a, b, cu_seqlens, self._relation_heads))
        return torch.stack(differences).mean(0)

    @torch.no_grad()
    def _lesson(self, inputs: dict[str, Any], padding: Padding, wants_states: bool) -> Said:
        """What the teacher says of a batch; its logits as they were kept, if nothing else is wanted."""
        indexes, device = self._facts.indexes, self.args.device
        keeps = bool(indexes) and not wants_states
        if keeps and all(index in self._kept for index in indexes):
            kept = zip(*(self._kept[index] for index in indexes), strict=True)
            return Said(tuple(torch.cat(parts).to(device) for parts in kept))
        if not (self.weights.logits or wants_states):
            return Said(())
        with torch.autocast(device.type, enabled=False):
            outputs = self.teacher(**inputs, output_hidden_states=wants_states)
        said = _said(self.reads, outputs, padding, wants_states)
        if keeps:
            rows = [1] * len(indexes) if self.reads == "texts" else list(self._facts.lengths)
            cut = [logits.cpu().split(rows) for logits in said.logits]
            self._kept |= dict(zip(indexes, zip(*cut, strict=True), strict=True))
        return said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer`, with the parts of the loss, of this process, before they are weighed."""
        steps = self.state.global_step - self._parts_since
        if "loss" in logs and steps > 0:
            logs |= {name: round(float(part) / steps, 6) for name, part in self._parts.items()}
            self._parts.clear()
            self._parts_since = self.state.global_step
        super().log(logs, start_time)


def _checked(student: nn.Module, teacher: nn.Module) -> str:
    """Which rows the logits of both are of; ValueError where they do not fit."""
    heads = []
    for who, model in (("student", student), ("teacher", teacher)):
        names = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in HEADS]
        if not isinstance(model, Head) or not names:
            raise ValueError(f"the {who} is a {type(model).__name__}, expected one of {', '.join(HEADS)}")
        heads.append(names[0])
    if heads[0] != heads[1]:
        raise ValueError(f"the student is a {heads[0]} and the teacher a {heads[1]}: expected the same head")
    a, b = student.config, teacher.config
    for name in ("vocab_size", "num_labels"):
        if getattr(a, name) != getattr(b, name):
            raise ValueError(f"the student's {name} is {getattr(a, name)}, the teacher's {getattr(b, name)}")
    return HEADS[heads[0]]


def _without_padding(inputs: Mapping[str, Any], config: Any) -> tuple[Ragged, Padding]:
    """The tokens of a batch, and where they stand in it; choices are sequences one after another."""
    known = {name: inputs[name] for name in BertInputs.__dataclass_fields__ if name in inputs}
    if known["input_ids"].dim() == 3:
        known = {name: value.flatten(0, 1) for name, value in known.items() if isinstance(value, Tensor)}
    return BertInputs(**known).checked(config).to_ragged()


def _said(reads: str, outputs: Any, padding: Padding, wants_states: bool) -> Said:
    states = tuple(padding.pack(state) for state in outputs.hidden_states) if wants_states else None
    if reads == "spans":
        return Said(tuple(padding.pack(logits) for logits in (outputs.start_logits, outputs.end_logits)), states)
    return Said((outputs.logits if reads == "texts" else padding.pack(outputs.logits),), states)
