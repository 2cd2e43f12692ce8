"""embedding_layer_norm: forward against the truth, gradients, odd inputs, refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from implementations import DEVICE, FORCEABLE, Implementation
from layouts import LAYOUTS
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.ops.embedding_layer_norm import reference

EPS = 1e-12  # BERT's
VOCABULARY, POSITIONS, TYPES = 50, 20, 2

# Long rows come by the dozen: the error of its mean and deviation is one draw for a whole row.
SHAPES = {
    "one token of one channel, whose variance is zero": ((1,), 1),
    "no dimension: a single id": ((), 24),
    "narrower than any vector": ((3,), 5),
    "one past a vector of 16 and of 32": ((4,), 33),
    "MiniLM, one token more than full tiles": ((17,), 384),
    "BERT-base, padded batch": ((2, 8), 768),
    "many short rows, several tiles": ((150,), 8),
    "rows longer than one block": ((16,), 8200),
}


def ids(implementation: Implementation, shape: tuple[int, ...], dtype: torch.dtype = torch.int64) -> list[Tensor]:
    """input_ids, position_ids, token_type_ids: the first and the last row of each table, and random ones."""
    result = []
    for rows in (VOCABULARY, POSITIONS, TYPES):
        drawn = torch.randint(rows, shape)
        drawn.view(-1)[:1], drawn.view(-1)[1:2] = rows - 1, 0
        result.append(drawn.to(implementation.device, dtype))
    return result


def parameters(implementation: Implementation, hidden_size: int) -> list[Tensor]:
    """The three tables, weight, layer_norm_bias."""
    tables = [implementation.randn(rows, hidden_size) for rows in (VOCABULARY, POSITIONS, TYPES)]
    return [*tables, implementation.randn(hidden_size), implementation.randn(hidden_size)]


@pytest.mark.parametrize(("shape", "hidden_size"), SHAPES.values(), ids=SHAPES.keys())
def test_forward(implementation: Implementation, shape: tuple[int, ...], hidden_size: int) -> None:
    args = (*ids(implementation, shape), *parameters(implementation, hidden_size), EPS, 0.0)
    assert_forward(partial(implementation, "embedding_layer_norm"), reference, *args)


def test_int32_ids_and_mixed_ones_give_the_same_bits(implementation: Implementation) -> None:
    wide, tables = ids(implementation, (2, 5)), parameters(implementation, 40)
    narrow = [t.int() for t in wide]
    expected = implementation("embedding_layer_norm", *wide, *tables, EPS, 0.0)
    assert torch.equal(implementation("embedding_layer_norm", *narrow, *tables, EPS, 0.0), expected)
    mixed = (narrow[0], *wide[1:])
    assert torch.equal(implementation("embedding_layer_norm", *mixed, *tables, EPS, 0.0), expected)


def test_eps_counts(implementation: Implementation) -> None:
    args = (*ids(implementation, (4,)), *parameters(implementation, 40), 0.5, 0.0)
    assert_forward(partial(implementation, "embedding_layer_norm"), reference, *args)


@pytest.mark.parametrize("magnitude", [1e-4, 1e4])
def test_magnitudes(implementation: Implementation, magnitude: float) -> None:
    *tables, weight, layer_norm_bias = parameters(implementation, 40)
    args = (*ids(implementation, (5,)), *(t * magnitude for t in tables), weight, layer_norm_bias, EPS, 0.0)
    assert_forward(partial(implementation, "embedding_layer_norm"), reference, *args)


def test_nan_stays_with_the_tokens_that_use_its_row(implementation: Implementation) -> None:
    (input_ids, *other_ids), (word, *others) = ids(implementation, (30,)), parameters(implementation, 40)
    clean = implementation("embedding_layer_norm", input_ids, *other_ids, word, *others, EPS, 0.0)
    word[0, 3] = float("nan")
    out = implementation("embedding_layer_norm", input_ids, *other_ids, word, *others, EPS, 0.0)
    assert out[input_ids == 0].isnan().all()
    assert torch.equal(out[input_ids != 0], clean[input_ids != 0])


@pytest.mark.parametrize(("shape", "hidden_size"), [((0,), 8), ((3,), 0), ((2, 0), 4)], ids=str)
def test_zero_size(implementation: Implementation, shape: tuple[int, ...], hidden_size: int) -> None:
    args = (*ids(implementation, shape), *parameters(implementation, hidden_size), EPS, 0.0)
    out = implementation("embedding_layer_norm", *args)
    assert out.shape == (*shape, hidden_size)
    assert out.dtype == implementation.dtype


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    # `every other element` holds t + 1 between the elements of t: past the table, so reading one shows.
    args = [layout(t) for t in (*ids(implementation, (2, 3)), *parameters(implementation, 36))]
    assert_forward(partial(implementation, "embedding_layer_norm"), reference, *args, EPS, 0.0)


def test_expanded(implementation: Implementation) -> None:
    input_ids, position_ids, token_type_ids = ids(implementation, (3, 5))
    word, position, token_type, weight, layer_norm_bias = parameters(implementation, 36)
    args = (
        *(input_ids, position_ids[:1].expand(3, 5), token_type_ids[:1, :1].expand(3, 5)),
        *(word, position[:1].expand_as(position), token_type, weight, layer_norm_bias[:1].expand(36)),
    )
    assert_forward(partial(implementation, "embedding_layer_norm"), reference, *args, EPS, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", FORCEABLE)
def test_gradients(impl: str, dtype: torch.dtype) -> None:
    case = Implementation("any", dtype, DEVICE)
    token_ids = ids(case, (4, 6))
    assert_gradients(
        lambda *tensors: ops.embedding_layer_norm(*token_ids, *tensors, impl=impl),
        lambda *tensors: reference(*token_ids, *tensors, EPS, 0.0),
        *parameters(case, 20),
    )


@pytest.mark.parametrize("impl", FORCEABLE)
def test_the_row_of_padding_gets_no_gradient(impl: str) -> None:
    """As in `torch.nn.Embedding`; the result is the same."""
    case = Implementation("any", torch.float32, DEVICE)
    token_ids, (word, *others) = ids(case, (4, 6)), parameters(case, 20)
    row = int(token_ids[0][0, 0])
    gradients, results = [], []
    for padding_idx in (None, row):
        table = word.clone().requires_grad_()
        out = ops.embedding_layer_norm(*token_ids, table, *others, padding_idx=padding_idx, impl=impl)
        out.pow(3).sum().backward()
        assert table.grad is not None
        gradients.append(table.grad)
        results.append(out)
    assert torch.equal(*results)
    assert gradients[0][row].any()
    gradients[0][row] = 0
    assert torch.equal(*gradients)


def test_gradcheck_of_the_definition() -> None:
    case = Implementation("any", torch.float64)
    token_ids = ids(case, (4,))
    tensors = [t.requires_grad_() for t in parameters(case, 3)]
    assert torch.autograd.gradcheck(lambda *tensors: reference(*token_ids, *tensors, EPS, 0.0), tensors)


def refused(**changes: Any) -> dict[str, Any]:
    token_ids = {name: torch.zeros(2, 3, dtype=torch.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    rows = {"word_embeddings": VOCABULARY, "position_embeddings": POSITIONS, "token_type_embeddings": TYPES}
    tables = {name: torch.ones(count, 4) for name, count in rows.items()}
    return {**token_ids, **tables, "weight": torch.ones(4), "layer_norm_bias": torch.ones(4), **changes}


REFUSED = {
    "an id past its table": (
        refused(input_ids=torch.tensor([[0, 1, 2], [3, VOCABULARY, 99]])),
        rf"input_ids {VOCABULARY} at index \(1, 1\) is out of range \[0, {VOCABULARY}\)",
    ),
    "a negative id": (
        refused(token_type_ids=torch.tensor([[0, 0, -1], [0, 0, 0]])),
        r"token_type_ids -1 at index \(0, 2\) is out of range \[0, 2\)",
    ),
    "a position past the table": (
        refused(position_ids=torch.full((2, 3), POSITIONS, dtype=torch.int32)),
        rf"position_ids {POSITIONS} at index \(0, 0\) is out of range \[0, {POSITIONS}\)",
    ),
    "ids that are not integers": (refused(position_ids=torch.zeros(2, 3)), "position_ids is torch.float32"),
    "ids of unlike shapes": (
        refused(position_ids=torch.zeros(3, dtype=torch.int64)),
        r"position_ids has shape \(3,\), expected \(2, 3\)",
    ),
    "ids on another device": (
        refused(input_ids=torch.zeros(2, 3, dtype=torch.int64, device="meta")),
        "input_ids is on meta but its table is on cpu",
    ),
    "tables of unlike widths": (
        refused(token_type_embeddings=torch.ones(2, 5)),
        r"token_type_embeddings has shape \(2, 5\), expected \(rows, 4\)",
    ),
    "a table of one dimension": (refused(position_embeddings=torch.ones(4)), r"position_embeddings has shape \(4,\)"),
    "weight's shape": (refused(weight=torch.ones(3)), r"weight has shape \(3,\), expected \(4,\)"),
    "layer_norm_bias's shape": (refused(layer_norm_bias=torch.ones(4, 1)), r"layer_norm_bias has shape \(4, 1\)"),
    "integer tables": (refused(word_embeddings=torch.ones(5, 4).int()), "word_embeddings is torch.int32"),
    "dtypes": (refused(weight=torch.ones(4).half()), "weight is torch.float16 but word_embeddings is torch.float32"),
    "devices": (
        refused(layer_norm_bias=torch.ones(4, device="meta")),
        "layer_norm_bias is on meta but word_embeddings is on cpu",
    ),
    "impossible dropout": (refused(dropout_p=1.5), "dropout_p is 1.5"),
}


@pytest.mark.parametrize(("args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(args: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ops.embedding_layer_norm(**args)


def test_triton_launcher_refuses_dropout() -> None:
    from bert_fast.kernels.embedding_layer_norm import embedding_layer_norm

    with pytest.raises(ValueError, match=r"dropout_p is 0\.1"):
        embedding_layer_norm(*refused().values(), EPS, 0.1)
