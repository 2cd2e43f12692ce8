"""Pre-training: text or shards in; a model that knows the language, its scores on held-out text, and its speed out."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bert_fast import disk
from bert_fast.data.encoding import TokenizerVocabulary
from bert_fast.folders import resolve
from bert_fast.recipes._pretraining_data import PAIRS, Phase, holds_out, make_collator, read_corpus
from bert_fast.recipes._pretraining_models import describe, make_model, save
from bert_fast.recipes._runs import RESULTS_FILE, training_arguments, versions
from bert_fast.training.phases import split_steps

#: What a run is told that is not told otherwise: BERT's and ELECTRA's learning rates, one step in a hundred of warm-up.
LEARNING_RATES = {"mlm": 1e-4, "nsp": 1e-4, "sop": 1e-4, "electra": 5e-4}
WARMUP = 0.01


@dataclass
class PretrainSettings:
    """What a run is told.

    Attributes:
        output_dir: the folder of the run, and of the model it leaves.
        train_file: a folder of shards, as `bert-fast data pretrain` makes them, or text: a file, or a folder of files.
        objective: "mlm", hidden tokens; "nsp", and is the second segment next (BERT)?; "sop", and are the two in order
            (ALBERT)?; "electra", replaced tokens.
        nsp_weight: what the second loss of "nsp" and "sop" is multiplied by.
        disc_weight: what the loss of ELECTRA's discriminator is multiplied by.
        model_name_or_path: a checkpoint to go on with: a folder, a Hub id or `demo`; of ELECTRA the discriminator.
        generator_name_or_path: of ELECTRA the generator; None for the folder `generator` of the discriminator.
        config_name: the shape of a fresh model: a name of `_pretraining_models.SHAPES`, or a `config.json`. ELECTRA's
            discriminator has it.
        tokenizer_name: a model's; None for that of `model_name_or_path`.
        initialization: "normal", as transformers, or "truncated_normal", as Google.
        generator_hidden_size, generator_layers: parts of the discriminator's.
        embedding_size: of ELECTRA; None for that of the shape.
        validation_file: shards or text that are held out.
        validation_split_percentage: of the documents of a text that are held out, where there is no such file.
        max_seq_length: of a text, in tokens, where there are no phases.
        phases: of the run, one after the other under one optimiser and schedule; they need `max_steps`.
        mlm_probability: part of the tokens that is hidden; None for what the shards say, 0.15 for text.
        scheme: what is hidden together, one of `bert_fast.data.masking.SCHEMES`; None as above, single tokens for text.
        max_predictions_per_seq: tokens that are hidden in a text, at most; None as above, any number for text.
        dupe_factor: how often text is cut into examples, differently each time; an epoch has all of them.
        text_field, split_sentences: how text is read, see `bert_fast.data.text.read_sentences`.
        arguments: of `bert_fast.training.TrainingArguments`, by name. A batch has `per_device_train_batch_size` texts,
            or with `max_tokens_per_batch` as many as fit.
        resume: go on from the last whole checkpoint of the folder, or from the one that is named.
        plain: run the plain modules on padded batches, for comparison.
    """

    output_dir: str
    train_file: str
    objective: str = "mlm"
    nsp_weight: float = 1.0
    disc_weight: float = 50.0
    model_name_or_path: str | None = None
    generator_name_or_path: str | None = None
    config_name: str | None = None
    tokenizer_name: str | None = None
    initialization: str = "normal"
    generator_hidden_size: float = 0.25
    generator_layers: float = 1.0
    embedding_size: int | None = None
    validation_file: str | None = None
    validation_split_percentage: float = 5
    max_seq_length: int = 128
    phases: tuple[Phase, ...] = ()
    mlm_probability: float | None = None
    scheme: str | None = None
    max_predictions_per_seq: int | None = None
    dupe_factor: int = 1
    text_field: str | None = None
    split_sentences: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)
    resume: bool | str = False
    plain: bool = False


@dataclass(frozen=True)
class PretrainResult:
    """What came of a run.

    Attributes:
        output_dir: where the model is.
        parameters: how many it has.
        phases: of each `max_seq_length`, `steps` and `texts`.
        before, after: scores of the held-out texts, by the names of `held_out.held_out_scores`; empty without them.
        train: `seconds` without evaluations, `steps`, `tokens`, `tokens_per_second` of this call.
    """

    output_dir: Path
    parameters: int
    phases: list[dict[str, Any]]
    before: dict[str, float]
    after: dict[str, float]
    train: dict[str, Any]

    def __str__(self) -> str:
        lines = [f"{self.parameters / 1e6:.1f} million parameters"]
        for number, phase in enumerate(self.phases, 1):
            texts = f"{phase['texts']:,} texts of up to {phase['max_seq_length']} tokens"
            lines.append(f"phase {number}: {texts}, {phase['steps']:,} steps")
        train = self.train
        lines.append(
            f"{train['steps']:,} steps, {train['tokens']:,} tokens in {train['seconds']:.1f} s: "
            f"{train['tokens_per_second']:,.0f} tokens/s"
        )
        if not self.after:
            lines.append("nothing was held out, so nothing says how good the model is: give a validation_file")
        for name in ("perplexity", "next_sentence_accuracy", "discriminator_accuracy", "discriminator_recall"):
            if name in self.after:
                values = (f"{scores[name]:,.4g}" if name in scores else "?" for scores in (self.before, self.after))
                whose = " of the generator" if name == "perplexity" and "discriminator_loss" in self.after else ""
                lines.append(f"held-out {name.replace('_', ' ')}{whose}: {' -> '.join(values)}")
        return "\n".join([*lines, f"written: {self.output_dir}"])


def pretrain(settings: PretrainSettings) -> PretrainResult:
    """Pre-train a model, from scratch or from a checkpoint.

    It leaves in `output_dir` the model and its tokenizer, as transformers loads them (of ELECTRA the discriminator, and
    the generator in `generator`), `results.json`, `metrics.jsonl` with its plot, the checkpoints, and in `data` what
    was made of text. With torchrun all processes call it, share the work and get the result.

    Raises:
        ValueError: the settings, the texts or the checkpoint are not right; the message names what.
        CheckpointError: `resume` names a checkpoint that is not whole.
    """
    import transformers

    from bert_fast.recipes._pretraining_trainer import PretrainingTrainer

    _check(settings)
    phases = settings.phases or (Phase(settings.max_seq_length, 1.0),)
    args, by_tokens = _arguments(settings, phases)
    named = settings.tokenizer_name or settings.model_name_or_path
    if named is None:
        raise ValueError("tokenizer_name is not given, and there is no model_name_or_path whose tokenizer it could be")
    tokenizer, vocabulary = resolve(named), TokenizerVocabulary.read(named)
    transformers.set_seed(args.seed)
    model = make_model(settings, vocabulary)
    _check_lengths(phases, model)
    with args.main_process_first(local=False):
        corpus = read_corpus(settings, phases, tokenizer, vocabulary)
    steps = split_steps(args.max_steps, [phase.fraction for phase in phases]) if len(phases) > 1 else []
    texts = args.per_device_train_batch_size
    budgets = [
        (args.max_tokens_per_batch, None) if by_tokens else (texts * phase.max_seq_length, texts) for phase in phases
    ]
    most = model.config.max_position_embeddings
    judged_by = corpus.options if corpus.held_out is None else corpus.held_out.manifest["options"]
    trainer = PretrainingTrainer(
        model,
        args,
        phases=corpus.phases,
        budgets=budgets,
        steps=steps,
        collate=make_collator(settings, corpus.options, vocabulary, args.seed, most),
        held_out=corpus.held_out,
        collate_held_out=make_collator(settings, judged_by, vocabulary, args.seed, most),
    )
    start = time.perf_counter()
    trainer.train(settings.resume or None)
    train = _told_of_training(trainer, time.perf_counter() - start - trainer.seconds_evaluating)
    before, after = _evaluated(trainer)
    sizes = [
        {"max_seq_length": phase.max_seq_length, "steps": count, "texts": len(part)}
        for phase, part, count in zip(phases, corpus.phases, steps or [trainer.state.max_steps], strict=True)
    ]
    described = describe(model)
    if trainer.is_world_process_zero():
        save(trainer.model, tokenizer, Path(settings.output_dir))
        results = {
            "objective": settings.objective,
            "settings": dataclasses.asdict(settings),
            **described,
            "phases": sizes,
            "held_out": {"before": before, "after": after},
            "train": train,
            "versions": versions(),
        }
        disk.write_json(Path(settings.output_dir) / RESULTS_FILE, results)
    trainer.accelerator.wait_for_everyone()
    return PretrainResult(Path(settings.output_dir), described["parameters"], sizes, before, after, train)


def _check(settings: PretrainSettings) -> None:
    if settings.objective not in PAIRS:
        raise ValueError(f"objective is {settings.objective!r}, expected one of {', '.join(PAIRS)}")
    for name in ("nsp_weight", "disc_weight"):
        if not getattr(settings, name) >= 0:
            raise ValueError(f"{name} is {getattr(settings, name)}, expected at least 0")
    if settings.config_name is not None and settings.model_name_or_path is not None:
        raise ValueError("config_name and model_name_or_path are both given, expected the one or the other")
    if (Path(settings.output_dir) / RESULTS_FILE).exists() and not settings.resume:
        raise ValueError(f"{settings.output_dir} holds a model that was pre-trained before: choose another output_dir")


def _check_lengths(phases: tuple[Phase, ...], model: Any) -> None:
    most = model.config.max_position_embeddings
    for number, phase in enumerate(phases, 1):
        if not 5 <= phase.max_seq_length <= most:
            which = f"of phase {number} " if len(phases) > 1 else ""
            raise ValueError(
                f"max_seq_length {which}is {phase.max_seq_length}, expected 5 to {most}, the max_position_embeddings "
                "of the model"
            )


def _arguments(settings: PretrainSettings, phases: tuple[Phase, ...]) -> tuple[Any, bool]:
    """`TrainingArguments`: what was given, then what suits pre-training; and whether batches are made by tokens."""
    from bert_fast.training import checkpoints

    given = settings.arguments
    if len(phases) > 1 and given.get("max_steps", -1) <= 0:
        raise ValueError(f"{len(phases)} phases share the steps of the run: give max_steps")
    judged = holds_out(settings)
    suited: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[settings.objective],
        "warmup_steps": WARMUP,
        "logging_steps": 0.02,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "eval_strategy": "steps" if judged else "no",
        "eval_steps": 0.1,
    }
    args = training_arguments(settings.output_dir, suited, given)
    args.eval_on_start = judged and not (settings.resume and checkpoints.listed(Path(settings.output_dir)))
    by_tokens = args.max_tokens_per_batch is not None
    if not by_tokens:
        longest = max(phase.max_seq_length for phase in phases)
        args.max_tokens_per_batch = args.per_device_train_batch_size * longest
    return args, by_tokens


def _told_of_training(trainer: Any, seconds: float) -> dict[str, Any]:
    tokens = trainer.throughput.total_tokens
    return {
        "seconds": seconds,
        "steps": trainer.state.global_step,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def _evaluated(trainer: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Scores of the held-out texts before the first step and after the last one."""
    if trainer.eval_dataset is None:
        return {}, {}
    history = [logs for logs in trainer.state.log_history if "eval_perplexity" in logs]
    before: dict[str, float] = next((logs for logs in history if logs["step"] == 0), {})
    after = next((logs for logs in history if logs["step"] == trainer.state.global_step), None) or trainer.evaluate()
    return _bare(before), _bare(after)


def _bare(logs: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
