"""Commands that run a model or say what it is: vectors, search, proofs, times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from bert_fast.cli._app import BatchSize, Device, Dtype, Entities, Model, Precision, TextField, command


@command()
def embed(
    model: Model,
    input: Annotated[str, typer.Option("--input", "-i", help="One text a line, or JSON lines; - is stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the vectors go, as a NumPy .npy file.")],
    text_field: TextField = None,
    batch_size: BatchSize = 32,
    normalize: Annotated[
        bool, typer.Option("--normalize/--no-normalize", help="Scale the vectors to length 1, if the model does not.")
    ] = False,
    unknown: Annotated[
        str, typer.Option(help="Words without pieces in the vocabulary: unk, or characters to spell them.")
    ] = "unk",
    entities: Entities = None,
    dtype: Dtype = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Write the vectors of the texts in a file: row i is line i."""
    from bert_fast.bulk import embed_file
    from bert_fast.ladder import read_entities

    summary = embed_file(
        model,
        input,
        output,
        text_field=text_field,
        batch_size=batch_size,
        normalize=normalize,
        unknown=unknown,
        entities=None if entities is None else read_entities(entities),
        dtype=dtype,
        precision=precision,
        device=device,
    )
    print(summary)


@command()
def search(
    model: Model,
    corpus: Annotated[str, typer.Option("--corpus", "-c", help="One text a line, or JSON lines; - is stdin.")],
    query: Annotated[list[str], typer.Option("--query", "-q", help="What to look for; may be given several times.")],
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Results per query.")] = 5,
    text_field: TextField = None,
    batch_size: BatchSize = 32,
    dtype: Dtype = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Print the lines of a file that are nearest in meaning to each query."""
    from bert_fast.bulk import format_hits, nearest, read_texts
    from bert_fast.embedder import Embedder
    from bert_fast.terminal import columns

    lines = [(number, text) for number, text in enumerate(read_texts(corpus, text_field), 1) if text.strip()]
    if not lines:
        raise ValueError(f"{corpus} holds no text to search")
    embedder = Embedder(model, dtype=dtype, precision=precision, device=device)
    hits = nearest(embedder, [text for _, text in lines], query, top_k, batch_size)
    print(format_hits(query, hits, lines, columns()))


@command()
def verify(
    model: Model,
    input: Annotated[
        str | None,
        typer.Option("--input", "-i", help="Texts to run, one a line.", show_default="sentences of the package"),
    ] = None,
    dtype: Dtype = None,
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Compare every layer with the plain definition in float64; exit 1 if the fast error is out of bounds."""
    from bert_fast.bulk import read_texts
    from bert_fast.verify import verify

    texts = None if input is None else list(read_texts(input))
    report = verify(model, texts, dtype=dtype, precision=precision, device=device)
    print(report)
    if not report.passed:
        raise typer.Exit(1)


@command()
def info(model: Model) -> None:
    """Say what a checkpoint is: its shape, size, pooling, tokenizer and files."""
    from bert_fast.info import describe

    print(describe(model))


@command()
def doctor() -> None:
    """Say what this machine has, which implementation each op runs, and why the others were refused."""
    from bert_fast.doctor import diagnose

    print(diagnose())


@command()
def bench(
    model: Model = "demo",
    case: Annotated[
        list[str],
        typer.Option("--case", help="32x128 is 32 texts of 128 tokens, mix32 is 32 of mixed lengths."),
    ] = ["1x16", "32x128", "mix32"],  # noqa: B006
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="as torch has them")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Samples of each contender.")] = 7,
) -> None:
    """Time a checkpoint against transformers (SDPA), side by side, on the CPU."""
    from bert_fast.benchmarking import bench_model, format_table
    from bert_fast.timing import WrongAnswerError

    try:
        print(format_table(bench_model(model, case, dtype, threads, repeats)))
    except WrongAnswerError as error:
        print(f"bert-fast: not timed, the answers differ: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


@command()
def tune(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="A folder, a Hub id or demo, whose shapes are measured.",
            show_default="MiniLM, BERT-base and BERT-large",
        ),
    ] = None,
    dtype: Annotated[list[str], typer.Option(help="float16 or bfloat16; may be given twice.")] = [  # noqa: B006
        "float16",
        "bfloat16",
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the table.", show_default="the user's cache")
    ] = None,
) -> None:
    """Measure, on this machine's GPU, which way each product is the fastest, for all later runs."""
    from bert_fast.timing import WrongAnswerError
    from bert_fast.tuning import tune

    try:
        print(f"written: {tune(model or (), dtype, output)}")
    except WrongAnswerError as error:
        print(f"bert-fast: not timed, the answers differ: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
