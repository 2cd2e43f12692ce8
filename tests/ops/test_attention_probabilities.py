"""attention_probabilities: against the truth, against attention, gradients, odd inputs, refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from implementations import FORCEABLE, HAS_GPU, Implementation
from numerics import assert_forward, assert_gradients
from torch import Tensor

from bert_fast import ops
from bert_fast.kernels import attention as attention_module
from bert_fast.kernels.attention_probabilities import attention_probabilities
from bert_fast.ops.attention_probabilities import reference

DEVICE = "cuda" if HAS_GPU else "cpu"
CASES = [Implementation("triton", dtype, DEVICE) for dtype in (torch.float16, torch.float32)]
IMPLS = [name for name in FORCEABLE if name != "cpp"]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("lengths", [[9, 64, 0], [140, 33]], ids=str)
@pytest.mark.parametrize(("case", "matrix_units"), [(CASES[0], True), (CASES[0], False), (CASES[1], False)], ids=str)
def test_triton(
    monkeypatch: pytest.MonkeyPatch, case: Implementation, matrix_units: bool, lengths: list[int], has_bias: bool
) -> None:
    monkeypatch.setattr(attention_module, "has_matrix_units", lambda device: matrix_units)
    q, k, _ = case.randn(sum(lengths), 3, 3, 24).unbind(1)
    max_seqlen = max(lengths) + 1
    bias = case.randn(3, max_seqlen, max_seqlen + 5) if has_bias else None
    args = (q, k, case.cu_seqlens(lengths), max_seqlen, [2, 0], -0.3, bias)
    out = assert_forward(attention_probabilities, reference, *args)
    for index, length in enumerate(lengths):
        assert not out[index, :, length:].any()
        assert not out[index, :, :, length:].any()


def test_triton_clamps_wrong_offsets() -> None:
    case = CASES[1]
    q, k = (t[:8] for t in case.randn(2, 90, 1, 16))
    out = attention_probabilities(q, k, case.tensor([-7, 3, 70, 90], torch.int32), 70, [0], 0.25)
    expected = reference(q, k, case.tensor([0, 3, 8, 8], torch.int32), 70, [0], 0.25, None)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(0, 2, 8), (4, 0, 8), (4, 2, 0)], ids=str)
def test_zero_size(shape: tuple[int, ...]) -> None:
    case, heads = CASES[0], list(range(shape[1]))
    q, cu_seqlens = case.randn(*shape), case.cu_seqlens([shape[0]])
    for run in (attention_probabilities, reference):
        out = run(q, q, cu_seqlens, shape[0], heads, 1.0, None)
        assert out.shape == (1, shape[1], shape[0], shape[0])
    assert attention_probabilities(q[:0], q[:0], case.cu_seqlens([]), 0, heads, 1.0).shape == (0, shape[1], 0, 0)


@pytest.mark.parametrize("impl", IMPLS)
def test_are_what_attention_multiplies_v_by(impl: str) -> None:
    case = Implementation("any", torch.float64 if impl == "reference" else torch.float32, DEVICE)
    q, k, v = case.randn(3, 12, 2, 8)
    options: dict[str, Any] = {"cu_seqlens": case.cu_seqlens([7, 5]), "bias": case.randn(2, 7, 7), "impl": impl}
    probabilities = ops.attention_probabilities(q, k, **options)
    assert probabilities.shape == (2, 2, 7, 7)
    padded = torch.stack([v[:7], torch.nn.functional.pad(v[7:], (0, 0, 0, 0, 0, 2))])
    product = (probabilities @ padded.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(torch.cat([product[0], product[1, :5]]), ops.attention(q, k, v, **options))
    assert torch.equal(ops.attention_probabilities(q, k, heads=[1], **options), probabilities[:, 1:])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl: str) -> None:
    case = Implementation("any", torch.float32, DEVICE)
    cu_seqlens = case.cu_seqlens([7, 0, 12])
    assert_gradients(
        lambda q, k, bias: ops.attention_probabilities(
            q, k, cu_seqlens=cu_seqlens, heads=[1], scale=0.3, bias=bias, impl=impl
        ),
        lambda q, k, bias: reference(q, k, cu_seqlens, 12, [1], 0.3, bias),
        *case.randn(2, 19, 2, 12),
        case.randn(2, 12, 12),
    )


Q, OFFSETS = torch.ones(6, 2, 4), torch.tensor([0, 2, 6], dtype=torch.int32)
REFUSED: dict[str, tuple[tuple[Tensor, Tensor], dict[str, Any], str]] = {
    "dimensions": ((Q[None], Q[None]), {}, r"q has shape \(1, 6, 2, 4\), expected \(num_tokens"),
    "k's shape": ((Q, Q[1:]), {}, r"k has shape \(5, 2, 4\), expected \(6, 2, 4\)"),
    "k's dtype": ((Q, Q.half()), {}, "k is torch.float16 but q is torch.float32"),
    "offsets": ((Q, Q), {"cu_seqlens": OFFSETS.long()}, "cu_seqlens is torch.int64"),
    "head past the last": ((Q, Q), {"heads": [0, 2]}, "heads has 2, expected 0 to 1"),
    "negative head": ((Q, Q), {"heads": [-1]}, "heads has -1, expected 0 to 1"),
    "bias": ((Q, Q), {"bias": torch.ones(2, 3, 4)}, r"bias has shape \(2, 3, 4\), expected \(2, >= 4, >= 4\)"),
    "max_seqlen": ((Q, Q), {"max_seqlen": 3}, "sequence 1 has 4 tokens, more than max_seqlen = 3"),
    "end": ((Q[1:], Q[1:]), {}, "cu_seqlens runs from 0 to 6, expected 0 to 5"),
}


@pytest.mark.parametrize(("qk", "options", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(qk: tuple[Tensor, Tensor], options: dict[str, Any], match: str) -> None:
    run = partial(ops.attention_probabilities, *qk)
    with pytest.raises(ValueError, match=f"attention_probabilities: {match}"):
        run(**{"cu_seqlens": OFFSETS, **options})
