"""Rows cut into parts, as where there are many: the kernels over whole rows at the widths of BERT and odd ones."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from implementations import Implementation, parameters
from numerics import assert_forward

from bert_fast.ops.embedding_layer_norm import reference as embedding_layer_norm
from bert_fast.ops.residual_layer_norm import reference as residual_layer_norm

TRITON = [parameter for parameter in parameters() if parameter.values[0].name == "triton"]

#: Width -> channels of a part.
WIDTHS = {8: 8, 40: 16, 300: 128, 384: 128, 768: 256, 1024: 256, 1536: 512, 3072: 1024, 5000: 2048}


@pytest.fixture(autouse=True)
def _as_for_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.kernels import rows

    monkeypatch.setattr(rows, "_FEW_PROGRAMS", 0)


@pytest.mark.parametrize(("width", "part"), WIDTHS.items())
def test_a_part_is_one_load_of_each_thread(width: int, part: int) -> None:
    from bert_fast.kernels.rows import blocks

    shape = blocks(9, width)
    assert shape["BLOCK_N"] == part
    assert shape["BLOCK_M"] * part == 8 * 32 * shape["num_warps"]


def test_few_rows_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    from bert_fast.kernels import rows

    monkeypatch.undo()
    assert rows.blocks(128, 768) == {"BLOCK_M": 1, "BLOCK_N": 1024, "num_warps": 4}
    assert rows.blocks(2048, 768) == {"BLOCK_M": 4, "BLOCK_N": 256, "num_warps": 4}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("triton", TRITON)
def test_residual_layer_norm(triton: Implementation, width: int) -> None:
    x, residual = triton.randn(9, width), triton.randn(9, width)
    vectors = [triton.randn(width) for _ in range(3)]
    arguments = (x, vectors[0], residual, *vectors[1:], 1e-12, 0.0)
    assert_forward(partial(triton, "residual_layer_norm"), residual_layer_norm, *arguments)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("triton", TRITON)
def test_embedding_layer_norm(triton: Implementation, width: int) -> None:
    ids = triton.tensor([[3, 1, 0], [2, 3, 3], [0, 0, 1]], torch.int64)
    arguments = (ids, ids, ids, *(triton.randn(4, width) for _ in range(3)), triton.randn(width), triton.randn(width))
    assert_forward(partial(triton, "embedding_layer_norm"), embedding_layer_norm, *arguments, 1e-12, 0.0)
