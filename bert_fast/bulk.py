"""Texts from files, vectors to files, and search over them: what the command line does with an `Embedder`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torch import Tensor

from bert_fast.disk import written_at_once
from bert_fast.embedder import Embedder
from bert_fast.lines import decoded, json_text
from bert_fast.terminal import fitted, progress_bar
from bert_fast.transfer import to_host

STDIN = "-"


def read_texts(path: str, text_field: str | None = None) -> Iterator[str]:
    """The texts of a file, one a line, UTF-8; `-` is stdin.

    Args:
        path: of a text file, or of JSON lines if it ends in `.jsonl`.
        text_field: key of the text in JSON lines; "text" when not given. Given, it makes any file JSON lines.

    Raises:
        ValueError: a line is not UTF-8, not a JSON object, or has no such text; the message gives its number.
        OSError: the file cannot be read.
    """
    as_json = text_field is not None or path.endswith(".jsonl")
    if path == STDIN and sys.stdin is None:
        raise OSError("stdin is closed")
    with nullcontext(sys.stdin.buffer) if path == STDIN else open(path, "rb") as lines:
        for where, text in decoded(lines, "stdin" if path == STDIN else path):
            yield json_text(text, text_field or "text", where) if as_json else text


class Summary(NamedTuple):
    """What `embed_file` did."""

    output: Path
    num_texts: int
    dimension: int
    num_tokens: int
    num_unknown: int
    num_truncated: int
    max_seq_length: int
    seconds: float

    def __str__(self) -> str:
        limit = f"{self.max_seq_length} tokens"
        tokens = f"{self.num_tokens:,} tokens" + (f", {self.num_unknown:,} of them [UNK]," if self.num_unknown else "")
        cut = f"cut at {limit}: {self.num_truncated:,} of {self.num_texts:,} texts"
        return (
            f"{self.output}: {self.num_texts:,} vectors of {self.dimension} float32\n"
            f"{tokens} in {self.seconds:.2f} s, {self.num_tokens / self.seconds:,.0f} tokens/s; "
            + (cut if self.num_truncated else f"no text has more than {limit}")
        )


def embed_file(
    model: str,
    source: str,
    output: Path,
    *,
    text_field: str | None = None,
    batch_size: int = 32,
    normalize: bool = False,
    unknown: str = "unk",
    entities: Mapping[str, str] | None = None,
    dtype: str | None = None,
    precision: str | None = None,
    device: str | None = None,
) -> Summary:
    """Write the vectors of the texts of `source` to `output`, a .npy file that appears whole or not at all.

    Memory does not grow with the number of texts; `numpy.load(output, mmap_mode="r")` reads the vectors likewise.

    Raises:
        ValueError: there is no text, or the model or a line cannot be read.
        OSError: a file cannot be read or written.
    """
    if not output.parent.is_dir():
        raise ValueError(f"there is no folder {output.parent} for the output")
    if output.exists():
        if not output.is_file():
            kind = "a folder" if output.is_dir() else "a device or a pipe"
            raise ValueError(f"{output} is {kind}, expected the name of a file")
        if source != STDIN and output.samefile(source):
            raise ValueError(f"{output} is the input too; the vectors would replace the texts")
    texts = read_texts(source, text_field)
    first = next(texts, None)  # a source that cannot be read is found before a model is loaded
    if first is None:
        raise ValueError(f"{'stdin' if source == STDIN else source} is empty: there is nothing to embed")
    with written_at_once(output) as file:  # from here on: a place that cannot be written is found before the work
        embedder = Embedder(model, dtype=dtype, precision=precision, device=device, unknown=unknown, entities=entities)
        started = time.perf_counter()
        num_texts, num_tokens, num_unknown, num_truncated = 0, 0, 0, 0
        _write_header(file, num_texts, embedder.dimension)
        with progress_bar() as progress:
            stream = embedder.encode_stream(
                _chain(first, texts), batch_size=batch_size, normalize_embeddings=normalize, progress=progress.update
            )
            for tokens, vectors in to_host(stream):
                file.write(vectors)
                num_texts += len(vectors)
                num_tokens += len(tokens.input_ids)
                num_unknown += tokens.num_unknown
                num_truncated += tokens.num_truncated
        file.seek(0)
        _write_header(file, num_texts, embedder.dimension)
        seconds = time.perf_counter() - started
    limit = embedder.max_seq_length
    return Summary(output, num_texts, embedder.dimension, num_tokens, num_unknown, num_truncated, limit, seconds)


def _write_header(file: IO[bytes], num_rows: int, width: int) -> None:
    """That of a .npy file of float32; numpy leaves it room, so that one of more rows is as long."""
    array = {"descr": np.dtype(np.float32).str, "fortran_order": False, "shape": (num_rows, width)}
    np.lib.format.write_array_header_1_0(file, array)


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def nearest(
    embedder: Embedder, corpus: Sequence[str], queries: Sequence[str], top_k: int, batch_size: int = 32
) -> list[list[tuple[float, int]]]:
    """For each query, cosine and index of the texts nearest to it, best first, at most `top_k`.

    The folder's prompts `query` and `document` are put before the texts where it has them.
    """

    def encode(texts: Sequence[str], kind: str) -> Tensor:
        prompt_name = kind if kind in embedder.recipe.prompts else None
        return embedder.encode(texts, prompt_name=prompt_name, batch_size=batch_size, convert_to_tensor=True)

    scores = embedder.similarity(encode(queries, "query"), encode(corpus, "document"))
    best = scores.topk(min(top_k, len(corpus)), dim=1)
    return [
        list(zip(values, indices, strict=True))
        for values, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def format_hits(
    queries: Sequence[str],
    hits: Sequence[Sequence[tuple[float, int]]],
    lines: Sequence[tuple[int, str]],
    width: int | None = None,
) -> str:
    """The results of `nearest` as tables of score, line number and text, cut to `width` columns if given."""
    blocks = []
    for query, found in zip(queries, hits, strict=True):
        rows = [f"{query}", "  score   line  text"]
        rows += [f"  {score:5.3f} {lines[index][0]:>6}  {lines[index][1]}" for score, index in found]
        blocks.append("\n".join(fitted(row, width) for row in rows))
    return "\n\n".join(blocks)
