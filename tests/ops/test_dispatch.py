"""Which implementation runs: the order, every refusal, forcing, warnings; the registered form of the ops."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast import ops
from bert_fast.ops import FallbackWarning, Impl, Op, Traits, _dispatch
from bert_fast.ops.attention import OP as ATTENTION
from bert_fast.ops.attention_probabilities import OP as ATTENTION_PROBABILITIES
from bert_fast.ops.bias_gelu import OP as BIAS_GELU
from bert_fast.ops.dense import OP as DENSE
from bert_fast.ops.embedding_layer_norm import OP as EMBEDDING_LAYER_NORM
from bert_fast.ops.linear import OP as LINEAR
from bert_fast.ops.linear import PackedWeight
from bert_fast.ops.linear_gelu import OP as LINEAR_GELU
from bert_fast.ops.masked_lm_loss import OP as MASKED_LM_LOSS
from bert_fast.ops.pooling import OP as POOLING
from bert_fast.ops.residual_layer_norm import OP as RESIDUAL_LAYER_NORM

#: LINEAR is not one of them: weights are packed for the CPU only.
OPS = (ATTENTION, BIAS_GELU, EMBEDDING_LAYER_NORM, POOLING, RESIDUAL_LAYER_NORM)


def missing() -> Callable[..., Tensor]:
    raise ImportError("no module named nothing")


def narrow_only(traits: Traits) -> str | None:
    return f"takes head_dim up to 8, not {traits.head_dim}" if traits.head_dim > 8 else None


def plain(x: Tensor) -> Tensor:
    return x + 1


def quick(x: Tensor) -> Tensor:
    return x + 1


def check(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}")


BOTH = (torch.float32, torch.float16)
TOY = Op(
    "toy",
    "(Tensor x) -> Tensor",
    reference=plain,
    fake=torch.empty_like,
    check=check,
    impls=(
        Impl("elsewhere", "cuda", BOTH, lambda: quick),
        Impl("broken", "cpu", (torch.float32,), missing),
        Impl("narrow", "cpu", (torch.float32,), lambda: quick, narrow_only),
        Impl("quick", "cpu", BOTH, lambda: quick),
    ),
)


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(TOY, "_selections", {})


def test_the_first_that_serves_runs_and_the_others_say_why_not() -> None:
    assert TOY.select("cuda", torch.float32).name == "elsewhere"
    narrow = TOY.select("cpu", torch.float32, Traits(head_dim=8))
    assert narrow.name == "narrow"
    assert narrow.run is quick
    assert dict(narrow.refusals) == {
        "elsewhere": "runs on cuda, not on cpu",
        "broken": "cannot be loaded: no module named nothing",
    }
    wide = TOY.select("cpu", torch.float32, Traits(head_dim=9))
    assert wide.name == "quick"
    assert dict(wide.refusals)["narrow"] == "takes head_dim up to 8, not 9"
    assert dict(TOY.select("cpu", torch.float16).refusals)["narrow"] == "takes float32, not float16"


def test_a_choice_is_made_once() -> None:
    first = TOY.select("cpu", torch.float32)
    assert TOY.select("cpu", torch.float32) is first
    assert TOY.select("cpu", torch.float16) is not first


def test_dropout_and_unknown_dtypes_take_the_definition() -> None:
    with pytest.warns(FallbackWarning):
        dropout = TOY.select("cpu", torch.float32, Traits(dropout=True))
    assert (dropout.name, dropout.run) == ("reference", plain)
    assert dict(dropout.refusals)["quick"] == "has no dropout"
    assert TOY.select("cpu", torch.float64).name == "reference"


def test_fall_back_warns_once_and_says_why() -> None:
    with pytest.warns(FallbackWarning) as caught:
        TOY.select("cpu", torch.bfloat16)
    assert any("quick takes float32, float16, not bfloat16" in str(warning.message) for warning in caught)
    assert len(caught) == 3  # one for each implementation of this device
    TOY._selections.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TOY.select("cpu", torch.bfloat16)


def test_no_warning_where_the_definition_is_what_is_wanted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TOY.select("cpu", torch.float64)  # the dtype of the truth
        TOY.select("cpu", torch.float32, impl="reference")
        TOY.select("meta", torch.float32)  # no implementation there to fall back from
        TOY.select("cpu", torch.float32)  # one refused, another serves


def test_forcing_is_honoured_or_raises() -> None:
    assert TOY.select("cpu", torch.float32, impl="quick").name == "quick"
    assert TOY.select("cpu", torch.float32, impl="reference").run is plain
    for impl, reason in {
        "elsewhere": "runs on cuda, not on cpu",
        "broken": "cannot be loaded: no module named nothing",
    }.items():
        with pytest.raises(ValueError, match=f"toy: {impl} is forced but {reason}"):
            TOY.select("cpu", torch.float32, impl=impl)
    with pytest.raises(ValueError, match="toy: quick is forced but has no dropout"):
        TOY.select("cpu", torch.float32, Traits(dropout=True), impl="quick")
    with pytest.raises(ValueError, match="toy has no implementation 'fastest'; it has: elsewhere, broken, narrow"):
        TOY(torch.ones(2), impl="fastest")


def test_force_is_undone_and_yields_to_impl() -> None:
    with ops.force("reference"):
        assert TOY.select("cpu", torch.float32).name == "reference"
        assert TOY.select("cpu", torch.float32, impl="quick").name == "quick"
        with ops.force("quick"):
            assert TOY.select("cpu", torch.float32).name == "quick"
        with ops.force(None):
            assert TOY.select("cpu", torch.float32).name == "narrow"
    with pytest.raises(RuntimeError, match="inside"), ops.force("reference"):
        raise RuntimeError("inside")
    assert TOY.select("cpu", torch.float32).name == "narrow"


def test_what_is_refused_never_reaches_an_implementation() -> None:
    with pytest.raises(ValueError, match=r"x is torch\.int64"):
        TOY(torch.ones(2, dtype=torch.int64), impl="quick")


def test_gradient_is_the_definitions_and_only_where_asked() -> None:
    x = torch.randn(3, requires_grad=True)
    out = TOY(x, impl="quick")
    upstream = torch.randn(3)
    (dx,) = torch.autograd.grad(out, x, upstream)
    assert torch.equal(dx, upstream)
    assert not TOY(x.detach(), impl="quick").requires_grad
    with torch.no_grad():
        assert not TOY(x, impl="quick").requires_grad


@pytest.mark.parametrize(
    ("forced", "expected"),
    [
        ("reference", "reference"),
        ("", "nothing forced"),
        ("triton", "ValueError: bias_gelu: triton is forced but runs on cuda, not on cpu"),
        ("fastest", "ValueError: bias_gelu has no implementation 'fastest'; it has: triton, cpp, reference"),
    ],
)
def test_environment_variable(forced: str, expected: str) -> None:
    script = (
        "import torch, warnings; from bert_fast import ops; from bert_fast.ops import _dispatch\n"
        "from bert_fast.ops.bias_gelu import OP\n"
        "if _dispatch._forced is None: print('nothing forced')\n"
        "else: print(OP.select('cpu', torch.float32).name)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "BERT_FAST_IMPL": forced},
        capture_output=True,
        text=True,
        check=False,
    )
    assert expected in (done.stderr if "Error" in expected else done.stdout)
    assert (done.returncode != 0) == ("Error" in expected)


def test_attention_past_the_largest_head_is_refused_by_triton() -> None:
    triton = next(impl for impl in ATTENTION.impls if impl.name == "triton")
    assert triton.refusal("cuda", torch.float16, Traits(head_dim=256)) is None
    assert triton.refusal("cuda", torch.float16, Traits(head_dim=257)) == "takes head_dim up to 256, not 257"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op_has_the_two_fused_implementations_and_they_load(op: Op) -> None:
    assert [(impl.name, impl.device) for impl in op.impls] == [("triton", "cuda"), ("cpp", "cpu")]
    for impl in op.impls:
        assert impl.refusal(impl.device, torch.float32, Traits()) is None


def calls() -> dict[str, tuple[Op, list[Any]]]:
    """Name -> an op and its arguments; floating-point tensors ask for gradients."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    cu_seqlens = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)
    token_ids = [torch.randint(2, (2, 4)) for _ in range(3)]
    tables = [randn(rows, 6) for rows in (5, 4, 2)]
    weight = PackedWeight.pack(torch.randn(5, 6), torch.randn(5), precision="int8")
    packed = [weight.panels, weight.vectors, weight.out_features, weight.in_features]
    return {
        "linear, with an activation": (LINEAR, [randn(4, 6), *packed, "gelu", None, None, None, 1e-12]),
        "linear, with a LayerNorm": (LINEAR, [randn(4, 6), *packed, None, randn(4, 5), randn(5), randn(5), 1e-12]),
        "dense": (DENSE, [randn(4, 6), randn(5, 6), randn(5)]),
        "masked_lm_loss": (MASKED_LM_LOSS, [randn(4, 6), randn(9, 6), randn(9), torch.tensor([0, 8, 3, 3]), 2.0]),
        "bias_gelu": (BIAS_GELU, [randn(4, 6), randn(6), "none"]),
        "residual_layer_norm": (
            RESIDUAL_LAYER_NORM,
            [randn(4, 6), randn(6), randn(4, 6), randn(6), randn(6), 1e-12, 0.0, None],
        ),
        "residual_layer_norm, with dropout": (
            RESIDUAL_LAYER_NORM,
            [randn(4, 6), randn(6), randn(4, 6), randn(6), randn(6), 1e-12, 0.3, torch.tensor(7)],
        ),
        "embedding_layer_norm": (
            EMBEDDING_LAYER_NORM,
            [*token_ids, *tables, randn(6), randn(6), 1e-12, 0.0, None, None],
        ),
        "linear_gelu": (LINEAR_GELU, [randn(3, 6), randn(4, 6), randn(4), "none"]),
        "pooling": (POOLING, [randn(8, 6), cu_seqlens, "mean"]),
        "attention, ragged": (
            ATTENTION,
            [randn(8, 2, 4), randn(8, 2, 4), randn(8, 2, 4), cu_seqlens, 5, None, 0.5, 0.0, None, None, None],
        ),
        "attention, masked": (
            ATTENTION,
            [randn(2, 4, 2, 4), randn(2, 4, 2, 4), randn(2, 4, 2, 4), None, 4, mask, 0.5, 0.0, None, None, None],
        ),
        "attention, with dropout": (
            ATTENTION,
            [
                randn(8, 2, 4),
                randn(8, 2, 4),
                randn(8, 2, 4),
                cu_seqlens,
                5,
                None,
                0.5,
                0.3,
                None,
                None,
                torch.tensor(7),
            ],
        ),
        "attention, with a bias": (
            ATTENTION,
            [randn(8, 2, 4), randn(8, 2, 4), randn(8, 2, 4), cu_seqlens, 5, None, 0.5, 0.0, randn(2, 5, 5), None, None],
        ),
        "attention_probabilities": (
            ATTENTION_PROBABILITIES,
            [randn(8, 3, 4), randn(8, 3, 4), cu_seqlens, 5, [2, 0], 0.5, randn(3, 5, 5)],
        ),
    }


CALLS = tuple(calls())

#: The public functions, taking the arguments of their schemas.
PUBLIC: dict[str, Callable[..., Tensor]] = {
    "linear": lambda x, panels, vectors, out_features, in_features, activation, residual, *norm: ops.linear(
        x,
        PackedWeight(panels, vectors, out_features, in_features),
        activation=activation,
        residual=residual,
        layer_norm=None if norm[0] is None else norm,
    ),
    "linear_gelu": lambda x, weight, bias, form: ops.linear_gelu(x, weight, bias, approximate=form),
    "dense": lambda x, weight, bias: ops.dense(x, weight, bias),
    "masked_lm_loss": lambda hidden, weight, bias, labels, divisor: ops.masked_lm_loss(
        hidden, weight, bias, labels, divisor=divisor
    ),
    "bias_gelu": lambda x, bias, form: ops.bias_gelu(x, bias, approximate=form),
    "residual_layer_norm": lambda *args: ops.residual_layer_norm(
        *args[:5], eps=args[5], dropout_p=args[6], seed=args[7]
    ),
    "embedding_layer_norm": lambda *args: ops.embedding_layer_norm(
        *args[:8], eps=args[8], dropout_p=args[9], padding_idx=args[10], seed=args[11]
    ),
    "pooling": lambda hidden, cu_seqlens, mode: ops.pooling(hidden, cu_seqlens, mode=mode),
    "attention": lambda q, k, v, cu_seqlens, max_seqlen, mask, scale, dropout_p, bias, schedule, seed: ops.attention(
        q,
        k,
        v,
        cu_seqlens=cu_seqlens,
        max_seqlen=None if cu_seqlens is None else max_seqlen,
        attention_mask=mask,
        scale=scale,
        dropout_p=dropout_p,
        bias=bias,
        schedule=schedule,
        seed=seed,
    ),
    "attention_probabilities": lambda q, k, cu_seqlens, max_seqlen, heads, scale, bias: ops.attention_probabilities(
        q, k, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, heads=heads, scale=scale, bias=bias
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_registered_form_keeps_the_rules_of_torch_library(name: str) -> None:
    op, args = calls()[name]
    torch.library.opcheck(getattr(torch.ops.bert_fast, op.name).default, args)
    if op.gradient is not None:
        torch.library.opcheck(getattr(torch.ops.bert_fast, f"{op.name}_train").default, args)


@pytest.mark.parametrize("name", CALLS)
def test_registered_form_checks_its_input(name: str) -> None:
    op, args = calls()[name]
    wrong = [a.to(torch.complex64) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    with pytest.raises(ValueError, match="expected a floating-point tensor"):
        getattr(torch.ops.bert_fast, op.name)(*wrong)


TRAINED = [
    name for name, (op, args) in calls().items() if op.gradient and op is not DENSE and op.gradient.serves(*args)
]


@pytest.mark.parametrize("name", TRAINED)
def test_tritons_launchers_of_training_take_what_the_op_gives(name: str) -> None:
    """Result and gradients as the definition's, through the same functions that run on a GPU."""
    op, args = calls()[name]
    assert op.gradient is not None
    impl = next(i for i in op.impls if i.name == "triton")
    assert impl.load_training is not None
    launchers, plain_args = impl.load_training(), [a.detach() if isinstance(a, Tensor) else a for a in args]
    result, *saved = op.gradient.forward(launchers, *plain_args)
    for tensor, like in zip(saved, op.gradient.fake(*plain_args), strict=True):
        assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
    expected = op.reference(*args)
    torch.testing.assert_close(result, expected.detach())
    upstream = torch.randn_like(expected)
    needed = [isinstance(a, Tensor) and a.requires_grad for a in args]
    leaves = [a for a, need in zip(args, needed, strict=True) if need]
    kept = [
        a if index in op.gradient.reads or not isinstance(a, Tensor) else a.new_empty(()).expand(a.shape)
        for index, a in enumerate(plain_args)
    ]
    grads = op.gradient.backward(launchers, upstream, result if op.gradient.reads_result else None, saved, kept, needed)
    found = [g for g, need in zip(grads, needed, strict=True) if need]
    for got, wanted in zip(found, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def run_with_gradients(function: Callable[..., Tensor], args: list[Any]) -> list[Tensor]:
    """The result, and the gradients of the floating-point arguments under a fixed upstream gradient."""
    leaves = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    out = function(*args)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_is_eager(name: str, backend: str) -> None:
    op, args = calls()[name]

    def function(*args: Any) -> Tensor:
        return PUBLIC[op.name](*args) * 1.5  # something of the compiler's own around the op

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for got, expected in zip(run_with_gradients(compiled, args), run_with_gradients(function, args), strict=True):
        assert torch.equal(got, expected)


def test_dispatch_overhead(benchmark: Any) -> None:
    x = torch.ones(1)
    nothing = Op(
        "nothing",
        "(Tensor x) -> Tensor",
        plain,
        torch.empty_like,
        lambda x: None,
        [Impl("id", "cpu", BOTH, lambda: lambda x: x)],
    )
    assert benchmark(nothing, x) is x
