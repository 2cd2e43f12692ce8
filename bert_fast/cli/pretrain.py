"""The command that pre-trains a model."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bert_fast.cli._app import TextField, command
from bert_fast.cli._arguments import (
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

MODEL = "The model"
MASKS = "What is hidden (if not given: as the shards say; for text what is shown)"
ELECTRA = "For ELECTRA"


def _option(panel: str) -> Any:
    return lambda name, help, **options: typer.Option(name, help=help, rich_help_panel=panel, **options)


_model, _mask, _electra = map(_option, (MODEL, MASKS, ELECTRA))


@command(extra_arguments=True)
def pretrain(
    context: typer.Context,
    train_file: Annotated[
        str,
        typer.Option(
            "--train_file",
            help="A folder that bert-fast data pretrain made; or text, a file or a folder: a sentence a line, a blank "
            "line between documents.",
        ),
    ],
    output_dir: OutputDir,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            help="mlm: hidden tokens. nsp: and is the second segment next (BERT)? sop: and are the two in order "
            "(ALBERT)? electra: replaced tokens.",
        ),
    ] = "mlm",
    validation_file: Annotated[
        str | None, typer.Option("--validation_file", help="Shards or text that the model is judged by.")
    ] = None,
    validation_split_percentage: Annotated[
        float,
        typer.Option(
            "--validation_split_percentage", help="Of the documents of a text that are held out, without such a file."
        ),
    ] = 5,
    text_field: TextField = None,
    split_sentences: Annotated[
        bool, typer.Option("--split_sentences", help="Lines hold several sentences: cut them by a simple rule.")
    ] = False,
    dupe_factor: Annotated[
        int, typer.Option("--dupe_factor", min=1, help="How often text is cut into examples, differently each time.")
    ] = 1,
    config_name: Annotated[
        str | None,
        _model(
            "--config_name",
            "A fresh model: tiny, mini, small, medium, base, large (Google's), electra-small, electra-base, "
            "electra-large; or a config.json.",
        ),
    ] = None,
    tokenizer_name: Annotated[
        str | None,
        _model(
            "--tokenizer_name",
            "Whose tokenizer: a folder (as bert-fast vocab train makes it), a Hub id, or demo.",
            show_default="that of the model",
        ),
    ] = None,
    model_name_or_path: Annotated[
        str | None, _model("--model_name_or_path", "Go on with a checkpoint instead: a folder, a Hub id, or demo.")
    ] = None,
    initialization: Annotated[
        str, _model("--initialization", "Of fresh weights: normal, or truncated_normal as Google's.")
    ] = "normal",
    max_steps: Annotated[
        int | None, training_option("--max_steps", "Steps of the optimiser.", min=1, show_default="by epochs")
    ] = None,
    num_train_epochs: NumTrainEpochs = 3.0,
    learning_rate: Annotated[
        float | None, training_option("--learning_rate", "The highest.", show_default="1e-4, for ELECTRA 5e-4")
    ] = None,
    per_device_train_batch_size: TrainBatchSize = 32,
    max_tokens_per_batch: Annotated[
        int | None,
        training_option("--max_tokens_per_batch", "As many texts as fit into so many tokens instead.", min=1),
    ] = None,
    max_seq_length: Annotated[int, training_option("--max_seq_length", "Tokens of a text.")] = 128,
    phase: Annotated[
        list[str] | None,
        training_option(
            "--phase",
            "A part of the run instead, of FRACTION of its steps, on FILE or the same text; as BERT's: "
            "--phase 128:0.9 --phase 512:0.1. Needs --max_steps.",
            metavar="LENGTH:FRACTION[:FILE]",
        ),
    ] = None,
    nsp_weight: Annotated[
        float, training_option("--nsp_weight", "What the second loss of nsp and sop is multiplied by.", min=0)
    ] = 1.0,
    resume_from_checkpoint: Resume = None,
    plain: Plain = False,
    mlm_probability: Annotated[
        float | None, _mask("--mlm_probability", "Part of the tokens.", show_default="0.15")
    ] = None,
    scheme: Annotated[
        str | None,
        _mask(
            "--scheme", "What is hidden together: subword, whole_word, ngram, span or entity.", show_default="subword"
        ),
    ] = None,
    max_predictions_per_seq: Annotated[
        int | None, _mask("--max_predictions_per_seq", "Tokens of a text, at most.", min=1, show_default="any number")
    ] = None,
    generator_hidden_size: Annotated[
        float, _electra("--generator_hidden_size", "Width of the generator, as a part of the discriminator's.")
    ] = 0.25,
    generator_layers: Annotated[float, _electra("--generator_layers", "Its layers, the same way.")] = 1.0,
    embedding_size: Annotated[
        int | None, _electra("--embedding_size", "Width of the shared embeddings.", min=1, show_default="the shape's")
    ] = None,
    disc_weight: Annotated[
        float, _electra("--disc_weight", "What the discriminator's loss is multiplied by.", min=0)
    ] = 50.0,
    generator_name_or_path: Annotated[
        str | None,
        _electra(
            "--generator_name_or_path",
            "Of a checkpoint to go on with.",
            show_default="the folder generator in that of the model",
        ),
    ] = None,
) -> None:
    """Pre-train a model on text, from scratch or from a checkpoint, and say how well it knows text it has not seen.

    Any option of TrainingArguments may follow, as --seed 1, --bf16 true, --gradient_accumulation_steps 8.
    With several processes: torchrun --nproc_per_node 2 -m bert_fast.cli pretrain ...
    """
    arguments = training_arguments(
        context,
        max_steps=max_steps,
        num_train_epochs=num_train_epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=per_device_train_batch_size,
        max_tokens_per_batch=max_tokens_per_batch,
    )

    from bert_fast.recipes.pretrain import Phase, PretrainSettings
    from bert_fast.recipes.pretrain import pretrain as run

    result = run(
        PretrainSettings(
            output_dir=str(output_dir),
            train_file=train_file,
            objective=objective,
            nsp_weight=nsp_weight,
            disc_weight=disc_weight,
            model_name_or_path=model_name_or_path,
            generator_name_or_path=generator_name_or_path,
            config_name=config_name,
            tokenizer_name=tokenizer_name,
            initialization=initialization,
            generator_hidden_size=generator_hidden_size,
            generator_layers=generator_layers,
            embedding_size=embedding_size,
            validation_file=validation_file,
            validation_split_percentage=validation_split_percentage,
            max_seq_length=max_seq_length,
            phases=tuple(map(Phase.parse, phase or ())),
            mlm_probability=mlm_probability,
            scheme=scheme,
            max_predictions_per_seq=max_predictions_per_seq,
            dupe_factor=dupe_factor,
            text_field=text_field,
            split_sentences=split_sentences,
            arguments=arguments,
            resume=resume(resume_from_checkpoint),
            plain=plain,
        )
    )
    print_once(result)
