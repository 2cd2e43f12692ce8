"""From strings to vectors: `SentenceTransformer.encode` against `Embedder.encode`, on the carried model."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor

from bert_fast import Embedder
from bert_fast.benchmarking import Row, compare, measured_row, parse_case, useful_flops, using_threads
from bert_fast.folders import resolve

#: The default of both: texts per run in sentence-transformers, the token budget of the device here.
BATCH_SIZE = 32


def texts(count: int) -> list[str]:
    """`count` texts of mixed lengths, the same on every call: words of the shipped sentences, joined in random order.

    The numbers of words are three quarters of the lengths of `parse_case`'s mix: about as many tokens as those.
    """
    sentences = files("bert_fast").joinpath("data", "sentences.txt").read_text(encoding="utf-8").splitlines()
    rng = np.random.default_rng(0)
    words: list[str] = []
    result: list[str] = []
    for length in parse_case(f"mix{count}").lengths:
        size = -(-3 * length // 4)
        while len(words) < size:
            words += str(rng.choice(sentences)).split()
        result.append(" ".join(words[:size]))
        words = words[size:]
    return result


def bench_strings(
    path_or_id: str, title: str, count: int, threads: int | None, repeats: int, peak_gops: float | None = None
) -> Row:
    """Time both on `count` texts, each with its own tokenizer and its own order of batches, once the vectors agree.

    `padded_tokens` of the row is what sentence-transformers computes: it sorts the texts by length first.
    """
    folder = resolve(path_or_id)
    reference, embedder = SentenceTransformer(str(folder), device="cpu"), Embedder(folder, device="cpu")
    given = texts(count)
    lengths = sorted(embedder.tokenizer(given, embedder.max_seq_length).lengths.tolist(), reverse=True)
    batches = [lengths[start : start + BATCH_SIZE] for start in range(0, count, BATCH_SIZE)]

    def encode(model: SentenceTransformer | Embedder) -> Tensor:
        return torch.from_numpy(model.encode(given, batch_size=BATCH_SIZE, show_progress_bar=False))

    with using_threads(threads):
        timings = compare(
            {"sentence-transformers": lambda: encode(reference), "bert_fast": lambda: encode(embedder)}, repeats
        )
    return measured_row(
        timings,
        model=title,
        case=f"{count} texts",
        dtype="float32",
        tokens=sum(lengths),
        padded_tokens=sum(len(batch) * batch[0] for batch in batches),
        flops=useful_flops(embedder.model.config, lengths),
        peak_gops=peak_gops,
    )
