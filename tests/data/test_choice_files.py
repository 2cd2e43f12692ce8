"""Choices, pairs and triplets from rows."""

import json

import pytest

from bert_fast.data.catalogue import read
from bert_fast.data.examples import ChoiceExample, SentencesExample

#: As in SWAG's train.csv, whose first column has no name.
SWAG = """,video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label
0,lsmdc1,3,She runs. He,She runs.,He,gold,"sits, tired.",eats.,flies.,sings.,2
"""


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def test_swag(tmp_path):
    write(tmp_path, "train.csv", SWAG)
    endings = ("sits, tired.", "eats.", "flies.", "sings.")
    expected = (ChoiceExample("0", tuple(("She runs.", f"He {ending}") for ending in endings), 2),)
    assert read("swag", tmp_path, labelled=True).examples == expected
    assert read("multiple_choice", tmp_path / "train.csv", labelled=True).examples == expected
    (tmp_path / "val.csv").write_text(SWAG.replace(",2\n", ",0\n"))
    assert read("swag", tmp_path, split="validation").examples[0].label == 0


def test_swag_without_labels(tmp_path):
    path = write(tmp_path, "test.csv", SWAG.replace(",label\n", "\n").replace(",2\n", "\n"))
    assert read("swag", path).examples[0].label is None
    with pytest.raises(ValueError, match="has no column 'label'"):
        read("swag", path, labelled=True)
    path = write(tmp_path, "test.jsonl", '{"choices": ["a", "b"], "label": -1}')
    assert read("multiple_choice", path).examples[0] == ChoiceExample("0", (("a", None), ("b", None)))
    with pytest.raises(ValueError, match=r"line 1: column 'label' is nothing, expected the number of a choice"):
        read("multiple_choice", path, labelled=True)


def test_lists_and_columns_of_choices(tmp_path):
    row = {"context": "A text.", "question": "Why?", "choices": ["x", "y", "z"], "label": 1}
    expected = tuple(("A text.", f"Why? {choice}") for choice in "xyz")
    assert read("multiple_choice", write(tmp_path, "a.jsonl", json.dumps(row))).examples == (
        ChoiceExample("0", expected, 1),
    )
    path = write(tmp_path, "a.csv", "question,choice_1,choice_2,label\nWhy?,x,y,0\n")
    assert read("multiple_choice", path).examples == (ChoiceExample("0", (("Why?", "x"), ("Why?", "y")), 0),)
    path = write(tmp_path, "b.csv", "stem,good,bad\nWhy?,x,y\n")
    columns = {"context": "stem", "choices": "good,bad"}
    assert read("multiple_choice", path, columns=columns).examples == (
        ChoiceExample("0", (("Why?", "x"), ("Why?", "y"))),
    )
    with pytest.raises(ValueError, match="has no column 'worse'; it has: 'stem', 'good', 'bad'"):
        read("multiple_choice", path, columns={"choices": "good,worse"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("question,choice1,choice2,label\nq,a,b,2\n", "column 'label' is '2', expected the number of a choice, 0 to 1"),
        ("question,choice1,choice2,label\nq,a,b,B\n", "column 'label' is 'B', expected the number"),
        ("question,choices,label\nq,\"[\"\"a\"\"]\",0\n", "line 2 has 1 choices, expected two or more"),
        ("question,label\nq,0\n", "has no columns sent1, sent2, choices or .*; it has: 'question', 'label'"),
    ],
)  # fmt: skip
def test_choices_that_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read("multiple_choice", write(tmp_path, "a.csv", content))


def sentences(path, **options):
    return [(example.texts, example.score) for example in read("embeddings", path, **options).examples]


def test_pairs_triplets_and_scores(tmp_path):
    path = write(tmp_path, "a.tsv", "anchor\tpositive\na\tb\n")
    assert read("embeddings", path, labelled=True).examples == (SentencesExample("0", ("a", "b")),)
    assert sentences(write(tmp_path, "b.csv", "anchor,positive,negative\na,b,c\n")) == [(("a", "b", "c"), None)]
    path = write(tmp_path, "c.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 4}')
    assert sentences(path, max_score=5) == [(("a", "b"), 0.8)]
    assert sentences(path, labelled=False) == [(("a", "b"), None)]
    path = write(tmp_path, "d.csv", "x,y,z\na,b,-1\n")
    assert sentences(path, columns={"anchor": "x", "positive": "y", "score": "z"}) == [(("a", "b"), -1.0)]


@pytest.mark.parametrize(
    ("score", "options", "message"),
    [
        ("4", {}, "line 2: column 'score' is '4', expected a number from -1 to 1, max_score"),
        ("nan", {}, "is 'nan', expected a number from -1 to 1"),
        ("6", {"max_score": 5.0}, "expected a number from -5 to 5"),
        ("near", {}, "is 'near', expected a number"),
        ("", {}, "is nothing, expected a number"),
        ("1", {"max_score": 0.0}, "max_score is 0.0, expected a number above 0"),
    ],
)
def test_scores_that_are_refused(tmp_path, score, options, message):
    with pytest.raises(ValueError, match=message):
        sentences(write(tmp_path, "a.csv", f"sentence1,sentence2,score\na,b,{score}\n"), **options)


def test_pairs_without_columns(tmp_path):
    with pytest.raises(ValueError, match=r"has no columns anchor, positive, negative or .*; it has: 'one', 'two'"):
        sentences(write(tmp_path, "a.csv", "one,two\na,b\n"))


@pytest.mark.parametrize("choices", ["red green blue", "['red apple', 'pear']"])
def test_a_text_is_not_cut_into_choices(tmp_path, choices):
    path = write(tmp_path, "a.csv", f'question,choices,label\nWhich?,"{choices}",1\n')
    with pytest.raises(ValueError, match=r"a.csv, line 2: column 'choices' is .*, expected a list"):
        read("multiple_choice", path)


def test_scores_beyond_any_number(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"anchor": "a", "positive": "b", "score": 1' + 400 * "0" + "}\n")
    with pytest.raises(ValueError, match=r"line 1: column 'score' is 1000.*, expected a number"):
        read("embeddings", path)
