"""Measures, on the GPU that is there, which way each product of a model is the fastest, and writes it down.

`bert-fast tune` calls this. What it writes, `kernels/tuned.py` reads; nothing is ever measured while serving.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.folders import resolve
from bert_fast.loading import read_config
from bert_fast.sentence_folder import Recipe
from bert_fast.timing import MAX_ERROR, Call, Timing, compare

#: (hidden_size, intermediate_size) measured when no model is named: MiniLM, BERT-base, BERT-large.
SHAPES = ((384, 1536), (768, 3072), (1024, 4096))

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

#: How much faster than cuBLAS and a pass a configuration must be to be chosen.
LEAST_GAIN = 1.02

#: Shortest sample, in seconds; a GPU's own clock resolves half a microsecond.
_MIN_SAMPLE = 0.004

_BY_PASS = "cuBLAS and a pass"


@dataclass(frozen=True)
class Choice:
    """What was found for one key.

    Attributes:
        key: as `kernels.tuned.key` spells it.
        config: of the product with an epilogue, or None where cuBLAS and a pass are at least as fast.
        ratio: time of cuBLAS and a pass over that of the fastest configuration; medians.
    """

    key: str
    config: tuple[int, ...] | None
    ratio: float

    def __str__(self) -> str:
        way = _BY_PASS if self.config is None else "epilogue " + "x".join(map(str, self.config))
        return f"{self.key:52} {way:28} {self.ratio:5.2f}"


def choose(key: str, timings: dict[tuple[int, ...] | None, Timing]) -> Choice:
    """The fastest way; cuBLAS and a pass, which is None, unless another is faster by `LEAST_GAIN`."""
    by_pass = timings[None].median
    medians = {config: timing.median for config, timing in timings.items() if config is not None}
    if not medians:
        return Choice(key, None, 1.0)
    fastest = min(medians, key=medians.__getitem__)
    ratio = by_pass / medians[fastest]
    return Choice(key, fastest if ratio >= LEAST_GAIN else None, ratio)


def measure(
    device: torch.device,
    shapes: Iterable[tuple[int, int]],
    dtypes: Iterable[torch.dtype],
    buckets: Sequence[int],
    configs: Sequence[Any],
    repeats: int = 5,
) -> Iterator[Choice]:
    """Time every configuration against cuBLAS and a pass, interleaved, after comparing their answers.

    Args:
        device: where.
        shapes: (in_features, out_features).
        dtypes: 16-bit ones.
        buckets: numbers of rows.
        configs: `kernels.linear_gelu.Config`s that the device can run.
        repeats: samples of each way.

    Yields:
        A choice for each shape, dtype and bucket.

    Raises:
        timing.WrongAnswerError: two ways differ by more than rounding.
    """
    from bert_fast.kernels import linear_gelu, tuned

    for dtype in dtypes:
        for in_features, out_features in shapes:
            weight = (torch.randn(out_features, in_features, device=device) / in_features**0.5).to(dtype)
            bias = torch.randn(out_features, device=device).to(dtype)
            for rows in buckets:
                x = torch.randn(rows, in_features, device=device).to(dtype)
                out = x.new_empty(rows, out_features)
                arguments = (x, weight, bias, "none", out)
                ways: dict[tuple[int, ...] | None, Callable[[], Tensor]] = {
                    None: partial(linear_gelu.by_pass, *arguments),
                    **{tuple(c): partial(linear_gelu.by_epilogue, *arguments, c) for c in configs},
                }
                key = tuned.key("linear_gelu", dtype, in_features, out_features, rows)
                yield choose(key, _timings(ways, device, dtype, repeats))


def _timings(
    ways: dict[tuple[int, ...] | None, Callable[[], Tensor]], device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[tuple[int, ...] | None, Timing]:
    """Timings of ways that all write into the same tensor."""
    names = {_BY_PASS if config is None else f"configuration {config}": config for config in ways}
    contenders = {name: Call(ways[config], device, _MIN_SAMPLE) for name, config in names.items()}
    allowed = MAX_ERROR[str(dtype).removeprefix("torch.")]
    timings = compare(contenders, repeats, max_error=allowed, part=_some_rows)
    return {names[name]: timing for name, timing in timings.items()}


def _some_rows(out: Tensor) -> Tensor:
    """A copy of about 4,096 rows; their distance is odd, so that they fall on every row of a tile."""
    return out[:: out.shape[0] // 4096 | 1].clone()


def write(path: Path, gpu: str, choices: Iterable[Choice]) -> None:
    """Add the choices to the table at `path`, in one step; those of other shapes stay.

    Raises:
        ValueError: the file is there and is not a table.
    """
    from bert_fast.kernels import tuned

    entries: dict[str, Any] = {}
    if path.is_file():
        tuned.read(path)
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    versions = f"torch {torch.__version__}, triton {_triton_version()}"
    for choice in choices:
        ratio = round(choice.ratio, 3)
        entries[choice.key] = {"config": choice.config, "times_faster_than_cublas": ratio, "measured_with": versions}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        json.dump({"gpu": gpu, "entries": entries}, file, indent=1)
        file.write("\n")
    os.replace(file.name, path)
    tuned.table.cache_clear()


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def shapes_of(models: Sequence[str]) -> list[tuple[int, int]]:
    """(hidden_size, intermediate_size) of each checkpoint: a folder, a Hub id or demo."""
    configs = [read_config(Recipe.read(resolve(model)).transformer) for model in models]
    return sorted({(config.hidden_size, config.intermediate_size) for config in configs})


def _user_folder() -> Path:
    """`tuned.user_folder`; ValueError where it would be in whatever folder this process runs in."""
    from bert_fast.kernels import tuned

    folder = tuned.user_folder()
    if not folder.is_absolute():
        raise ValueError(f"the table's folder is {folder}: the user has no home; set XDG_CACHE_HOME or pass --output")
    return folder


def tune(
    models: Sequence[str] = (),
    dtypes: Sequence[str] = ("float16", "bfloat16"),
    folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Measure this machine's GPU and write its table. It takes minutes, most of them Triton's compiler's.

    Args:
        models: checkpoints whose shapes are measured; MiniLM's, BERT-base's and BERT-large's if none is named.
        dtypes: "float16" or "bfloat16"; products in float32 have one way only.
        folder: of the table; by default the user's, where the kernels look first.
        say: is given a line for each choice.

    Returns:
        The file.

    Raises:
        ValueError: a dtype is another, there is no GPU, it has no matrix units that Triton uses, or no folder is given
            and the user has no home.
    """
    wrong = next((dtype for dtype in dtypes if dtype not in DTYPES), None)
    if wrong is not None:
        raise ValueError(f"dtype is {wrong!r}, expected one of {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise ValueError("tune measures a GPU, and there is none here that torch can use")
    from bert_fast.kernels import linear_gelu, tuned

    device = torch.device("cuda", torch.cuda.current_device())
    gpu, configs = torch.cuda.get_device_name(device), linear_gelu.candidates_on(device)
    if not configs:
        raise ValueError(f"{gpu} has compute capability below 8.0: Triton has no matrix units there, nothing to tune")
    shapes = shapes_of(models) if models else SHAPES
    say(f"{gpu}: the way taken, and how many times faster the fastest epilogue is than {_BY_PASS}")
    path = (folder or _user_folder()) / tuned.file_name(gpu)
    with torch.inference_mode():
        for choice in measure(device, shapes, [DTYPES[dtype] for dtype in dtypes], tuned.BUCKETS, configs):
            say(str(choice))
            write(path, gpu, [choice])  # at once: it stays if what follows is stopped
    return path
