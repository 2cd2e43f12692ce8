"""The catalogue as a whole, the repository's own examples, and the commands that show them."""

import gzip
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow.parquet import write_table
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.data.catalogue import DATASETS, KINDS, read
from bert_fast.data.examples import Answer, ChoiceExample, QuestionExample, TextExample, TokensExample

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_names_and_kinds():
    names = "cola sst2 mrpc qqp stsb mnli ax qnli rte wnli squad squad_v2 conll2003 swag imdb"
    assert list(DATASETS) == names.split()
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        assert dataset.kind in KINDS
        assert dataset.metrics
        assert ("train" in dataset.splits) == (name != "ax")
        assert dataset.options["max_seq_length"] == {"squad": 384, "squad_v2": 384, "imdb": 512}.get(name, 128)


def test_the_file_of_a_split(tmp_path):
    """Official names come first, and a compressed file is as good."""
    text = "sentence\tlabel\n{}\t1\n"
    (tmp_path / "validation.jsonl").write_text('{"sentence": "exported", "label": 1}\n')
    assert read("sst2", tmp_path, split="validation").examples[0].text == "exported"
    (tmp_path / "dev.tsv").write_text(text.format("official"))
    assert read("sst2", tmp_path, split="validation").examples[0].text == "official"
    (tmp_path / "train.tsv.gz").write_bytes(gzip.compress(text.format("compressed").encode()))
    assert read("sst2", tmp_path).examples[0].text == "compressed"


@pytest.mark.parametrize(
    ("name", "row", "example"),
    [
        (
            "mnli",
            {"premise": "a", "hypothesis": "b", "label": 2, "idx": 0},
            TextExample("0", "a", "b", "contradiction"),
        ),
        (
            "squad",
            {
                "id": "x",
                "title": "t",
                "context": "In Oslo.",
                "question": "q",
                "answers": {"text": ["Oslo"], "answer_start": [3]},
            },
            QuestionExample("x", "q", "In Oslo.", (Answer("Oslo", 3),)),
        ),
        ("conll2003", {"id": "7", "tokens": ["Ann"], "ner_tags": [1]}, TokensExample("7", ("Ann",), ("B-PER",))),
        (
            "swag",
            {"sent1": "a", "sent2": "b", **{f"ending{index}": str(index) for index in range(4)}, "label": 3},
            ChoiceExample("0", tuple(("a", f"b {index}") for index in range(4)), 3),
        ),
        ("imdb", {"text": "a", "label": 0}, TextExample("0", "a", None, "neg")),
    ],
)
def test_the_parquet_files_of_the_hub(tmp_path, name, row, example):
    write_table(pyarrow.Table.from_pylist([row]), tmp_path / "train-00000-of-00001.parquet")
    assert read(name, tmp_path, labelled=True).examples == (example,)


@pytest.mark.parametrize(
    ("task", "name", "sizes", "options"),
    [
        ("classification", "reviews/{}.tsv", (120, 40), {}),
        ("classification", "paraphrases/{}.jsonl", (60, 30), {}),
        ("classification", "similarity/{}.tsv", (60, 30), {}),
        ("classification", "topics/{}.jsonl", (60, 30), {}),
        ("tokens", "entities/{}.txt", (80, 30), {}),
        ("question_answering", "questions/{}.json", (47, 23), {}),
        ("multiple_choice", "endings/{}.csv", (50, 25), {}),
        ("embeddings", "pairs/{}.tsv", (100, 30), {}),
        ("embeddings", "similarity/{}.tsv", (60, 30), {"max_score": 5.0}),
    ],
)
def test_the_examples_of_the_repository(task, name, sizes, options):
    parts = [read(task, EXAMPLES / name.format(split), labelled=True, **options) for split in ("train", "validation")]
    assert tuple(len(part.examples) for part in parts) == sizes
    assert all(part.skipped == {} for part in parts)
    seen = {repr(example).split(", ", 1)[1] for example in parts[0].examples}
    assert not seen & {repr(example).split(", ", 1)[1] for example in parts[1].examples}


@pytest.mark.parametrize("name", ["reviews/{}.tsv", "paraphrases/{}.jsonl"])
def test_classes_of_the_examples_are_balanced(name):
    for split in ("train", "validation"):
        counts = Counter(example.label for example in read("classification", EXAMPLES / name.format(split)).examples)
        assert len(counts) == 2
        assert len(set(counts.values())) == 1


def test_the_examples_are_small():
    for folder in EXAMPLES.iterdir():
        assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 100_000


def test_tasks():
    listed = run("data", "tasks")
    assert listed.exit_code == 0
    for name in DATASETS:
        assert f"\n{name} " in listed.stdout
    shown = run("data", "tasks", "mnli").stdout
    assert "labels   0 entailment, 1 neutral, 2 contradiction" in shown
    assert "validation_mismatched  dev_mismatched.tsv, " in shown
    refused = run("data", "tasks", "glue")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    assert "there is no data set 'glue'; there are: cola, " in refused.stderr


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (
            ("classification", "reviews/train.tsv", "-n", 1),
            "120 examples\nlabels: negative 60, positive 60\n\nid 0\n"
            "  text     The chocolate is waxy and sickly; I threw it away.\n  label    negative\n",
        ),
        (("stsb", "similarity/train.tsv", "-n", 0), "60 examples\nscores: 0 to 5, 2.19 on average\n"),
        (("squad_v2", "questions/validation.json", "-n", 0), "23 examples\nlabels: answer 18, impossible 5\n"),
        (("embeddings", "pairs/train.tsv", "-n", 0), "100 examples\nlabels: none\n"),
        (("embeddings", "pairs/validation.tsv", "-n", 0), "30 examples\nscores: 0 to 1, 0.5 on average\n"),
    ],
)
def test_show(args, expected):
    task, file, *more = args
    result = run("data", "show", task, EXAMPLES / file, *more)
    assert (result.exit_code, result.stdout) == (0, expected)


def test_show_every_kind_of_example():
    assert (
        "\n  words    Maria/B-PER Lopez/I-PER flew/O "
        in run("data", "show", "tokens", EXAMPLES / "entities/train.txt").stdout
    )
    shown = run("data", "show", "swag", EXAMPLES / "endings/train.csv").stdout
    assert "\n  2*       The postman stops in front of the house. | He pushes two letters through the slot.\n" in shown
    shown = run("data", "show", "squad_v2", EXAMPLES / "questions/train.json", "-n", 4).stdout
    assert "\n  answers  whale oil\n" in shown
    assert "\n  answers  impossible" in shown
    assert (
        "\n  label    science, technology\n"
        in run("data", "show", "classification", EXAMPLES / "topics/train.jsonl").stdout
    )


def test_show_says_what_was_left_out(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_text("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n1\t1\t2\ta\tb\t1\n2\t3\n")
    assert "left out: 1 (a row with a wrong number of columns)" in run("data", "show", "qqp", tmp_path).stdout


def test_show_takes_the_options_of_the_readers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("body,verdict\nx,a;b\n")
    columns = ("--column", "text=body", "--column", "label=verdict")
    shown = run("data", "show", "classification", path, *columns, "--problem", "multi", "--label_delimiter", ";")
    assert "labels: a 1, b 1" in shown.stdout
    for args, message in [
        ((), "has no columns text, text_pair or"),
        (("--column", "text"), "--column is 'text', expected ROLE=NAME"),
        (("--iob1",), "reading classification has no option 'iob1'"),
    ]:
        refused = run("data", "show", "classification", path, *args)
        assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
        assert message in refused.stderr


def test_a_terminal_that_lacks_a_character_is_no_error(tmp_path):
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n東京,good\nParis,bad\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "bert_fast.cli", "data", "show", "classification", str(file)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "??" in done.stdout
