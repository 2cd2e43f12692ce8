"""A search: its lines and its best model; interruptions; trials that fail; another search in the same folder."""

import dataclasses
import json
import os
import re
import signal

import pytest
import small
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoint import checkpoint
from transformers import TrainerCallback

from bert_fast.recipes import predict
from bert_fast.recipes.search import (
    SearchSettings,
    Trial,
    best_trial,
    mean_score,
    points,
    read_trials,
    search,
    trials_table,
)
from bert_fast.recipes.spaces import Range


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=128)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trial(number, point, seed, score):
    return Trial(number, {"learning_rate": point}, seed, score, {}, 1.0, None if score is not None else "NaN")


def test_a_grid_leaves_a_line_for_each_point_and_one_model(model, tmp_path):
    settings = SearchSettings(
        small.settings(model, tmp_path / "out", num_train_epochs=10), {"learning_rate": [1e-7, 1e-2]}
    )
    result = search(settings)
    lines = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [line["parameters"] for line in lines] == [{"learning_rate": 1e-7}, {"learning_rate": 1e-2}]
    assert [dataclasses.asdict(t) for t in result.trials] == lines
    assert result.best.number == 2
    assert result.best.score == 1.0
    assert not list((tmp_path / "out" / "trials" / "001").glob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
    tuned = predict.load(result.folder, device="cpu")
    metrics, _ = predict.evaluate(tuned, settings.base.validation_file)
    assert metrics == result.best.metrics
    table = (tmp_path / "out" / "trials.md").read_text().splitlines()
    assert [re.split(r" *\| *", row)[1] for row in table[4:6]] == ["2", "1"]
    before = os.stat(tmp_path / "out" / "trials.jsonl").st_mtime_ns
    assert search(settings) == result  # nothing is left to do
    assert os.stat(tmp_path / "out" / "trials.jsonl").st_mtime_ns == before


def test_a_search_that_was_interrupted_goes_on_in_the_middle_of_its_trial(model, tmp_path, monkeypatch):
    class Kill(TrainerCallback):
        """SIGTERM after the second step of the second trial."""

        def on_step_end(self, args, state, control, **kwargs):
            if args.learning_rate == 1e-3 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def settings(folder):
        base = small.settings(model, tmp_path / folder)
        return SearchSettings(base, {"learning_rate": [3e-3, 1e-3]})

    whole = search(settings("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Kill])
        with pytest.raises(SystemExit):
            search(settings("parts"))
    assert len(read_trials(tmp_path / "parts")) == 1
    assert (tmp_path / "parts" / "trials" / "002" / "checkpoint-3").is_dir()
    parts = search(settings("parts"))
    for a, b in zip(whole.trials, parts.trials, strict=True):
        assert dataclasses.replace(a, seconds=0) == dataclasses.replace(b, seconds=0)
    weights = [load_file(result.folder / "model.safetensors") for result in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_drawn_points_do_not_depend_on_interruptions(model, tmp_path):
    def settings(folder, trials):
        return SearchSettings(
            small.settings(model, tmp_path / folder, max_steps=1),
            {"learning_rate": Range(1e-4, 1e-2, log=True)},
            trials,
        )

    whole = search(settings("whole", 3))
    search(settings("parts", 2))
    parts = search(settings("parts", 3))  # more trials than before are the same search
    assert [t.parameters for t in whole.trials] == [t.parameters for t in parts.trials]
    assert len({t.parameters["learning_rate"] for t in whole.trials}) == 3


def test_a_trial_that_fails_is_a_line_too(model, tmp_path):
    settings = SearchSettings(small.settings(model, tmp_path / "out", max_grad_norm=0), {"learning_rate": [1e38, 1e-3]})
    result = search(settings)
    assert result.trials[0].score is None
    assert "not finite" in result.trials[0].error
    assert result.best.number == 2
    assert "not finite" in trials_table(result.trials).splitlines()[-1]
    with pytest.raises(ValueError, match=r"all 1 trials failed, the last one: .*not finite"):
        search(SearchSettings(small.settings(model, tmp_path / "b", max_grad_norm=0), {"learning_rate": [1e38]}))


def test_another_search_in_the_folder_says_what_differs(model, tmp_path):
    base = small.settings(model, tmp_path / "out", max_steps=1)
    search(SearchSettings(base, {"learning_rate": [1e-3]}))
    for other, message in (
        (SearchSettings(base, {"learning_rate": [1e-3, 2e-3]}), r"space was \{.*0.001\]\} and is \{.*0.002\]\}"),
        (SearchSettings(base, {"learning_rate": [1e-3]}, seeds=(1,)), r"seeds was \[42\] and is \[1\]"),
        (
            SearchSettings(dataclasses.replace(base, model_name_or_path="demo"), {"learning_rate": [1e-3]}),
            r"out has another search: model_name_or_path was .* and is demo. Choose another output_dir",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            search(other)


def test_a_line_that_was_not_finished_is_cut_off(tmp_path):
    file = tmp_path / "trials.jsonl"
    line = json.dumps(dataclasses.asdict(trial(1, 1e-3, 42, 0.5)))
    file.write_text(line + "\n" + line[:20])
    assert read_trials(tmp_path) == [trial(1, 1e-3, 42, 0.5)]
    assert file.read_text() == line + "\n"
    file.write_text(line + "\n[1]\n")
    with pytest.raises(ValueError, match=r"trials.jsonl, line 2 is not a trial"):
        read_trials(tmp_path)


def test_points_are_judged_by_the_mean_of_their_seeds():
    trials = [trial(1, 1e-3, 1, 0.9), trial(2, 1e-3, 2, 0.5), trial(3, 2e-3, 1, 0.75), trial(4, 2e-3, 2, 0.8)]
    assert [mean_score(group) for group in points(trials)] == [pytest.approx(0.7), pytest.approx(0.775)]
    assert best_trial(trials).number == 4
    failed = [*trials, trial(5, 3e-3, 1, 1.0), trial(6, 3e-3, 2, None)]
    assert best_trial(failed).number == 4  # a point of which one failed has no mean
    again = [*trials, trial(5, 2e-3, 1, 0.1), trial(6, 2e-3, 2, 0.2)]
    assert len(points(again)) == 3  # the same point, drawn once more
    assert "mean" in trials_table(trials).splitlines()[0]
    assert best_trial([trial(1, 1e-3, 1, None)]) is None


def test_settings_that_are_wrong_say_so(model, tmp_path):
    base = small.settings(model, tmp_path / "out")
    for settings, message in (
        (SearchSettings(dataclasses.replace(base, validation_file=None)), r"a search needs a validation_file"),
        (SearchSettings(base, trials=0), r"trials is 0, expected at least 1"),
        (SearchSettings(base, seeds=()), r"seeds is empty"),
        (SearchSettings(base, {"learning_rate": [1e-3]}, metric="bleu"), r"metric is 'bleu', expected one of accuracy"),
    ):
        with pytest.raises(ValueError, match=message):
            search(settings)
