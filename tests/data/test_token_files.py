"""Words and tags from CoNLL's columns and from rows."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from bert_fast.data.catalogue import DATASETS, read
from bert_fast.data.examples import TokensExample
from bert_fast.data.tokens import NO_WORDS, iob1_to_iob2

#: As in eng.train: IOB1, four columns, documents marked.
ENG = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O
. . O O

Peter NNP I-NP I-PER
Blackburn NNP I-NP I-PER
Ann NNP I-NP B-PER
"""


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_labels_are_those_of_datasets():
    """`ner_tags` of `datasets/conll2003/conll2003.py` of huggingface/datasets (commit 003f96e)."""
    names = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
    assert DATASETS["conll2003"].labels == names


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_conll2003_becomes_iob2(tmp_path, ends):
    path = tmp_path / "eng.train"
    path.write_bytes(ENG.replace("\n", ends).encode())
    expected = (
        TokensExample("0", ("EU", "rejects", "German", "call", "."), ("B-ORG", "O", "B-MISC", "O", "O")),
        TokensExample("1", ("Peter", "Blackburn", "Ann"), ("B-PER", "I-PER", "B-PER")),
    )
    assert read("conll2003", tmp_path, labelled=True).examples == expected
    assert read("tokens", path).examples == expected  # known by its name
    assert read("tokens", path, iob1=False).examples[0].tags == ("I-ORG", "O", "I-MISC", "O", "O")


def test_words_and_tags(tmp_path):
    spaces = "Ann B-PER\nran O\n\n\nOslo B-LOC\n"
    for content in (spaces, spaces.replace(" ", "\t").strip(), spaces.replace("ran O", "ran   O")):
        for name in ("a.txt", "a.conll", "a.tsv"):
            found = read("tokens", write(tmp_path, name, content), labelled=True)
            assert [(e.words, e.tags) for e in found.examples] == [
                (("Ann", "ran"), ("B-PER", "O")),
                (("Oslo",), ("B-LOC",)),
            ]


def test_columns_by_number(tmp_path):
    path = write(tmp_path, "a.txt", "1 B-PER Ann x\n2 O ran x\n")
    found = read("tokens", path, columns={"words": "2", "tags": "1"})
    assert found.examples[0] == TokensExample("0", ("Ann", "ran"), ("B-PER", "O"))
    with pytest.raises(ValueError, match="has no column 4 for tags; it has 4, from 0"):
        read("tokens", path, columns={"tags": "4"})
    with pytest.raises(ValueError, match="has columns without names; tags='ner' should be a number"):
        read("tokens", path, columns={"tags": "ner"})


def test_words_without_tags(tmp_path):
    path = write(tmp_path, "a.txt", "Ann\nran\n")
    assert read("tokens", path).examples == (TokensExample("0", ("Ann", "ran"), None),)
    with pytest.raises(ValueError, match="line 1 has one column, expected a word and its tag"):
        read("tokens", path, labelled=True)
    path = write(tmp_path, "b.txt", "Ann B-PER\n")
    assert read("tokens", path, labelled=False).examples[0].tags is None


def test_a_word_may_hold_any_other_space(tmp_path):
    path = write(tmp_path, "a.txt", "10\u00a0000 O\n\u3000 O\n")
    assert read("tokens", path).examples[0].words == ("10\u00a0000", "\u3000")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Ann B-PER\nran\n", "line 2 has 1 columns, expected 2 as the lines before it have"),
        ("Ann\tB-PER\nran O\n", "line 2 has 1 columns, expected 2"),
        ("Ann x B-PER\n\nran O\n", "line 3 has 2 columns, expected 3"),
        ("", "is empty"),
        ("\n-DOCSTART- O\n\n", "holds no examples"),
    ],
)
def test_odd_columns(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read("tokens", write(tmp_path, "a.txt", content))


def test_rows_of_lists(tmp_path):
    rows = [{"tokens": ["Ann", "ran"], "ner_tags": [1, 0]}, {"tokens": [], "ner_tags": []}]
    path = write(tmp_path, "train.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    found = read("conll2003", path, labelled=True)
    assert found.examples == (TokensExample("0", ("Ann", "ran"), ("B-PER", "O")),)
    assert found.skipped == {NO_WORDS: 1}
    assert read("tokens", path).examples[0].tags == ("1", "0")


def test_rows_of_texts(tmp_path):
    for name, content in {
        "a.csv": 'id,words,tags\nx,Ann ran,B-PER O\ny,"[""New York"", ""x""]","[""B-LOC"", ""O""]"\n',
        "a.tsv": 'id\twords\ttags\nx\tAnn ran\tB-PER O\ny\t["New York", "x"]\t["B-LOC", "O"]\n',
    }.items():
        found = read("tokens", write(tmp_path, name, content))
        assert found.examples == (
            TokensExample("x", ("Ann", "ran"), ("B-PER", "O")),
            TokensExample("y", ("New York", "x"), ("B-LOC", "O")),
        )


def test_what_is_refused(tmp_path):
    path = write(tmp_path, "a.csv", "words,tags\nAnn ran,O\n")
    with pytest.raises(ValueError, match="line 2 has 2 words and 1 tags"):
        read("tokens", path)
    path = write(tmp_path, "a.jsonl", '{"words": ["a", 1], "tags": ["O", "O"]}')
    with pytest.raises(ValueError, match=r"line 1: column 'words' is .*, expected a list of texts"):
        read("tokens", path)
    path = write(tmp_path, "b.jsonl", '{"words": ["a"], "tags": [null]}')
    with pytest.raises(ValueError, match=r"line 1: column 'tags' is .*, expected a list of tags"):
        read("tokens", path)
    path = write(tmp_path, "a.txt", "Ann O\n\nOslo B-PLACE\n")
    with pytest.raises(ValueError, match="line 3: the tag 'B-PLACE' is none of: O, B-PER"):
        read("conll2003", path)


tags = st.lists(st.sampled_from(["O", "B-X", "I-X", "B-Y", "I-Y"]))


def iob2_to_iob1(tags):
    """The same entities with B- only where an entity follows one of its type."""
    before = "O"
    for tag in tags:
        yield f"I-{tag[2:]}" if tag.startswith("B-") and before[2:] != tag[2:] else tag
        before = tag


@settings(deadline=None)
@given(tags)
def test_iob2_stays_and_iob1_gives_it_back(tags):
    once = iob1_to_iob2(tags)
    assert iob1_to_iob2(once) == once
    assert iob1_to_iob2(tuple(iob2_to_iob1(once))) == once


@settings(deadline=None)
@given(tags)
def test_entities_are_those_of_seqeval(tags):
    assert get_entities(list(iob1_to_iob2(tags))) == get_entities(tags)


@pytest.mark.parametrize(
    ("words", "tags"), [("['EU', 'rejects']", "B-ORG O"), ("EU rejects", "['B-ORG', 'O']"), ("['EU' 'rejects']", "O")]
)
def test_lists_as_python_prints_them_are_refused(tmp_path, words, tags):
    """What pandas writes into a csv; cut at its spaces it would pass for words."""
    path = write(tmp_path, "a.csv", f'tokens,ner_tags\n"{words}","{tags}"\n')
    with pytest.raises(ValueError, match=r"a.csv, line 2: column '.*' is .*, expected a list in JSON"):
        read("tokens", path)


def test_brackets_are_words_too(tmp_path):
    path = write(tmp_path, "a.csv", "tokens,ner_tags\n[ applause ],O O O\n" + 20000 * "[" + "],O\n")
    found = read("tokens", path).examples
    assert found[0].words == ("[", "applause", "]")
    assert len(found[1].words) == 1
