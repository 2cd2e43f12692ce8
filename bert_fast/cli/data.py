"""Commands that make data of text, and say what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli._app import DATA, TextField, command


@command(into=DATA)
def pretrain(
    input: Annotated[
        list[Path],
        typer.Option(
            "--input",
            "-i",
            help="A file of text, or a folder of such files; may be given several times. One sentence a line and a "
            "blank line between documents; .jsonl: one document a line. Also compressed: .gz, .bz2, .xz, .zst.",
        ),
    ],
    tokenizer: Annotated[
        str, typer.Option(metavar="MODEL", help="Whose tokenizer: a folder, a Hub id, or demo (all-MiniLM-L6-v2).")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the shards.")],
    objective: Annotated[
        str,
        typer.Option(
            help="nsp: is the second segment next? sop: are the two in order? none: one segment, no question."
        ),
    ] = "nsp",
    masking: Annotated[
        str, typer.Option(help="static: tokens are hidden here. dynamic: in training, anew in each epoch.")
    ] = "static",
    scheme: Annotated[
        str,
        typer.Option(
            help="What is hidden together: subword, whole_word, ngram (ALBERT), span (SpanBERT), entity (ERNIE)."
        ),
    ] = "subword",
    max_seq_length: Annotated[int, typer.Option(help="Tokens of an instance, [CLS] and [SEP] included.")] = 128,
    max_predictions_per_seq: Annotated[int, typer.Option(help="Tokens to predict of an instance, at most.")] = 20,
    mlm_probability: Annotated[float, typer.Option(help="Part of the tokens to predict.")] = 0.15,
    dupe_factor: Annotated[
        int,
        typer.Option(help="How often the text is gone through, with other segments and masks; 1 will do if dynamic."),
    ] = 10,
    short_seq_prob: Annotated[
        float, typer.Option(help="Part of the documents whose instances are shorter, by a random length.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 12345,
    words: Annotated[
        str,
        typer.Option(
            help="What a word is, for all schemes but subword. tokenizer: what it cuts text into. spaces: what stands "
            "between spaces, for text that was segmented before, such as Chinese."
        ),
    ] = "tokenizer",
    entities: Annotated[
        Path | None,
        typer.Option(
            help="Names whose tokens count as one word, one a line; of a line with a tab, as bert-fast embed reads it, "
            "what stands before."
        ),
    ] = None,
    text_field: TextField = None,
    split_sentences: Annotated[
        bool, typer.Option("--split-sentences", help="Cut lines that hold several sentences, after . ! ? and a space.")
    ] = False,
    shard_tokens: Annotated[int, typer.Option(help="Tokens of the text that make a shard.")] = 1 << 23,
    num_workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes; the data do not depend on it.", show_default="all processors, fewer for little text"
        ),
    ] = None,
) -> None:
    """Make shards for pre-training of text: segments, labels and masks, as google-research/bert does.

    An interrupted run goes on where it was, by the same command; the data come out the same.
    """
    from bert_fast.data.inspect import statistics
    from bert_fast.data.instances import Options
    from bert_fast.data.shards import build

    options = Options(
        objective=objective,
        masking=masking,
        scheme=scheme,
        max_seq_length=max_seq_length,
        max_predictions_per_seq=max_predictions_per_seq,
        mlm_probability=mlm_probability,
        dupe_factor=dupe_factor,
        short_seq_prob=short_seq_prob,
        seed=seed,
        words=words,
        text_field=text_field,
        split_sentences=split_sentences,
        shard_tokens=shard_tokens,
    )
    print(statistics(output, build(input, tokenizer, output, options, entities=entities, num_workers=num_workers)))


@command(into=DATA)
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What bert-fast data pretrain wrote.")],
    num_instances: Annotated[int, typer.Option("--num-instances", "-n", min=0, help="How many are printed.")] = 3,
) -> None:
    """Print statistics of pre-training data, and some instances: hidden tokens read SEEN→TRUE."""
    from bert_fast.data.inspect import instances, statistics
    from bert_fast.data.pretraining import ShardDataset

    dataset = ShardDataset(folder)
    print(statistics(folder, dataset.manifest))
    if num_instances:
        print(f"\n{instances(dataset, num_instances)}")
