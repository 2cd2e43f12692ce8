"""Training's benchmark: texts and their layouts, every contender's first gradient, and what becomes of the times."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peak, report, tables, targets, train
from benchmarks.budget import Budget
from benchmarks.cases import GPU_TRAINING, MODELS, QUICK_TRAINING, TRAINING, ModelCases, TrainCase
from benchmarks.processes import WorkerError
from benchmarks.steps import LAYOUTS, MASK_ID, MEGA_BATCH, Steps, representative
from benchmarks.suite import Settings
from benchmarks.training import DEFAULT_TRAINEES, TRAINEES, Peak, Request, Training, config_of
from bert_fast.benchmarking import Cost, parse_case, useful_flops
from bert_fast.config import BertConfig
from bert_fast.timing import Timing, using_threads

CLASSIFICATION, MLM = QUICK_TRAINING

#: In this process: what a contender does does not depend on sizes.
SMALL = BertConfig(vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)

MACHINE: peak.Peak = {
    "threads": 1,
    "instructions": [{"dtype": "float32", "instruction": "fma", "gops": 40.0}],
    "copy_gbs": 8.0,
}


def steps(case: TrainCase = MLM) -> Steps:
    return Steps.of(case, SMALL.vocab_size)


def request(case: TrainCase, layout: str, what: str) -> Request:
    made = steps(case)
    first = "padded" if layout == "grouped" else layout
    return Request(case, what, made.first(first), made.batches(layout))


# ------------------------------------------------------------------------------------------------- texts and layouts


@pytest.mark.parametrize(
    ("kind", "batch_size", "count"),
    [("mix", 16, 5), ("mix", 8, 3), ("squad", 64, 4)],  # those of TRAINING and GPU_TRAINING
)
def test_the_chosen_texts_are_padded_as_a_mega_batch_is(kind: str, batch_size: int, count: int) -> None:
    all_of_them = np.array(parse_case(f"{kind}{MEGA_BATCH * batch_size}").lengths)
    chosen = representative(all_of_them, batch_size, count)

    def fill(lengths: np.ndarray) -> float:
        """Share of real tokens in batches of these lengths, in this order."""
        return lengths.mean() / lengths.reshape(-1, batch_size).max(1).mean()

    rng = np.random.default_rng(5)
    drawn = np.mean([fill(rng.permutation(all_of_them)) for _ in range(50)])
    grouped = fill(np.sort(all_of_them))
    assert len(chosen) == batch_size * count
    assert chosen.mean() == pytest.approx(all_of_them.mean(), rel=0.12)
    assert fill(chosen) == pytest.approx(drawn, rel=0.04)
    assert fill(np.sort(chosen)) == pytest.approx(grouped, rel=0.02)
    assert fill(np.sort(chosen)) >= grouped - 1e-9  # grouping is not made to look worse than it is


def test_too_few_steps_to_stand_for_all() -> None:
    lengths = np.array(parse_case("mix800").lengths)
    with pytest.raises(ValueError, match="steps is 1: no 1 batches of 16 texts"):
        representative(lengths, 16, 1)


@pytest.mark.parametrize("case", QUICK_TRAINING, ids=lambda case: case.task)
def test_every_layout_has_the_same_texts_and_labels(case: TrainCase) -> None:
    made, pairs = steps(case), {}
    assert steps(case).texts[3].ids.equal(made.texts[3].ids)  # every time the same
    for layout in LAYOUTS:
        batches = made.batches(layout)
        assert len(batches) == case.steps
        if layout == "packed":
            found = []
            for batch in batches:
                assert batch["input_ids"].shape == batch["position_ids"].shape == (1, batch["cu_seq_lens_q"][-1])
                bounds = batch["cu_seq_lens_q"].tolist()
                assert batch["max_length_q"] == max(np.diff(bounds))
                for index, (a, b) in enumerate(pairwise(bounds)):
                    assert batch["position_ids"][0, a:b].tolist() == list(range(b - a))
                    labels = batch["labels"][index] if case.task == "classification" else batch["labels"][0, a:b]
                    found.append((batch["input_ids"][0, a:b].tolist(), labels.tolist()))
        else:
            found = []
            for batch in batches:
                for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
                    keep = mask.bool()
                    assert not ids[~keep].any()
                    if case.task == "mlm":
                        assert (labels[~keep] == -100).all()
                        labels = labels[keep]
                    found.append((ids[keep].tolist(), labels.tolist()))
            assert sum(batch["input_ids"].numel() for batch in batches) == made.computed_tokens(layout)
        pairs[layout] = found
    assert pairs["padded"] == pairs["packed"]
    assert sorted(map(str, pairs["grouped"])) == sorted(map(str, pairs["padded"]))
    assert [len(ids) for ids, _ in pairs["grouped"]] == sorted(made.lengths, reverse=True)
    assert made.computed_tokens("packed") < made.computed_tokens("grouped") < made.computed_tokens("padded")


def test_predicted_tokens() -> None:
    made = Steps.of(TrainCase("base", "mlm", "64x256", 2), 30522)
    assert all(int((text.labels != -100).sum()) == round(0.15 * 256) for text in made.texts)
    assert made.predicted == 128 * 38
    ids, labels = (torch.cat([getattr(text, name) for text in made.texts]) for name in ("ids", "labels"))
    chosen = labels != -100
    assert (ids[chosen] == MASK_ID).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (ids[chosen] == labels[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    words = ids[~chosen]
    assert 1 <= int(words.min()) <= int(words.max()) < 30522
    assert (words < 175).float().mean().item() == pytest.approx(0.5, abs=0.02)  # the square root of the vocabulary


def test_work_of_a_step_by_hand() -> None:
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    full = TrainCase("tiny", "classification", "2x4", 3)
    forward = useful_flops(config, [4] * 6)
    assert Steps.of(full, 50).flops(config) == 3 * forward
    masked = Steps.of(replace(full, task="mlm"), 50)
    assert masked.predicted == 6  # one of four tokens each
    assert masked.flops(config) == 3 * (forward + 6 * (2 * 8 * 8 + 2 * 8 * 50))


# -------------------------------------------------------------------------------------------------------- contenders


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(MODELS, "tiny", ModelCases("Tiny", SMALL, ()))
    with using_threads(1):
        yield


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("name", [name for name, trainee in TRAINEES["cpu"].items() if not trainee.compiled])
@pytest.mark.parametrize("case", QUICK_TRAINING, ids=lambda case: case.task)
def test_a_contender_begins_with_the_gradient_of_transformers(name: str, case: TrainCase) -> None:
    trainee = TRAINEES["cpu"][name]
    exact = Training(TRAINEES["cpu"]["transformers"], "cpu")(request(case, "padded", "exact"))
    training = Training(trainee, "cpu")
    found = training(request(case, trainee.layout, "compared"))
    allowed = train.MAX_TRAINING_ERROR[trainee.dtype]
    assert found.tolist() == pytest.approx(exact.tolist(), rel=allowed)
    again = training(request(case, trainee.layout, "compared"))
    assert torch.equal(again, found)  # it trained nothing
    if trainee.dtype == "float32":
        assert torch.equal(training(request(case, trainee.layout, "exact")), found)
    losses = training(request(case, trainee.layout, "steps"))
    assert losses.shape == (case.steps,)
    assert losses.isfinite().all()
    trained = training.parameters[0].detach().clone()
    assert torch.equal(training(request(case, trainee.layout, "compared")), found)  # it begins anew
    assert not torch.equal(training.parameters[0], trained)


@pytest.mark.usefixtures("_small")
def test_steps_have_dropout_and_free_the_gradients() -> None:
    training = Training(TRAINEES["cpu"]["transformers"], "cpu")
    first = request(CLASSIFICATION, "padded", "steps")
    compared = training(replace(first, what="compared"))
    loss = training.step(training.batches[0])
    assert abs(loss.item() - compared[0].item()) > 1e-4
    assert all(parameter.grad is None for parameter in training.parameters)


@pytest.mark.usefixtures("_small")
def test_activations_grow_with_the_batch_and_not_with_the_model() -> None:
    training = Training(TRAINEES["cpu"]["transformers"], "cpu")
    few, many = (TrainCase("tiny", "classification", f"{count}x128", 1) for count in (8, 32))
    small, large = (training(request(case, "padded", "activations")).item() for case in (few, many))
    # A layer keeps at least its input, query, key and value, the attention's output and twice the wide activations.
    assert large > 1e-6 * 4 * (5 * 32 + 2 * 64) * 32 * 128
    assert large / small == pytest.approx(4, rel=0.5)


def test_peak_counts_from_where_it_begins() -> None:
    held = torch.ones(20_000_000)
    found = Peak("cpu")
    torch.ones(40_000_000).sum()
    assert found.megabytes() == pytest.approx(160, abs=8)
    assert held.sum() > 0


@pytest.mark.usefixtures("_small")
def test_profile_names_the_ops() -> None:
    table = train.profile(CLASSIFICATION, "bert_fast own", "cpu")
    assert table.startswith("bert_fast own, Tiny classification mix4, 3 steps:\n")
    assert "aten::" in table
    assert "Self CPU time total" in table


# ------------------------------------------------------------------------------------------------------ torch.compile


class Clocked:
    """A contender that takes as long as it is told, or fails."""

    def __init__(self, name: str, seconds: float | None) -> None:
        self.name, self.seconds = name, seconds

    def within(self, budget: Budget) -> Any:
        return nullcontext()

    def give(self, arguments: Any) -> None:
        """Takes anything."""

    def warm_up(self, calls: int) -> None:
        if self.seconds is None:
            raise WorkerError(f"{self.name} had not finished warm_up when the time was up", self.name, "warm_up")

    def sample(self) -> float:
        assert self.seconds is not None
        return self.seconds


class ClockedCrew:
    def __init__(self, seconds: dict[str, float | None]) -> None:
        self.specs = seconds

    def ready(self) -> dict[str, Clocked]:
        return {name: Clocked(name, seconds) for name, seconds in self.specs.items()}

    def end(self, name: str) -> None:
        del self.specs[name]


@pytest.mark.parametrize(
    ("compiled", "seconds", "stays", "said"),
    [
        (0.8, 10.0, True, []),
        (1.3, 10.0, False, ["here: torch.compile takes 433 ms a step, 333 ms uncompiled"]),
        (None, 10.0, False, ["here: torch.compile had not finished warm_up when the time was up"]),
        (0.8, 0.0, False, ["here: torch.compile: no time was left to compile"]),
    ],
    ids=["faster", "slower", "out of time", "no time"],
)
def test_torch_compile_takes_part_where_it_is_faster(
    compiled: float | None, seconds: float, stays: bool, said: list[str]
) -> None:
    crew: Any = ClockedCrew({"transformers": 1.0, "torch.compile": compiled, "bert_fast": 0.2})
    settings = Settings(MACHINE, 1, 1, (), ())
    took = train.drop_slower_compiled(settings, crew, steps(), "here", seconds)
    assert 0 <= took < 5
    assert ("torch.compile" in crew.specs) is stays
    assert settings.left_out == said


# --------------------------------------------------------------------------------------------------- tables, targets


def made_up(milliseconds: dict[str, float], case: TrainCase = TRAINING[0]) -> tables.TrainRow:
    """A row of these times a step, and as many megabytes."""
    timings = {name: Timing((1e-3 * case.steps * ms,), error=1e-6, cosine=1.0) for name, ms in milliseconds.items()}
    costs = {name: Cost(activations_mb=ms) for name, ms in milliseconds.items()}
    texts = Steps.of(case, config_of(case).vocab_size)
    return train.trained_row(timings, costs, texts, Settings(MACHINE, 1, 1, (), ()))


@pytest.fixture(scope="module")
def result() -> report.Result:
    first = {"transformers": 400.0, "transformers grouped": 180.0, "torch.compile": 320.0}
    second = {"transformers": 600.0, "transformers grouped": 300.0}
    rows = [
        made_up({**first, "bert_fast": 80.0, "bert_fast bf16": 64.0}),
        made_up({**second, "bert_fast": 160.0, "bert_fast bf16": 100.0}, TRAINING[3]),
    ]
    empty: Any = {key: [] for key in report.Measurement.__required_keys__}
    about = {
        "command": "python -m benchmarks.train",
        "date": "2020-01-01T00:00:00+00:00",
        "commit": None,
        "dirty": None,
        "device": "Some CPU",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "load_average": {"before": [0.0] * 3, "after": [0.0] * 3},
        "peak": MACHINE,
    }
    return {**empty, **about, "train": rows, "left_out": ["BERT-base mlm mix8: torch.compile: no time"]}


def test_ratios_are_to_the_faster_of_eager_and_compiled(result: report.Result) -> None:
    first, second = result["train"]
    assert tables.training_peer(first, "padded") == "torch.compile"
    assert tables.training_ratio(first, "bert_fast") == pytest.approx(4)
    assert tables.training_ratio(first, "bert_fast", "grouped") == pytest.approx(180 / 80)
    assert tables.activations_ratio(first, "bert_fast") == pytest.approx(80 / 320)
    assert tables.training_ratio(second, "bert_fast bf16") == pytest.approx(6)
    assert tables.training_ratio(second, "torch.compile") is None
    assert tables.training_peer({**first, "contenders": {}}, "padded") is None


def test_row_of_a_step(result: report.Result) -> None:
    row = result["train"][0]
    ours = row["contenders"]["bert_fast"]
    made = Steps.of(TRAINING[0], 30522)
    assert row["tokens"] == sum(made.lengths) / 5
    assert row["texts"] == 16
    assert ours["computed_tokens"] == made.computed_tokens("padded") / 5
    assert row["contenders"]["transformers grouped"]["computed_tokens"] == made.computed_tokens("grouped") / 5
    assert ours["median_ms"] == pytest.approx(80)
    assert ours["gflops"] == pytest.approx(row["flops"] * 1e-9 / 0.08)
    assert ours["of_peak"] == pytest.approx(ours["gflops"] / 40)
    assert row["contenders"]["bert_fast bf16"]["of_peak"] is None  # no peak of that dtype was measured


def test_targets_of_a_cpu(result: report.Result) -> None:
    judged = {v["name"]: v for v in targets.judge({"train": result}, targets.CPU_TRAINING)}
    measured = {name: verdict["measured"] for name, verdict in judged.items()}
    assert measured == {
        "bert_fast, any task, to padded": pytest.approx(3.75),
        "bert_fast, any task, to grouped": pytest.approx(300 / 160),
        "bert_fast bf16, any task, to padded": pytest.approx(5),
        "bert_fast bf16, any task, to grouped": pytest.approx(180 / 64),
        "bert_fast, mlm, to padded": pytest.approx(3.75),
        "bert_fast, activations to padded": pytest.approx(160 / 600),
    }
    assert [verdict["met"] for verdict in judged.values()] == [True, True, True, True, False, True]


def test_targets_of_training_on_an_h200(result: report.Result) -> None:
    case = TrainCase("base", "mlm", "128x128", 2)
    gpu: report.Result = {
        **result,
        "device": "NVIDIA H200",
        "train": [made_up({"transformers": 90.0, "bert_fast": 25.0}, case)],
    }
    judged = {v["name"]: v for v in targets.judge({"train": gpu})}
    mlm = judged["MLM training, BERT-base, 128x128"]
    assert (mlm["measured"], mlm["met"]) == (pytest.approx(128 * 128 / 0.025), True)
    assert judged["MLM training, BERT-large, 32x512"]["met"] is None
    assert judged["training, SQuAD-like lengths, to transformers"]["met"] is None


def test_files_and_readme(result: report.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, readme = tmp_path / "train.json", tmp_path / "README.md"
    report.save(result, path)
    assert report.read(path) == result
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train.json", "train.md"]
    begin, end = report.TRAINING
    readme.write_text(f"{report.BEGIN}\nforwards\n{report.END}\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(path), "--readme", str(readme)])
    report.main()
    text = readme.read_text()
    assert text.startswith(f"{report.BEGIN}\nforwards\n{report.END}\n{begin}\n\nSome CPU, 2 threads")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert report.TRAINING_LEGEND in text
    assert "Left out:\n\n- BERT-base mlm mix8: torch.compile: no time\n" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    (line,) = (dict(zip(lines[0], cells, strict=True)) for cells in lines if cells[3] == "torch.compile")
    assert (line["ms"], line["to padded"], line["to grouped"], line["of its MB"]) == ("320.0", "1.00x", "0.56x", "100%")


# ---------------------------------------------------------------------------------------------------- the whole of it


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(peak, "measure_cpu", lambda threads, quick: MACHINE)
    output = tmp_path / "train.json"
    arguments = ["--quick", "--tasks", "mlm", "--contenders", "transformers", "bert_fast", "--threads", "1"]
    arguments += ["--repeats", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    train.main()
    written = report.read(output)
    assert written["command"] == " ".join(["python -m benchmarks.train", *arguments[:-2]])
    assert written["left_out"] == []
    (row,) = written["train"]
    assert (row["model"], row["task"], row["steps"], list(row["contenders"])) == (
        "Tiny",
        "mlm",
        3,
        ["transformers", "bert_fast"],
    )
    for name, measured in row["contenders"].items():
        assert measured["error"] <= (0.0 if name == "transformers" else 1e-4)
        assert measured["median_ms"] > 0
        assert 0 < measured["activations_mb"] < 50
    said = capsys.readouterr().out
    assert tables.training_table(written["train"]) in said
    assert "| bert_fast, mlm, to padded" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--compile-seconds", "-1"], "--compile-seconds is -1.0"),
        (["--quick"], "--quick needs --output"),
        (["--models", "large"], "no case of these models and tasks"),
        (["--contenders", "keras"], "contender 'keras' is not one of transformers, "),
        (["--profile", "keras"], "contender 'keras' is not one of transformers, "),
        (["--contenders", "transformers"], "--contenders lacks bert_fast"),
    ],
    ids=["threads", "seconds", "compile", "quick", "no case", "contender", "profile", "no subject"],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    assert message in capsys.readouterr().err


def test_cases_and_contenders_are_there() -> None:
    for case in (*TRAINING, *GPU_TRAINING, *QUICK_TRAINING):
        assert case.model in MODELS
        assert case.task in ("classification", "mlm")
    for device, names in DEFAULT_TRAINEES.items():
        assert {"transformers", "bert_fast"} <= set(names) <= set(TRAINEES[device])
    assert {trainee.dtype for trainee in TRAINEES["cuda"].values()} == {"bfloat16"}
    assert all(isinstance(MODELS[case.model].source, BertConfig) for case in GPU_TRAINING)  # nothing from the network
