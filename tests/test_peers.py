"""Every peer of the benchmarks gives transformers' answer, and one that is not there is named."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, report, run
from benchmarks.peers import PEERS
from bert_fast.benchmarking import (
    MAX_PEER_ERROR,
    Case,
    Encode,
    Row,
    WrongAnswerError,
    bench_cases,
    format_table,
    ratio_to_best,
    relative_error,
)

pytestmark = pytest.mark.peers

CASE = Case("ragged", (3, 11, 1, 7))


@pytest.fixture(scope="module")
def model() -> Any:
    """A small random BERT, with weights large enough that attention, mask and token types matter."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        initializer_range=0.2,
        attn_implementation="sdpa",
    )
    return BertModel(config).eval()


@pytest.fixture
def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # makes the import fail
    monkeypatch.delitem(sys.modules, "benchmarks.peers.onnx_runtime", raising=False)


def _build(name: str, model: Any, precision: str) -> Encode:
    assert not PEERS[name].missing(), 'the peers come with: pip install "bert_fast[bench]"'
    return PEERS[name].build(model, precision)


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
    [(peer.name, precision) for peer in PEERS.values() for precision in peer.precisions if precision != "float16"],
)
def test_peer_gives_the_answer(name: str, precision: str, model: Any, inputs: dict[str, Tensor]) -> None:
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    error = _error(_build(name, model, precision), model, inputs)
    if precision == "int8":
        assert 1e-3 < error < 0.1  # two layers round less than those of a real model, but they do round
    else:
        assert error <= MAX_PEER_ERROR[precision]
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "ctranslate2"])
def test_converted_model_takes_any_shape(name: str, model: Any, inputs: dict[str, Tensor]) -> None:
    encode = _build(name, model, "float32")
    for rows, length in ((4, 11), (1, 9), (2, 16)):
        full = Case("full", (length,) * rows).inputs(model.config.vocab_size)
        assert _error(encode, model, full) <= MAX_PEER_ERROR["float32"]
    assert _error(encode, model, inputs) <= MAX_PEER_ERROR["float32"]


def test_peer_names_a_precision_it_has_not(model: Any) -> None:
    with pytest.raises(ValueError, match="precision is 'int4', openvino has float32, bfloat16"):
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
    assert [peer.name for peer in peers.select(["all"], "cuda")] == ["transformers-eager", "torch.compile"]
    with pytest.raises(ValueError, match="openvino does not run on cuda"):
        peers.select(["openvino"], "cuda")
    with pytest.raises(ValueError, match="peer 'tensorrt' is not one of all, transformers-eager, "):
        peers.select(["tensorrt"])


@pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")
@pytest.mark.parametrize(("dtype", "precision"), [("float32", None), ("bfloat16", None), ("float32", "int8")])
def test_rows_with_peers(model: Any, dtype: str, precision: str | None) -> None:
    import copy

    given = []

    def build(model32: Any) -> Any:
        given.append((model32.dtype, torch.get_num_threads()))
        return lambda inputs: model32(**inputs).last_hidden_state * 1.00003

    timed = copy.deepcopy(model).to(getattr(torch, dtype))
    (row,) = bench_cases(timed, "tiny", [CASE], threads=1, repeats=1, precision=precision, peers={"a peer": build})
    assert given == [(torch.float32, 1)]
    assert row["dtype"] == (precision or dtype)
    assert list(row["contenders"]) == ["transformers", "a peer", *([] if precision == "int8" else ["bert_fast"])]
    # All against float32: the peer's error is what it was given, transformers' that of its dtype.
    assert row["contenders"]["a peer"]["error"] == pytest.approx(3e-5, rel=0.1)
    assert (row["contenders"]["transformers"]["error"] > 1e-4) == (dtype == "bfloat16")


def test_wrong_peer_is_refused(model: Any) -> None:
    def build(model32: Any) -> Any:
        return lambda inputs: model32(**inputs).last_hidden_state * 1.001

    with pytest.raises(WrongAnswerError, match=r"a peer differs from .* relative error of 1\.0e-03, allowed 1e-04"):
        bench_cases(model, "tiny", [CASE], repeats=1, peers={"a peer": build})


def _row(dtype: str, **milliseconds: float) -> Row:
    first = next(iter(milliseconds.values()))
    return {
        "model": "tiny",
        "case": "mix4",
        "dtype": dtype,
        "tokens": 10,
        "padded_tokens": 20,
        "contenders": {
            name: {
                "median_ms": median,
                "quartiles_ms": [median, median],
                "gflops": 12 / median,
                "of_peak": 0.5,
                "ratio": first / median,
                "error": 0.0,
            }
            for name, median in milliseconds.items()
        },
    }


ROWS = [
    _row("float32", transformers=12.0, one=6.0, two=4.0, bert_fast=3.0),
    _row("int8", transformers=12.0, two=2.0),
]


def test_table_with_peers_has_a_line_for_each() -> None:
    assert ratio_to_best(ROWS[0]) == pytest.approx(4 / 3)
    assert format_table(ROWS).splitlines() == [
        "| case | dtype   | tokens | padded | contender    |    ms | ratio | to best | GFLOP/s | of peak | error |",
        "| ---- | ------- | -----: | -----: | ------------ | ----: | ----: | ------: | ------: | ------: | ----: |",
        "| mix4 | float32 |     10 |     20 | transformers | 12.00 | 1.00x |         |       1 |     50% | 0e+00 |",
        "| mix4 | float32 |     10 |     20 | one          |  6.00 | 2.00x |         |       2 |     50% | 0e+00 |",
        "| mix4 | float32 |     10 |     20 | two          |  4.00 | 3.00x |         |       3 |     50% | 0e+00 |",
        "| mix4 | float32 |     10 |     20 | bert_fast    |  3.00 | 4.00x |   1.33x |       4 |     50% | 0e+00 |",
        "| mix4 | int8    |     10 |     20 | transformers | 12.00 | 1.00x |         |       1 |     50% | 0e+00 |",
        "| mix4 | int8    |     10 |     20 | two          |  2.00 | 6.00x |         |       6 |     50% | 0e+00 |",
    ]


def test_table_of_rows_with_different_contenders() -> None:
    rows = [_row("float32", transformers=12.0, bert_fast=3.0), ROWS[1]]
    assert [line.split("|")[5].strip() for line in format_table(rows).splitlines()[2:]] == [
        "transformers",
        "bert_fast",
        "transformers",
        "two",
    ]


def test_plot_of_rows_with_different_contenders() -> None:
    axes = report.plot(ROWS).axes[0]
    bars = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert bars == {"one": [2.0], "two": [3.0, 6.0], "bert_fast": [4.0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "tensorrt"], "tensorrt"),
        (["--dtype", "int8"], "--dtype int8 needs --peers"),
        (["--peers", "openvino", "--dtype", "int8"], "--dtype int8 needs --peers"),
        (["--strings", "0"], "--strings is 0"),
        (["--strings", "8", "--peers", "all"], "takes no --peers"),
    ],
    ids=["unknown", "int8 alone", "int8 with a peer that has none", "no strings", "strings with peers"],
)
def test_run_names_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err


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
    from benchmarks.peers.strings import bench_strings

    row = bench_strings("demo", "MiniLM-L6", 6, threads=1, repeats=1)
    assert list(row["contenders"]) == ["sentence-transformers", "bert_fast"]
    assert row["case"] == "6 texts"
    assert 0 < row["tokens"] < row["padded_tokens"]
