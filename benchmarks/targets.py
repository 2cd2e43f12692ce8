"""What bert_fast is to reach on one H200, and in training on a CPU, as data, and how much of it results show.

On another GPU a target is the same fraction of that GPU's own ceiling, as it was measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

from benchmarks.cases import KernelCase
from benchmarks.peak import Peak, best
from benchmarks.report import Result
from benchmarks.tables import (
    TrainRow,
    activations_ratio,
    bytes_per_second,
    ratio_to,
    samples_per_second,
    tokens_per_second,
    training_ratio,
    training_tokens_per_second,
)
from bert_fast.benchmarking import Row, markdown_table

#: What an H200 does through PyTorch: 10^9 operations per second of a bfloat16 matrix product, bytes copied in 10^9/s.
H200 = {"product": 790_000.0, "copy": 4_300.0}

#: Results by the stem of their file, "encoder", "kernels" and "train"; what was not measured is missing.
Results = Mapping[str, Result]


Figure = Callable[[Result], float | None]
Value = Callable[[Row], float | None]


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Attributes:
        name: what it is.
        required: on an H200, in `unit`.
        figure: what the results show, or None.
        part: the results it is in.
        ceiling: the key of `H200` that it depends on; None for ratios and for what the host does.
        at_most: lower is better.
    """

    name: str
    required: float
    unit: str
    figure: Figure
    part: str = "encoder"
    ceiling: str | None = None
    at_most: bool = False

    def required_on(self, device: str, peak: Peak) -> float | None:
        """What the target is on this device; None where its ceiling was not measured."""
        if self.ceiling is None or "H200" in device:
            return self.required
        reached = {"product": best(peak, "bfloat16"), "copy": peak["copy_gbs"]}[self.ceiling]
        if not reached:
            return None
        scale = reached / H200[self.ceiling]
        return self.required / scale if self.at_most else self.required * scale


def _of(value: Value, model: str, case: str, dtype: str = "bfloat16") -> Figure:
    """The value of the row of this name."""

    def figure(result: Result) -> float | None:
        for row in (*result["rows"], *result.get("kernels", [])):
            if (row["model"], row["case"], row["dtype"]) == (model, case, dtype):
                return value(row)
        return None

    return figure


def _of_kernel(value: Value, op: str, batch: str, dropout_p: float = 0.0) -> Figure:
    case = KernelCase(op, batch, dropout_p=dropout_p)
    return _of(value, op, case.name, case.dtype)


def _lowest_ratio(peer: str, rows: Sequence[tuple[str, str]]) -> Figure:
    """Against a peer, over those of these models and cases that have it."""

    def figure(result: Result) -> float | None:
        found = [_of(partial(ratio_to, peer), model, case)(result) for model, case in rows]
        return min((ratio for ratio in found if ratio is not None), default=None)

    return figure


def _training(
    value: Callable[[TrainRow], float | None],
    worst: Callable[[list[float]], float],
    task: str | None = None,
    model: str | None = None,
    case: str | None = None,
) -> Figure:
    """The worst value of the rows of this task, model and case; of all where they are None."""

    def figure(result: Result) -> float | None:
        rows = [
            row
            for row in result.get("train", [])
            if task in (None, row["task"]) and model in (None, row["model"]) and case in (None, row["case"])
        ]
        found = [figure for row in rows if (figure := value(row)) is not None]
        return worst(found) if found else None

    return figure


def _times(name: str, layout: str) -> Callable[[TrainRow], float | None]:
    return partial(training_ratio, name=name, layout=layout)


def _measured(key: str, scale: float = 1.0) -> Value:
    def value(row: Row) -> float | None:
        found = row["contenders"]["bert_fast"].get(key)
        return None if not isinstance(found, float) else scale * found

    return value


_milliseconds = _measured("median_ms")
_tflops = _measured("gflops", 1e-3)


def _terabytes(row: Row) -> float:
    return 1e-12 * bytes_per_second(row)


BASE, LARGE = "BERT-base", "BERT-large"
MIX = ((BASE, "squad64"), (LARGE, "squad64"))
FULL = ((BASE, "128x128"), (LARGE, "32x384"))

TARGETS = (
    Target(
        "BERT-large, SQuAD-like lengths",
        5_000,
        "samples/s",
        _of(samples_per_second, LARGE, "squad64"),
        ceiling="product",
    ),
    Target(
        "BERT-large, SQuAD-like lengths, fp8",
        7_000,
        "samples/s",
        _of(samples_per_second, LARGE, "squad64", "float8_e4m3fn"),
        ceiling="product",
    ),
    Target("BERT-base, 128 x 128", 2.8e6, "tokens/s", _of(tokens_per_second, BASE, "128x128"), ceiling="product"),
    Target("BERT-large, 32 x 384", 850e3, "tokens/s", _of(tokens_per_second, LARGE, "32x384"), ceiling="product"),
    Target("BERT-base, 1 x 128", 0.35, "ms", _of(_milliseconds, BASE, "1x128"), ceiling="copy", at_most=True),
    Target("BERT-large, 1 x 128", 0.8, "ms", _of(_milliseconds, LARGE, "1x128"), ceiling="copy", at_most=True),
    Target("host, BERT-base, 1 x 128", 60, "us", _of(_measured("host_us"), BASE, "1x128"), at_most=True),
    *(
        Target(
            f"attention, head_dim 64, length {length}",
            required,
            "TFLOP/s",
            _of_kernel(_tflops, "attention", case),
            part="kernels",
            ceiling="product",
        )
        for length, required, case in ((128, 200, "1024x128"), (256, 280, "512x256"), (512, 330, "256x512"))
    ),
    *(
        Target(
            f"attention's gradient, head_dim 64, length 512{f', dropout {dropout_p}' if dropout_p else ''}",
            required,
            "TFLOP/s",
            _of_kernel(_tflops, "attention_backward", "256x512", dropout_p),
            part="kernels",
            ceiling="product",
        )
        for dropout_p, required in ((0.0, 240), (0.1, 200))
    ),
    *(
        Target(op, 3.7, "TB/s", _of_kernel(_terabytes, op, "1024x128"), part="kernels", ceiling="copy")
        for op in ("residual_layer_norm", "embedding_layer_norm")
    ),
    Target("SQuAD-like lengths, to transformers", 3, "x", _lowest_ratio("transformers", MIX)),
    Target("SQuAD-like lengths, to torch.compile", 2, "x", _lowest_ratio("torch.compile", MIX)),
    Target("full batches, to transformers", 1.3, "x", _lowest_ratio("transformers", FULL)),
    Target("full batches, to torch.compile", 1.3, "x", _lowest_ratio("torch.compile", FULL)),
    Target(
        "training, SQuAD-like lengths, to transformers",
        2.5,
        "x",
        _training(_times("bert_fast", "padded"), min, case="squad64"),
        part="train",
    ),
    *(
        Target(
            f"MLM training, {model}, {case}",
            required,
            "tokens/s",
            _training(training_tokens_per_second, min, "mlm", model, case),
            part="train",
            ceiling="product",
        )
        for model, case, required in ((LARGE, "32x512", 210e3), (BASE, "128x128", 650e3))
    ),
)

#: Of training on a CPU with two cores, for the slowest of the models, against transformers in float32.
CPU_TRAINING = (
    *(
        Target(
            f"{name}, {task or 'any task'}, to {layout}",
            required,
            "x",
            _training(_times(name, layout), min, task),
            part="train",
        )
        for name, task, layout, required in (
            ("bert_fast", None, "padded", 3),
            ("bert_fast", None, "grouped", 1.7),
            ("bert_fast bf16", None, "padded", 5),
            ("bert_fast bf16", None, "grouped", 2.8),
            ("bert_fast", "mlm", "padded", 4),
        )
    ),
    Target(
        "bert_fast, activations to padded",
        0.5,
        "x",
        _training(partial(activations_ratio, name="bert_fast"), max),
        part="train",
        at_most=True,
    ),
)


class Verdict(TypedDict):
    """A target on a device."""

    name: str
    unit: str
    at_most: bool
    required: float | None  # None where the device's ceiling was not measured
    measured: float | None
    met: bool | None  # None when not measured


def judge(results: Results, among: Sequence[Target] = TARGETS) -> list[Verdict]:
    """Every target, as far as the results tell."""
    verdicts: list[Verdict] = []
    for target in among:
        result = results.get(target.part)
        required = target.required_on(result["device"], result["peak"]) if result else None
        measured = target.figure(result) if result else None
        met = None
        if measured is not None and required is not None:
            met = measured <= required if target.at_most else measured >= required
        verdicts.append(
            {
                "name": target.name,
                "unit": target.unit,
                "at_most": target.at_most,
                "required": required,
                "measured": measured,
                "met": met,
            }
        )
    return verdicts


def table(verdicts: Sequence[Verdict]) -> str:
    """A line for each target."""
    return markdown_table(
        [
            {
                "target": verdict["name"],
                "unit": verdict["unit"],
                "required": _bound(verdict),
                "measured": "not measured" if verdict["measured"] is None else f"{verdict['measured']:.4g}",
                "met": {True: "yes", False: "no", None: ""}[verdict["met"]],
            }
            for verdict in verdicts
        ]
    )


def _bound(verdict: Verdict) -> str:
    if verdict["required"] is None:
        return ""
    return f"{'<=' if verdict['at_most'] else '>='} {verdict['required']:.4g}"
