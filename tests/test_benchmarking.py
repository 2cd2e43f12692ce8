"""The measuring tools themselves: what they count, that they refuse wrong answers, and what they write."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, peak, report, run
from bert_fast import benchmarking
from bert_fast.benchmarking import Row, Timing, WrongAnswerError, compare, format_table, parse_case, useful_flops
from bert_fast.config import BertConfig

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Time that passes only where a test says so."""
    fake = SimpleNamespace(now=0.0)
    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def test_compare_interleaves_and_rotates(clock: SimpleNamespace) -> None:
    order: list[str] = []

    def contender(name: str) -> torch.Tensor:
        order.append(name)
        clock.now += 1.0
        return torch.ones(2)

    timings = compare({name: lambda name=name: contender(name) for name in "abc"}, repeats=4, warmup=0)
    assert "".join(order[-12:]) == "abc" + "bca" + "cab" + "abc"
    assert list(timings) == ["a", "b", "c"]
    assert all(timing.samples == (1.0,) * 4 for timing in timings.values())


def test_compare_repeats_short_calls_within_a_sample(clock: SimpleNamespace) -> None:
    calls = {"short": 0, "long": 0}

    def contender(name: str, seconds: float) -> torch.Tensor:
        calls[name] += 1
        clock.now += seconds
        return torch.ones(2)

    timings = compare(
        {"short": lambda: contender("short", 2.0**-10), "long": lambda: contender("long", 2.0)}, repeats=3, warmup=2
    )
    # One call for the answer, two to warm up, one to see how long it takes; then three samples of 11 calls or of one.
    assert calls == {"short": 4 + 3 * 11, "long": 4 + 3}
    assert timings["short"].median == pytest.approx(2.0**-10)
    assert timings["long"].median == 2.0


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.tensor([1.0, 2.1]), "fast differs from plain by a relative error of 4.5e-02, allowed 1e-05"),
        (torch.tensor([1.0, float("nan")]), "relative error of nan"),
        (torch.ones(3), r"fast gives shape \(3,\) but plain gives \(2,\)"),
    ],
    ids=["another number", "NaN", "another shape"],
)
def test_compare_times_nothing_when_answers_differ(
    monkeypatch: pytest.MonkeyPatch, answer: torch.Tensor, message: str
) -> None:
    def perf_counter() -> float:
        raise AssertionError("the clock was read")

    monkeypatch.setattr(benchmarking, "time", SimpleNamespace(perf_counter=perf_counter))
    with pytest.raises(WrongAnswerError, match=message):
        compare({"plain": lambda: torch.tensor([1.0, 2.0]), "fast": lambda: answer})


def test_compare_reports_the_error_it_allowed() -> None:
    timings = compare(
        {"plain": lambda: torch.tensor([3.0, 4.0]), "fast": lambda: torch.tensor([3.0, 4.5])},
        repeats=1,
        max_error=0.2,
    )
    assert (timings["plain"].error, timings["fast"].error) == (0.0, pytest.approx(0.1))


def test_compare_looks_at_the_part_it_is_told() -> None:
    contenders = {"plain": lambda: torch.tensor([1.0, 7.0]), "fast": lambda: torch.tensor([1.0, 0.0])}
    timings = compare(contenders, repeats=1, part=lambda answer: answer[:1])
    assert timings["fast"].error == 0.0


def test_compare_needs_a_round() -> None:
    with pytest.raises(ValueError, match="repeats is 0"):
        compare({"plain": lambda: torch.ones(1)}, repeats=0)


def test_timing_summary() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0), error=0.0)
    assert (timing.median, timing.quartiles) == (3.0, (2.0, 4.0))


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


def _row(model: str = "tiny", dtype: str = "float32", of_peak: float | None = 0.5) -> Row:
    slow = {
        "median_ms": 3.0,
        "quartiles_ms": [2.5, 3.5],
        "gflops": 10.0,
        "of_peak": of_peak,
        "ratio": 1.0,
        "error": 0.0,
    }
    fast = {**slow, "median_ms": 1.5, "gflops": 20.0, "ratio": 2.0, "error": 1.25e-6}
    return {
        "model": model,
        "case": "mix4",
        "dtype": dtype,
        "tokens": 100,
        "padded_tokens": 200,
        "contenders": {"plain": slow, "fast": fast},
    }


def test_table() -> None:
    assert format_table([_row()]).splitlines() == [
        "| case | tokens | padded | plain ms | fast ms | fast ratio | fast GFLOP/s | of peak | error |",
        "| ---- | -----: | -----: | -------: | ------: | ---------: | -----------: | ------: | ----: |",
        "| mix4 |    100 |    200 |     3.00 |    1.50 |      2.00x |           20 |     50% | 1e-06 |",
    ]


def test_table_names_what_varies() -> None:
    table = format_table([_row("small", of_peak=None), _row("a longer name", of_peak=None)])
    header, _, *lines = table.splitlines()
    assert header.startswith("| model         | case |")
    assert lines[0].startswith("| small         | mix4 |")
    assert "dtype" not in header
    assert {len(line) for line in table.splitlines()} == {len(header)}
    assert "| dtype " in format_table([_row(), _row(dtype="bfloat16")])
    assert format_table([]) == ""


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
        "rows": [_row(), _row("other")],
    }


def test_result_round_trip(result: report.Result, tmp_path: Path) -> None:
    path = tmp_path / "device" / "encoder.json"
    report.save(result, path)
    assert report.read(path) == result

    text = path.with_suffix(".md").read_text()
    assert format_table(result["rows"]) in text
    assert "Some CPU, 2 threads, commit 0123456789ab with changes, load average 0.5" in text
    assert "    python -m benchmarks.run --models tiny\n" in text
    assert "triton" not in text

    plot = path.with_suffix(".svg").read_bytes()
    assert xml.etree.ElementTree.fromstring(plot).tag == "{http://www.w3.org/2000/svg}svg"
    assert len(plot) < 200_000
    report.save(result, path)
    assert path.with_suffix(".svg").read_bytes() == plot


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


@pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")
def test_run_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], result: report.Result
) -> None:
    monkeypatch.setattr(run, "MODELS", {"tiny": cases.ModelCases("Tiny", TINY, ("1x4", "mix3"))})
    monkeypatch.setattr(peak, "measure_cpu", lambda threads: result["peak"])
    output = tmp_path / "encoder.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--threads", "1", "--repeats", "1", "--output", str(output)])
    run.main()

    written = report.read(output)
    assert [row["case"] for row in written["rows"]] == ["1x4", "mix3"]
    assert written["command"] == f"python -m benchmarks.run --threads 1 --repeats 1 --output {output}"
    assert written["versions"]["torch"] == torch.__version__
    fast = written["rows"][0]["contenders"]["bert_fast"]
    assert fast["of_peak"] == pytest.approx(fast["gflops"] / 40.0)
    assert format_table(written["rows"]) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--threads", "0"], "--threads is 0"), (["--cases", "4"], "case '4'"), (["--models", "huge"], "huge")],
    ids=["threads", "case", "model"],
)
def test_run_names_bad_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        run.main()
    assert message in capsys.readouterr().err


def test_random_weights_are_the_same_every_time() -> None:
    tiny = cases.ModelCases("Tiny", TINY, ())
    first, second = (run.build(tiny, "bfloat16").state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {tensor.dtype for tensor in first.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_folder_of_a_device() -> None:
    assert run.slug("Intel(R) Xeon(R) Processor 2 threads") == "intel-xeon-processor-2-threads"
    assert run.slug("AMD EPYC 9R14") == "amd-epyc-9r14"
