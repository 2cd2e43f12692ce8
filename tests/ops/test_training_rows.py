"""The C++ kernels of training that work row by row: forward, gradients, dropout, odd inputs, threads, refusals.

The definitions are plain PyTorch with the dropout of `bert_fast/ops/_dropout.py`, in float64 with the same seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import pi, prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from implementations import Implementation, parameters
from layouts import LAYOUTS
from numerics import assert_no_worse, to_double
from torch import Tensor

from bert_fast import _C
from bert_fast.ops._dropout import dropout
from bert_fast.ops.pooling import MODES
from bert_fast.ops.pooling import reference as pooling

EPS = 1e-12  # BERT's
PROBABILITIES = (0.0, 0.1, 1.0)


@pytest.fixture(scope="module", params=[p for p in parameters() if p.values[0].name == "cpp"])
def cpp(request: pytest.FixtureRequest) -> Iterator[Implementation]:
    """The C++ kernels at each instruction set, in each dtype."""
    if request.param.isa == "missing":
        pytest.fail("bert_fast._C is not there; build the extension: make dev")
    extension = importlib.import_module("bert_fast._C")
    before = extension.get_isa()
    extension.set_isa(request.param.isa)
    yield request.param
    extension.set_isa(before)


@pytest.fixture(params=[1, 2, 7], ids=lambda count: f"{count} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def seed_for(dropout_p: float) -> Tensor | None:
    return torch.tensor(2**62 + 77) if dropout_p > 0 else None


def outcome(definition: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    """The result of a definition and the gradients of its inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = definition(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def assert_training(
    fast: list[Tensor], definition: Callable[..., Tensor], upstream: Tensor, inputs: list[Tensor], names: str
) -> None:
    """The result and every gradient of a fused forward and backward are no worse than the plain definition's."""
    plain = outcome(definition, upstream, *inputs)
    truth = outcome(definition, upstream.double(), *map(to_double, inputs))
    for name, f, p, t in zip(["out", *names.split()], fast, plain, truth, strict=True):
        assert f.is_contiguous(), name
        assert_no_worse(f, p, t, name)


def assert_same(a: Any, b: Any) -> None:
    """The same bits, NaN included, in every tensor of two tuples."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------------ residual_layer_norm

RESIDUAL_NAMES = "x bias residual weight layer_norm_bias"

SHAPES = {
    "one element, whose variance is zero": (1, 1),
    "no leading dimension": (24,),
    "narrower than any vector, rows that are no multiple of four": (3, 5),
    "one past a vector of 16 and of 32": (5, 33),
    "one past the bytes of a call of the generator": (4, 129),
    "MiniLM, one row past the first sums": (65, 384),
    "BERT-base": (16, 768),
    "many short rows: sums of sums": (1300, 8),
    "several leading dimensions": (2, 3, 2, 10),
    "long rows": (12, 2056),
}


def residual_inputs(shape: tuple[int, ...], x_dtype: torch.dtype, dtype: torch.dtype) -> list[Tensor]:
    vectors = [torch.randn(shape[-1]).to(dtype) for _ in range(3)]
    return [torch.randn(shape).to(x_dtype), vectors[0], torch.randn(shape).to(dtype), *vectors[1:]]


def residual_definition(dropout_p: float, x: Tensor, bias: Tensor, residual: Tensor, *norm: Tensor) -> Tensor:
    hidden = dropout(x + bias, dropout_p, seed_for(dropout_p)) + residual
    return F.layer_norm(hidden, hidden.shape[-1:], *norm, EPS)


def run_residual(dropout_p: float, upstream: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """out and the gradients of the inputs, in their order."""
    seed, x, weight = seed_for(dropout_p), inputs[0], inputs[3]
    out, normalized, rstd = _C.residual_layer_norm_train(*inputs, EPS, dropout_p, seed)
    assert normalized.dtype == out.dtype == weight.dtype
    assert (rstd.dtype, rstd.shape) == (torch.float32, (prod(x.shape[:-1]),))
    dx, dbias, dresidual, dweight, dnorm_bias = _C.residual_layer_norm_backward(
        upstream, normalized, rstd, weight, dropout_p, seed, x.dtype
    )
    assert (dx is dresidual) == (dropout_p == 0 and x.dtype == weight.dtype)
    return [out, dx, dbias, dresidual, dweight, dnorm_bias]


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_residual_layer_norm(cpp: Implementation, shape: tuple[int, ...], dropout_p: float) -> None:
    inputs, upstream = residual_inputs(shape, cpp.dtype, cpp.dtype), cpp.randn(*shape)
    fast = run_residual(dropout_p, upstream, inputs)
    assert_training(fast, partial(residual_definition, dropout_p), upstream, inputs, RESIDUAL_NAMES)


@pytest.mark.parametrize("dropout_p", PROBABILITIES)
def test_residual_layer_norm_under_autocast(cpp: Implementation, dropout_p: float) -> None:
    """A product in bfloat16 beside parameters and a residual in float32."""
    shape = (37, 40)
    inputs, upstream = residual_inputs(shape, torch.bfloat16, torch.float32), torch.randn(shape)
    fast = run_residual(dropout_p, upstream, inputs)
    assert_training(fast, partial(residual_definition, dropout_p), upstream, inputs, RESIDUAL_NAMES)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_residual_layer_norm_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    inputs, upstream = residual_inputs((4, 3, 36), cpp.dtype, cpp.dtype), cpp.randn(4, 3, 36)
    expected = run_residual(0.1, upstream, inputs)
    assert_same(run_residual(0.1, layout(upstream), list(map(layout, inputs))), expected)


def test_residual_layer_norm_expanded_gradient(cpp: Implementation) -> None:
    inputs, upstream = residual_inputs((5, 36), cpp.dtype, cpp.dtype), cpp.randn(1, 1).expand(5, 36)
    assert_same(run_residual(0.1, upstream, inputs), run_residual(0.1, upstream.contiguous(), inputs))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_residual_layer_norm_zero_size(cpp: Implementation, shape: tuple[int, ...]) -> None:
    out, dx, *sums = run_residual(0.1, cpp.randn(*shape), residual_inputs(shape, cpp.dtype, cpp.dtype))
    assert out.shape == dx.shape == sums[1].shape == shape
    for vector in (sums[0], *sums[2:]):
        assert torch.equal(vector, torch.zeros(shape[-1], dtype=cpp.dtype))


def test_residual_layer_norm_nan_stays_in_its_row(cpp: Implementation) -> None:
    inputs, upstream = residual_inputs((40, 40), cpp.dtype, cpp.dtype), cpp.randn(40, 40)
    clean = run_residual(0.1, upstream, inputs)
    inputs[2][2, 3] = float("nan")
    out, dx, _, dresidual, *_ = run_residual(0.1, upstream, inputs)
    assert out[2].isnan().all()
    assert dresidual[2].isnan().all()
    assert (dx[2].isnan() | (dx[2] == 0)).all()  # zero where it was dropped
    for tensor, expected in ((out, clean[0]), (dx, clean[1]), (dresidual, clean[3])):
        tensor[2] = expected[2]
        assert torch.equal(tensor, expected)


def test_a_dropped_nan_is_zero(cpp: Implementation) -> None:
    inputs = residual_inputs((3, 20), cpp.dtype, cpp.dtype)
    clean = run_residual(1.0, torch.ones(3, 20, dtype=cpp.dtype), inputs)
    inputs[0] = torch.full_like(inputs[0], float("nan"))
    assert_same(run_residual(1.0, torch.ones(3, 20, dtype=cpp.dtype), inputs), clean)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)], ids=str)
def test_residual_layer_norm_threads(threads: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs, upstream = residual_inputs((333, 384), *dtypes), torch.randn(333, 384)
    several = run_residual(0.1, upstream, inputs)
    torch.set_num_threads(1)
    assert_same(several, run_residual(0.1, upstream, inputs))


# ----------------------------------------------------------------------------------------------- embedding_layer_norm

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


# ---------------------------------------------------------------------------------------------------------- bias_gelu


def gelu_definition(approximate: str, x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate=approximate)


def assert_gelu(upstream: Tensor, x: Tensor, bias: Tensor, approximate: str) -> None:
    definition = partial(gelu_definition, approximate)
    plain = outcome(definition, upstream, x, bias)
    truth = outcome(definition, upstream.double(), x.double(), bias.double())
    fast = _C.bias_gelu_backward(upstream, x, bias, approximate)
    for name, f, p, t in zip(("dx", "dbias"), fast, plain[1:], truth[1:], strict=True):
        assert f.is_contiguous()
        assert_no_worse(f, p, t, name)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_bias_gelu(cpp: Implementation, shape: tuple[int, ...], approximate: str) -> None:
    assert_gelu(cpp.randn(*shape), 2 * cpp.randn(*shape), cpp.randn(shape[-1]), approximate)


def gelu_slope(x: Tensor, approximate: str) -> tuple[Tensor, Tensor, Tensor]:
    """The derivative at float64 x as a sum of two terms, neither with the cancellation of `1 + erf` and `1 + tanh`.

    Returns:
        The terms, and the exponent of the exponential in them.
    """
    if approximate == "none":
        density = torch.exp(-x.square() / 2) / (2 * pi) ** 0.5
        return torch.erfc(-x / 2**0.5) / 2, x * density, x.square() / 2
    two_z, slope = (factor * (2 / pi) ** 0.5 * 2 for factor in (x + 0.044715 * x**3, 1 + 3 * 0.044715 * x.square()))
    return two_z.sigmoid(), x * slope * two_z.sigmoid() * (-two_z).sigmoid(), two_z.abs()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_in_the_tails(cpp: Implementation, approximate: str) -> None:
    """Where plain PyTorch gives zero or noise, the digits of the derivative are right down to -8."""
    x = torch.linspace(-8, 8, 4001).to(cpp.dtype).clamp(-8, 8)
    dx, _ = _C.bias_gelu_backward(torch.ones_like(x), x, torch.zeros_like(x), approximate)
    first, second, exponent = gelu_slope(x.double(), approximate)
    error = (16 + 4 * exponent) * 2**-24  # without FMA the exponent is rounded, to so many parts of the exponential
    allowed = error * (first.abs() + second.abs()) + torch.finfo(cpp.dtype).eps * (first + second).abs()
    assert ((dx.double() - (first + second)).abs() <= allowed).all()
    far = cpp.tensor([-1e30, -200.0, 200.0, 1e30, -float("inf"), float("inf"), float("nan")])
    dx, _ = _C.bias_gelu_backward(torch.ones_like(far), far, torch.zeros_like(far), approximate)
    limits = torch.tensor([0, 0, 1, 1, 0, 1, torch.nan])
    torch.testing.assert_close(dx.float(), limits, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_bias_gelu_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor]) -> None:
    args = (cpp.randn(4, 3, 36), cpp.randn(4, 3, 36), cpp.randn(36))
    assert_same(_C.bias_gelu_backward(*map(layout, args), "none"), _C.bias_gelu_backward(*args, "none"))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)], ids=str)
def test_bias_gelu_zero_size(cpp: Implementation, shape: tuple[int, ...]) -> None:
    dx, dbias = _C.bias_gelu_backward(cpp.randn(*shape), cpp.randn(*shape), cpp.randn(shape[-1]), "none")
    assert dx.shape == shape
    assert torch.equal(dbias, torch.zeros(shape[-1], dtype=cpp.dtype))


def test_bias_gelu_threads(threads: int) -> None:
    args = (torch.randn(333, 200), torch.randn(333, 200), torch.randn(200), "none")
    several = _C.bias_gelu_backward(*args)
    torch.set_num_threads(1)
    assert_same(several, _C.bias_gelu_backward(*args))


# ------------------------------------------------------------------------------------------------------------ pooling

SEQUENCES = {
    "one token of one channel": ([1], 1),
    "empty sequences first, between and last": ([0, 3, 0, 0, 5, 0], 20),
    "only empty sequences": ([0, 0], 20),
    "MiniLM, several blocks of channels": ([4, 7, 70], 384),
    "channels one past a block": ([3, 2], 129),
}


def pooling_gradient(grad: Tensor, hidden: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    return outcome(lambda h: pooling(h, cu_seqlens, mode), grad, hidden)[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), SEQUENCES.values(), ids=SEQUENCES.keys())
def test_pooling(cpp: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden, grad = cpp.randn(sum(lengths), hidden_size), cpp.randn(len(lengths), hidden_size)
    args = (cpp.cu_seqlens(lengths), mode)
    fast = _C.pooling_backward(grad, hidden, *args)
    plain, truth = (pooling_gradient(grad.to(d), hidden.to(d), *args) for d in (cpp.dtype, torch.float64))
    assert_no_worse(fast, plain, truth)


def test_pooling_ties_share(cpp: Implementation) -> None:
    hidden, grad = cpp.randn(30, 20).round(), cpp.randn(2, 20)
    args = (cpp.cu_seqlens([13, 17]), "max")
    truth = pooling_gradient(grad.double(), hidden.double(), *args)
    assert_no_worse(_C.pooling_backward(grad, hidden, *args), pooling_gradient(grad, hidden, *args), truth)
    assert (truth[:13].count_nonzero(0) > 1).any()


def test_pooling_nan_and_infinities_as_amax_has_them(cpp: Implementation) -> None:
    hidden, grad = cpp.randn(30, 20), cpp.randn(2, 20)
    hidden[3, 4], hidden[20, 5], hidden[21, 5], hidden[:13, 6] = torch.nan, torch.inf, torch.inf, -torch.inf
    args = (cpp.cu_seqlens([13, 17]), "max")
    torch.testing.assert_close(
        _C.pooling_backward(grad, hidden, *args), pooling_gradient(grad, hidden, *args), equal_nan=True
    )


@pytest.mark.parametrize("mode", MODES)
def test_pooling_of_rows_past_the_last_sequence(cpp: Implementation, mode: str) -> None:
    hidden, grad, cu_seqlens = cpp.randn(9, 20), cpp.randn(2, 20), cpp.cu_seqlens([3, 4])
    fast = _C.pooling_backward(grad, hidden, cu_seqlens, mode)
    assert torch.equal(fast[:7], _C.pooling_backward(grad, hidden[:7], cu_seqlens, mode))
    assert not fast[7:].any()
    none = _C.pooling_backward(grad[:0], hidden, cpp.cu_seqlens([]), mode)
    assert torch.equal(none, torch.zeros_like(hidden))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_pooling_layouts(cpp: Implementation, layout: Callable[[Tensor], Tensor], mode: str) -> None:
    args = (cpp.randn(3, 36), cpp.randn(10, 36), cpp.cu_seqlens([3, 0, 7]))
    assert torch.equal(_C.pooling_backward(*map(layout, args), mode), _C.pooling_backward(*args, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("lengths", "hidden_size"), [([], 8), ([3, 2], 0), ([0], 0)], ids=str)
def test_pooling_zero_size(cpp: Implementation, lengths: list[int], hidden_size: int, mode: str) -> None:
    hidden, grad = cpp.randn(sum(lengths), hidden_size), cpp.randn(len(lengths), hidden_size)
    assert _C.pooling_backward(grad, hidden, cpp.cu_seqlens(lengths), mode).shape == hidden.shape


# ------------------------------------------------------------------------------------------------------ cross_entropy

LOGITS = {
    "one class: nothing to learn": (3, 1),
    "two": (5, 2),
    "less than a vector": (4, 7),
    "one past four vectors of 16": (3, 65),
    "one past the blocks of sums": (12, 513),
    "BERT's vocabulary": (3, 30522),
}


def cross_entropy_gradients(logits: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """softmax - onehot by plain PyTorch, and the truth: at the label minus the others, as 1 is no digit of it."""
    plain = outcome(lambda x: F.cross_entropy(x + bias, labels, reduction="sum"), torch.tensor(1.0), logits)[1]
    index = labels[:, None]
    others = (logits.double() + bias.double()).softmax(-1).scatter(1, index, 0.0)
    return plain, others.scatter(1, index, -others.sum(-1, keepdim=True))


@pytest.mark.parametrize("bias_dtype", [None, torch.float32], ids=["own bias", "float32 bias"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize(("rows", "classes"), LOGITS.values(), ids=LOGITS.keys())
def test_cross_entropy(
    cpp: Implementation, rows: int, classes: int, scale: float, bias_dtype: torch.dtype | None
) -> None:
    logits, bias = cpp.randn(rows, classes) * scale, cpp.randn(classes).to(bias_dtype or cpp.dtype)
    labels = torch.randint(classes, (rows,))
    labels[:2] = torch.tensor([0, classes - 1])  # the ends of a row
    truth = F.cross_entropy((logits.double() + bias.double()), labels, reduction="none")
    plain = F.cross_entropy((logits.float() + bias.float()), labels, reduction="none")
    gradients = cross_entropy_gradients(logits, bias, labels)
    losses = _C.cross_entropy_(logits, bias, labels)
    assert_no_worse(losses, plain, truth, "losses")
    assert_no_worse(logits, *gradients, "gradient")


def test_cross_entropy_of_many_classes(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(2, 300_000), cpp.randn(300_000), torch.tensor([299_999, 5])
    gradients = cross_entropy_gradients(logits, bias, labels)
    _C.cross_entropy_(logits, bias, labels)
    assert_no_worse(logits, *gradients, "gradient")


def test_cross_entropy_of_equal_logits_is_the_logarithm_of_their_number(cpp: Implementation) -> None:
    logits = torch.full((2, 64), 1e4, dtype=cpp.dtype)
    losses = _C.cross_entropy_(logits, torch.zeros(64, dtype=cpp.dtype), torch.tensor([3, 60]))
    torch.testing.assert_close(losses, torch.full((2,), 64.0).log())
    assert logits[0, 0] == 1 / 64
    assert logits[0, 3] == cpp.tensor(1 / 64 - 1)


def test_cross_entropy_of_an_almost_certain_label(cpp: Implementation) -> None:
    logits = cpp.tensor([[0.0, -1.0, 15.0, -2.0]])
    others = sum(torch.tensor([-15.0, -16.0, -17.0], dtype=torch.float64).exp())
    losses = _C.cross_entropy_(logits, torch.zeros(4, dtype=cpp.dtype), torch.tensor([2]))
    torch.testing.assert_close(losses.double(), torch.log1p(others)[None], rtol=1e-5, atol=0)
    expected = -others / (1 + others)
    torch.testing.assert_close(logits[0, 2].double(), expected, rtol=1e-5 + torch.finfo(cpp.dtype).eps, atol=0)


def test_cross_entropy_odd_logits_stay_in_their_row(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(4, 100), cpp.randn(100), torch.randint(1, 100, (4,))
    clean = logits.clone()
    clean_losses = _C.cross_entropy_(clean, bias, labels)
    logits[0, 99], logits[1, 5], logits[2, 0] = torch.nan, torch.inf, -torch.inf
    losses = _C.cross_entropy_(logits, bias, labels)
    assert losses[:2].isnan().all()
    assert logits[:2].isnan().all()
    assert logits[2, 0] == 0
    assert logits[2].isfinite().all()
    assert losses[3] == clean_losses[3]
    assert torch.equal(logits[3], clean[3])


def test_cross_entropy_zero_size(cpp: Implementation) -> None:
    for classes in (0, 5):
        losses = _C.cross_entropy_(cpp.randn(0, classes), cpp.randn(classes), torch.zeros(0, dtype=torch.int64))
        assert (losses.dtype, losses.shape) == (torch.float32, (0,))


def test_cross_entropy_bias_and_labels_in_any_layout(cpp: Implementation) -> None:
    logits, bias, labels = cpp.randn(5, 40), cpp.randn(40), torch.randint(40, (5,))
    other = logits.clone()
    losses = _C.cross_entropy_(logits, bias, labels)
    spread = [torch.stack([t, t + 1], -1)[..., 0] for t in (bias, labels)]
    assert_same((_C.cross_entropy_(other, *spread), other), (losses, logits))


def test_cross_entropy_threads(threads: int) -> None:
    logits, bias, labels = torch.randn(50, 3000), torch.randn(3000), torch.randint(3000, (50,))
    other = logits.clone()
    losses = _C.cross_entropy_(logits, bias, labels)
    torch.set_num_threads(1)
    assert_same((losses, logits), (_C.cross_entropy_(other, bias, labels), other))


# ----------------------------------------------------------------------------------------------------------- refusals


def train_args(**changes: Any) -> list[Any]:
    args = {"x": torch.ones(2, 3), "bias": torch.ones(3), "residual": torch.ones(2, 3), "weight": torch.ones(3)}
    args |= {"layer_norm_bias": torch.ones(3), "eps": EPS, "dropout_p": 0.1, "seed": torch.tensor(1)}
    return list({**args, **changes}.values())


def backward_args(**changes: Any) -> list[Any]:
    args = {"grad": torch.ones(2, 3), "normalized": torch.ones(2, 3), "rstd": torch.ones(2), "weight": torch.ones(3)}
    return list({**args, "dropout_p": 0.0, "seed": None, "x_dtype": torch.float32, **changes}.values())


def embedding_args(**changes: Any) -> list[Any]:
    args = {"grad": torch.ones(2, 3), "input_ids": torch.tensor([0, 4]), "position_ids": torch.tensor([0, 1])}
    args |= {"token_type_ids": torch.tensor([0, 1]), "normalized": torch.ones(2, 3), "rstd": torch.ones(2)}
    args |= {"weight": torch.ones(3), "vocab_rows": 5, "position_rows": 2, "token_type_rows": 2, "dropout_p": 0.0}
    return list({**args, "seed": None, "padding_idx": None, **changes}.values())


REFUSED: dict[str, tuple[str, list[Any], str]] = {
    "half": ("residual_layer_norm_train", train_args(residual=torch.ones(2, 3).half()), "residual is torch.float16"),
    "float32 beside bfloat16": (
        "residual_layer_norm_train",
        train_args(**{name: torch.ones(3).bfloat16() for name in ("bias", "weight", "layer_norm_bias")})[:2]
        + train_args(residual=torch.ones(2, 3).bfloat16())[2:],
        "x is torch.float32 but residual is torch.bfloat16",
    ),
    "residual's shape": ("residual_layer_norm_train", train_args(residual=torch.ones(3)), r"residual has shape \(3,\)"),
    "bias's shape": ("residual_layer_norm_train", train_args(bias=torch.ones(2)), r"bias has shape \(2,\)"),
    "an impossible probability": ("residual_layer_norm_train", train_args(dropout_p=1.5), r"dropout_p is 1\.5"),
    "no number": ("residual_layer_norm_train", train_args(dropout_p=float("nan")), "dropout_p is nan"),
    "no seed": ("residual_layer_norm_train", train_args(seed=None), r"dropout_p is 0\.1 without a seed"),
    "several seeds": ("residual_layer_norm_train", train_args(seed=torch.ones(2).long()), r"shape \(2,\), expected an"),
    "a seed of floats": ("residual_layer_norm_train", train_args(seed=torch.tensor(1.0)), "seed is torch.float32"),
    "grad's shape": ("residual_layer_norm_backward", backward_args(grad=torch.ones(3, 3)), r"grad has shape \(3, 3\)"),
    "grad's dtype": (
        "residual_layer_norm_backward",
        backward_args(grad=torch.ones(2, 3).bfloat16()),
        "grad is torch.b",
    ),
    "rstd's shape": ("residual_layer_norm_backward", backward_args(rstd=torch.ones(3)), r"rstd has shape \(3,\)"),
    "rstd's dtype": (
        "residual_layer_norm_backward",
        backward_args(rstd=torch.ones(2).double()),
        "rstd is torch.float64",
    ),
    "x_dtype": ("residual_layer_norm_backward", backward_args(x_dtype=torch.half), "x_dtype is torch.float16"),
    "an id": ("embedding_layer_norm_backward", embedding_args(vocab_rows=4), r"input_ids 4 at index 1 .* \[0, 4\)"),
    "ids' shape": (
        "embedding_layer_norm_backward",
        embedding_args(position_ids=torch.ones(3).long()),
        "position_ids has",
    ),
    "padding_idx": ("embedding_layer_norm_backward", embedding_args(padding_idx=5), "padding_idx is 5"),
    "negative rows": ("embedding_layer_norm_backward", embedding_args(position_rows=-1), "position_rows is -1"),
    "form": ("bias_gelu_backward", [torch.ones(2, 3), torch.ones(2, 3), torch.ones(3), "erf"], "approximate is 'erf'"),
    "gelu's grad": ("bias_gelu_backward", [torch.ones(3), torch.ones(2, 3), torch.ones(3), "none"], "grad has shape"),
    "too few tokens": (
        "pooling_backward",
        [torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 3], dtype=torch.int32), "mean"],
        "cu_seqlens runs from 0 to 3, expected 0 to 2",
    ),
    "mode": (
        "pooling_backward",
        [torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0, 2], dtype=torch.int32), "sum"],
        "mode is 'sum'",
    ),
    "pooling's grad": (
        "pooling_backward",
        [torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0, 2], dtype=torch.int32), "mean"],
        r"grad has shape \(2, 3\), expected \(1, 3\)",
    ),
    "a label": (
        "cross_entropy_",
        [torch.ones(2, 3), torch.ones(3), torch.tensor([0, -100])],
        r"labels -100 at index 1 is out of range \[0, 3\)",
    ),
    "labels' shape": ("cross_entropy_", [torch.ones(2, 3), torch.ones(3), torch.tensor([0])], "labels has shape"),
    "strided logits": (
        "cross_entropy_",
        [torch.ones(3, 2).T, torch.ones(3), torch.tensor([0, 1])],
        "logits has strides",
    ),
    "logits' dtype": ("cross_entropy_", [torch.ones(2, 3).half(), torch.ones(3), torch.tensor([0, 1])], "logits is"),
    "bias's dtype": (
        "cross_entropy_",
        [torch.ones(2, 3), torch.ones(3).double(), torch.tensor([0, 1])],
        "bias is torch",
    ),
}


@pytest.mark.parametrize(("function", "args", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(function: str, args: list[Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(_C, function)(*args)
