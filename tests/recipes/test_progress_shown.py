"""What a person sees while files are read, tokenised and answered; and that a pipe sees nothing."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
from pyarrow import Table
from pyarrow.parquet import write_table

from bert_fast import terminal
from bert_fast.data.catalogue import read
from bert_fast.recipes._splits import make_split, task_of

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = {
    "classification": "reviews/train.tsv",
    "tokens": "entities/train.txt",
    "question_answering": "questions/train.json",
    "multiple_choice": "endings/train.csv",
    "embeddings": "pairs/train.tsv",
}


@pytest.fixture
def watched(monkeypatch):
    """A terminal, where bars appear at once."""
    monkeypatch.setattr(terminal, "is_watched", lambda: True)
    monkeypatch.setattr(terminal, "DELAY", 0.0)


def work(kind):
    task = task_of(kind, {"version_2_with_negative": True, "max_seq_length": 128} if kind.startswith("q") else {})
    found = read(kind, EXAMPLES / FILES[kind], labelled=True)
    task.learn(found.examples)
    split = make_split("train", found, task, tiny_checkpoint.tokenizer())
    if kind == "question_answering":
        zeros = [(np.zeros(len(feature["input_ids"]), np.float32),) * 2 for feature in split.features.inputs]
        task.predictions(split.examples, split.features, zeros)
    return len(found.examples)


@pytest.mark.parametrize("kind", FILES)
def test_files_are_read_and_tokenised_before_ones_eyes(kind, watched, capsys):
    count = work(kind)
    said = capsys.readouterr().err
    if kind != "question_answering":  # whose file is one piece of JSON
        assert f"reading {Path(FILES[kind]).name}:" in said
    assert "tokenising: 100%" in said
    texts = {"multiple_choice": 4, "embeddings": 2}.get(kind, 1) * count
    assert f"{texts}/{texts}" in said
    assert ("choosing answers: 100%" in said) == (kind == "question_answering")


def test_a_pipe_sees_nothing(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "DELAY", 0.0)
    for kind in FILES:
        work(kind)
    assert capsys.readouterr().err == ""


def test_files_in_other_formats(tmp_path, watched, capsys):
    rows = [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]
    write_table(Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"text": "one", "label": "a"}\n')
    for label in ("pos", "neg"):
        (tmp_path / "test" / label).mkdir(parents=True)
        (tmp_path / "test" / label / "0_1.txt").write_text("Fine.")
    read("classification", tmp_path / "a.parquet")
    read("classification", tmp_path / "a.jsonl")
    read("imdb", tmp_path, split="test")
    said = capsys.readouterr().err
    assert "reading a.parquet: 100%" in said
    assert "reading a.jsonl: 1 lines" in said
    assert "reading neg: 100%" in said


def test_a_terminal_that_does_not_say_how_wide_it_is():
    """Of `script` and of containers; its width is 0."""
    ours, theirs = os.openpty()
    program = "from bert_fast.terminal import progress_bar; list(progress_bar('ab', what='letters', show=True))"
    subprocess.run([sys.executable, "-c", program], stderr=theirs, check=True)
    os.close(theirs)
    assert b"letters: 100%" in os.read(ours, 1 << 16)
    os.close(ours)


def test_of_several_processes_one_is_seen(monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert terminal.is_watched()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not terminal.is_watched()
