"""Rows of the suite as tables: a line for each case, and a line for each contender."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from benchmarks import peers
from benchmarks.peak import Peak, best
from bert_fast.benchmarking import Measured, Row, markdown_table, parse_case

SUBJECT = peers.SUBJECT.name


class TrainMeasured(TypedDict):
    """One contender of a training case; all of it for one step, on average over those that are timed."""

    dtype: str
    layout: str  # "padded", "grouped" or "packed"
    computed_tokens: float  # with the padding of the collator
    median_ms: float
    quartiles_ms: list[float]
    gflops: float  # useful, per second
    of_peak: float | None  # in its own dtype
    error: float  # of the first loss and norm of the gradient, root mean square
    activations_mb: float | None


class TrainRow(TypedDict):
    """One training case; all numbers but `steps` are of one step."""

    model: str
    task: str
    case: str
    steps: int  # timed together
    texts: int
    tokens: float
    predicted: float
    flops: float
    contenders: dict[str, TrainMeasured]


def best_peer(row: Row) -> str | None:
    """The name of the fastest contender that is not bert_fast; None if there is no other."""
    others = [name for name in row["contenders"] if name != SUBJECT]
    return min(others, key=lambda name: row["contenders"][name]["median_ms"], default=None)


def ratio_to(name: str | None, row: Row) -> float | None:
    """The time of a contender over bert_fast's: above 1 is ahead of it. None if the row does not have it."""
    contenders = row["contenders"]
    if name not in contenders:
        return None
    return contenders[name]["median_ms"] / contenders[SUBJECT]["median_ms"]


def ratio_to_best(row: Row) -> float | None:
    """The time of the best peer over bert_fast's: above 1 is ahead of all."""
    return ratio_to(best_peer(row), row)


def on_gpu(row: Row) -> bool:
    """Whether the row was measured on a GPU."""
    return row["contenders"][SUBJECT].get("host_us") is not None


def samples_per_second(row: Row, name: str = SUBJECT) -> float:
    """Sequences per second of a contender."""
    return len(parse_case(row["case"]).lengths) / (1e-3 * row["contenders"][name]["median_ms"])


def tokens_per_second(row: Row, name: str = SUBJECT) -> float:
    """Real tokens per second of a contender."""
    return row["tokens"] / (1e-3 * row["contenders"][name]["median_ms"])


def summary(rows: Sequence[Row]) -> str:
    """A line for each row: what bert_fast reaches, beside the baseline and the best peer."""
    cells, baseline = _gpu_cells if on_gpu(rows[0]) else _cpu_cells, next(iter(rows[0]["contenders"]))
    return markdown_table([cells(row, baseline) for row in rows])


def _cpu_cells(row: Row, baseline: str) -> dict[str, str]:
    peer = best_peer(row)
    best = row["contenders"][peer] if peer else None
    return {
        **_name_cells(row),
        "ms": f"{row['contenders'][SUBJECT]['median_ms']:.2f}",
        **_quality_cells(row["contenders"][SUBJECT]),
        **_ratio_cells(row, baseline),
        "its error": f"{best['error']:.0e}" if best else "",
        "its MB": _whole(best["memory_mb"]) if best else "",
    }


def _gpu_cells(row: Row, baseline: str) -> dict[str, str]:
    measured = row["contenders"][SUBJECT]
    return {**_name_cells(row), **_rate_cells(row, SUBJECT), **_gpu_costs(measured), **_ratio_cells(row, baseline)}


def _name_cells(row: Row) -> dict[str, str]:
    return {"model": row["model"], "case": row["case"], "dtype": row["dtype"]}


def _ratio_cells(row: Row, baseline: str) -> dict[str, str]:
    return {
        f"to {baseline}": _ratio(ratio_to(baseline, row)),
        "best peer": best_peer(row) or "",
        "to best": _ratio(ratio_to_best(row)),
    }


def _rate_cells(row: Row, name: str) -> dict[str, str]:
    """How fast a contender is on a GPU."""
    measured = row["contenders"][name]
    return {
        "ms": f"{measured['median_ms']:.3f}",
        "samples/s": f"{samples_per_second(row, name):.0f}",
        "tokens/s": f"{tokens_per_second(row, name):.3g}",
        "TFLOP/s": f"{1e-3 * measured['gflops']:.1f}",
        "of peak": _percent(measured["of_peak"]),
    }


def _gpu_costs(measured: Measured) -> dict[str, str]:
    return {
        "error": f"{measured['error']:.0e}",
        "MB": _whole(measured["memory_mb"]),
        "host": _whole(measured.get("host_us")),
        "latency": _whole(measured.get("latency_us")),
    }


def details(rows: Sequence[Row]) -> str:
    """A line for each contender of each row."""
    gpu = on_gpu(rows[0])
    return markdown_table(
        [
            {
                **_name_cells(row),
                "tokens": str(row["tokens"]),
                "padded": str(row["padded_tokens"]),
                "contender": name,
                **(_rate_cells(row, name) if gpu else {"ms": f"{measured['median_ms']:.2f}"}),
                "quartiles": "-".join(f"{quartile:.{3 if gpu else 2}f}" for quartile in measured["quartiles_ms"]),
                "ratio": f"{measured['ratio']:.2f}x",
                "to best": _ratio(ratio_to_best(row)) if name == SUBJECT else "",
                **(_gpu_costs(measured) if gpu else _quality_cells(measured)),
                "cosine": f"{measured['cosine']:.5f}",
                "build MB": _whole(measured["build_memory_mb"]),
            }
            for row in rows
            for name, measured in row["contenders"].items()
        ]
    )


def kernel_table(rows: Sequence[Row], peak: Peak) -> str:
    """A line for each contender of each kernel: its rates, under the limits of the machine."""
    return markdown_table(
        [
            {
                "kernel": row["model"],
                "case": row["case"],
                "dtype": row["dtype"],
                "contender": name,
                "us": f"{1e3 * measured['median_ms']:.1f}",
                "TFLOP/s": f"{1e-3 * measured['gflops']:.1f}" if row["flops"] else "",
                "of peak": _percent(measured["of_peak"]) if row["flops"] else "",
                "TB/s": f"{bytes_per_second(row, name) * 1e-12:.2f}",
                "of copy": _percent(bytes_per_second(row, name) * 1e-9 / peak["copy_gbs"]),
                "limit": limit(row, peak)[0],
                "of limit": _percent(limit(row, peak)[1] / (1e-3 * measured["median_ms"])),
                "ratio": f"{measured['ratio']:.2f}x",
                "error": f"{measured['error']:.0e}",
            }
            for row in rows
            for name, measured in row["contenders"].items()
        ]
    )


def bytes_per_second(row: Row, name: str = SUBJECT) -> float:
    """Bytes that must be read and written, per second of a contender."""
    return row["bytes"] / (1e-3 * row["contenders"][name]["median_ms"])


def limit(row: Row, peak: Peak) -> tuple[str, float]:
    """What takes longest at the machine's own rates, "products" or "copy", and how long, in seconds."""
    copy, rate = row["bytes"] / (1e9 * peak["copy_gbs"]), best(peak, row["dtype"])
    products = row["flops"] / (1e9 * rate) if rate else 0.0
    return ("products", products) if products > copy else ("copy", copy)


def _quality_cells(measured: Measured) -> dict[str, str]:
    return {
        "GFLOP/s": f"{measured['gflops']:.0f}",
        "of peak": _percent(measured["of_peak"]),
        "error": f"{measured['error']:.0e}",
        "MB": _whole(measured["memory_mb"]),
    }


def training_peer(row: TrainRow, layout: str) -> str | None:
    """The faster of transformers with and without torch.compile, on batches of this layout; None without both."""
    names = [name for name, measured in row["contenders"].items() if measured["layout"] == layout]
    peers_ms = {n: row["contenders"][n]["median_ms"] for n in names if not n.startswith(SUBJECT)}
    return min(peers_ms, key=lambda name: peers_ms[name], default=None)


def training_ratio(row: TrainRow, name: str, layout: str = "padded") -> float | None:
    """The time of the best peer on batches of this layout over that of a contender; None without one of them."""
    peer = training_peer(row, layout)
    if peer is None or name not in row["contenders"]:
        return None
    return row["contenders"][peer]["median_ms"] / row["contenders"][name]["median_ms"]


def activations_ratio(row: TrainRow, name: str) -> float | None:
    """What a step of a contender holds, over what one of the best peer does on padded batches."""
    peer = training_peer(row, "padded")
    if peer is None or name not in row["contenders"]:
        return None
    ours, theirs = (row["contenders"][n]["activations_mb"] for n in (name, peer))
    return ours / theirs if ours is not None and theirs else None


def training_tokens_per_second(row: TrainRow, name: str = SUBJECT) -> float:
    """Real tokens per second of a contender's steps."""
    return row["tokens"] / (1e-3 * row["contenders"][name]["median_ms"])


def training_table(rows: Sequence[TrainRow]) -> str:
    """A line for each contender of each case."""
    return markdown_table(
        [
            {
                "model": row["model"],
                "task": row["task"],
                "case": row["case"],
                "contender": name,
                "dtype": measured["dtype"],
                "fill": _percent(row["tokens"] / measured["computed_tokens"]),
                "ms": f"{measured['median_ms']:.1f}",
                "quartiles": "-".join(f"{quartile:.1f}" for quartile in measured["quartiles_ms"]),
                "tokens/s": f"{training_tokens_per_second(row, name):.0f}",
                "GFLOP/s": f"{measured['gflops']:.0f}",
                "of peak": _percent(measured["of_peak"]),
                "MB": _whole(measured["activations_mb"]),
                "error": f"{measured['error']:.0e}",
                "to padded": _ratio(training_ratio(row, name)),
                "to grouped": _ratio(training_ratio(row, name, "grouped")),
                "of its MB": _percent(activations_ratio(row, name)),
            }
            for row in rows
            for name, measured in row["contenders"].items()
        ]
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"
