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
from torch import Tensor

from benchmarks.cases import OP_CASES, OpCase
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
