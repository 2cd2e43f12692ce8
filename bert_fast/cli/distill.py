"""The command that makes a smaller model of a fine-tuned one."""

from __future__ import annotations

from typing import Annotated

import typer

from bert_fast.cli._app import command
from bert_fast.cli._arguments import (
    LearningRate,
    MaxEvalSamples,
    MaxTrainSamples,
    NumTrainEpochs,
    OutputDir,
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

STUDENT = "The student (one of these)"
LOSS = "What it learns"


@command(extra_arguments=True)
def distill(
    context: typer.Context,
    teacher: Annotated[str, typer.Option("--teacher", help="The folder that bert-fast finetune left.")],
    output_dir: OutputDir,
    train_file: Annotated[
        str | None, typer.Option("--train_file", help="What the teacher says is learnt on these examples.")
    ] = None,
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="What both are scored on; the best epoch is kept.")
    ] = None,
    test_file: TestFile = None,
    data_dir: DataDir = None,
    text_column: TextColumn = None,
    text_pair_column: PairColumn = None,
    label_column: LabelColumn = None,
    column: Column = None,
    read_option: ReadOption = None,
    student_layers: Annotated[
        int | None,
        typer.Option("--student_layers", help="So many of the teacher's layers, copied.", rich_help_panel=STUDENT),
    ] = None,
    student_config: Annotated[
        str | None,
        typer.Option(
            "--student_config",
            help="A config.json of its shape, at most the teacher's; starts from parts of the teacher's weights.",
            rich_help_panel=STUDENT,
        ),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option("--student", help="A trained model with the teacher's vocabulary.", rich_help_panel=STUDENT),
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="The training file has no labels, or they are not to be used.")
    ] = False,
    logits_weight: Annotated[
        float, typer.Option("--logits_weight", help="Of what the teacher answers.", rich_help_panel=LOSS)
    ] = 1.0,
    labels_weight: Annotated[
        float, typer.Option("--labels_weight", help="Of the labels of the file.", rich_help_panel=LOSS)
    ] = 0.5,
    hidden_weight: Annotated[
        float, typer.Option("--hidden_weight", help="Of the teacher's hidden states.", rich_help_panel=LOSS)
    ] = 0.0,
    attention_weight: Annotated[
        float,
        typer.Option(
            "--attention_weight", help="Of how the teacher's tokens relate to each other.", rich_help_panel=LOSS
        ),
    ] = 0.0,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Above 1: more of the answers not given.", rich_help_panel=LOSS)
    ] = 2.0,
    teacher_precision: Annotated[
        str | None,
        training_option(
            "--teacher_precision",
            "What the teacher computes in: fp32, bf16, int8.",
            show_default="that of its weights",
        ),
    ] = None,
    num_train_epochs: NumTrainEpochs = 3.0,
    learning_rate: LearningRate = 5e-5,
    per_device_train_batch_size: TrainBatchSize = 32,
    max_train_samples: MaxTrainSamples = None,
    max_eval_samples: MaxEvalSamples = None,
    resume_from_checkpoint: Resume = None,
) -> None:
    """Train a smaller student on what a fine-tuned teacher says; print what that costs and gains.

    Any option of TrainingArguments may follow, as --seed 1, --bf16 true, --max_tokens_per_batch 4096.
    """
    arguments = training_arguments(
        context,
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
    )

    from bert_fast.recipes.distill import DistillSettings
    from bert_fast.recipes.distill import distill as run

    result = run(
        DistillSettings(
            teacher=teacher,
            output_dir=str(output_dir),
            student_layers=student_layers,
            student_config=student_config,
            student=student,
            train_file=train_file,
            validation_file=validation_file,
            test_file=test_file,
            data_dir=data_dir,
            columns=read_columns(text_column, text_pair_column, label_column, column),
            read_options=read_options("--read_option", read_option),
            unlabelled=unlabelled,
            logits_weight=logits_weight,
            labels_weight=labels_weight,
            hidden_weight=hidden_weight,
            attention_weight=attention_weight,
            temperature=temperature,
            teacher_precision=teacher_precision,
            arguments=arguments,
            max_train_samples=max_train_samples,
            max_eval_samples=max_eval_samples,
            resume=resume(resume_from_checkpoint),
        )
    )
    print_once(result)
