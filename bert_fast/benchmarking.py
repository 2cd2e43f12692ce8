"""Side-by-side timing: answers are compared first, then the calls are timed in interleaved rounds."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from bert_fast.folders import resolve

#: Largest relative error between two implementations of a whole encoder, by dtype. It tells a wrong answer from
#: rounding, which grows over the layers to some units in the last place; `bert-fast verify` judges the rounding.
MAX_ERROR = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}

#: The same for the peers, which decide for themselves what they round: it tells a wrong model from a coarse one.
MAX_PEER_ERROR = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2, "int8": 0.6}

#: Shortest sample, in seconds: a shorter call is repeated within the sample, or the clock would be measured.
MIN_SAMPLE = 0.01

#: A forward pass: what `Case.inputs` gives -> last hidden states (batch_size, longest, hidden_size).
Encode = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Case:
    """A batch of sequences: its name, and the length of each in tokens."""

    name: str
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens of the batch."""
        return sum(self.lengths)

    @property
    def num_padded_tokens(self) -> int:
        """Tokens of the batch when each sequence is padded to the longest."""
        return len(self.lengths) * max(self.lengths)

    def inputs(self, vocab_size: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Random ids, the same on every call, padded on the right.

        Returns:
            input_ids in [0, vocab_size), attention_mask and token_type_ids, each (batch_size, longest) int64; zero
            past the end of a sequence.
        """
        mask = torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]
        ids = torch.randint(vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(ids)}
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def parse_case(text: str) -> Case:
    """A batch by its name: "32x128" is 32 sequences of 128 tokens, "mix32" is 32 sequences of mixed lengths.

    The lengths of a mix are log-normal with median 32 and sigma 0.8, cut to 3..256 tokens, in no order; always the
    same for one batch size.

    Raises:
        ValueError: the text is neither form, or a number in it is zero.
    """
    if full := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text):
        batch_size, seq_len = (int(number) for number in full.groups())
        return Case(text, (seq_len,) * batch_size)
    if mix := re.fullmatch(r"mix([1-9][0-9]*)", text):
        lengths = np.random.default_rng(0).lognormal(math.log(32), 0.8, int(mix[1]))
        return Case(text, tuple(np.clip(lengths.round(), 3, 256).astype(int).tolist()))
    raise ValueError(f"case {text!r} is neither BATCHxLENGTH, such as 32x128, nor mixBATCH, such as mix32")


class EncoderShape(Protocol):
    """The part of a configuration, ours or transformers', that the work depends on."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int


def useful_flops(config: EncoderShape, lengths: Sequence[int]) -> int:
    """Floating-point operations of one forward pass over real tokens: the matrix products of the layers.

    Per layer and sequence of n tokens `2 n (4 h^2 + 2 h f) + 4 n^2 h`, for hidden size h and intermediate size f:
    projections and feed-forward, then scores and context. Padding is not work.
    """
    h, f = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * sum(2 * n * (4 * h * h + 2 * h * f) + 4 * n * n * h for n in lengths)


class WrongAnswerError(RuntimeError):
    """A contender's answer differs from the first one's, so nothing is timed."""


@dataclass(frozen=True)
class Timing:
    """Measurements of one contender: seconds per call in each round, and the error of its answer."""

    samples: tuple[float, ...]
    error: float

    @property
    def median(self) -> float:
        """Seconds per call."""
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile, in seconds per call."""
        low, high = np.quantile(self.samples, (0.25, 0.75))
        return float(low), float(high)


def relative_error(answer: Tensor, expected: Tensor) -> float:
    """|answer - expected| / |expected|, Euclidean norms over all elements, in float64; NaN if an element is NaN."""
    difference = (answer.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(torch.finfo(torch.float64).tiny))


def compare(
    contenders: dict[str, Callable[[], Tensor]],
    repeats: int = 7,
    warmup: int = 2,
    *,
    max_error: float | Mapping[str, float] = MAX_ERROR["float32"],
    expected: Tensor | None = None,
    part: Callable[[Tensor], Tensor] = lambda answer: answer,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Check that the contenders agree, then time them in interleaved rounds whose order rotates.

    Args:
        contenders: calls by name.
        repeats: rounds; each takes one sample of every contender.
        warmup: untimed calls of each contender before the rounds.
        max_error: largest `relative_error` that passes; of each contender, by name, where they differ.
        expected: the right answer; the first contender's when not given.
        part: what of an answer is compared.
        device: where the calls run; on "cuda" the device's own clock times them.

    Raises:
        WrongAnswerError: an answer has another shape or too large an error. Nothing has been timed then.
        ValueError: `repeats` is not positive.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected at least 1")
    answers = {name: part(call()) for name, call in contenders.items()}
    baseline, first_answer = next(iter(answers.items()))
    if expected is not None:
        baseline, first_answer = "the expected answer", part(expected)
    errors = _errors(answers, baseline, first_answer, max_error)
    counts = {}
    for name, call in contenders.items():
        for _ in range(warmup):
            call()
        counts[name] = max(1, math.ceil(MIN_SAMPLE / _seconds(call, 1, device)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for first in range(repeats):
        start = first % len(contenders)
        for name in islice(cycle(contenders), start, start + len(contenders)):
            samples[name].append(_seconds(contenders[name], counts[name], device))
    return {name: Timing(tuple(samples[name]), errors[name]) for name in contenders}


def _errors(
    answers: dict[str, Tensor], baseline: str, expected: Tensor, max_error: float | Mapping[str, float]
) -> dict[str, float]:
    """Error of each answer against the expected one, which messages call `baseline`."""
    errors = {}
    for name, answer in answers.items():
        if answer.shape != expected.shape:
            raise WrongAnswerError(
                f"{name} gives shape {tuple(answer.shape)} but {baseline} gives {tuple(expected.shape)}"
            )
        errors[name] = relative_error(answer, expected)
        allowed = max_error[name] if isinstance(max_error, Mapping) else max_error
        if not errors[name] <= allowed:  # not "greater": NaN must not pass
            raise WrongAnswerError(
                f"{name} differs from {baseline} by a relative error of {errors[name]:.1e}, allowed {allowed:.0e}"
            )
    return errors


def _seconds(call: Callable[[], Tensor], count: int, device: torch.device | str) -> float:
    """Seconds per call over `count` calls in a row."""
    if torch.device(device).type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / count
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


class Measured(TypedDict):
    """One contender of a row. `ratio` is the first contender's median over this one's: above 1 is faster."""

    median_ms: float
    quartiles_ms: list[float]  # first and third
    gflops: float  # useful, per second
    of_peak: float | None
    ratio: float
    error: float


class Row(TypedDict):
    """One case of a comparison, as results files hold it."""

    model: str
    case: str
    dtype: str
    tokens: int
    padded_tokens: int
    contenders: dict[str, Measured]


def bench_model(
    path_or_id: str | Path,
    cases: Sequence[str],
    dtype: str = "float32",
    threads: int | None = None,
    repeats: int = 7,
) -> list[Row]:
    """Time a checkpoint in transformers (SDPA, padded) and the same one through `bert_fast.accelerate`, on the CPU.

    Args:
        path_or_id: a folder, a Hub id or `demo`, as `folders.resolve` takes it, of a checkpoint that transformers'
            `AutoModel` loads.
        cases: names of batches, see `parse_case`.
        dtype: "float32", "bfloat16" or "float16".
        threads: torch's threads; as they are when not given.
        repeats: samples of each contender.

    Returns:
        One row per case; `format_table` prints them.

    Raises:
        ValueError: a case, the dtype, `threads` or `repeats` is not as said, or a sequence is too long for the model.
        WrongAnswerError: the two disagree.
    """
    batches = [parse_case(text) for text in cases]
    return bench_cases(load(path_or_id, dtype), str(path_or_id), batches, threads=threads, repeats=repeats)


def load(path_or_id: str | Path, dtype: str) -> Any:
    """A checkpoint as transformers' base model, with SDPA attention, in eval mode; arguments as in `bench_model`."""
    if dtype not in MAX_ERROR:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(MAX_ERROR)}")
    from transformers import AutoModel

    folder = resolve(path_or_id)
    return AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def bench_cases(
    model: Any,
    name: str,
    cases: Sequence[Case],
    *,
    threads: int | None = None,
    repeats: int = 7,
    peak_gops: float | None = None,
    precision: str | None = None,
    peers: Mapping[str, Callable[[Any], Encode]] | None = None,
) -> list[Row]:
    """Time a transformers BERT, where it is, against a copy of it passed through `bert_fast.accelerate`, and peers.

    Args:
        model: a transformers base model in eval mode; unchanged.
        name: what the rows call it.
        cases: the batches.
        threads, repeats: as in `bench_model`.
        peak_gops: what the device can do in this dtype, in 10^9 operations per second; gives `of_peak`.
        precision: of the peers and of `of_peak`; the model's dtype when not given. In "int8" the model stays as it is,
            and bert_fast, which has none, takes no part.
        peers: what builds them, by name, from the model in float32. With peers, all errors are against its answer.

    Raises:
        ValueError: as `bench_model`.
        WrongAnswerError: the contenders disagree.
    """
    from bert_fast.drop_in import accelerate

    dtype = str(model.dtype).removeprefix("torch.")
    precision, peers = precision or dtype, peers or {}
    for case in cases:
        if max(case.lengths) > model.config.max_position_embeddings:
            raise ValueError(
                f"case {case.name} has a sequence of {max(case.lengths)} tokens, "
                f"{name} takes {model.config.max_position_embeddings}"
            )
    contenders = {"transformers": _encode(model)}
    exact: Encode | None = None
    with using_threads(threads):
        if peers:
            model32 = model if dtype == "float32" else copy.deepcopy(model).float()
            exact = _encode(model32)
            contenders |= {peer: build(model32) for peer, build in peers.items()}
        if precision == dtype:
            contenders["bert_fast"] = _encode(accelerate(copy.deepcopy(model)))
        max_error = {
            contender: MAX_PEER_ERROR[precision] if contender in peers else MAX_ERROR[dtype] for contender in contenders
        }
        rows = []
        for case in cases:
            inputs = case.inputs(model.config.vocab_size, model.device)
            with torch.inference_mode():
                timings = compare(
                    {contender: partial(encode, inputs) for contender, encode in contenders.items()},
                    repeats,
                    max_error=max_error,
                    expected=exact(inputs) if exact else None,
                    part=itemgetter(inputs["attention_mask"].bool()),  # what stands in padding is nobody's answer
                    device=model.device,
                )
            rows.append(
                measured_row(
                    timings,
                    model=name,
                    case=case.name,
                    dtype=precision,
                    tokens=case.num_tokens,
                    padded_tokens=case.num_padded_tokens,
                    flops=useful_flops(model.config, case.lengths),
                    peak_gops=peak_gops,
                )
            )
    return rows


def _encode(model: Any) -> Encode:
    return lambda inputs: model(**inputs).last_hidden_state


def measured_row(
    timings: Mapping[str, Timing],
    *,
    model: str,
    case: str,
    dtype: str,
    tokens: int,
    padded_tokens: int,
    flops: int,
    peak_gops: float | None,
) -> Row:
    """What `compare` measured, as a row: `flops` is the useful work of a call, see `Row` for the rest."""
    gflop = flops * 1e-9
    baseline = next(iter(timings.values())).median
    return {
        "model": model,
        "case": case,
        "dtype": dtype,
        "tokens": tokens,
        "padded_tokens": padded_tokens,
        "contenders": {
            contender: {
                "median_ms": timing.median * 1e3,
                "quartiles_ms": [1e3 * quartile for quartile in timing.quartiles],
                "gflops": gflop / timing.median,
                "of_peak": gflop / timing.median / peak_gops if peak_gops else None,
                "ratio": baseline / timing.median,
                "error": timing.error,
            }
            for contender, timing in timings.items()
        },
    }


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """torch's threads for the length of the context; None leaves them, and less than 1 is a ValueError."""
    if count is not None and count < 1:
        raise ValueError(f"threads is {count}, expected at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def has_line_per_contender(rows: Sequence[Row]) -> bool:
    """Whether `format_table` gives each contender a line: where there are more than three, or not always the same."""
    names = {tuple(row["contenders"]) for row in rows}
    return len(names) > 1 or any(len(contenders) > 3 for contenders in names)


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that also reads well in a terminal.

    Times are medians in milliseconds; GFLOP/s counts useful work. A line is a case, and its last three columns are the
    last contender's. Where `has_line_per_contender`, "to best" says how many times bert_fast is as fast as the fastest
    of the others.
    The model and the dtype are left out where all rows have the same, the share of the peak where it is not known.
    """
    if not rows:
        return ""
    if has_line_per_contender(rows):
        lines = [_contender_cells(row, name) for row in rows for name in row["contenders"]]
    else:
        lines = [_cells(row) for row in rows]
    same = [name for name in ("model", "dtype") if len({line[name] for line in lines}) == 1]
    same += [name for name in ("of peak", "to best") if not any(line.get(name) for line in lines)]
    header = [name for name in lines[0] if name not in same]
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in header}
    text = {"model", "case", "dtype", "contender"}

    def joined(cells: dict[str, str]) -> str:
        return "| " + " | ".join(f"{cells[n]:{'<' if n in text else '>'}{widths[n]}}" for n in header) + " |"

    rule = {name: "-" * widths[name] if name in text else "-" * (widths[name] - 1) + ":" for name in header}
    return "\n".join([joined({name: name for name in header}), joined(rule), *map(joined, lines)])


def _case_cells(row: Row) -> dict[str, str]:
    return {
        "model": row["model"],
        "case": row["case"],
        "dtype": row["dtype"],
        "tokens": str(row["tokens"]),
        "padded": str(row["padded_tokens"]),
    }


def _cells(row: Row) -> dict[str, str]:
    """Column name -> what stands there, in the line of a case."""
    contenders = row["contenders"]
    *_, subject = contenders
    last = contenders[subject]
    return {
        **_case_cells(row),
        **{f"{name} ms": f"{measured['median_ms']:.2f}" for name, measured in contenders.items()},
        **{f"{name} ratio": f"{measured['ratio']:.2f}x" for name, measured in list(contenders.items())[1:]},
        f"{subject} GFLOP/s": f"{last['gflops']:.0f}",
        **_quality_cells(last),
    }


def _contender_cells(row: Row, name: str) -> dict[str, str]:
    """The same, in the line of one contender."""
    measured = row["contenders"][name]
    return {
        **_case_cells(row),
        "contender": name,
        "ms": f"{measured['median_ms']:.2f}",
        "ratio": f"{measured['ratio']:.2f}x",
        "to best": f"{ratio_to_best(row):.2f}x" if name == "bert_fast" else "",
        "GFLOP/s": f"{measured['gflops']:.0f}",
        **_quality_cells(measured),
    }


def _quality_cells(measured: Measured) -> dict[str, str]:
    return {
        "of peak": "" if measured["of_peak"] is None else f"{measured['of_peak']:.0%}",
        "error": f"{measured['error']:.0e}",
    }


def ratio_to_best(row: Row) -> float:
    """The time of the fastest other contender, transformers among them, over bert_fast's: above 1 is ahead of all."""
    others = (measured["median_ms"] for name, measured in row["contenders"].items() if name != "bert_fast")
    return min(others) / row["contenders"]["bert_fast"]["median_ms"]
