"""Distillation: a fine-tuned teacher in; a smaller student out, and what it costs in score and gains in speed."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bert_fast import disk
from bert_fast.benchmarking import markdown_table
from bert_fast.data.catalogue import read
from bert_fast.families import make_config
from bert_fast.folders import read_json, resolve
from bert_fast.heads import Head
from bert_fast.loading import from_pretrained
from bert_fast.recipes import finetune
from bert_fast.recipes._runs import RESULTS_FILE
from bert_fast.recipes._splits import Split, beside, judged, make_split, reading, sampled, write_predictions
from bert_fast.recipes.card import write_card
from bert_fast.recipes.predict import FineTuned, load, read_tokenizer, run
from bert_fast.recipes.report import write_report
from bert_fast.recipes.students import OF_THE_TASK, shallower, student_of
from bert_fast.tasks._task import Features
from bert_fast.tasks.registry import TASK_FILE
from bert_fast.timing import Call, compare

#: How many texts speed is measured on, at most.
TIMED = 256


@dataclass
class DistillSettings:
    """What a run is told.

    Attributes:
        teacher: the folder that a fine-tuning left, or a distillation.
        output_dir: the folder of the run, and of the student it leaves.
        student_layers: the student is the teacher with so many of its layers, evenly spaced. Or:
        student_config: a `config.json` of its shape, at most the teacher's; its weights are parts of the teacher's. Or:
        student: a model, of any shape, with the teacher's vocabulary; its classifier starts afresh.
        train_file, validation_file, test_file, columns, read_options: as for fine-tuning. Columns and options that are
            not given are those of the teacher's files.
        data_dir: the folder of the teacher's data set, in place of these files.
        unlabelled: the training examples have no labels, or they are not to be used.
        logits_weight, labels_weight, hidden_weight, attention_weight: of the parts of the loss; see
            `bert_fast.training.distillation.Weights`.
        temperature: that logits are divided by.
        teacher_precision: what the teacher computes in; None for that of its weights.
        arguments: of `bert_fast.training.TrainingArguments`, by name.
        max_train_samples, max_eval_samples, resume: as for fine-tuning.
    """

    teacher: str
    output_dir: str
    student_layers: int | None = None
    student_config: str | None = None
    student: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    data_dir: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    read_options: dict[str, Any] = field(default_factory=dict)
    unlabelled: bool = False
    logits_weight: float = 1.0
    labels_weight: float = 0.5
    hidden_weight: float = 0.0
    attention_weight: float = 0.0
    temperature: float = 2.0
    teacher_precision: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    resume: bool | str = False


@dataclass(frozen=True)
class ComparedModel:
    """A model beside another: its shape, its scores (split -> metric -> value), and texts a second."""

    layers: int
    hidden_size: int
    parameters: int
    metrics: dict[str, dict[str, float]]
    texts_per_second: float


@dataclass(frozen=True)
class DistillResult:
    """What came of a run.

    Attributes:
        output_dir: where the student is.
        main_metric: the one that the task goes by.
        teacher, student: what they score and how fast they are, timed side by side.
        num_timed: on so many texts.
        seconds: of training.
    """

    output_dir: Path
    main_metric: str
    teacher: ComparedModel
    student: ComparedModel
    num_timed: int
    seconds: float

    def __str__(self) -> str:
        lines = []
        for name, model in (("teacher", self.teacher), ("student", self.student)):
            line = {
                "model": name,
                "layers": str(model.layers),
                "hidden": str(model.hidden_size),
                "parameters": f"{model.parameters / 1e6:.1f} M",
            }
            for split, metrics in model.metrics.items():
                line[f"{split} {self.main_metric}"] = f"{metrics[self.main_metric]:.4f}"
            line["texts/s"] = f"{model.texts_per_second:.0f}"
            line["speed"] = f"{model.texts_per_second / self.teacher.texts_per_second:.2f}x"
            lines.append(line)
        table = markdown_table(lines)
        timed = f"speed: {self.num_timed} texts, tokenised before, side by side"
        return f"{table}\n\n{timed}; the student is {self.output_dir}"


def distill(settings: DistillSettings) -> DistillResult:
    """Train a student on what a fine-tuned teacher says.

    It leaves in `output_dir` what fine-tuning leaves, and in `results.json`, under `distillation`, the teacher's scores
    and both speeds.

    Raises:
        ValueError: the settings, the files or the models are not right; the message names what.
        CheckpointError: `resume` names a checkpoint that is not whole.
    """
    import transformers

    from bert_fast.recipes._task_distillation import TaskDistillation
    from bert_fast.training.distillation import Weights

    output_dir = Path(settings.output_dir)
    finetune.check_output_dir(output_dir, settings.resume)
    tuned = _teacher(settings)
    finetuning = _as_finetuning(settings, tuned)
    args = finetune.arguments_of(finetuning)
    weights = Weights(
        logits=settings.logits_weight,
        labels=0.0 if settings.unlabelled else settings.labels_weight,
        hidden=settings.hidden_weight,
        attention=settings.attention_weight,
    )
    splits = _splits(settings, finetuning, tuned, args.seed)
    held_out, main_metric = finetune.choose_by(splits, tuned.task, args, settings.arguments)

    transformers.set_seed(args.seed)
    student: Any = _student(settings, tuned)
    trainer = TaskDistillation(
        student,
        args,
        teacher=tuned.model,
        weights=weights,
        temperature=settings.temperature,
        task=tuned.task,
        train=splits["train"],
        validation=held_out,
        collate=tuned.task.collator(student.config),
    )
    train = finetune.train_on(splits["train"], trainer, settings.resume)

    metrics: dict[str, dict[str, dict[str, float]]] = {"teacher": {}, "student": {}}
    for name, split in splits.items():
        if name == "train":
            continue
        predictions, scores = trainer.judged(split)
        if split.labelled:
            metrics["student"][name] = scores
            _, metrics["teacher"][name] = judged(tuned.task, split, run(tuned.model, tuned.task, split.features))
        if trainer.is_world_process_zero():
            write_predictions(output_dir / f"predictions_{name}.jsonl", beside(split.examples, predictions))
    timed = _few((held_out or splits["train"]).features)
    both = _compared(tuned, student, metrics, timed)
    result = DistillResult(output_dir, main_metric, *both, len(timed.inputs), train["seconds"])
    if trainer.is_world_process_zero():
        finetune.save_model(output_dir, student, tuned.folder, tuned.task)
        finetune.write_results(output_dir, finetuning, tuned.task, main_metric, metrics["student"], train)
        _add_to_results(output_dir / RESULTS_FILE, settings, result)
        write_report(output_dir)
        write_card(output_dir)
    trainer.accelerator.wait_for_everyone()
    return result


def _as_finetuning(settings: DistillSettings, tuned: FineTuned) -> finetune.FinetuneSettings:
    """What both have in common."""
    shared = {f.name for f in dataclasses.fields(finetune.FinetuneSettings)} & set(vars(settings))
    values = {name: getattr(settings, name) for name in shared}
    values |= {"columns": {**tuned.columns, **settings.columns}}
    values |= {"read_options": {**tuned.read_options, **settings.read_options}}
    return finetune.FinetuneSettings(model_name_or_path=settings.teacher, task=tuned.data, **values)


def _teacher(settings: DistillSettings) -> FineTuned:
    folder = resolve(settings.teacher)
    if not (folder / TASK_FILE).is_file():
        raise ValueError(
            f"{settings.teacher} has no {TASK_FILE}, which says what its outputs mean: a teacher is the folder that "
            "bert-fast finetune or bert-fast distill left"
        )
    return load(folder, precision=settings.teacher_precision)


def _splits(
    settings: DistillSettings, finetuning: finetune.FinetuneSettings, tuned: FineTuned, seed: int
) -> dict[str, Split]:
    """Split -> its examples as the model takes them, those of training first."""
    found = {}
    options = reading(tuned.task, finetuning.read_options)
    for split, source in finetune.sources_of(finetuning).items():
        labelled = None if split.startswith("test") else not (split == "train" and settings.unlabelled)
        examples = read(tuned.data, source, split=split, columns=finetuning.columns, labelled=labelled, **options)
        most = settings.max_train_samples if split == "train" else settings.max_eval_samples
        found[split] = make_split(split, sampled(examples, most, seed), tuned.task, tuned.tokenizer)
    return found


def _student(settings: DistillSettings, tuned: FineTuned) -> Head:
    ways = ("student_layers", "student_config", "student")
    given = [name for name in ways if getattr(settings, name) is not None]
    if len(given) != 1:
        raise ValueError(f"{' and '.join(given) or 'none'} given, expected exactly one of {', '.join(ways)}")
    teacher: Any = tuned.model
    if settings.student_layers is not None:
        return student_of(teacher, shallower(teacher.config, settings.student_layers))
    if settings.student_config is not None:
        return student_of(teacher, make_config(read_json(Path(settings.student_config))))
    folder = resolve(str(settings.student))
    mine, theirs = read_tokenizer(folder).backend.get_vocab(), tuned.tokenizer.backend.get_vocab()
    if mine != theirs:
        other = next((token for token in theirs if mine.get(token) != theirs[token]), None) or next(iter(mine))
        raise ValueError(
            f"the student {settings.student} has another vocabulary than the teacher: {other!r} is {mine.get(other)} "
            f"in the one and {theirs.get(other)} in the other"
        )
    labels = {name: getattr(teacher.config, name) for name in OF_THE_TASK}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*starts untrained")
        student: Any = from_pretrained(folder, tuned.task.head, config=labels, dtype="float32")
    return student


def _few(features: Features) -> Features:
    """`TIMED` of them, evenly spread."""
    places = np.unique(np.linspace(0, len(features.inputs) - 1, min(TIMED, len(features.inputs))).astype(int))
    return Features([features.inputs[place] for place in places], features.owners[places])


def _compared(
    tuned: FineTuned, student: Any, metrics: Mapping[str, dict[str, dict[str, float]]], timed: Features
) -> tuple[ComparedModel, ComparedModel]:
    """The teacher and the student beside each other."""
    speeds = _texts_per_second(tuned, student, timed)
    models: Mapping[str, Any] = {"teacher": tuned.model, "student": student}
    teacher, other = (
        ComparedModel(
            layers=model.config.num_hidden_layers,
            hidden_size=model.config.hidden_size,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            metrics=metrics[name],
            texts_per_second=speeds[name],
        )
        for name, model in models.items()
    )
    return teacher, other


def _texts_per_second(tuned: FineTuned, student: Head, features: Features) -> dict[str, float]:
    """Of both models, timed in turns."""
    models: Mapping[str, Any] = {"teacher": tuned.model, "student": student}

    def answer(model: Any) -> torch.Tensor:
        outputs = run(model, tuned.task, features, progress=False)
        return torch.from_numpy(np.concatenate([part.ravel() for output in outputs for part in output]))

    # They are not to agree; whether they do is what the scores say.
    calls = {name: Call(lambda model=model: answer(model)) for name, model in models.items()}  # type: ignore[misc]
    timings = compare(calls, max_error=math.inf)
    return {name: len(features.inputs) / timing.median for name, timing in timings.items()}


def _add_to_results(file: Path, settings: DistillSettings, result: DistillResult) -> None:
    results = read_json(file)
    results["settings"] |= dataclasses.asdict(settings)
    results["distillation"] = {
        "teacher": dataclasses.asdict(result.teacher),
        "student": dataclasses.asdict(result.student),
        "num_timed": result.num_timed,
    }
    disk.write_json(file, results)
