"""Micro-benchmarks of the ops, fused against the definition, on the sizes of `cases.OP_CASES`.

    pytest benchmarks/test_ops.py --benchmark-only [-k "attention and minilm"]

An implementation that cannot be had fails its benchmarks with the reason. On a GPU host time is measured too: each
call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import OP_CASES, OpCase, products
from bert_fast import ops
from bert_fast.benchmarking import Case, parse_case
from bert_fast.config import BertConfig
from bert_fast.ops.bias_gelu import OP as BIAS_GELU
from bert_fast.timing import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", {"cpu": "cpp", "cuda": "triton"}[DEVICE])


def _cu_seqlens(case: Case) -> Tensor:
    return torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)


def _embedding_layer_norm(config: BertConfig, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    inputs = case.inputs(config.vocab_size)
    real = inputs["attention_mask"].bool()
    tables = (config.vocab_size, config.max_position_embeddings, config.type_vocab_size)
    return (
        inputs["input_ids"][real],
        torch.cat([torch.arange(length) for length in case.lengths]),
        inputs["token_type_ids"][real],
        *(torch.randn(rows, config.hidden_size) for rows in tables),
        *torch.randn(2, config.hidden_size),
    ), {}


def _attention(config: BertConfig, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    qkv = torch.randn(3, case.num_tokens, config.num_attention_heads, config.head_dim)
    return tuple(qkv), {"cu_seqlens": _cu_seqlens(case), "max_seqlen": max(case.lengths)}


def _bias_gelu(config: BertConfig, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.randn(case.num_tokens, config.intermediate_size), torch.randn(config.intermediate_size)), {}


def _residual_layer_norm(config: BertConfig, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    x, residual = torch.randn(2, case.num_tokens, config.hidden_size)
    bias, weight, layer_norm_bias = torch.randn(3, config.hidden_size)
    return (x, bias, residual, weight, layer_norm_bias), {}


def _pooling(config: BertConfig, case: Case) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    return (torch.randn(case.num_tokens, config.hidden_size), _cu_seqlens(case)), {}


#: Op -> what makes its arguments, in float32 on the CPU: positional ones and the rest.
ARGUMENTS: dict[str, Callable[[BertConfig, Case], tuple[tuple[Tensor, ...], dict[str, Any]]]] = {
    "embedding_layer_norm": _embedding_layer_norm,
    "attention": _attention,
    "bias_gelu": _bias_gelu,
    "residual_layer_norm": _residual_layer_norm,
    "pooling": _pooling,
}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors to `dtype`, all tensors to the device; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(DEVICE, dtype if value.is_floating_point() else None)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op_case", OP_CASES, ids=lambda op_case: f"{op_case.model}-{op_case.case}")
@pytest.mark.parametrize("op", ARGUMENTS)
def test_op(benchmark: Any, op: str, op_case: OpCase, dtype: torch.dtype, impl: str) -> None:
    """The answer is at most twice as far from the truth as the definition's own; then it is timed."""
    benchmark.group = f"{op}, {op_case.model} {op_case.case}, {dtype}"
    torch.manual_seed(0)
    args, options = ARGUMENTS[op](op_case.config, parse_case(op_case.case))
    args, options = tuple(_cast(a, dtype) for a in args), {name: _cast(a, dtype) for name, a in options.items()}
    function = getattr(ops, op)

    def call() -> Tensor:
        answer = function(*args, **options, impl=impl)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return answer

    with torch.inference_mode():
        truth = function(*(_cast(a, torch.float64) for a in args), **options, impl="reference")
        allowed = 2 * relative_error(function(*args, **options, impl="reference"), truth) + torch.finfo(dtype).eps
        assert relative_error(call(), truth) <= allowed
        benchmark(call)


def _torch_linear(x: Tensor, weight: Tensor, bias: Tensor, follows: str, residual: Tensor, norm: Tensor) -> Tensor:
    product = F.linear(x, weight, bias)
    if follows == "gelu":
        return F.gelu(product)
    return product if follows == "bias" else F.layer_norm(product + residual, bias.shape, norm[0], norm[1], 1e-12)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("product", products(OP_CASES[0].config))
@pytest.mark.parametrize("op_case", OP_CASES, ids=lambda op_case: f"{op_case.model}-{op_case.case}")
def test_linear(benchmark: Any, op_case: OpCase, product: str, precision: str, impl: str) -> None:
    """Packed products against torch's own, in float32 for "fp32" and in bfloat16, its narrowest, for the others."""
    benchmark.group = f"linear, {op_case.model} {op_case.case}, {product}, {precision}"
    torch.manual_seed(0)
    in_features, out_features, follows = products(op_case.config)[product]
    rows, dtype = parse_case(op_case.case).num_tokens, torch.float32 if precision == "fp32" else torch.bfloat16
    x, residual = torch.randn(rows, in_features).to(dtype), torch.randn(rows, out_features).to(dtype)
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    bias, norm = torch.randn(out_features).to(dtype), torch.randn(2, out_features).to(dtype)
    packed = ops.PackedWeight.pack(weight, bias, precision=precision)

    def fast(dtype: torch.dtype, impl: str) -> Tensor:
        gain, shift = (vector.to(dtype) for vector in norm)
        has_norm = follows == "residual and LayerNorm"
        return ops.linear(
            x.to(dtype),
            packed,
            activation="gelu" if follows == "gelu" else None,
            residual=residual.to(dtype) if has_norm else None,
            layer_norm=(gain, shift, 1e-12) if has_norm else None,
            impl=impl,
        )

    with torch.inference_mode():
        truth = fast(torch.float64, "reference")
        allowed = 2 * relative_error(fast(dtype, "reference"), truth) + torch.finfo(dtype).eps
        assert relative_error(fast(dtype, "cpp"), truth) <= allowed
        if impl == "cpp":
            benchmark(lambda: fast(dtype, "cpp"))
        else:
            benchmark(lambda: _torch_linear(x, weight, bias, follows, residual, norm))


@pytest.mark.parametrize("part", ["select", "run", "call"])
def test_dispatch(benchmark: Any, part: str) -> None:
    """What it costs to reach an implementation: call less run, of which select is a part; on a single element."""
    benchmark.group = "dispatch of bias_gelu on 1x1"
    x, bias = torch.randn(1, 1, device=DEVICE), torch.randn(1, device=DEVICE)
    run = BIAS_GELU.select(DEVICE, x.dtype).run
    calls: dict[str, Callable[[], Any]] = {
        "select": lambda: BIAS_GELU.select(DEVICE, x.dtype),
        "run": lambda: run(x, bias, "none"),
        "call": lambda: BIAS_GELU(x, bias, "none"),
    }
    with torch.inference_mode():
        benchmark(calls[part])
