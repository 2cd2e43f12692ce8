"""The commands finetune, evaluate and predict: what they print, and one line for bad input."""

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoint
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.loading import from_pretrained
from bert_fast.recipes._splits import task_of
from bert_fast.recipes.finetune import save_model

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

REVIEWS = Path(__file__).parents[2] / "examples" / "reviews"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint.checkpoint(tmp_path_factory.mktemp("base"))


def finetune(base, output_dir, *options):
    files = ["--train_file", REVIEWS / "train.tsv", "--validation-file", REVIEWS / "validation.tsv"]
    model = ["--model_name_or_path", base, "--task_name", "classification", "--output_dir", output_dir]
    return run("finetune", *model, *files, "--max_steps", 2, "--disable_tqdm=true", "--use_cpu", *options)


def test_from_files_to_predictions(base, tmp_path):
    made = finetune(base, tmp_path / "run", "--per_device_train_batch_size", 4, "--text_column", "sentence")
    assert made.exit_code == 0, made.stderr
    last = made.stdout.splitlines()[-4:]
    assert last[0].startswith("2 steps on 120 examples in ")
    assert last[1].split() == ["accuracy", "macro_f1", "loss"]
    assert last[2].split()[0] == "validation"
    assert last[3] == f"written: {tmp_path / 'run'}"
    scored = run("evaluate", tmp_path / "run", REVIEWS / "validation.tsv", "--device", "cpu")
    assert scored.stdout.splitlines() == ["40 examples", *last[1:3]]
    output = tmp_path / "said.csv"
    said = run("predict", tmp_path / "run", REVIEWS / "validation.tsv", "-o", output, "--device", "cpu")
    assert said.stdout == f"{output}: 40 examples\n"
    assert len(output.read_text().splitlines()) == 41


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warmup", "3"], "--warmup is no option of this command nor one of TrainingArguments; did you mean"),
        (["--num_train_epochs", "0", "--max_steps", "-1"], "num_train_epochs is 0.0, expected above 0"),
        (["--optimizer", "sgd"], "optimizer is 'sgd', expected one of adamw"),
        (["--label_column", "stars"], "stars"),
        (["--column", "stars"], "--column is 'stars', expected ROLE=NAME"),
        (["--task_option", "loss=triplet"], "loss is no option of classification"),
        (["--read_option", "comma=3"], "reading classification has no option 'comma'"),
        (["--resume_from_checkpoint", "elsewhere"], "there is no checkpoint elsewhere"),
        (["--train_file", "absent.tsv"], "absent.tsv: No such file or directory"),
    ],
)
def test_bad_options_are_one_line(base, tmp_path, options, message):
    result = finetune(base, tmp_path / "run", *options)
    assert result.exit_code == 2, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("bert-fast: ")
    assert message in line


def test_a_model_of_mnli_answers_the_diagnostic_pairs(base, tmp_path):
    task = task_of("mnli", {"problem": "single"})
    model = from_pretrained(base, task.head, config=task.config())
    save_model(tmp_path, model, base, task)
    (tmp_path / "results.json").write_text('{"task": "mnli"}')
    pairs = tmp_path / "diagnostic-full.tsv"
    rows = "".join(f"A {number}.\tB.\t{('neutral', 'entailment')[number % 2]}\n" for number in range(4))
    pairs.write_text(f"Premise\tHypothesis\tLabel\n{rows}")
    options = ["--task_name", "ax", "--device", "cpu"]
    assert run("evaluate", tmp_path, pairs, *options).stdout.splitlines()[1].split() == ["mcc", "loss"]
    done = run("predict", tmp_path, pairs, *options, "-o", tmp_path / "said.jsonl", "--submission", tmp_path / "glue")
    assert done.exit_code == 0, done.output
    lines = (tmp_path / "glue" / "AX.tsv").read_text().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["index", "0", "1", "2", "3"]
    for name, message in (
        ("squad", "squad is question_answering, but the model is for classification"),
        ("rte", "rte has the label 'not_entailment', which the model has not: entailment, neutral, contradiction"),
    ):
        refused = run("evaluate", tmp_path, pairs, "--task_name", name)
        assert (refused.exit_code, refused.stderr) == (2, f"bert-fast: {message}\n")


def test_evaluate_and_predict_refuse_other_folders(base, tmp_path):
    for command in (["evaluate"], ["predict", "-o", tmp_path / "said.csv"]):
        result = run(*command, base, REVIEWS / "validation.tsv")
        assert result.exit_code == 2
        assert "has no task.json: it is not a model that was fine-tuned here" in result.stderr


@pytest.mark.slow
def test_two_processes_do_what_one_does(base, tmp_path):
    """Without dropout, batches of 4 in each of two processes are the batches of 8 of one."""
    scores = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += ["-m", "bert_fast.cli", "finetune", "--model_name_or_path", str(base), "--disable_tqdm", "true"]
        command += ["--task_name", "classification", "--output_dir", str(folder), "--use_cpu", "--max_steps", "6"]
        command += ["--train_file", str(REVIEWS / "train.tsv"), "--validation_file", str(REVIEWS / "validation.tsv")]
        command += ["--per_device_train_batch_size", str(8 // processes), "--learning_rate", "3e-3"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("written: ") == 1
        scores.append([line for line in done.stdout.splitlines() if line.startswith("validation")])
    assert scores[0] == scores[1]
