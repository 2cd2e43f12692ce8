"""A recipe's stages: what they are worth, when they run again, and what is wrong with a file."""

import os
import signal

import pytest
import small
import torch
import transformers
from safetensors.torch import load_file
from tiny_checkpoint import checkpoint
from transformers import TrainerCallback

from bert_fast.recipes import predict
from bert_fast.recipes._paths import PathResult, TransferResult, transfer_page, transfer_table
from bert_fast.recipes.transfer import read_recipe, transfer

SENTENCES = [
    f"the {animal} {verb} in the {place}"
    for animal in ("cat", "dog", "bird")
    for verb in ("sleeps", "eats")
    for place in ("house", "garden", "barn", "yard")
]

RECIPE = """
model = "{folder}/model"
output_dir = "{folder}/out"
seeds = [1]

[domain]
train_file = "{folder}/domain.txt"
max_steps = {steps}
learning_rate = 3e-3
use_cpu = true
disable_tqdm = true
plot_metrics = false

[task]
validation_split_percentage = 25
max_steps = 2
use_cpu = true
disable_tqdm = true
plot_metrics = false

[finetune]
task = "classification"
train_file = "{folder}/texts.tsv"
validation_file = "{folder}/texts.tsv"
max_steps = 2
use_cpu = true
disable_tqdm = true
plot_metrics = false
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write(folder, text=RECIPE, steps=6):
    """A folder with all that the recipe names, and the recipe."""
    if not (folder / "model").exists():
        checkpoint(folder / "model", max_position_embeddings=128)
        small.file(folder / "texts.tsv")
        (folder / "domain.txt").write_text("\n\n".join("\n".join(SENTENCES[i::8]) for i in range(8)) * 4)
    (folder / "recipe.toml").write_text(text.format(folder=folder, steps=steps))
    return folder / "recipe.toml"


def run(file):
    said = []
    return transfer(read_recipe(file), said.append), said


def accuracy(folder):
    tuned = predict.load(folder, device="cpu")
    return predict.evaluate(tuned, folder.parent.parent / "texts.tsv")[0]["accuracy"]


@pytest.mark.slow
def test_all_paths_run_once_and_only_what_changed_runs_again(tmp_path):
    result, said = run(write(tmp_path))
    assert [path.name for path in result.paths] == [
        "domain, task, finetune", "domain, finetune", "task, finetune", "finetune",
    ]  # fmt: skip
    names = [
        "domain", "domain+task", "domain+task+finetune-1", "domain+finetune-1", "task", "task+finetune-1", "finetune-1",
    ]  # fmt: skip
    assert said == [f"{name}: runs" for name in names]
    assert result.metric == "validation accuracy"
    before, after = result.paths[0].perplexities["domain"]
    assert after < before
    assert result.paths[2].scores == [accuracy(tmp_path / "out" / "task+finetune-1")]
    assert transfer_table(result) in (tmp_path / "out" / "transfer.md").read_text()
    assert not list((tmp_path / "out").rglob("checkpoint-*"))

    again, said = run(tmp_path / "recipe.toml")
    assert again == result
    assert said == [f"{name}: finished before" for name in names]

    recipe = RECIPE.replace("25\nmax_steps = 2", "25\nmax_steps = 3")
    changed, said = run(write(tmp_path, recipe))
    anew = "runs again, for the model it starts from is another one"
    assert [line for line in said if "finished" not in line] == [
        "domain+task: runs again, for max_steps was 2 and is 3", "domain+task: runs",
        f"domain+task+finetune-1: {anew}", "domain+task+finetune-1: runs",
        "task: runs again, for max_steps was 2 and is 3", "task: runs",
        f"task+finetune-1: {anew}", "task+finetune-1: runs",
    ]  # fmt: skip
    assert changed.paths[3] == result.paths[3]

    (tmp_path / "domain.txt").write_text((tmp_path / "domain.txt").read_text() + "\n\nand a cow")
    alone, said = run(write(tmp_path, recipe.replace("seeds = [1]", "seeds = [1, 2]\nablation = false")))
    assert said[0] == "domain: runs again, for what train_file holds has changed"
    assert [path.name for path in alone.paths] == ["domain, task, finetune"]
    scores = [accuracy(tmp_path / "out" / f"domain+task+finetune-{seed}") for seed in (1, 2)]
    assert alone.paths[0].scores == scores
    assert alone.folder.resolve().name == f"domain+task+finetune-{1 + scores.index(max(scores))}"


def test_a_stage_that_was_interrupted_goes_on(tmp_path, monkeypatch):
    class Kill(TrainerCallback):
        """SIGTERM after the second step of the first stage."""

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    recipe = RECIPE.replace("seeds = [1]", "seeds = [1]\nablation = false")
    whole, _ = run(write(tmp_path, recipe))
    (tmp_path / "out").rename(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", [*transformers.trainer.DEFAULT_CALLBACKS, Kill])
        with pytest.raises(SystemExit):
            run(tmp_path / "recipe.toml")
    assert (tmp_path / "out" / "domain" / "checkpoint-3").is_dir()
    parts, said = run(tmp_path / "recipe.toml")
    assert said == ["domain: goes on", "domain+task: runs", "domain+task+finetune-1: runs"]
    assert parts.paths[0].scores == whole.paths[0].scores
    weights = [load_file(tmp_path / name / "domain" / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    pooler = load_file(tmp_path / "model" / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(weights[0]["bert.pooler.dense.weight"], pooler)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[domain]", "[domian]", r"recipe.toml has 'domian', .*did you mean domain"),
        ("learning_rate", "learning_rte", r"recipe.toml, \[domain\] has 'learning_rte', .*did you mean learning_rate"),
        ("validation_file", "validaton_file", r"\[finetune\] has 'validaton_file', .*did you mean validation_file"),
        ('output_dir = "{folder}/out"', "", r"recipe.toml has no output_dir"),
        ("seeds = [1]", "seeds = 3", r"seeds is 3, expected numbers"),
        ("[task]\n", "[task]\n= 3\n", r"recipe.toml is not TOML: .*line \d+"),
        ("domain.txt", "other.txt", r"\[domain\] train_file: there is no .*other.txt"),
        ('train_file = "{folder}/domain.txt"', "", r"\[domain\] has no train_file"),
        ('validation_file = "{folder}/texts.tsv"', "", r"\[finetune\] has no validation_file"),
        ('task = "classification"', "", r"\[finetune\] has no task: the name of a data set"),
        ("seeds = [1]\n\n[domain]", "domain = 3\n\n[other]", r"has 'other'"),
    ],
)
def test_a_recipe_that_is_wrong_says_so(tmp_path, old, new, message):
    assert old in RECIPE
    with pytest.raises(ValueError, match=message):
        run(write(tmp_path, RECIPE.replace(old, new)))
    assert not (tmp_path / "out" / "domain").exists()


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    (tmp_path / "out" / "domain").mkdir(parents=True)
    (tmp_path / "out" / "domain" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"domain is no stage of a transfer: choose another output_dir"):
        run(write(tmp_path))
    assert (tmp_path / "out" / "domain" / "letter.txt").exists()


def test_the_table_compares_with_the_whole_path(tmp_path):
    paths = [
        PathResult(("domain",), [0.9, 0.8], {"domain": (30.0, 20.0)}, 5.0),
        PathResult((), [0.7, 0.8], {}, 2.0),
    ]
    result = TransferResult("validation accuracy", paths, tmp_path)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in transfer_table(result).splitlines()]
    assert cells[0] == [
        "path", "validation accuracy", "spread", "seeds", "against the whole", "domain perplexity", "seconds",
    ]  # fmt: skip
    assert cells[2] == ["domain, finetune", "0.8500", "0.0707", "2", "", "30.0 to 20.0", "5.0"]
    assert cells[3] == ["finetune", "0.7500", "0.0707", "2", "-0.1000", "-", "2.0"]
    page = transfer_page(result)
    assert all(f">{cell}<" in page for row in cells[2:] for cell in row if cell)
    assert "<svg" in page
