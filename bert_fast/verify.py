"""The parity report: how far the fast BERT is from the plain definition in float64, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast import ops
from bert_fast.embedder import Embedder
from bert_fast.families import model_class
from bert_fast.loading import build
from bert_fast.terminal import progress_bar
from bert_fast.tokenization import TokenBatch

#: The fast error may be this many times the plain definition's own in the same dtype, plus one unit in the last place:
#: the two round in another order, and neither order is the better one.
FACTOR = 2.0

#: Bounds on the relative error of every layer in 8 bits, where the plain model's error says nothing.
MAX_ERRORS = {"int8": 0.06, "fp8": 0.1}

#: The dtype of the plain model that stands beside a precision; that of the weights beside any other.
PLAIN_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.bfloat16, "fp8": torch.bfloat16}

#: How many of the shipped sentences are used when the caller gives no texts.
NUM_SENTENCES = 64

BATCH_SIZE = 32


def shipped_sentences() -> list[str]:
    """The English sentences that come with the package."""
    return (files("bert_fast") / "data" / "sentences.txt").read_text(encoding="utf-8").splitlines()


@dataclass
class Error:
    """How far vectors are from the true ones.

    Attributes:
        max_abs: the largest difference of one component.
        min_cosine: the smallest cosine between a vector and the true one.
        relative: |vectors - truth| / |truth|, Euclidean norms over all of them.
    """

    max_abs: float = 0.0
    min_cosine: float = 1.0
    _squares: float = 0.0
    _true_squares: float = 0.0

    def add(self, vectors: Tensor, truth: Tensor) -> None:
        """Count more vectors, (n, size), against float64 ones of the same shape."""
        difference = vectors.double() - truth
        cosine = F.cosine_similarity(vectors.double(), truth, dim=1)
        # numpy's maximum and minimum keep a NaN
        self.max_abs = float(np.maximum(self.max_abs, difference.abs().max().item()))
        self.min_cosine = float(np.minimum(self.min_cosine, cosine.min().item()))
        self._squares += difference.square().sum().item()
        self._true_squares += truth.square().sum().item()

    @property
    def relative(self) -> float:
        """As above; over vectors that are all zero, the norm of the difference."""
        return math.sqrt(self._squares / self._true_squares) if self._true_squares else math.sqrt(self._squares)


@dataclass
class Stage:
    """One line of the report: the embeddings, a layer, or the sentence vector."""

    name: str
    dtype: torch.dtype
    fast: Error = field(default_factory=Error)
    plain: Error = field(default_factory=Error)
    largest: float = 0.0
    limit: float | None = None  # on the relative error, where the plain model's says nothing

    def add(self, fast: Tensor, plain: Tensor, truth: Tensor) -> None:
        """Count more vectors, (n, size) each."""
        self.fast.add(fast, truth)
        self.plain.add(plain, truth)
        self.largest = max(self.largest, truth.abs().max().item())

    @property
    def passed(self) -> bool:
        """Whether the fast errors are within `FACTOR` of the plain ones, plus one unit in the last place."""
        if self.limit is not None:
            return self.fast.relative <= self.limit
        ulp = torch.finfo(self.dtype).eps
        return (
            self.fast.relative <= FACTOR * self.plain.relative + ulp
            and self.fast.max_abs <= FACTOR * self.plain.max_abs + ulp * self.largest
        )


@dataclass(frozen=True)
class Report:
    """The errors of every stage, in the order in which the model computes them."""

    model: str
    dtype: torch.dtype
    precision: str | None
    device: str
    num_texts: int
    num_tokens: int
    stages: list[Stage]

    @property
    def passed(self) -> bool:
        """Whether every stage did."""
        return all(stage.passed for stage in self.stages)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        width = max(len(stage.name) for stage in self.stages)
        computed = self.precision or dtype
        limit = self.stages[0].limit
        bound = f"within {FACTOR:g}x" if limit is None else f"relative <= {limit:g}"
        lines = [
            f"{self.model}: {self.num_texts} texts, {self.num_tokens} tokens, {computed} on {self.device}",
            f"Errors against the plain definition in float64, of the fast model and of the plain one in {dtype}:",
            "",
            f"{'':{width}}  {'max error':^17}  {'relative error':^17}  {'min cosine':>12}  {bound}",
            f"{'':{width}}  {'fast':>8} {'plain':>8}  {'fast':>8} {'plain':>8}  {'fast':>12}",
        ]
        for stage in self.stages:
            fast, plain = stage.fast, stage.plain
            lines.append(
                f"{stage.name:{width}}  {fast.max_abs:8.1e} {plain.max_abs:8.1e}  {fast.relative:8.1e} "
                f"{plain.relative:8.1e}  {fast.min_cosine:12.9f}  {'yes' if stage.passed else 'NO'}"
            )
        failed = [stage.name for stage in self.stages if not stage.passed]
        verdict = f"FAILED at {', '.join(failed)}" if failed else "passed"
        return "\n".join([*lines, "", f"Verdict: {verdict}"])


def verify(
    path_or_id: str | Path,
    texts: Sequence[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    precision: str | None = None,
    device: torch.device | str | None = None,
) -> Report:
    """Compare the fast BERT of a checkpoint with the plain definition in float64, over the same weights.

    Args:
        path_or_id: as `Embedder` takes it.
        texts: what to run; None for a sample of the shipped sentences.
        dtype: of the fast model, and of the plain one whose errors stand beside; None for the checkpoint's own. The
            weights are rounded to it first, so that only the arithmetic is compared.
        precision: as `Embedder` takes it. Beside bf16 stands the plain model in bfloat16, and so it does beside int8
            and fp8, whose relative errors have bounds of their own, `MAX_ERRORS`.
        device: None for a GPU if there is one.

    Returns:
        The report; `print` shows it as a table, `.passed` is the verdict.

    Raises:
        ValueError: the checkpoint cannot be loaded, or there are no texts.
    """
    if texts is None:
        sentences = shipped_sentences()
        texts = sentences[:: max(1, len(sentences) // NUM_SENTENCES)][:NUM_SENTENCES]
    if not texts:
        raise ValueError("there are no texts to verify on")
    embedder = Embedder(path_or_id, dtype=dtype, precision=precision, device=device)
    fast, config = embedder.model, embedder.model.config
    weights, kind = fast.state_dict(), model_class(config, plain=True)
    dtype = PLAIN_DTYPES.get(precision or "", next(fast.parameters()).dtype)
    plain = build(kind, config, weights, dtype=dtype, device=embedder.device)
    truth = build(kind, config, weights, dtype=torch.float64, device=embedder.device)

    names = ["embeddings", *(f"layer {i}" for i in range(1, config.num_hidden_layers + 1)), "sentence vector"]
    limit = MAX_ERRORS.get(precision or "")
    stages = [Stage(name, dtype, limit=limit) for name in names]
    texts, num_tokens = sorted(texts, key=len), 0
    for start in progress_bar(range(0, len(texts), BATCH_SIZE), what="comparing", unit=" batches"):
        tokens = embedder.tokenizer(texts[start : start + BATCH_SIZE], embedder.max_seq_length)
        num_tokens += len(tokens.input_ids)
        runs = (_fast_states(embedder, tokens), _plain_states(embedder, plain, tokens))
        for stage, *states in zip(stages, *runs, _plain_states(embedder, truth, tokens), strict=True):
            stage.add(*states)
    return Report(str(path_or_id), dtype, precision, str(embedder.device), len(texts), num_tokens, stages)


@torch.inference_mode()
def _fast_states(embedder: Embedder, tokens: TokenBatch) -> list[Tensor]:
    """Rows of the embeddings and of every layer, (num_tokens, hidden_size), then the pooled vectors."""
    states: list[Tensor] = []
    ragged = tokens.to_ragged(embedder.device)
    embedder.model.encode(ragged, hidden_states=states)
    return [*states, embedder.embed(tokens)]


@torch.inference_mode()
def _plain_states(embedder: Embedder, model: Any, tokens: TokenBatch) -> list[Tensor]:
    """The same from the plain definition, run on a padded batch."""
    ragged = tokens.to_ragged(embedder.device)
    lengths = ragged.cu_seqlens.diff()
    mask = torch.arange(ragged.max_seqlen, device=embedder.device) < lengths[:, None]
    input_ids, token_type_ids = torch.zeros((2, *mask.shape), dtype=torch.int64, device=embedder.device)
    input_ids[mask], token_type_ids[mask] = ragged.input_ids, ragged.token_type_ids
    output = model(input_ids, mask, token_type_ids, output_hidden_states=True)
    states = [state[mask] for state in output.hidden_states]
    return [*states, _pooled(embedder, states[-1], ragged.cu_seqlens)]


def _pooled(embedder: Embedder, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(batch_size, dimension): the sentence vectors as the folder's recipe makes them."""
    recipe = embedder.recipe
    vectors = torch.cat(
        [ops.pooling(rows, cu_seqlens, mode=mode, impl="reference") for mode in recipe.pooling_modes], dim=1
    )
    return F.normalize(vectors, dim=1) if recipe.normalize else vectors
