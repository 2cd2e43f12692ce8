"""`make demo`: the main job on real weights, in half a minute: vectors, search, proof, speed."""

from __future__ import annotations

import time
import warnings

from bert_fast.benchmarking import bench_model, format_table
from bert_fast.bulk import format_hits, nearest
from bert_fast.embedder import Embedder
from bert_fast.folders import DEMO
from bert_fast.verify import shipped_sentences, verify

QUERIES = (
    "Why do programs with several threads stop responding?",
    "how far away are the stars",
    "keeping vegetables healthy without chemicals",
    "a piece of music that nobody can forget",
)

TOP_K = 3

CASES = ("1x16", "32x128", "mix32")


def main() -> int:
    """Run the demonstration; 1 if the parity report fails."""
    from transformers.utils.logging import disable_progress_bar

    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}")
    sentences = shipped_sentences()
    embedder = Embedder(DEMO)
    _title(f"1. {len(sentences)} sentences to vectors (all-MiniLM-L6-v2)")
    embedder.encode(sentences[:32])  # the first run also loads the kernels
    started = time.perf_counter()
    vectors = embedder.encode(sentences)
    seconds = time.perf_counter() - started
    print(f"{len(vectors)} vectors of {embedder.dimension} in {seconds:.2f} s, {len(vectors) / seconds:.0f} a second")

    _title("2. The nearest sentences to four queries")
    lines = list(enumerate(sentences, 1))
    print(format_hits(QUERIES, nearest(embedder, sentences, QUERIES, TOP_K), lines, width=110))

    _title("3. Is it right? Every layer against the plain definition in float64")
    report = verify(DEMO)
    print(report)

    _title("4. Is it fast? Against transformers (SDPA), the same weights, side by side")
    disable_progress_bar()  # transformers' own, while it loads
    print(format_table(bench_model(DEMO, CASES)))
    print("\nmix32 is 32 texts of mixed lengths, as real ones are; a ratio above 1 is faster.")
    return 0 if report.passed else 1


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


if __name__ == "__main__":
    raise SystemExit(main())
