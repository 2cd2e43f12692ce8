"""The report against counts made the plain way, and the commands."""

import gzip
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
import tokenizers
from tiny_checkpoint import checkpoint
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.folders import resolve
from bert_fast.tokenization import Tokenizer
from bert_fast.vocabulary import words
from bert_fast.vocabulary.report import measure

TEXT = str(Path(__file__).parent.parent.parent / "examples" / "text")
LINES = [line for line in (Path(TEXT) / "sailing.txt").read_text(encoding="utf-8").splitlines() if line]
ODD = ["The ☃ is in 東 ☃.", "Æthelred's caf☃e", "x" * 101, ""]


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def assert_refused(result, message):
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("bert-fast: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_pretrained(resolve("demo"))


def test_counts(tokenizer):
    report = measure(tokenizer, LINES + ODD, entities={"☃": "snowman"})
    backend = tokenizer.backend
    encodings = backend.encode_batch(LINES + ODD, add_special_tokens=False)
    tokens = [token for encoding in encodings for token in encoding.tokens]
    words = Counter((text, word) for text, encoding in enumerate(encodings) for word in encoding.word_ids)
    assert report.num_lines == len(LINES) + len(ODD)
    assert report.all.num_words == len(words)
    assert report.all.num_pieces == len(tokens) == report.steps[0].num_tokens
    assert report.all.num_unknown == tokens.count("[UNK]") == report.steps[0].num_unknown == 4
    assert report.all.num_whole == sum(count == 1 for count in words.values()) - 4
    assert dict(report.unknown) == {"☃": 2, "caf☃e": 1, "x" * 101: 1}
    for name in ("num_words", "num_distinct", "num_whole", "num_pieces", "num_unknown"):
        assert sum(getattr(row, name) for row in report.by_length.values()) == getattr(report.all, name)
    assert list(report.by_length) == [(1, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 12), (17, None)]


def test_words_are_counted_in_bounded_memory(tokenizer, monkeypatch):
    """Text without spaces: each line is other, its words are not."""
    lines = [f"{'東京' * 500}{number}" for number in range(300)]
    expected = words.count_words(lines, tokenizer.backend)
    assert (expected["東"], expected["7"]) == (150_000, 1)
    monkeypatch.setattr(words, "MOST_CHUNKS", 10)
    tracemalloc.start()
    counted = words.count_words(("".join([line[:500], line[500:]]) for line in lines), tokenizer.backend)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counted == expected
    assert peak < 400_000  # the lines are 600,000


def test_steps_are_those_of_the_tokenizers(tokenizer):
    entities = {"☃": "snowman"}
    report = measure(tokenizer, LINES + ODD, entities=entities)
    backend = tokenizer.backend
    steps = [{}, {"unknown": "characters"}, {"unknown": "characters", "entities": entities}]
    for step, options in zip(report.steps, steps, strict=True):
        batch = Tokenizer(backend, **options)(LINES + ODD)
        assert step.num_tokens == len(batch.input_ids) - 2 * len(batch.lengths)
        assert step.num_unknown == batch.num_unknown


def test_what_is_saved_is_what_an_extension_saves(tokenizer):
    from bert_fast.vocabulary.extension import extended

    report = measure(tokenizer, LINES, num_words=12)
    assert len(report.costly) == 12
    after = Tokenizer(extended(tokenizer.backend, [costly.word for costly in report.costly]))
    assert report.saved == len(tokenizer(LINES).input_ids) - len(after(LINES).input_ids)
    assert [costly.saved for costly in report.costly] == sorted((c.saved for c in report.costly), reverse=True)


def test_bad_reports(tokenizer):
    with pytest.raises(ValueError, match="no word in the text"):
        measure(tokenizer, ["", " "])
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="is a WordLevel"):
        measure(Tokenizer(other), ["a"])


def test_train_extend_and_report_commands(tmp_path):
    packed = tmp_path / "packed.txt.gz"
    packed.write_bytes(gzip.compress("\n".join(LINES).encode()))
    result = run("vocab", "train", packed, TEXT, "--output", tmp_path / "v", "--vocab_size", 500)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'v'}: 500 tokens: 5 special, 31 characters, 464 pieces\n"

    result = run("vocab", "report", tmp_path / "v", TEXT, "--num_words", 3)
    assert result.exit_code == 0, result.output
    for part in ("[UNK]: 0.00% of the words", "10 to 12", "+ characters", "With these 3 words in the vocabulary"):
        assert part in result.stdout

    folder = checkpoint(tmp_path / "model")
    result = run("vocab", "extend", folder, "--corpus", TEXT, "--num_words", 3, "-o", tmp_path / "longer")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'longer'}: 2 words added, ids 30522 to 30523"  # no more are there five times
    assert lines[1] == "  halyard, levain"
    assert lines[2] == "cut differently, as a new word is their beginning: 0 other words, 0 of the 5,635 in the corpus"
    assert Tokenizer.from_pretrained(tmp_path / "longer")(["Halyard"]).input_ids.tolist() == [101, 30522, 102]


def test_words_and_their_effect(tmp_path):
    folder = checkpoint(tmp_path / "model")
    (tmp_path / "words.txt").write_text("sprocket\nSan Francisco\n\nthe\n")
    result = run("vocab", "extend", folder, "--words", tmp_path / "words.txt", "--corpus", TEXT, "-o", tmp_path / "x")
    assert result.exit_code == 0, result.output
    for part in (
        "1 word added, ids 30522 to 30522\n  sprocket\n",
        "not added: 2 words\n  San Francisco: the tokenizer takes it for 2 words: san francisco\n  the: is in",
        "1 other word, 1 of the 5,635 in the corpus",
        "sprockets: sp ##rock ##ets -> sprocket ##s",
    ):
        assert part in result.stdout


def test_refused_commands(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"fine\n\xff\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    out = tmp_path / "out"
    assert_refused(run("vocab", "train", tmp_path / "none.txt", "-o", out), "none.txt")
    assert_refused(run("vocab", "train", tmp_path / "words.txt", "-o", out), "words.txt, line 2 is not UTF-8")
    assert_refused(run("vocab", "train", TEXT, "-o", tmp_path / "there"), "there is there already")
    assert_refused(run("vocab", "train", TEXT, "-o", out, "--vocab_size", 50), "vocab_size is 50, but the 5 special")
    assert_refused(run("vocab", "extend", "demo", "-o", out), "neither --words nor --corpus")
    assert_refused(run("vocab", "extend", "demo", "--words", tmp_path / "words.txt", "-o", out), "line 2 is not UTF-8")
    assert_refused(run("vocab", "report", tmp_path / "there", TEXT), "holds no tokenizer")
    assert_refused(run("vocab", "report", "demo", TEXT, "--entities", tmp_path / "words.txt"), "words.txt, line 1 is")
    assert not out.exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files stands for it: what is written ends in the middle."""
    checkpoint(tmp_path / "model")
    (tmp_path / "words.txt").write_text("sprocket\n")
    command = f'ulimit -f 2000; exec "{sys.executable}" -m bert_fast.cli vocab extend model --words words.txt -o out'
    environment = {**os.environ, "PYTHONPATH": str(Path(TEXT).parent.parent)}
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("bert-fast: ")
    assert done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "words.txt"]
