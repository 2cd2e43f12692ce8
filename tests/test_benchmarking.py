"""The measuring tools themselves: what they count, that they refuse wrong answers, and what they write."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, peak, plots, report, run
from benchmarks.tables import best_peer, details, ratio_to_best, summary
from bert_fast import benchmarking
from bert_fast.benchmarking import Cost, Row, Work, format_table, measured_row, parse_case, useful_bytes, useful_flops
from bert_fast.config import BertConfig
from bert_fast.timing import Timing, WrongAnswerError

TINY = BertConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=300,
)


@pytest.mark.parametrize(
    ("text", "lengths"),
    [("1x16", (16,)), ("3x5", (5, 5, 5)), ("12x1", (1,) * 12)],
    ids=["one sequence", "full batch", "two digits, shortest"],
)
def test_full_batches(text: str, lengths: tuple[int, ...]) -> None:
    case = parse_case(text)
    assert (case.name, case.lengths) == (text, lengths)
    assert case.num_tokens == case.num_padded_tokens == sum(lengths)


def test_mix_is_log_normal_and_repeatable() -> None:
    case = parse_case("mix4000")
    logs = torch.tensor(case.lengths).double().log()
    assert len(case.lengths) == 4000
    assert (min(case.lengths), max(case.lengths)) == (3, 256)  # of 4000, some fall past either cut
    # Standard errors at 4000 samples: 0.016 of the median's logarithm, 0.009 of sigma (which the cut lowers a little).
    assert logs.median().item() == pytest.approx(math.log(32), abs=0.08)
    assert logs.std().item() == pytest.approx(0.8, abs=0.05)
    assert list(case.lengths) != sorted(case.lengths)
    assert parse_case("mix4000") == case


def test_mix32_has_padding() -> None:
    case = parse_case("mix32")
    assert len(case.lengths) == 32
    assert case.num_padded_tokens == 32 * max(case.lengths) > case.num_tokens


@pytest.mark.parametrize("text", ["", "32", "x128", "0x16", "1x0", "-1x16", "1x16 ", "2X8", "mix", "mix0", "mix4x4"])
def test_bad_case_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"case {text!r}"):
        parse_case(text)


def test_inputs_are_padded_on_the_right() -> None:
    case = parse_case("mix8")
    inputs = case.inputs(vocab_size=7)
    mask = inputs["attention_mask"]
    assert {tuple(t.shape) for t in inputs.values()} == {(8, max(case.lengths))}
    assert {t.dtype for t in inputs.values()} == {torch.int64}
    assert mask.sum(1).tolist() == list(case.lengths)
    assert (mask.diff(dim=1) <= 0).all()
    assert set(inputs["input_ids"][mask.bool()].tolist()) == set(range(7))
    assert not inputs["input_ids"][~mask.bool()].any()
    assert not inputs["token_type_ids"].any()
    assert all(torch.equal(tensor, case.inputs(vocab_size=7)[name]) for name, tensor in inputs.items())


def test_useful_flops_by_hand() -> None:
    small = SimpleNamespace(hidden_size=2, intermediate_size=3, num_hidden_layers=1)
    # n = 5: 2 * 5 * (4 * 2 * 2 + 2 * 2 * 3) = 280 in the projections, 4 * 5 * 5 * 2 = 200 in the scores and context.
    assert useful_flops(small, [5]) == 480
    # n = 1: 2 * 28 + 8 = 64.
    assert useful_flops(small, [5, 1]) == 544
    assert useful_flops(SimpleNamespace(hidden_size=2, intermediate_size=3, num_hidden_layers=4), [5, 1]) == 4 * 544
    # BERT-base, 128 tokens: 12 * (256 * 7,077,888 + 4 * 16,384 * 768).
    assert useful_flops(BertConfig(), [128]) == 22_347_251_712


def test_useful_bytes_by_hand() -> None:
    small = SimpleNamespace(hidden_size=2, intermediate_size=3, num_hidden_layers=3)
    # 4 * 2 * 2 + 2 * 2 * 3 = 28 weights; a token moves 14 * 2 + 2 * 3 = 34 elements.
    assert useful_bytes(small, 5, "bfloat16") == 3 * 2 * (28 + 5 * 34)
    assert useful_bytes(small, 5, "int8") * 4 == useful_bytes(small, 5, "float32")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Folder of a small random BERT."""
    import transformers

    transformers.BertModel(transformers.BertConfig.from_dict(TINY.to_dict())).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")
def test_bench_model(checkpoint: Path, dtype: str) -> None:
    threads = torch.get_num_threads()
    rows = benchmarking.bench_model(checkpoint, ["2x4", "mix3"], dtype=dtype, threads=1, repeats=2)
    assert torch.get_num_threads() == threads
    assert [(row["case"], row["dtype"]) for row in rows] == [("2x4", dtype), ("mix3", dtype)]
    assert (rows[0]["tokens"], rows[0]["padded_tokens"]) == (8, 8)
    for row in rows:
        plain, fast = row["contenders"]["transformers"], row["contenders"]["bert_fast"]
        flops = useful_flops(TINY, parse_case(row["case"]).lengths)
        assert (plain["ratio"], plain["error"], plain["of_peak"]) == (1.0, 0.0, None)
        assert fast["ratio"] == pytest.approx(plain["median_ms"] / fast["median_ms"])
        assert fast["gflops"] * fast["median_ms"] * 1e6 == pytest.approx(flops)
        assert fast["quartiles_ms"][0] <= fast["median_ms"] <= fast["quartiles_ms"][1]


def test_bench_model_refuses_a_wrong_model(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accelerate(model: torch.nn.Module) -> torch.nn.Module:
        model.get_parameter("encoder.layer.1.output.LayerNorm.bias").data += 1e-3
        return model

    monkeypatch.setattr("bert_fast.drop_in.accelerate", accelerate)
    with pytest.raises(WrongAnswerError, match="bert_fast differs from transformers"):
        benchmarking.bench_model(checkpoint, ["2x4"], repeats=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["2y4"]}, "case '2y4'"),
        ({"cases": ["1x301"]}, "case 1x301 has a sequence of 301 tokens, .* takes 300"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"threads": 0}, "threads is 0"),
        ({"repeats": 0}, "repeats is 0"),
    ],
    ids=["case", "sequence too long", "dtype", "threads", "repeats"],
)
def test_bench_model_names_bad_input(checkpoint: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmarking.bench_model(checkpoint, **{"cases": ["1x4"], **options})


def _row(
    milliseconds: dict[str, float], model: str = "tiny", case: str = "mix4", dtype: str = "float32", suite: bool = True
) -> Row:
    """100 tokens and 3e7 operations, contenders that take so long; with a peak and memory as the suite has them."""
    timings = {
        name: Timing((median * 1e-3,), error=0.0 if index == 0 else 1.25e-6, cosine=1.0)
        for index, (name, median) in enumerate(milliseconds.items())
    }
    costs = {name: Cost(calls_mb=10.0 * median, build_mb=400.0) for name, median in milliseconds.items()}
    work = Work(model, case, dtype, tokens=100, padded_tokens=200, flops=30_000_000, bytes=1_000_000)
    return measured_row(timings, work, peak_gops=40.0 if suite else None, costs=costs if suite else None)


SLOW_AND_FAST = {"plain": 3.0, "fast": 1.5}

SUITE = [
    _row({"transformers": 12.0, "onnxruntime": 6.0, "openvino": 4.0, "bert_fast": 3.0}),
    _row({"transformers": 12.0, "openvino": 2.0, "bert_fast": 4.0}, dtype="int8"),
]


def test_table() -> None:
    assert format_table([_row(SLOW_AND_FAST)]).splitlines() == [
        "| case | tokens | padded | plain ms | fast ms | fast ratio | fast GFLOP/s | error |",
        "| ---- | -----: | -----: | -------: | ------: | ---------: | -----------: | ----: |",
        "| mix4 |    100 |    200 |     3.00 |    1.50 |      2.00x |           20 | 1e-06 |",
    ]


def test_table_names_what_varies() -> None:
    table = format_table([_row(SLOW_AND_FAST, "small"), _row(SLOW_AND_FAST, "a longer name")])
    header, _, *lines = table.splitlines()
    assert header.startswith("| model         | case |")
    assert lines[0].startswith("| small         | mix4 |")
    assert "dtype" not in header
    assert {len(line) for line in table.splitlines()} == {len(header)}
    assert "| dtype " in format_table([_row(SLOW_AND_FAST), _row(SLOW_AND_FAST, dtype="bfloat16")])
    assert format_table([]) == ""


def test_summary_of_the_suite() -> None:
    assert [best_peer(row) for row in SUITE] == ["openvino", "openvino"]
    assert [ratio_to_best(row) for row in SUITE] == [pytest.approx(4 / 3), pytest.approx(0.5)]
    header, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in summary(SUITE).splitlines())
    assert header[:8] == ["model", "case", "dtype", "ms", "GFLOP/s", "of peak", "error", "MB"]
    assert header[8:] == ["to transformers", "best peer", "to best", "its error", "its MB"]
    assert lines[0] == (
        ["tiny", "mix4", "float32", "3.00", "10", "25%", "1e-06", "30", "4.00x", "openvino", "1.33x", "1e-06", "40"]
    )
    assert lines[1][2] == "int8"
    assert lines[1][-3] == "0.50x"


def test_details_have_a_line_for_each_contender() -> None:
    _, _, *lines = ([cell.strip() for cell in line.split("|")[1:-1]] for line in details(SUITE).splitlines())
    assert [line[5] for line in lines] == [name for row in SUITE for name in row["contenders"]]
    assert lines[1][6:] == ["6.00", "6.00-6.00", "2.00x", "", "5", "12%", "1e-06", "60", "1.00000", "400"]
    assert lines[3][9] == "1.33x"


def test_plots_show_every_contender(result: report.Result) -> None:
    ratios = plots.ratios(SUITE)
    heights = [[bar.get_height() for bars in axes.containers for bar in bars] for axes in ratios.axes]
    assert heights == [pytest.approx([4.0, 2.0, 4 / 3]), pytest.approx([3.0, 0.5])]
    assert [axes.get_title() for axes in ratios.axes] == ["tiny, float32", "tiny, int8"]

    first, second = plots.throughput(result["sweep"]).axes
    assert [list(line.get_xdata()) for line in first.lines] == [[1, 2, 4, 8, 16, 32]] * 2
    assert [list(line.get_ydata()) for line in second.lines] == [pytest.approx([10.0] * 7), pytest.approx([20.0] * 7)]

    floats, integers = plots.roofline(SUITE, result["peak"]).axes
    roof, *points = floats.lines
    assert max(roof.get_ydata()) == 40.0
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in points] == [(30.0, 2.5), (30.0, 7.5), (30.0, 10.0)]
    assert len(integers.lines) == 3  # no int8 peak was measured, so there is no roof


@pytest.fixture
def result() -> report.Result:
    return {
        "command": "python -m benchmarks.run --models tiny",
        "date": "2020-01-01T00:00:00+00:00",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": True,
        "device": "Some CPU",
        "threads": 2,
        "versions": {"torch": "2.13.0", "triton": None},
        "load_average": {"before": [0.5, 0.25, 0.125], "after": [1.0, 0.5, 0.25]},
        "peak": {
            "threads": 2,
            "instructions": [{"dtype": "float32", "instruction": "fma", "gops": 40.0}],
            "copy_gbs": 8.0,
        },
        "rows": SUITE,
        "sweep": [
            _row({"transformers": 3.0, "bert_fast": 1.5}, case=case)
            for series in cases.SWEEP.values()
            for case in series
        ],
        "strings": [_row({"sentence-transformers": 8.0, "bert_fast": 2.0}, case="64 texts")],
    }


def test_result_round_trip(result: report.Result, tmp_path: Path) -> None:
    path = tmp_path / "device" / "encoder.json"
    report.save(result, path)
    assert report.read(path) == result

    text = path.with_suffix(".md").read_text()
    assert summary(result["rows"]) in text
    assert summary(result["strings"]) in text
    assert details([*result["rows"], *result["strings"], *result["sweep"]]) in text
    assert "Some CPU, 2 threads, commit 0123456789ab with changes, load average 0.5" in text
    assert "    python -m benchmarks.run --models tiny\n" in text
    assert "triton" not in text

    files = {name: path.with_name(f"encoder-{name}.svg") for name in report.TITLES}
    drawn = {name: file.read_bytes() for name, file in files.items()}
    for name, plot in drawn.items():
        assert xml.etree.ElementTree.fromstring(plot).tag == "{http://www.w3.org/2000/svg}svg"
        assert len(plot) < 200_000
        assert f"]({files[name].name})" in text
    report.save(result, path)
    assert drawn == {name: file.read_bytes() for name, file in files.items()}


def test_readme_gets_the_tables_and_links_to_the_plots(
    result: report.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, readme = tmp_path / "device" / "encoder.json", tmp_path / "README.md"
    report.save(result, path)
    readme.write_text(f"before\n{report.BEGIN}\n{report.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--readme", str(readme)])
    report.main()
    text = readme.read_text()
    assert summary(result["rows"]) in text
    assert "Every contender" not in text
    assert all(f"](device/encoder-{name}.svg)" in text for name in report.TITLES)


def test_result_without_parts(result: report.Result, tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    report.save({**result, "rows": [], "sweep": []}, path)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["encoder.json", "encoder.md"]
    assert report.tables(report.read(path)) == summary(result["strings"])


def test_result_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "encoder.json"
    path.write_text('{"rows": [], "device": "x"}')
    with pytest.raises(ValueError, match=r"encoder\.json is not a benchmark result: it has no command, commit"):
        report.read(path)


def test_splice_replaces_only_what_is_between_the_markers() -> None:
    once = report.splice(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n", "new\n")
    assert once == f"before\n{report.BEGIN}\n\nnew\n\n{report.END}\nafter\n"
    assert report.splice(once, "new\n") == once


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{report.END} only", "begin --> is there 0 times"),
        (f"{report.BEGIN} only", "end --> is there 0 times"),
        (f"{report.BEGIN}{report.BEGIN}{report.END}", "begin --> is there 2 times"),
        (f"{report.END}{report.BEGIN}", "comes before"),
    ],
    ids=["no begin", "no end", "two begins", "crossed"],
)
def test_splice_needs_both_markers(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report.splice(text, "table")


def test_peak_compiles_and_runs() -> None:
    machine = peak.measure_cpu(threads=2, quick=True)
    assert machine["threads"] == 2
    figures = [machine["copy_gbs"], *(instruction["gops"] for instruction in machine["instructions"])]
    assert all(math.isfinite(figure) and figure > 0 for figure in figures)
    rates = [i["gops"] for i in machine["instructions"] if i["dtype"] == "float32"]
    assert peak.best(machine, "float32") == max(rates)
    assert peak.best(machine, "float64") is None


def test_peak_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        peak.measure_cpu(threads=0)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="no-such-compiler cannot be run"):
        peak.measure_cpu(threads=1, quick=True)
    monkeypatch.setenv("CXX", "g++ --no-such-flag")
    with pytest.raises(RuntimeError, match="unrecognized command-line option"):
        peak.measure_cpu(threads=1, quick=True)


@pytest.mark.parametrize("model", cases.MODELS)
def test_every_case_fits_its_model(model: str) -> None:
    names = [*cases.MODELS[model].cases, *(c.case for c in cases.OP_CASES if c.model == model)]
    assert max(max(parse_case(name).lengths) for name in names) <= 512


def test_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: report.Result
) -> None:
    monkeypatch.setitem(cases.MODELS, "tiny", cases.ModelCases("Tiny", TINY, ("1x4", "mix3")))
    monkeypatch.setattr(peak, "measure_cpu", lambda threads, quick: result["peak"])
    output = tmp_path / "encoder.json"
    arguments = ["--models", "tiny", "--dtype", "float32", "--peers", "transformers-eager", "--parts", "encoder"]
    arguments += ["--threads", "1", "--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    run.main()

    written = report.read(output)
    assert [row["case"] for row in written["rows"]] == ["1x4", "mix3"]
    assert written["command"] == " ".join(["python -m benchmarks.run", *arguments[:-2]])  # not where it went
    assert written["versions"]["torch"] == torch.__version__
    for row in written["rows"]:
        assert list(row["contenders"]) == ["transformers", "transformers-eager", "bert_fast"]
        for name, measured in row["contenders"].items():
            assert measured["of_peak"] == pytest.approx(measured["gflops"] / 40.0)
            assert measured["error"] <= (0.0 if name == "transformers" else 1e-5)
            assert 0 < measured["memory_mb"] < 200
            assert 0 < measured["build_memory_mb"] < 200
    assert summary(written["rows"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--strings", "0"], "--strings is 0"),
        (["--cases", "4"], "case '4'"),
        (["--models", "huge"], "huge"),
        (["--peers", "tensorrt"], "tensorrt"),
        (["--dtype", "float16"], "--dtype float16: bert_fast has it not on cpu"),
        (["--device", "cuda", "--parts", "sweep"], "--parts sweep: on cuda there are encoder, compiled, kernels"),
        (["--seconds", "0"], "--seconds is 0.0"),
        (["--quick"], "--quick needs --output"),
    ],
    ids=["threads", "strings", "case", "model", "peer", "dtype", "part", "seconds", "quick"],
)
def test_run_names_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err


def test_random_weights_are_the_same_every_time() -> None:
    first, second = (cases.build_model(TINY).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values() if tensor.is_floating_point()} == {torch.float32}


def test_folder_of_a_device() -> None:
    assert run.slug("Intel(R) Xeon(R) Processor 2 threads") == "intel-xeon-processor-2-threads"
    assert run.slug("AMD EPYC 9R14") == "amd-epyc-9r14"


def test_a_row_measured_again_takes_the_place_of_the_earlier() -> None:
    first, second = _row({"a": 1.0}, case="1x4"), _row({"a": 1.0}, case="1x8")
    again = _row({"a": 1.0, "b": 2.0}, case="1x4")
    rows: list[Row] = []
    for row in (first, second, again):
        run.place(row, rows)
    assert rows == [again, second]
