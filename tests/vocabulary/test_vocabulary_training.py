"""Trained vocabularies: the same every time, read alike by transformers, closed under their alphabet."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer

from bert_fast.tokenization import Tokenizer, bert_normalizer
from bert_fast.vocabulary.training import FIRST_TOKENS, count_characters, train
from bert_fast.vocabulary.words import count_words, split

ROOT = Path(__file__).parent.parent.parent
LINES = [
    line
    for path in sorted((ROOT / "examples" / "text").glob("*.txt"))
    for line in path.read_text(encoding="utf-8").splitlines()
]
MIXED = [*LINES[:60], "Crème brûlée à Ångström", "我爱北京。我爱东京。", "don't, re-do: 3.14"]

ODD_TEXTS = ["", " \t\u00a0", "BRÛLÉE", "我爱北京x东", "☃ snow☃man", "x" * 101, "[MASK] it [CLS]", "e\u0301a\u0308"]


def rows(batch):
    ids = batch.input_ids.tolist()
    ends = batch.lengths.cumsum().tolist()
    return [ids[end - length : end] for end, length in zip(ends, batch.lengths.tolist(), strict=True)]


@pytest.fixture(scope="module")
def english():
    return train(LINES, vocab_size=800)


@pytest.mark.parametrize(
    "options",
    [{}, {"lowercase": False}, {"lowercase": False, "strip_accents": True}, {"strip_accents": False},
     {"chinese_characters": False}],
    ids=str,
)  # fmt: skip
def test_transformers_reads_the_same_ids(tmp_path, options):
    train(MIXED, vocab_size=400, min_frequency=1, **options).save(tmp_path / "v")
    texts = MIXED + ODD_TEXTS
    ours = rows(Tokenizer.from_pretrained(tmp_path / "v")(texts))
    assert AutoTokenizer.from_pretrained(tmp_path / "v")(texts)["input_ids"] == ours
    assert BertTokenizer.from_pretrained(tmp_path / "v")(texts)["input_ids"] == ours
    (tmp_path / "v" / "tokenizer.json").unlink()  # vocab.txt alone says the same
    assert rows(Tokenizer.from_pretrained(tmp_path / "v")(texts)) == ours
    assert AutoTokenizer.from_pretrained(tmp_path / "v")(texts)["input_ids"] == ours


def test_special_tokens_come_first_and_have_their_roles(english, tmp_path):
    english.save(tmp_path / "v")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "v")
    assert english.tokens[:5] == FIRST_TOKENS
    named = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [*named, tokenizer.mask_token_id] == [0, 1, 2, 3, 4]
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == len(english.tokens) == len(set(english.tokens)) == 800


def defined(texts, vocab_size, min_frequency):
    """The training, written down: every pair counted anew before each step; ties go to the pair of lower ids."""
    backend = train(texts, vocab_size=vocab_size).backend()
    counts = count_words(texts, backend)
    alphabet = sorted({character for word in counts for character in word})
    inside = [f"##{character}" for character in alphabet if character.isalnum()]
    ids = {token: id for id, token in enumerate([*FIRST_TOKENS, *inside, *alphabet])}
    words = {word: [word[0], *(f"##{character}" for character in word[1:])] for word in counts}
    while len(ids) < vocab_size:
        pairs = Counter()
        for word, pieces in words.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]), default=None)
        if best is None or pairs[best] < min_frequency:
            break
        joined = best[0] + best[1].removeprefix("##")
        ids.setdefault(joined, len(ids))
        for pieces in words.values():
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == best:
                    pieces[at : at + 2] = [joined]
                at += 1
    return (*FIRST_TOKENS, *alphabet, *inside, *list(ids)[5 + len(inside) + len(alphabet) :])


@pytest.mark.parametrize(("vocab_size", "min_frequency"), [(62, 2), (300, 2), (1000, 3)])
def test_the_pieces_are_those_of_the_definition(vocab_size, min_frequency):
    found = train(LINES[:100], vocab_size=vocab_size, min_frequency=min_frequency).tokens
    assert found == defined(LINES[:100], vocab_size, min_frequency)
    assert len(found) <= vocab_size


SCRIPT = """
import hashlib, random, sys
from pathlib import Path
from bert_fast.vocabulary.training import train
lines = [line for path in sorted(Path("examples/text").glob("*.txt")) for line in path.read_text().splitlines()]
random.Random(int(sys.argv[1])).shuffle(lines)
print(hashlib.sha256("\\n".join(train(lines, vocab_size=900, limit_alphabet=28).tokens).encode()).hexdigest())
"""


def test_the_same_vocabulary_in_every_process_order_and_number_of_threads():
    """The library's hash tables are seeded anew in each process, and so are its vocabularies, left to itself."""
    found = set()
    for seed in range(4):
        environment = {**os.environ, "RAYON_NUM_THREADS": str(seed + 1)}
        command = [sys.executable, "-c", SCRIPT, str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
        found.add(done.stdout)
    assert len(found) == 1


def test_alphabet(english):
    assert english.alphabet == tuple(sorted({c for line in LINES for c in line.lower()} - {" "}))
    assert not english.left_out
    assert {"a", "##a", "-"} <= set(english.tokens)
    assert "##-" not in english.tokens  # punctuation is a word of its own


def test_chinese_characters_are_words():
    assert not {"##我", "##京", "北京"} & set(train(MIXED, vocab_size=400, min_frequency=1).tokens)
    assert {"##京", "我爱北京"} <= set(train(["我爱北京"] * 2, chinese_characters=False).tokens)


def test_limit_of_the_alphabet_keeps_the_most_frequent():
    vocabulary = train(["bbb ccc aaaa dd"], limit_alphabet=2)
    assert vocabulary.alphabet == ("a", "b")  # c is as frequent as b, and comes after it
    assert vocabulary.left_out == {"c": 3, "d": 2}
    assert vocabulary.backend().encode("ab c").tokens == ["[CLS]", "a", "##b", "[UNK]", "[SEP]"]


def test_min_frequency():
    assert "abc" in train(["abc abc abc"], min_frequency=3).tokens
    assert "abc" not in train(["abc abc abc"], min_frequency=4).tokens


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("abcxyz ETAON'-.,?"), max_size=40))
def test_text_of_the_alphabet_comes_back(english, text):
    backend = english.backend()
    tokens = backend.encode(text, add_special_tokens=False).tokens
    assert "[UNK]" not in tokens
    joined = "".join(token.removeprefix("##") if token.startswith("##") else f" {token}" for token in tokens)
    assert joined.split() == split(text, backend)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=20), max_size=4), st.booleans(), st.booleans())
def test_counts_are_those_of_the_whole_text(texts, lowercase, chinese):
    """Words counted by chunk, and characters one by one, against the tokenizer's own way through each text."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    backend.normalizer = bert_normalizer({"do_lower_case": lowercase, "tokenize_chinese_chars": chinese})
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words = Counter(word for text in texts for word in split(text, backend))
    assert count_words(texts, backend) == words
    assert count_characters(texts, backend) == Counter(char for word in words.elements() for char in word)


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no text"),
        (["", " \t"], {}, "no text"),
        (["abc"], {"vocab_size": 10}, "vocab_size is 10, but the 5 special tokens and the alphabet of 3 characters"),
        (iter(["abc"]), {}, "texts is an iterator"),
    ],
)
def test_bad_input(texts, options, message):
    with pytest.raises(ValueError, match=message):
        train(texts, **options)


def test_a_folder_that_is_there_is_not_touched(english, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="is there already"):
        english.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_files(english, tmp_path):
    english.save(tmp_path / "new" / "v")
    assert sorted(path.name for path in tmp_path.joinpath("new").iterdir()) == ["v"]
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"]
    assert sorted(path.name for path in tmp_path.joinpath("new", "v").iterdir()) == names
    config = json.loads((tmp_path / "new" / "v" / "tokenizer_config.json").read_text())
    assert config["do_lower_case"] is True
    assert config["tokenizer_class"] == "BertTokenizer"
