"""How a run is doing: its speed, a line on the terminal, a file of measurements and a plot of them."""

from __future__ import annotations

import importlib.util
import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, TrainerCallback

from bert_fast.timing import Call, compare

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "metrics.svg"

#: What the terminal shows of a log, in this order: name in the log, short name, format.
SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("eval_loss", "eval loss", "{:.4f}"),
    ("eval_perplexity", "perplexity", "{:,.1f}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "gradient", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("gflops_per_second", "GFLOP/s", "{:,.1f}"),
    ("fraction_of_peak", "of peak", "{:.0%}"),
    ("skipped_steps", "skipped steps", "{:d}"),
)

#: What the plot shows, one panel each: title, names in the log.
PANELS = (
    ("loss", ("loss", "eval_loss")),
    ("norm of the gradient", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("tokens per second", ("tokens_per_second",)),
)


class Throughput:
    """Work done per second of training; evaluation and saving do not count.

    Args:
        peak_gflops: what all devices together can do, in 10^9 floating-point operations per second; None if unknown.

    Attributes:
        total_tokens: real tokens since it was made.
    """

    def __init__(self, peak_gflops: float | None) -> None:
        self.peak_gflops = peak_gflops
        self.total_tokens = 0
        self.restart()

    def restart(self) -> None:
        """Begin anew, now."""
        self._start, self._tokens, self._flops = time.perf_counter(), 0, 0

    def count(self, tokens: int, flops: int) -> None:
        """Add work that was done: real tokens, and useful floating-point operations."""
        self._tokens += tokens
        self.total_tokens += tokens
        self._flops += flops

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time that passes inside."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def read(self) -> dict[str, float]:
        """Rates since the last reading, by their names in the log; what is not known is left out."""
        seconds, rates = time.perf_counter() - self._start, {}
        if self._tokens:
            rates["tokens_per_second"] = self._tokens / seconds
        if self._flops:
            rates["gflops_per_second"] = self._flops / seconds * 1e-9
            if self.peak_gflops:
                rates["fraction_of_peak"] = rates["gflops_per_second"] / self.peak_gflops
        self.restart()
        return rates


def measured_peak(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """10^9 floating-point operations per second of a matrix product of size x size random numbers.

    The peak of a GPU for practical purposes. On a CPU torch's products may stay far below it: `benchmarks/peak.py`
    measures that with instructions.
    """
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = compare({"product": Call(partial(torch.matmul, a, b), device.type)})["product"]
    return 2 * size**3 / min(timing.samples) * 1e-9


def describe(logs: Mapping[str, Any]) -> str:
    """A log as one line for people: what `SHOWN` names of it, or all of it where it has none of that."""
    shown = [f"{title} {form.format(logs[name])}" for name, title, form in SHOWN if logs.get(name)]
    return " · ".join(
        shown
        or [
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in logs.items()
            if name != "epoch"  # the line begins with it
        ]
    )


class Progress(ProgressCallback):
    """A bar with the time left, and a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write a line above the bar."""
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(f"step {state.global_step:>6} · epoch {state.epoch:.2f} · {describe(logs)}")


class MetricsFile(TrainerCallback):
    """Appends each log to `metrics.jsonl` in the output folder, and may plot the file when the run ends.

    A line is a JSON object: `step`, `epoch`, and what is logged. A run that is resumed first cuts what came after the
    checkpoint, and a line that was not finished, so that each step is there once.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the file to what the checkpoint knows."""
        if state.is_world_process_zero:
            cut(Path(args.output_dir) / METRICS_FILE, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append a line."""
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS_FILE).open("a", encoding="utf-8") as file:
                line = {name: value if _is_finite(value) else None for name, value in logs.items()}
                file.write(json.dumps({"step": state.global_step, **line}) + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draw the plot."""
        file = Path(args.output_dir) / METRICS_FILE
        if not (args.plot_metrics and state.is_world_process_zero and file.exists()):
            return
        if importlib.util.find_spec("matplotlib") is None:
            warnings.warn(f"{PLOT_FILE} is not drawn: matplotlib is not installed", stacklevel=2)
        else:
            plot(read(file), file.with_name(PLOT_FILE))


def _is_finite(value: Any) -> bool:
    """JSON has no NaN and no infinity."""
    return not isinstance(value, float) or math.isfinite(value)


def cut(file: Path, step: int) -> None:
    """Leave the lines of steps up to this one, as far as they are whole; none for step 0, where a run begins."""
    if not file.exists():
        return
    end = 0
    with file.open("rb+") as stream:
        for line in stream:
            if not step or not line.endswith(b"\n") or not _step_of(line) <= step:
                break
            end += len(line)
        stream.truncate(end)


def _step_of(line: bytes) -> float:
    """NaN for what is no line of ours, as a crash of the machine may leave."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.nan


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw loss, gradient, learning rate and speed over the steps; the ending of `path` says the format."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6))
    figure.subplots_adjust(left=0.08, right=0.97, bottom=0.08, top=0.94, wspace=0.2, hspace=0.35)
    for axes, (title, names) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 50 else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend()
    figure.savefig(path)
