"""Pre-training as people do it: on real text until it knows something, and in two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import bert_fast
from bert_fast.recipes.pretrain import Phase, PretrainSettings, pretrain
from bert_fast.training.progress import METRICS_FILE, read
from bert_fast.vocabulary.training import train

#: By which factor the perplexity of text that was held out falls in 60 steps at least; measured: 11.
FACTOR = 7

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation of Python's language, and a vocabulary of it, as in docs/guides/pretraining.md."""
    place = tmp_path_factory.mktemp("pretrain")
    documents = [[" ".join(part.split()) for part in re.split(r"\n\s*\n", text)] for text in topics.values()]
    (place / "docs.txt").write_text("\n\n".join("\n".join(filter(None, parts)) for parts in documents))
    train([part for parts in documents for part in parts], vocab_size=4000, show_progress=False).save(
        place / "vocabulary"
    )
    (place / "shape.json").write_text(json.dumps(SHAPE))
    return place


@pytest.mark.slow
def test_a_tiny_bert_learns_from_real_text(place: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    arguments = {"max_steps": 60, "learning_rate": 1e-3, "eval_strategy": "no", "save_strategy": "no"}
    try:
        result = pretrain(
            PretrainSettings(
                str(tmp_path),
                str(place / "docs.txt"),
                config_name="tiny",
                tokenizer_name=str(place / "vocabulary"),
                arguments={**arguments, "use_cpu": True, "plot_metrics": False, "disable_tqdm": True},
            )
        )
    finally:
        torch.set_num_threads(threads)
    assert 3000 < result.before["perplexity"] < 5000, "an untrained model takes all of 4,000 words to be as likely"
    assert result.before["perplexity"] / result.after["perplexity"] > FACTOR


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(place: Path, tmp_path: Path) -> None:
    """Over both phases, with the same scores of what is held out; the data are made once."""
    options = {
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "disable_tqdm": True,
        "plot_metrics": False,
        "use_cpu": True,
        "save_strategy": "no",
    }
    common = {
        "train_file": str(place / "docs.txt"),
        "config_name": str(place / "shape.json"),
        "tokenizer_name": str(place / "vocabulary"),
        "objective": "nsp",
    }
    flags = {**common, **options, "per_device_train_batch_size": 2, "output_dir": tmp_path / "two"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "bert_fast.cli", "pretrain", *words, "--phase", "16:0.5", "--phase", "32:0.5"],
        env={**os.environ, "PYTHONPATH": str(Path(bert_fast.__file__).parent.parent), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("written: ") == 1
    phases = (Phase(16, 0.5), Phase(32, 0.5))
    arguments = {**options, "per_device_train_batch_size": 4}
    one = pretrain(PretrainSettings(str(tmp_path / "one"), phases=phases, arguments=arguments, **common))
    found, expected = (
        [line["loss"] for line in read(tmp_path / name / METRICS_FILE) if "loss" in line] for name in ("two", "one")
    )
    assert len(expected) == 4
    assert found == pytest.approx(expected, rel=1e-5)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert results["held_out"]["after"] == pytest.approx(one.after, rel=1e-4)
    assert results["train"]["tokens"] == one.train["tokens"]
