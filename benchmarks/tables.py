"""Rows of the suite as tables: a line for each case, and a line for each contender."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import peers
from bert_fast.benchmarking import Measured, Row, markdown_table

SUBJECT = peers.SUBJECT.name


def best_peer(row: Row) -> str:
    """The name of the fastest contender that is not bert_fast."""
    others = [name for name in row["contenders"] if name != SUBJECT]
    return min(others, key=lambda name: row["contenders"][name]["median_ms"])


def ratio_to_best(row: Row) -> float:
    """The time of the best peer over bert_fast's: above 1 is ahead of all."""
    contenders = row["contenders"]
    return contenders[best_peer(row)]["median_ms"] / contenders[SUBJECT]["median_ms"]


def summary(rows: Sequence[Row]) -> str:
    """A line for each row: what bert_fast reaches, beside the baseline and the best peer."""
    return markdown_table([_summary_cells(row) for row in rows])


def _summary_cells(row: Row) -> dict[str, str]:
    measured, best = row["contenders"][SUBJECT], row["contenders"][best_peer(row)]
    baseline = next(iter(row["contenders"]))
    return {
        "model": row["model"],
        "case": row["case"],
        "dtype": row["dtype"],
        "ms": f"{measured['median_ms']:.2f}",
        **_quality_cells(measured),
        f"to {baseline}": f"{measured['ratio']:.2f}x",
        "best peer": best_peer(row),
        "to best": f"{ratio_to_best(row):.2f}x",
        "its error": f"{best['error']:.0e}",
        "its MB": _megabytes(best["memory_mb"]),
    }


def details(rows: Sequence[Row]) -> str:
    """A line for each contender of each row."""
    return markdown_table(
        [
            {
                "model": row["model"],
                "case": row["case"],
                "dtype": row["dtype"],
                "tokens": str(row["tokens"]),
                "padded": str(row["padded_tokens"]),
                "contender": name,
                "ms": f"{measured['median_ms']:.2f}",
                "quartiles": "-".join(f"{quartile:.2f}" for quartile in measured["quartiles_ms"]),
                "ratio": f"{measured['ratio']:.2f}x",
                "to best": f"{ratio_to_best(row):.2f}x" if name == SUBJECT else "",
                **_quality_cells(measured),
                "cosine": f"{measured['cosine']:.5f}",
                "build MB": _megabytes(measured["build_memory_mb"]),
            }
            for row in rows
            for name, measured in row["contenders"].items()
        ]
    )


def _quality_cells(measured: Measured) -> dict[str, str]:
    return {
        "GFLOP/s": f"{measured['gflops']:.0f}",
        "of peak": "" if measured["of_peak"] is None else f"{measured['of_peak']:.0%}",
        "error": f"{measured['error']:.0e}",
        "MB": _megabytes(measured["memory_mb"]),
    }


def _megabytes(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
