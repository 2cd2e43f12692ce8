"""`out=`: the bits of a fresh result, written where the caller says; no gradients, and nothing but the right tensor."""

from __future__ import annotations

import pytest
import torch
from implementations import FORCEABLE, Implementation

from bert_fast import ops


@pytest.mark.parametrize("in_place", [False, True])
def test_bias_gelu(implementation: Implementation, in_place: bool) -> None:
    x, bias = implementation.randn(5, 40), implementation.randn(40)
    expected = implementation("bias_gelu", x, bias, "none")
    out = x if in_place else torch.empty_like(x)
    assert implementation("bias_gelu", x, bias, "none", out) is not None
    assert torch.equal(out, expected)


@pytest.mark.parametrize("where", ["fresh", "x", "residual"])
def test_residual_layer_norm(implementation: Implementation, where: str) -> None:
    x, residual = implementation.randn(5, 40), implementation.randn(5, 40)
    vectors = [implementation.randn(40) for _ in range(3)]
    arguments = (x, vectors[0], residual, *vectors[1:], 1e-12, 0.0)
    expected = implementation("residual_layer_norm", *arguments)
    out = {"fresh": torch.empty_like(x), "x": x, "residual": residual}[where]
    implementation("residual_layer_norm", *arguments, out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_attention(implementation: Implementation, masked: bool) -> None:
    q, k, v = (implementation.randn(2, 7, 3, 16) for _ in range(3))
    mask = implementation.tensor([[1, 1, 1, 0, 1, 0, 0], [0] * 7], torch.bool) if masked else None
    arguments = (q, k, v, None, 7, mask, 0.25, 0.0)
    expected = implementation("attention", *arguments)
    out = torch.full_like(q, 3.0)
    implementation("attention", *arguments, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("impl", FORCEABLE)
def test_public_functions(impl: str) -> None:
    device = "cuda" if impl == "triton" else "cpu"
    x, bias = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    expected = ops.bias_gelu(x, bias, impl=impl)
    out = torch.empty_like(x)
    assert ops.bias_gelu(x, bias, impl=impl, out=out) is out
    assert torch.equal(out, expected)

    for wrong in (torch.empty(4, 9), torch.empty(4, 8, dtype=torch.float64), torch.empty(8, 4).t()):
        with pytest.raises(ValueError, match=r"bias_gelu: out is torch.float.* expected contiguous torch.float32"):
            ops.bias_gelu(x, bias, impl=impl, out=wrong.to(device))
    with pytest.raises(ValueError, match="out is given, but gradients are to be recorded"):
        ops.bias_gelu(x.clone().requires_grad_(), bias, impl=impl, out=out)


def test_memory_that_overlaps_is_refused() -> None:
    memory = torch.randn(5 * 8)
    x, shifted = memory[:32].view(4, 8), memory[4:36].view(4, 8)
    with pytest.raises(RuntimeError, match="single memory"):
        ops.bias_gelu(x, torch.zeros(8), impl="cpp", out=shifted)
    q = torch.randn(4, 2, 8)
    with pytest.raises(RuntimeError, match="single memory"):
        ops.attention(q, q, q, cu_seqlens=torch.tensor([0, 4], dtype=torch.int32), impl="cpp", out=q)
