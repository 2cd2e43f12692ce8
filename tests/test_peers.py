"""Every peer of the benchmarks gives transformers' answer, and one that is not there is named."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, run
from benchmarks.cases import ModelCases, build_model
from benchmarks.peers import CONTENDERS, PEERS
from benchmarks.suite import MAX_PEER_ERROR, Settings, bench_encoder, bench_strings
from bert_fast.benchmarking import Case, Encode
from bert_fast.config import BertConfig
from bert_fast.timing import relative_error

pytestmark = pytest.mark.peers

CASE = Case("ragged", (3, 11, 1, 7))


TINY = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=128,
    initializer_range=0.2,  # large enough that attention, mask and token types matter
)

MACHINE = {
    "threads": 1,
    "instructions": [{"dtype": dtype, "instruction": "fma", "gops": 40.0} for dtype in ("float32", "int8")],
    "copy_gbs": 8.0,
}


@pytest.fixture(scope="module")
def model() -> Any:
    """A small random BERT."""
    return build_model(TINY)


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "benchmarks.peers.onnx_runtime", raising=False)


def _build(name: str, precision: str) -> Encode:
    assert not CONTENDERS[name].missing(), 'the peers come with: pip install "bert_fast[bench]"'
    return CONTENDERS[name].build(build_model(TINY), precision)


def _error(encode: Encode, model: Any, inputs: dict[str, Tensor]) -> float:
    """Relative error of a peer on the real tokens, against transformers."""
    real = inputs["attention_mask"].bool()
    with torch.inference_mode():
        return relative_error(encode(inputs)[real], model(**inputs).last_hidden_state[real])


@pytest.fixture
def inputs(model: Any) -> dict[str, Tensor]:
    padded = CASE.inputs(model.config.vocab_size)
    padded["token_type_ids"] = padded["input_ids"] % 2
    return padded


@pytest.mark.parametrize(
    ("name", "precision"),
    # float16 is torch's own peers' only, by the same code, and slow on a CPU.
    [(peer.name, precision) for peer in CONTENDERS.values() for precision in peer.cpu if precision != "float16"],
)
def test_contender_gives_the_answer(name: str, precision: str, model: Any, inputs: dict[str, Tensor]) -> None:
    if precision == "int8":
        inputs["token_type_ids"].zero_()  # the sentences that calibrate OpenVINO have no second type
    error = _error(_build(name, precision), model, inputs)
    if precision == "int8" and name != "transformers":
        assert 1e-3 < error < 0.1  # two layers round less than those of a real model, but they do round
    else:
        assert error <= MAX_PEER_ERROR[precision]
        assert (error > 1e-4) == (precision == "bfloat16")


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ctranslate2"])
def test_converted_model_takes_any_shape(name: str, model: Any, inputs: dict[str, Tensor]) -> None:
    encode = _build(name, "float32")
    for rows, length in ((4, 11), (1, 9), (2, 16)):
        full = Case("full", (length,) * rows).inputs(model.config.vocab_size)
        assert _error(encode, model, full) <= MAX_PEER_ERROR["float32"]
    assert _error(encode, model, inputs) <= MAX_PEER_ERROR["float32"]


def test_torch_compile_takes_more_shapes_than_it_would_by_itself() -> None:
    model = build_model(replace(TINY, num_hidden_layers=1))  # compiling takes long
    encode = PEERS["torch.compile"].build(model, "float32")
    for length in range(1, 11):  # more than 8
        full = Case("full", (length,)).inputs(TINY.vocab_size)
        assert _error(encode, model, full) <= MAX_PEER_ERROR["float32"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 10


def test_peer_names_a_precision_it_has_not(model: Any) -> None:
    with pytest.raises(ValueError, match="precision is 'int4', openvino has float32, bfloat16, int8"):
        PEERS["openvino"].build(model, "int4")


@pytest.mark.usefixtures("without_onnxruntime")
def test_missing_peer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"onnxruntime is not installed: .*onnxruntime"):
        peers.select(["onnxruntime"])
    with pytest.raises(ValueError, match="onnxruntime is not installed"):
        peers.select(["all", "onnxruntime"])
    assert "onnxruntime" not in {peer.name for peer in peers.select(["all"])}
    assert "left out: onnxruntime is not installed: " in capsys.readouterr().err


def test_select() -> None:
    assert peers.select([]) == []
    assert peers.select(["torch.compile", "transformers-eager"]) == [
        PEERS["transformers-eager"],
        PEERS["torch.compile"],
    ]
    on_gpu = [peer.name for peer in peers.select(["all"], "cuda")]
    assert on_gpu == ["transformers-eager", "torch.compile", "varlen_attn"]
    with pytest.raises(ValueError, match="openvino does not run on cuda"):
        peers.select(["openvino"], "cuda")
    with pytest.raises(ValueError, match="peer 'tensorrt' is not one of all, transformers-eager, "):
        peers.select(["tensorrt"])


def test_every_contender_in_a_row() -> None:
    settings = Settings(MACHINE, threads=1, repeats=1, dtypes=["float32"], peers=list(PEERS.values()))
    rows = list(bench_encoder(settings, ModelCases("Tiny", TINY, ()), ["2x4", "mix3"]))
    assert [row["case"] for row in rows] == ["2x4", "mix3"]
    for row in rows:
        assert list(row["contenders"]) == [name for name, peer in CONTENDERS.items() if "float32" in peer.cpu]
        for measured in row["contenders"].values():
            assert measured["error"] <= MAX_PEER_ERROR["float32"]
            assert measured["cosine"] == pytest.approx(1.0)
            assert measured["memory_mb"] > 0
            assert measured["of_peak"] == pytest.approx(measured["gflops"] / 40.0)


def test_a_case_too_long_for_the_model_is_named() -> None:
    settings = Settings(MACHINE, threads=1, repeats=1, dtypes=["float32"], peers=[])
    with pytest.raises(ValueError, match="case 1x129 has a sequence of 129 tokens, Tiny takes 128"):
        list(bench_encoder(settings, ModelCases("Tiny", TINY, ()), ["1x4", "1x129"]))


@pytest.mark.usefixtures("without_onnxruntime")
def test_run_names_a_missing_peer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", "--peers", "onnxruntime"])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert "onnxruntime is not installed" in capsys.readouterr().err


def test_texts_have_mixed_lengths_and_are_the_same_every_time() -> None:
    from benchmarks.peers.strings import texts

    given = texts(64)
    words = [len(text.split()) for text in given]
    assert (len(given), len(set(given))) == (64, 64)
    assert min(words) < 12 < 96 < max(words)
    assert given == texts(64)


def test_bench_strings() -> None:
    settings = Settings(MACHINE, threads=1, repeats=1, dtypes=["float32"], peers=[])
    (row,) = bench_strings(settings, 6, sys.executable)
    names = list(row["contenders"])
    assert (names[0], names[-1]) == ("sentence-transformers", "bert_fast")
    assert row["contenders"]["bert_fast"]["error"] <= 1e-5
    assert (row["case"], row["dtype"]) == ("6 texts", "float32")
    assert 0 < row["tokens"] < row["padded_tokens"]


def test_a_back_end_that_cannot_run_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from benchmarks.peers.strings import specs

    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')  # without site-packages
    bare.chmod(0o755)
    peers, ours = specs("demo", ["float32"], str(bare))
    assert (list(peers), list(ours)) == (["sentence-transformers"], ["float32"])
    message = capsys.readouterr().err
    assert "left out: sentence-transformers-onnx: ModuleNotFoundError: No module named 'sentence_trans" in message
    assert "left out: sentence-transformers-openvino: " in message
