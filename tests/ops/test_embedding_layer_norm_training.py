"""The C++ embedding_layer_norm in training: numbers, layouts, odd inputs, threads, refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation
from layouts import LAYOUTS
from torch import Tensor
from training_definitions import EPS, assert_same, assert_training, seed_for

from bert_fast import _C
from bert_fast.ops._dropout import dropout

VOCABULARY, POSITIONS, TYPES = 50, 20, 2
EMBEDDING_NAMES = "word position token_type weight layer_norm_bias"

ID_SHAPES = {
    "a single id without a dimension": ((), 24),
    "narrower than any vector": ((3,), 5),
    "one past a vector of 16 and of 32": ((4,), 33),
    "MiniLM, every id many times": ((2, 150), 384),
    "one past a block of columns": ((29,), 129),
    "long rows": ((12,), 2056),
}


def ids(shape: tuple[int, ...]) -> list[Tensor]:
    """input_ids, position_ids, token_type_ids."""
    return [torch.randint(rows, shape) for rows in (VOCABULARY, POSITIONS, TYPES)]


def tables(cpp: Implementation, hidden_size: int) -> list[Tensor]:
    """The three tables, weight, layer_norm_bias."""
    rows = [cpp.randn(count, hidden_size) for count in (VOCABULARY, POSITIONS, TYPES)]
    return [*rows, cpp.randn(hidden_size), cpp.randn(hidden_size)]


@dataclass(frozen=True)
class EmbeddingDefinition:
    ids: list[Tensor]
    dropout_p: float
    padding_idx: int | None = None

    def __call__(self, word: Tensor, position: Tensor, token_type: Tensor, *norm: Tensor) -> Tensor:
        hidden = F.embedding(self.ids[0], word, self.padding_idx) + F.embedding(self.ids[2], token_type)
        hidden = hidden + F.embedding(self.ids[1], position)
        out = F.layer_norm(hidden, hidden.shape[-1:], *norm, EPS)
        return dropout(out, self.dropout_p, seed_for(self.dropout_p))

    def run(self, upstream: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        """out and the gradients of the parameters, in their order, by the kernels."""
        seed, weight = seed_for(self.dropout_p), parameters[3]
        out, normalized, rstd = _C.embedding_layer_norm_train(*self.ids, *parameters, EPS, self.dropout_p, seed)
        assert normalized.dtype == out.dtype == weight.dtype
        assert (rstd.dtype, rstd.shape) == (torch.float32, (self.ids[0].numel(),))
        rows = [table.shape[0] for table in parameters[:3]]
        grads = _C.embedding_layer_norm_backward(
            upstream, *self.ids, normalized, rstd, weight, *rows, self.dropout_p, seed, self.padding_idx
        )
        return [out, *grads]


@pytest.mark.parametrize(("dropout_p", "padding_idx"), [(0.0, None), (0.1, 0), (1.0, 3)])
@pytest.mark.parametrize(("shape", "hidden_size"), ID_SHAPES.values(), ids=ID_SHAPES.keys())
def test_embedding_layer_norm(
    cpp: Implementation, shape: tuple[int, ...], hidden_size: int, dropout_p: float, padding_idx: int | None
) -> None:
    definition = EmbeddingDefinition(ids(shape), dropout_p, padding_idx)
    inputs, upstream = tables(cpp, hidden_size), cpp.randn(*shape, hidden_size)
    fast = definition.run(upstream, inputs)
    assert_training(fast, definition, upstream, inputs, EMBEDDING_NAMES)


def test_the_row_of_padding_gets_no_gradient(cpp: Implementation) -> None:
    given = [torch.tensor([4, 7, 4, 4]), torch.arange(4), torch.zeros(4, dtype=torch.int64)]
    inputs, upstream = tables(cpp, 20), cpp.randn(4, 20)
    _, dword, *others = EmbeddingDefinition(given, 0.0, 4).run(upstream, inputs)
    assert dword.count_nonzero(1).nonzero().flatten().tolist() == [7]
    _, whole, *same = EmbeddingDefinition(given, 0.0).run(upstream, inputs)
    assert whole.count_nonzero(1).nonzero().flatten().tolist() == [4, 7]
    assert_same(others, same)


def test_int32_ids_give_the_same_bits(cpp: Implementation) -> None:
    given, inputs, upstream = ids((2, 5)), tables(cpp, 40), cpp.randn(2, 5, 40)
    expected = EmbeddingDefinition(given, 0.1).run(upstream, inputs)
    assert_same(EmbeddingDefinition([t.int() for t in given], 0.1).run(upstream, inputs), expected)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_embedding_layer_norm_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    given, inputs, upstream = ids((4, 3)), tables(cpp, 36), cpp.randn(4, 3, 36)
    expected = EmbeddingDefinition(given, 0.1).run(upstream, inputs)
    others = EmbeddingDefinition(list(map(layout, given)), 0.1).run(layout(upstream), list(map(layout, inputs)))
    assert_same(others, expected)


@pytest.mark.parametrize(("shape", "hidden_size"), [((0,), 8), ((3,), 0), ((2, 0), 4)], ids=str)
def test_embedding_layer_norm_zero_size(cpp: Implementation, shape: tuple[int, ...], hidden_size: int) -> None:
    inputs = tables(cpp, hidden_size)
    out, *grads = EmbeddingDefinition(ids(shape), 0.1, 0).run(cpp.randn(*shape, hidden_size), inputs)
    assert out.shape == (*shape, hidden_size)
    for grad, parameter in zip(grads, inputs, strict=True):
        assert torch.equal(grad, torch.zeros_like(parameter))


def test_embedding_layer_norm_nan_stays_with_its_ids(cpp: Implementation) -> None:
    given, inputs, upstream = ids((60,)), tables(cpp, 40), cpp.randn(60, 40)
    upstream[7, 3] = float("nan")
    _, dword, dposition, dtoken_type, *_ = EmbeddingDefinition(given, 0.0).run(upstream, inputs)
    for grad, own in zip((dword, dposition, dtoken_type), given, strict=True):
        assert grad.isnan().all(1).nonzero().flatten().tolist() == [own[7]]
        assert grad.isnan().any(1).sum() == 1


def test_embedding_layer_norm_threads(threads: int) -> None:
    fp32 = Implementation("cpp", torch.float32)
    given, inputs, upstream = ids((333,)), tables(fp32, 384), torch.randn(333, 384)
    several = EmbeddingDefinition(given, 0.1, 0).run(upstream, inputs)
    torch.set_num_threads(1)
    assert_same(several, EmbeddingDefinition(given, 0.1, 0).run(upstream, inputs))


def embedding_args(**changes: Any) -> list[Any]:
    args = {"grad": torch.ones(2, 3), "input_ids": torch.tensor([0, 4]), "position_ids": torch.tensor([0, 1])}
    args |= {"token_type_ids": torch.tensor([0, 1]), "normalized": torch.ones(2, 3), "rstd": torch.ones(2)}
    args |= {"weight": torch.ones(3), "vocab_rows": 5, "position_rows": 2, "token_type_rows": 2, "dropout_p": 0.0}
    return list({**args, "seed": None, "padding_idx": None, **changes}.values())


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "an id": ("embedding_layer_norm_backward", embedding_args(vocab_rows=4), r"input_ids 4 at index 1 .* \[0, 4\)"),
    "ids' shape": (
        "embedding_layer_norm_backward",
        embedding_args(position_ids=torch.ones(3).long()),
        "position_ids has",
    ),
    "padding_idx": ("embedding_layer_norm_backward", embedding_args(padding_idx=5), "padding_idx is 5"),
    "negative rows": ("embedding_layer_norm_backward", embedding_args(position_rows=-1), "position_rows is -1"),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
