"""The commands of search, distillation and transfer: help, and one clear line for bad input."""

import json

import pytest
import small
from tiny_checkpoint import checkpoint
from typer.testing import CliRunner

from bert_fast.cli import app


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def refused(result):
    """Exit code 2 and one line on stderr, which is returned."""
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("bert-fast: ")
    assert "Traceback" not in result.output
    return line


@pytest.fixture
def files(tmp_path):
    model = checkpoint(tmp_path / "model", max_position_embeddings=128)
    return model, small.file(tmp_path / "texts.tsv")


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("distill", ["--teacher", "--student_layers", "--hidden_weight", "--temperature"]),
        ("search-hparams", ["--vary", "--trials", "--seeds", "--space_file"]),
        ("transfer", ["RECIPE"]),
    ],
)
def test_help_says_what_there_is(command, flags):
    out = run(command, "--help").stdout
    assert all(flag in out for flag in flags)


def test_a_search_by_flags(files, tmp_path):
    model, texts = files
    command = ["search-hparams", "--model_name_or_path", model, "--task_name", "classification", "--output-dir"]
    command += [tmp_path / "out", "--train_file", texts, "--validation_file", texts, "--use_cpu", "true"]
    command += ["--plot_metrics", "false", "--max_steps", "1"]
    done = run(*command, "--vary", "learning_rate=1e-3..1e-2:log", "--trials", 1, "--seeds", "3,4")
    assert done.exit_code == 0, done.output
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [trial["seed"] for trial in trials] == [3, 4]
    assert trials[0]["parameters"] == trials[1]["parameters"]
    assert 1e-3 <= trials[0]["parameters"]["learning_rate"] <= 1e-2
    assert done.stdout.splitlines()[0].startswith("| trial |")
    for flags, message in (
        (["--vary", "learning_rte=1e-3"], "the space has 'learning_rte', which is no setting there; did you mean"),
        (["--vary", "learning_rate"], "--vary is 'learning_rate', expected NAME=VALUE"),
        (["--vary", "learning_rate=1e-3..x"], "--vary learning_rate is '1e-3..x', expected values as 1,2,3 or a range"),
        (["--vary", "learning_rate=1e-3..1e-2"], "learning_rate has a range, which only a search with a number of"),
        (["--seeds", "a"], "--seeds is 'a', expected numbers, as 1,2,3"),
        (["--learning_rte", "1"], "--learning_rte is no option of this command nor one of TrainingArguments"),
        (["--vary", "learning_rate=1e-3"], "has another search: space was"),
    ):
        assert message in refused(run(*command, *flags))


def test_a_teacher_that_is_none_is_one_line(files, tmp_path):
    model, texts = files
    line = refused(
        run("distill", "--teacher", model, "--output_dir", tmp_path / "s", "--train_file", texts, "--student_layers", 1)
    )
    assert "has no task.json, which says what its outputs mean" in line


def test_a_recipe_that_is_not_there_is_one_line(tmp_path):
    assert "recipe.toml: No such file or directory" in refused(run("transfer", tmp_path / "recipe.toml"))
