"""residual_layer_norm and embedding_layer_norm in training: dropout, what is kept, and the gradients of the kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_given_gradients, assert_no_worse, to_double
from torch import Tensor

from bert_fast.ops._dropout import dropout

EPS = 1e-12  # BERT's
SEED = torch.tensor(0x123456789ABCDEF)


@pytest.fixture(scope="module", params=[p for p in parameters() if p.values[0].name == "triton"])
def implementation(request: pytest.FixtureRequest) -> Implementation:
    """Triton's alone; without this fixture, that of conftest.py, the C++ ones too."""
    return request.param


def residual_definition(
    x: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, layer_norm_bias: Tensor, dropout_p: float
) -> Tensor:
    hidden = dropout(x + bias, dropout_p, SEED) + residual
    return F.layer_norm(hidden, hidden.shape[-1:], weight, layer_norm_bias, EPS)


def residual_inputs(implementation: Implementation, *shape: int) -> list[Tensor]:
    """x, bias, residual, weight, layer_norm_bias."""
    x, residual = implementation.randn(*shape), implementation.randn(*shape)
    bias, weight, layer_norm_bias = (implementation.randn(shape[-1]) for _ in range(3))
    return [x, bias, residual, weight, layer_norm_bias]


def residual_backward(implementation: Implementation, inputs: list[Tensor], dropout_p: float, grad: Tensor) -> tuple:
    """The forward as well: (out, normalized, rstd), and the gradients in the order of the inputs."""
    kept = implementation("residual_layer_norm_train", *inputs, EPS, dropout_p, SEED)
    _, normalized, rstd = kept
    dx, *others = implementation(
        "residual_layer_norm_backward", grad, normalized, rstd, inputs[3], dropout_p, SEED, inputs[0].dtype
    )
    return kept, [dx, *others]


RESIDUAL_SHAPES = {
    "one element, whose variance is zero": (1, 1),
    "no leading dimension": (24,),
    "narrower than any vector": (3, 5),
    "one past a vector of 16 and of 32": (4, 33),
    "MiniLM, more tiles than programs under the interpreter": (17, 384),
    "BERT-base": (16, 768),
    "many short rows, several tiles": (150, 24),
    "several leading dimensions": (2, 3, 2, 10),
    "rows longer than one block": (8, 4100),
}
WITHOUT_OR_ALL_DROPPED = [(p, shape) for p in (0.0, 1.0) for shape in ((3, 5), (17, 384))]


@pytest.mark.parametrize(
    ("dropout_p", "shape"),
    [pytest.param(0.1, shape, id=name) for name, shape in RESIDUAL_SHAPES.items()] + WITHOUT_OR_ALL_DROPPED,
)
def test_residual(implementation: Implementation, dropout_p: float, shape: tuple[int, ...]) -> None:
    inputs, grad = residual_inputs(implementation, *shape), implementation.randn(*shape)
    definition = partial(residual_definition, dropout_p=dropout_p)
    (out, normalized, rstd), gradients = residual_backward(implementation, inputs, dropout_p, grad)
    assert_no_worse(out, definition(*inputs), definition(*map(to_double, inputs)), "out")
    assert out.is_contiguous()
    assert normalized.is_contiguous()

    x, bias, residual, *_ = inputs
    hidden = dropout(x.double() + bias.double(), dropout_p, SEED) + residual.double()
    rows = hidden.view(-1, shape[-1])
    plain = F.layer_norm((dropout(x + bias, dropout_p, SEED) + residual), shape[-1:], eps=EPS)
    assert_no_worse(normalized, plain, F.layer_norm(hidden, shape[-1:], eps=EPS), "normalized")
    torch.testing.assert_close(rstd.double(), (rows.var(-1, unbiased=False) + EPS).rsqrt(), rtol=1e-5, atol=0)

    assert_given_gradients(gradients, definition, inputs, grad)
    assert (gradients[0] is gradients[2]) == (dropout_p == 0)


@pytest.mark.parametrize("width", [40, 300, 384, 768, 1024])
def test_residual_cut_as_for_many_rows(
    implementation: Implementation, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bert_fast.kernels import rows

    monkeypatch.setattr(rows, "_FEW_PROGRAMS", 0)
    inputs, grad = residual_inputs(implementation, 9, width), implementation.randn(9, width)
    (out, *_), gradients = residual_backward(implementation, inputs, 0.1, grad)
    definition = partial(residual_definition, dropout_p=0.1)
    assert_no_worse(out, definition(*inputs), definition(*map(to_double, inputs)))
    assert_given_gradients(gradients, definition, inputs, grad)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_residual_with_16_bit_x_beside_float32(implementation: Implementation, dropout_p: float) -> None:
    """As under autocast."""
    if implementation.dtype == torch.float32:
        pytest.skip("its x is not of 16 bits")
    x, *others = residual_inputs(implementation, 5, 40)
    inputs, grad = [x, *(t.float() for t in others)], torch.randn(5, 40, device=x.device)
    (out, normalized, _), gradients = residual_backward(implementation, inputs, dropout_p, grad)
    assert out.dtype == normalized.dtype == torch.float32
    definition = partial(residual_definition, dropout_p=dropout_p)
    assert_no_worse(out, definition(*inputs), definition(*map(to_double, inputs)))
    assert_given_gradients(gradients, definition, inputs, grad)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_residual_layouts(implementation: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, grad = residual_inputs(implementation, 4, 3, 36), implementation.randn(4, 3, 36)
    (out, *_), gradients = residual_backward(implementation, list(map(layout, inputs)), 0.1, layout(grad))
    (expected, *_), expected_gradients = residual_backward(implementation, inputs, 0.1, grad)
    for given, contiguous in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        assert torch.equal(given, contiguous)


def test_residual_expanded_gradient(implementation: Implementation) -> None:
    """As of a sum."""
    inputs, grad = residual_inputs(implementation, 5, 36), implementation.tensor(1.0).expand(5, 36)
    _, gradients = residual_backward(implementation, inputs, 0.0, grad)
    _, expected = residual_backward(implementation, inputs, 0.0, grad.contiguous())
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_residual_zero_size(implementation: Implementation, shape: tuple[int, ...]) -> None:
    inputs, grad = residual_inputs(implementation, *shape), implementation.randn(*shape)
    (out, normalized, rstd), gradients = residual_backward(implementation, inputs, 0.1, grad)
    assert out.shape == normalized.shape == shape
    assert rstd.shape == (0,)
    for gradient, of in zip(gradients, inputs, strict=True):
        assert gradient.shape == of.shape
        assert gradient.dtype == of.dtype
        assert not gradient.any()


def test_residual_nan_stays_in_its_row(implementation: Implementation) -> None:
    inputs, grad = residual_inputs(implementation, 7, 40), implementation.randn(7, 40)
    _, (dx, _, dresidual, *_) = residual_backward(implementation, inputs, 0.1, grad)
    grad[2, 3] = float("nan")
    _, (dx_nan, dbias, dresidual_nan, dweight, dlayer_norm_bias) = residual_backward(implementation, inputs, 0.1, grad)
    assert dresidual_nan[2].isnan().all()
    assert dx_nan[2].isnan().any()
    for gradient, clean in ((dx_nan, dx), (dresidual_nan, dresidual)):
        gradient[2] = clean[2]
        assert torch.equal(gradient, clean)
    assert dbias.isnan().any()
    for gradient in (dweight, dlayer_norm_bias):
        assert torch.equal(gradient.isnan().nonzero(), torch.tensor([[3]], device=grad.device))


VOCABULARY, POSITIONS, TYPES = 50, 20, 2


def embedding_inputs(implementation: Implementation, shape: tuple[int, ...], hidden_size: int) -> tuple[list, list]:
    """The ids, of which some come often and some never; the three tables, weight, layer_norm_bias."""
    ids = [torch.randint(rows, shape) for rows in (VOCABULARY - 5, POSITIONS, TYPES)]
    ids[0][torch.rand(shape) < 0.5] = 3
    ids[0].view(-1)[:1] = VOCABULARY - 1
    tables = [implementation.randn(rows, hidden_size) for rows in (VOCABULARY, POSITIONS, TYPES)]
    vectors = [implementation.randn(hidden_size), implementation.randn(hidden_size)]
    return [t.to(implementation.device) for t in ids], tables + vectors


def embedding_definition(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    layer_norm_bias: Tensor,
    ids: list[Tensor],
    dropout_p: float,
    padding_idx: int | None = None,
) -> Tensor:
    input_ids, position_ids, token_type_ids = ids
    hidden = F.embedding(input_ids, word, padding_idx) + F.embedding(token_type_ids, token_type)
    hidden = hidden + F.embedding(position_ids, position)
    return dropout(F.layer_norm(hidden, hidden.shape[-1:], weight, layer_norm_bias, EPS), dropout_p, SEED)


def embedding_backward(
    implementation: Implementation,
    ids: list[Tensor],
    inputs: list[Tensor],
    dropout_p: float,
    grad: Tensor,
    padding_idx: int | None = None,
) -> tuple:
    """The forward as well: (out, normalized, rstd), and the gradients in the order of the inputs."""
    kept = implementation("embedding_layer_norm_train", *ids, *inputs, EPS, dropout_p, SEED)
    _, normalized, rstd = kept
    sizes = (VOCABULARY, POSITIONS, TYPES)
    gradients = implementation(
        "embedding_layer_norm_backward",
        *(grad, *ids, normalized, rstd, inputs[3], *sizes, dropout_p, SEED, padding_idx),
    )
    return kept, list(gradients)


EMBEDDING_SHAPES = {
    "one token of one channel, whose variance is zero": ((1,), 1),
    "no dimension: a single id": ((), 24),
    "narrower than any vector": ((3,), 5),
    "one past a vector of 16 and of 32": ((4,), 33),
    "MiniLM, more tiles than programs under the interpreter": ((17,), 384),
    "BERT-base, padded batch": ((2, 8), 768),
    "ids with more tokens than a piece": ((600,), 24),
}


@pytest.mark.parametrize(
    ("dropout_p", "shape", "hidden_size"),
    [pytest.param(0.1, *shape, id=name) for name, shape in EMBEDDING_SHAPES.items()]
    + [(0.0, (3,), 5), (1.0, (3,), 5), (0.0, (2, 8), 768)],
)
def test_embedding(implementation: Implementation, dropout_p: float, shape: tuple[int, ...], hidden_size: int) -> None:
    ids, inputs = embedding_inputs(implementation, shape, hidden_size)
    grad = implementation.randn(*shape, hidden_size)
    definition = partial(embedding_definition, ids=ids, dropout_p=dropout_p)
    (out, normalized, _), gradients = embedding_backward(implementation, ids, inputs, dropout_p, grad)
    assert_no_worse(out, definition(*inputs), definition(*map(to_double, inputs)), "out")
    assert out.is_contiguous()
    assert normalized.is_contiguous()
    assert_given_gradients(gradients, definition, inputs, grad)


def test_embedding_row_of_padding_gets_no_gradient(implementation: Implementation) -> None:
    ids, inputs = embedding_inputs(implementation, (300,), 20)
    grad = implementation.randn(300, 20)
    for padding_idx in (3, 0):  # many tokens, and few
        _, gradients = embedding_backward(implementation, ids, inputs, 0.0, grad, padding_idx)
        _, expected = embedding_backward(implementation, ids, inputs, 0.0, grad)
        assert expected[0][padding_idx].any()
        expected[0][padding_idx] = 0
        assert all(map(torch.equal, gradients, expected))


def test_embedding_layouts_and_int32_ids(implementation: Implementation) -> None:
    ids, inputs = embedding_inputs(implementation, (4, 6), 36)
    grad = implementation.randn(4, 6, 36)
    (expected, *_), expected_gradients = embedding_backward(implementation, ids, inputs, 0.1, grad)
    for layout in LAYOUTS.values():
        given = [layout(t) for t in ids[:1]] + [layout(t.int()) for t in ids[1:]]
        (out, *_), gradients = embedding_backward(implementation, given, list(map(layout, inputs)), 0.1, layout(grad))
        assert all(map(torch.equal, [out, *gradients], [expected, *expected_gradients]))


@pytest.mark.parametrize(("shape", "hidden_size"), [((0,), 8), ((3,), 0), ((2, 0), 4)], ids=str)
def test_embedding_zero_size(implementation: Implementation, shape: tuple[int, ...], hidden_size: int) -> None:
    ids, inputs = embedding_inputs(implementation, shape, hidden_size)
    grad = implementation.randn(*shape, hidden_size)
    (out, normalized, rstd), gradients = embedding_backward(implementation, ids, inputs, 0.1, grad)
    assert out.shape == normalized.shape == (*shape, hidden_size)
    assert rstd.shape == (ids[0].numel(),)
    for gradient, of in zip(gradients, inputs, strict=True):
        assert gradient.shape == of.shape
        assert gradient.dtype == of.dtype
        assert not gradient.any()


def test_embedding_nan_stays_with_its_token(implementation: Implementation) -> None:
    ids, inputs = embedding_inputs(implementation, (30,), 20)
    grad = implementation.randn(30, 20)
    _, expected = embedding_backward(implementation, ids, inputs, 0.0, grad)
    grad[4, 3] = float("nan")
    _, gradients = embedding_backward(implementation, ids, inputs, 0.0, grad)
    for gradient, clean, rows in zip(gradients[:3], expected[:3], ids, strict=True):
        row = rows[4]
        assert gradient[row].isnan().all()
        gradient[row] = clean[row]
        assert torch.equal(gradient, clean)


@pytest.mark.gpu
def test_the_same_bits_every_time() -> None:
    triton = Implementation("triton", torch.bfloat16, "cuda")
    ids, inputs = embedding_inputs(triton, (20_000,), 768)
    grad = triton.randn(20_000, 768)
    first, again = (embedding_backward(triton, ids, inputs, 0.1, grad)[1] for _ in range(2))
    assert all(map(torch.equal, first, again))
    rows = residual_inputs(triton, 20_000, 768)
    first, again = (residual_backward(triton, rows, 0.1, grad)[1] for _ in range(2))
    assert all(map(torch.equal, first, again))
