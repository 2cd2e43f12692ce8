"""Commands around a fine-tuned model: make one, score it, let it speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from bert_fast.cli._app import Device, Precision, command
from bert_fast.cli._arguments import (
    Checkpoint,
    LearningRate,
    MaxEvalSamples,
    MaxTrainSamples,
    NumTrainEpochs,
    OutputDir,
    Plain,
    Resume,
    TrainBatchSize,
    print_once,
    resume,
    training_arguments,
    training_option,
)
from bert_fast.cli._files import (
    Column,
    DataDir,
    LabelColumn,
    PairColumn,
    ReadOption,
    TestFile,
    TextColumn,
    read_columns,
    read_options,
)

KINDS = "For some kinds of tasks (default: the data set's, or as published)"

FineTunedModel = Annotated[str, typer.Argument(metavar="MODEL", help="A folder that bert-fast finetune left.")]
Split = Annotated[str, typer.Option(help="Which part, where FILE is the folder of a data set.")]
FilesOf = Annotated[
    str | None,
    typer.Option(
        "--task_name",
        help="The data set that FILE is of, if another: ax for a model of mnli.",
        show_default="that of the model",
    ),
]


def _kind(name: str, help: str, **options: Any) -> Any:
    return typer.Option(name, help=help, rich_help_panel=KINDS, **options)


@command(extra_arguments=True)
def finetune(
    context: typer.Context,
    model_name_or_path: Checkpoint,
    task_name: Annotated[
        str,
        typer.Option(
            "--task_name",
            help="classification, tokens, question_answering, multiple_choice or embeddings, for files of your own; or "
            "a data set: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, squad, squad_v2, conll2003, swag, imdb.",
        ),
    ],
    output_dir: OutputDir,
    train_file: Annotated[
        str | None, typer.Option("--train_file", help="What is learnt from: csv, tsv, jsonl, json, parquet, txt.")
    ] = None,
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="What it is scored on; the best epoch is kept.")
    ] = None,
    test_file: TestFile = None,
    data_dir: DataDir = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    column: Column = None,
    read_option: ReadOption = None,
    num_train_epochs: NumTrainEpochs = 3.0,
    learning_rate: LearningRate = 5e-5,
    per_device_train_batch_size: TrainBatchSize = 32,
    max_seq_length: Annotated[
        int | None,
        training_option(
            "--max_seq_length", "Tokens of a text; longer ones are cut.", show_default="128, or the data set's"
        ),
    ] = None,
    early_stopping_patience: Annotated[
        int | None, training_option("--early_stopping_patience", "End after so many evaluations without gain.", min=1)
    ] = None,
    max_train_samples: MaxTrainSamples = None,
    max_eval_samples: MaxEvalSamples = None,
    resume_from_checkpoint: Resume = None,
    plain: Plain = False,
    problem: Annotated[
        str | None, _kind("--problem", "Classification: single, multi (several labels), regression.")
    ] = None,
    label_all_tokens: Annotated[
        bool | None, _kind("--label_all_tokens", "Tokens: train on all sub-words of a word.")
    ] = None,
    return_entity_level_metrics: Annotated[
        bool | None, _kind("--return_entity_level_metrics", "Tokens: also score each type of entity.")
    ] = None,
    doc_stride: Annotated[int | None, _kind("--doc_stride", "Questions: tokens from window to window.")] = None,
    max_query_length: Annotated[int | None, _kind("--max_query_length", "Questions: tokens of a question.")] = None,
    max_answer_length: Annotated[int | None, _kind("--max_answer_length", "Questions: tokens of an answer.")] = None,
    n_best_size: Annotated[int | None, _kind("--n_best_size", "Questions: answers that are considered.")] = None,
    version_2_with_negative: Annotated[
        bool | None, _kind("--version_2_with_negative", "Questions: there may be no answer.")
    ] = None,
    null_score_diff_threshold: Annotated[
        float | None, _kind("--null_score_diff_threshold", "Questions: how likely no answer must be.")
    ] = None,
    task_option: Annotated[
        list[str] | None,
        _kind(
            "--task_option", "Any other of the task, as loss=triplet; may be given several times.", metavar="NAME=VALUE"
        ),
    ] = None,
) -> None:
    """Fine-tune a checkpoint on labelled files, and score it.

    Any option of TrainingArguments may follow, as --seed 1, --bf16 true, --max_tokens_per_batch 4096, --freeze encoder.
    With several processes: torchrun --nproc_per_node 2 -m bert_fast.cli finetune ...
    """
    arguments = training_arguments(
        context,
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
    )
    options = {
        "max_seq_length": max_seq_length,
        "problem": problem,
        "label_all_tokens": label_all_tokens,
        "return_entity_level_metrics": return_entity_level_metrics,
        "doc_stride": doc_stride,
        "max_query_length": max_query_length,
        "max_answer_length": max_answer_length,
        "n_best_size": n_best_size,
        "version_2_with_negative": version_2_with_negative,
        "null_score_diff_threshold": null_score_diff_threshold,
    }
    given = {name: value for name, value in options.items() if value is not None}

    from bert_fast.recipes.finetune import FinetuneSettings
    from bert_fast.recipes.finetune import finetune as run

    result = run(
        FinetuneSettings(
            model_name_or_path=model_name_or_path,
            task=task_name,
            output_dir=str(output_dir),
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            data_dir=data_dir,
            columns=read_columns(text_column, text_pair_column, label_column, column),
            read_options=read_options("--read_option", read_option),
            task_options=given | read_options("--task_option", task_option),
            arguments=arguments,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            early_stopping_patience=early_stopping_patience,
            resume=resume(resume_from_checkpoint),
            plain=plain,
        )
    )
    print_once(result)


@command()
def evaluate(
    model: FineTunedModel,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file with labels, or the folder of a data set.")],
    split: Split = "validation",
    task_name: FilesOf = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write what is said of each example: .jsonl, .csv or .tsv."),
    ] = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    column: Column = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Score a fine-tuned model on a file with labels."""
    from bert_fast.recipes import predict as recipe
    from bert_fast.recipes.finetune import table

    columns = read_columns(text_column, text_pair_column, label_column, column)
    tuned = recipe.load(model, device=device, precision=precision)
    tuned = tuned if task_name is None else recipe.of_data(tuned, task_name)
    metrics, part = recipe.evaluate(tuned, file, split=split, columns=columns, output=output)
    print(f"{len(part.examples)} examples{_notes(part)}")
    print(table({split: metrics}))


@command()
def predict(
    model: FineTunedModel,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file, with labels or without, or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to: .jsonl, .csv or .tsv.")],
    split: Split = "test",
    task_name: FilesOf = None,
    submission: Annotated[
        Path | None, typer.Option(help="Also a folder for the files that the data set's benchmark takes.")
    ] = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    column: Column = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Write what a fine-tuned model says of each example of a file."""
    from bert_fast.recipes import predict as recipe

    columns = read_columns(text_column, text_pair_column, None, column)
    tuned = recipe.load(model, device=device, precision=precision)
    tuned = tuned if task_name is None else recipe.of_data(tuned, task_name)
    part, files = recipe.predict(tuned, file, output, split=split, columns=columns, submission=submission)
    print(f"{output}: {len(part.examples)} examples{_notes(part)}")
    for path in files:
        print(path)


def _notes(part: Any) -> str:
    """What was cut and what was left out of a file."""
    cut = [f"{part.features.num_truncated} cut at max_seq_length"] if part.features.num_truncated else []
    return "".join(f"; {note}" for note in [*cut, *(f"{n} skipped: {why}" for why, n in part.skipped.items())])
