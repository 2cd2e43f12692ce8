"""The parity report passes on what is right and fails on what is not."""

import math

import pytest
import torch

from bert_fast import engine
from bert_fast.embedder import Embedder
from bert_fast.verify import FACTOR, Stage, shipped_sentences, verify

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

TEXTS = shipped_sentences()[:12]
STAGES = ["embeddings", *(f"layer {i}" for i in range(1, 7)), "sentence vector"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_demo_passes(dtype):
    report = verify("demo", dtype=dtype)
    assert report.passed
    assert report.passed
    assert [stage.name for stage in report.stages] == STAGES
    assert report.num_texts == 64
    assert report.num_tokens > 1000
    for stage in report.stages:
        eps = torch.finfo(getattr(torch, dtype)).eps
        assert 0 < stage.plain.relative < 10 * eps, "the plain definition in a lower dtype does round"
        assert stage.fast.min_cosine > 1 - 0.1 * eps
    text = str(report)
    assert text.splitlines()[0] == f"demo: 64 texts, {report.num_tokens} tokens, {dtype} on cpu"
    assert text.endswith("Verdict: passed")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_demo_passes_in_every_precision(precision):
    report = verify("demo", precision=precision)
    assert f"tokens, {precision} on cpu" in str(report)
    assert report.stages[-1].fast.relative > 0
    assert report.passed


def test_a_wrong_layer_is_found_and_placed(monkeypatch):
    """The tanh form of GELU in place of the erf form: wrong by about 1e-4, from the first layer on."""
    monkeypatch.setitem(engine.ACTIVATIONS, "gelu", "gelu_tanh")
    report = verify("demo", TEXTS)
    assert not report.passed
    assert [stage.name for stage in report.stages if not stage.passed] == STAGES[1:]
    assert "Verdict: FAILED at layer 1, layer 2" in str(report)


def test_a_nan_fails(monkeypatch):
    right = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, *args: right(self, *args) * math.nan)
    report = verify("demo", TEXTS)
    assert [stage.name for stage in report.stages if not stage.passed] == ["sentence vector"]
    assert math.isnan(report.stages[-1].fast.max_abs)


def test_the_bound():
    truth = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    plain = truth + torch.tensor([[1e-3, 0.0], [0.0, 0.0]])
    for factor, passes in ((0.5, True), (1.9, True), (2.1, False)):
        stage = Stage("layer", torch.float32)
        stage.add(truth + factor * (plain - truth), plain, truth)
        assert stage.passed == passes
        assert stage.fast.max_abs == pytest.approx(factor * 1e-3)
        assert stage.fast.relative == pytest.approx(factor * 1e-3 / math.sqrt(30))
    assert FACTOR == 2.0


def test_a_single_bad_element_among_many_fails():
    """The norm of everything would hide it; the largest error does not."""
    truth = torch.ones(1000, 100, dtype=torch.float64)
    plain = truth + 1e-6
    fast = truth.clone()
    fast[7, 7] += 1e-5
    stage = Stage("layer", torch.float32)
    stage.add(fast, plain, truth)
    assert stage.fast.relative < stage.plain.relative
    assert not stage.passed


def test_the_shipped_sentences():
    sentences = shipped_sentences()
    lengths = [len(sentence.split()) for sentence in sentences]
    assert len(set(sentences)) == len(sentences) >= 400
    assert min(lengths) == 4
    assert 45 < max(lengths) <= 60


def test_no_texts():
    with pytest.raises(ValueError, match="no texts"):
        verify("demo", [])
