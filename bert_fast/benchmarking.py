"""What is timed and how it is told: batches by name, useful work, rows of results and their table."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor

from bert_fast.folders import resolve
from bert_fast.timing import MAX_ERROR, Call, Timing, compare, using_threads

#: Columns of tables that hold words.
TEXT_COLUMNS = {
    "model",
    "case",
    "dtype",
    "contender",
    "best peer",
    "kernel",
    "limit",
    "target",
    "unit",
    "part",
    "task",
    "path",
}

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
    """A batch by its name: "32x128" is 32 sequences of 128 tokens, "mix32" and "squad32" are 32 of mixed lengths.

    The lengths of a mix are log-normal with median 32 and sigma 0.8, cut to 3..256 tokens, in no order; always the
    same for one batch size. Those of "squad" are as long as questions with their passages, cut at 384 tokens: the
    quantiles of a log-normal, so that each batch size has the same distribution, with mean 180.

    Raises:
        ValueError: the text is none of these forms, or a number in it is zero.
    """
    if full := re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text):
        batch_size, seq_len = (int(number) for number in full.groups())
        return Case(text, (seq_len,) * batch_size)
    if mix := re.fullmatch(r"mix([1-9][0-9]*)", text):
        lengths = np.random.default_rng(0).lognormal(math.log(32), 0.8, int(mix[1]))
        return Case(text, tuple(np.clip(lengths.round(), 3, 256).astype(int).tolist()))
    if squad := re.fullmatch(r"squad([1-9][0-9]*)", text):
        batch_size = int(squad[1])
        normal = np.array([NormalDist().inv_cdf((i + 0.5) / batch_size) for i in range(batch_size)])
        ordered = np.clip((165 * np.exp(0.45 * normal)).round(), 32, 384).astype(int)
        return Case(text, tuple(np.random.default_rng(0).permutation(ordered).tolist()))
    raise ValueError(
        f"case {text!r} is neither BATCHxLENGTH, such as 32x128, nor mixBATCH or squadBATCH, such as mix32"
    )


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


def useful_bytes(config: EncoderShape, num_tokens: int, dtype: str) -> int:
    """Bytes that a forward pass reads and writes if weights and activations, all of this dtype, move once per step.

    Per layer `4 h^2 + 2 h f` weights, and for each real token: the projections h + 3h, attention 3h + h, its output and
    the residual 2h + h, the feed-forward block h + f and then f + h + h; with h and f as in `useful_flops`.
    """
    h, f = config.hidden_size, config.intermediate_size
    elements = 4 * h * h + 2 * h * f + num_tokens * (14 * h + 2 * f)
    return config.num_hidden_layers * elements * getattr(torch, dtype).itemsize


class Measured(TypedDict):
    """One contender of a row. `ratio` is the first contender's median over this one's: above 1 is faster."""

    median_ms: float
    quartiles_ms: list[float]  # first and third
    gflops: float  # useful, per second
    of_peak: float | None
    ratio: float
    error: float
    cosine: float
    memory_mb: float | None  # the most that the calls held of the device, weights included; None where not known
    build_memory_mb: float | None  # the same of making it, with the first call
    host_us: float | None  # on a GPU, of a single call: until it returns; None elsewhere
    latency_us: float | None  # and until its answer is there


class Row(TypedDict):
    """One case of a comparison, as results files hold it."""

    model: str
    case: str
    dtype: str
    tokens: int
    padded_tokens: int
    flops: int  # of a call: `useful_flops`
    bytes: int  # of a call: `useful_bytes`
    contenders: dict[str, Measured]


@dataclass(frozen=True)
class Work:
    """What a timed call does; the fields are those of `Row`."""

    model: str
    case: str
    dtype: str
    tokens: int
    padded_tokens: int
    flops: int
    bytes: int

    @classmethod
    def of(
        cls, lengths: Sequence[int], config: EncoderShape, *, model: str, case: str, dtype: str, padded_tokens: int
    ) -> Work:
        """Of an encoder over sequences of these lengths."""
        flops, moved = useful_flops(config, lengths), useful_bytes(config, sum(lengths), dtype)
        return cls(model, case, dtype, sum(lengths), padded_tokens, flops, moved)

    @classmethod
    def of_case(cls, case: Case, config: EncoderShape, *, model: str, dtype: str) -> Work:
        """Of a forward pass over a batch."""
        padded = case.num_padded_tokens
        return cls.of(case.lengths, config, model=model, case=case.name, dtype=dtype, padded_tokens=padded)


@dataclass(frozen=True)
class Cost:
    """What a contender costs beside its time; None where it is not known.

    Attributes:
        calls_mb: the most memory that its calls held, in megabytes, beyond the libraries; of the device it runs on.
        build_mb: the same until the first call was made.
        host_us, latency_us: on a GPU, of a single call: until it returns, and until its answer is there.
        activations_mb: in training, what a step holds beyond the model, its gradients and the optimiser.
    """

    calls_mb: float | None = None
    build_mb: float | None = None
    host_us: float | None = None
    latency_us: float | None = None
    activations_mb: float | None = None


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
    from bert_fast.drop_in import accelerate

    batches = [parse_case(text) for text in cases]
    model, name = load(path_or_id, dtype), str(path_or_id)
    check_lengths(batches, name, model.config.max_position_embeddings)
    contenders = {
        "transformers": last_hidden_state(model),
        "bert_fast": last_hidden_state(accelerate(copy.deepcopy(model))),
    }
    rows = []
    with using_threads(threads), torch.inference_mode():
        for case in batches:
            inputs = case.inputs(model.config.vocab_size, model.device)
            timings = compare(
                {contender: Call(partial(encode, inputs)) for contender, encode in contenders.items()},
                repeats,
                max_error=MAX_ERROR[dtype],
                part=itemgetter(inputs["attention_mask"].bool()),  # what stands in padding is nobody's answer
            )
            rows.append(measured_row(timings, Work.of_case(case, model.config, model=name, dtype=dtype)))
    return rows


def load(path_or_id: str | Path, dtype: str) -> Any:
    """A checkpoint as transformers' base model, with SDPA attention, in eval mode; arguments as in `bench_model`."""
    if dtype not in MAX_ERROR:
        raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(MAX_ERROR)}")
    from transformers import AutoModel

    folder = resolve(path_or_id)
    return AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def check_lengths(cases: Sequence[Case], name: str, max_positions: int) -> None:
    """ValueError for a case with a sequence longer than the model takes, which the message calls `name`."""
    for case in cases:
        if max(case.lengths) > max_positions:
            raise ValueError(
                f"case {case.name} has a sequence of {max(case.lengths)} tokens, {name} takes {max_positions}"
            )


def last_hidden_state(model: Any) -> Encode:
    """The forward pass of a transformers base model."""
    return lambda inputs: model(**inputs).last_hidden_state


def measured_row(
    timings: Mapping[str, Timing],
    work: Work,
    *,
    peak_gops: float | None = None,
    costs: Mapping[str, Cost] | None = None,
) -> Row:
    """What `compare` measured, as a row.

    Args:
        timings: by contender; ratios are to the first.
        work: what a call did.
        peak_gops: what the device can do in this dtype, in 10^9 operations per second; gives `of_peak`.
        costs: of each contender, where they are known.
    """
    gflop = work.flops * 1e-9
    baseline = next(iter(timings.values())).median
    contenders: dict[str, Measured] = {}
    for name, timing in timings.items():
        cost = costs[name] if costs else Cost()
        contenders[name] = {
            "median_ms": timing.median * 1e3,
            "quartiles_ms": [1e3 * quartile for quartile in timing.quartiles],
            "gflops": gflop / timing.median,
            "of_peak": gflop / timing.median / peak_gops if peak_gops else None,
            "ratio": baseline / timing.median,
            "error": timing.error,
            "cosine": timing.cosine,
            "memory_mb": cost.calls_mb,
            "build_memory_mb": cost.build_mb,
            "host_us": cost.host_us,
            "latency_us": cost.latency_us,
        }
    return {
        "model": work.model,
        "case": work.case,
        "dtype": work.dtype,
        "tokens": work.tokens,
        "padded_tokens": work.padded_tokens,
        "flops": work.flops,
        "bytes": work.bytes,
        "contenders": contenders,
    }


def format_table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table that also reads well in a terminal: a line for each case.

    Times are medians in milliseconds; GFLOP/s counts useful work. The last two columns are the last contender's. The
    model and the dtype are left out where all rows have the same.
    """
    if not rows:
        return ""
    lines = [_cells(row) for row in rows]
    same = [name for name in ("model", "dtype") if len({line[name] for line in lines}) == 1]
    return markdown_table([{name: cell for name, cell in line.items() if name not in same} for line in lines])


def markdown_table(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines, all with the same columns, aligned: text to the left, and numbers to the right."""
    header = list(lines[0])
    widths = {name: max(len(name), *(len(line[name]) for line in lines)) for name in header}
    text = {name for name in header if name in TEXT_COLUMNS}

    def joined(cells: Mapping[str, str]) -> str:
        return "| " + " | ".join(f"{cells[n]:{'<' if n in text else '>'}{widths[n]}}" for n in header) + " |"

    rule = {name: "-" * widths[name] if name in text else "-" * (widths[name] - 1) + ":" for name in header}
    return "\n".join([joined({name: name for name in header}), joined(rule), *map(joined, lines)])


def _cells(row: Row) -> dict[str, str]:
    """Column name -> what stands there, in the line of a case."""
    contenders = row["contenders"]
    *_, subject = contenders
    last = contenders[subject]
    return {
        "model": row["model"],
        "case": row["case"],
        "dtype": row["dtype"],
        "tokens": str(row["tokens"]),
        "padded": str(row["padded_tokens"]),
        **{f"{name} ms": f"{measured['median_ms']:.2f}" for name, measured in contenders.items()},
        **{f"{name} ratio": f"{measured['ratio']:.2f}x" for name, measured in list(contenders.items())[1:]},
        f"{subject} GFLOP/s": f"{last['gflops']:.0f}",
        "error": f"{last['error']:.0e}",
    }
