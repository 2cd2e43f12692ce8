"""Packed weights of an encoder whose embeddings are of another width than its layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from implementations import HAS_GPU
from numerics import assert_no_worse

from bert_fast import engine, ops
from bert_fast.config import ElectraConfig
from bert_fast.electra import ElectraModel
from bert_fast.engine.gpu import GpuEngine
from bert_fast.engine.projected import ProjectedEngine
from bert_fast.inputs import BertInputs
from bert_fast.ragged import Ragged

#: Bounds on the relative error of the rows, as in test_engine.
MAX_ERROR = {"fp32": 2e-6, "bf16": 2e-2, "int8": 5e-2}
needs_extension = pytest.mark.skipif(ops.extension() is None, reason="the C++ extension is not built")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for two
    yield
    torch.set_num_threads(before)


def make(**options: Any) -> ElectraModel:
    torch.manual_seed(0)
    sizes = {"embedding_size": 20, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 96}
    config = ElectraConfig(vocab_size=80, num_hidden_layers=2, max_position_embeddings=64, **{**sizes, **options})
    return ElectraModel(config).eval()


def ragged(*lengths: int) -> Ragged:
    generator = torch.Generator().manual_seed(1)
    return Ragged.from_lengths(torch.randint(0, 80, (sum(lengths),), generator=generator), torch.tensor(lengths))


def states(model: ElectraModel, batch: Ragged) -> list[torch.Tensor]:
    """By the definitions of the ops."""
    found: list[torch.Tensor] = []
    with torch.no_grad(), ops.force("reference"):
        model.encode(batch, found)
    return found


@needs_extension
@pytest.mark.parametrize(
    ("precision", "act"), [("fp32", "gelu"), ("fp32", "gelu_new"), ("fp32", "relu"), ("bf16", "gelu"), ("int8", "relu")]
)
def test_the_answer(precision: str, act: str) -> None:
    model, batch = make(hidden_act=act), ragged(5, 0, 33, 1)
    run, found = ProjectedEngine(model, act, 2, precision), []
    rows = run.rows(batch, found)
    assert rows.shape == (39, 64)
    assert not rows.requires_grad
    for state, plain, truth in zip(
        found, states(model, batch), states(copy.deepcopy(model).double(), batch), strict=True
    ):
        if precision == "fp32":
            assert_no_worse(state, plain, truth)
        assert (state - truth).norm() <= MAX_ERROR[precision] * truth.norm()
    alone = [run.rows(ragged_of(text)) for text in batch.input_ids.split([5, 0, 33, 1])]
    assert torch.equal(torch.cat(alone), rows)
    vectors = run.vectors(batch, ["mean", "cls"], True)
    assert vectors.shape == (4, 128)
    torch.testing.assert_close(vectors.norm(dim=1), torch.tensor([1.0, 0.0, 1.0, 1.0]))


def ragged_of(text: torch.Tensor) -> Ragged:
    return Ragged.from_lengths(text, torch.tensor([len(text)]))


@needs_extension
@pytest.mark.parametrize("precision", [None, *MAX_ERROR])
def test_it_serves_the_model(precision: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "prefers_torch", lambda _: False)  # as a CPU with a matrix unit does in bf16
    monkeypatch.setattr("bert_fast.ops._dispatch._warned", set())
    model = make()
    ids, mask = torch.randint(0, 80, (3, 9)), torch.arange(9) < torch.tensor([9, 4, 0])[:, None]
    with torch.no_grad():
        expected = ElectraModel.forward(model.double(), ids, mask).last_hidden_state
        model.float()
        engine.set_precision(model, precision, model.engine)
        assert isinstance(model.engine(), ProjectedEngine)
        found = model(ids, mask).last_hidden_state
        assert (found - expected).norm() <= MAX_ERROR[precision or "fp32"] * expected.norm()
        assert not found[~mask].any()
        if precision is not None:
            engine.release(model)
            assert model.embeddings_project is not None
            assert model.embeddings_project.weight.isnan().all()
            assert torch.equal(model(ids, mask).last_hidden_state, found)
        else:
            model.embeddings_project.weight.mul_(2.0)
            assert not torch.equal(model(ids, mask).last_hidden_state, found)
            model.embeddings_project.register_forward_hook(lambda *_: None)
            with pytest.warns(ops.FallbackWarning, match="a Linear in it has a hook"):
                model(ids, mask)
        with pytest.raises(ValueError, match="input_ids 80 at index"):
            model(ids.fill_(80), mask)


@needs_extension
def test_bf16_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "prefers_torch", lambda precision: precision == "bf16")
    model, batch = make(), ragged(5, 33)
    truth = states(copy.deepcopy(model).double(), batch)[-1]
    engine.set_precision(model, "bf16", model.engine)
    with torch.no_grad():
        assert isinstance(model.engine(), engine.TorchEngine)
        assert (model.encode(batch) - truth).norm() <= MAX_ERROR["bf16"] * truth.norm()


def test_on_a_gpu_or_its_interpreter() -> None:
    device = torch.device("cuda" if HAS_GPU else "cpu")
    model, batch = make(hidden_size=32), ragged(5, 0, 9)
    plain, truth = states(model, batch), states(copy.deepcopy(model).double(), batch)
    run, found = GpuEngine(model.to(device), "gelu", 2, "fp32"), []
    rows = run.rows(batch, found)
    assert torch.equal(rows, found[-1])
    for state, *others in zip(found, plain, truth, strict=True):
        assert_no_worse(state.cpu(), *others)
    inputs = BertInputs(batch.input_ids[None, :5].to(device))
    assert torch.equal(run.padded(inputs)[0][0], rows[:5])
