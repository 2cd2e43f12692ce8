"""Texts with labels from any file: which columns, which labels, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data.catalogue import read
from bert_fast.data.classification import NO_LABEL
from bert_fast.data.examples import TextExample


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return path


def labels(path, **options):
    return [example.label for example in read("classification", path, **options).examples]


def test_usual_columns(tmp_path):
    for header, expected in {
        "text,label": ("1", None),
        "sentence,label": ("1", None),
        "text,text_pair,label": ("1", "2"),
        "sentence1,sentence2,label": ("1", "2"),
        "premise,hypothesis,label": ("1", "2"),
        "question,sentence,label": ("1", "2"),
        "question1,question2,label": ("1", "2"),
    }.items():
        cells = ",".join("12"[: header.count(",")]) + ",yes"
        found = read("classification", write(tmp_path, "a.csv", f"{header}\n{cells}\n"), labelled=True)
        assert found.examples == (TextExample("0", *expected, "yes"),)


def test_columns_by_role(tmp_path):
    path = write(tmp_path, "a.csv", "key,review,text,verdict\nx7,good,ignored,yes\n")
    columns = {"text": "review", "label": "verdict", "id": "key"}
    assert read("classification", path, columns=columns).examples == (TextExample("x7", "good", None, "yes"),)


def test_labels_are_wanted_or_not(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,x\nb,\n")
    assert labels(path) == ["x", None]
    assert labels(path, labelled=False) == [None, None]
    with pytest.raises(ValueError, match="line 3: column 'label' is nothing, expected a label"):
        labels(path, labelled=True)


def test_a_file_without_labels_needs_no_column_of_them(tmp_path):
    """What was said of the training file is said of the file to predict, too."""
    path = write(tmp_path, "a.csv", "text\na\n")
    for labelled in (None, False):
        assert labels(path, labelled=labelled, columns={"label": "verdict"}) == [None]
    with pytest.raises(ValueError, match="has no column 'verdict'; it has: 'text'"):
        labels(path, labelled=True, columns={"label": "verdict"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("text,label\na,0\nb,1\n", ["0", "1"]),  # numbers of classes
        ("text,label\na,0.5\nb,1\n", [0.5, 1.0]),  # numbers, since one has a fraction
        ("text,score\na,0\nb,1\n", [0.0, 1.0]),  # numbers, by the name of the column
        ("text,labels\na,x|y\nb,\n", [("x", "y"), ()]),  # several, by the name of the column
        ('text,label\na,"[""x"", ""y""]"\nb,[]\n', [("x", "y"), ()]),  # several, as JSON
        ("text,label\na,x\nb,0.5\n", ["x", "0.5"]),
    ],
)
def test_the_problem_is_seen_in_the_labels(tmp_path, content, expected):
    assert labels(write(tmp_path, "a.csv", content)) == expected


def test_the_problem_can_be_said(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\na,3\nb,4;5\n")
    assert labels(path) == ["3", "4;5"]
    assert labels(path, problem="multi", label_delimiter=";") == [("3",), ("4", "5")]
    with pytest.raises(ValueError, match=r"line 3: column 'label' is '4;5', expected a number"):
        labels(path, problem="regression")
    with pytest.raises(ValueError, match="problem is 'double', expected one of: single, multi, regression"):
        labels(path, problem="double")


def test_values_of_json(tmp_path):
    rows = [{"text": "a", "label": label} for label in (1, True, "x", 2.0, None)]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert labels(path) == ["1", "true", "x", "2", None]
    path = write(tmp_path, "b.jsonl", '{"text": "a", "label": true}')
    with pytest.raises(ValueError, match=r"line 1: column 'label' is True, expected a number"):
        labels(path, problem="regression")
    path = write(tmp_path, "b.jsonl", '{"text": "a", "label": {"x": 1}}')
    with pytest.raises(ValueError, match=r"line 1: column 'label' is .*, expected the name of a class"):
        labels(path)


def test_a_column_for_each_label(tmp_path):
    path = write(tmp_path, "a.csv", "text,toxic,rude\na,1,0\nb,0,0\nc,1,1\n")
    assert labels(path, columns={"label": "toxic,rude"}) == [("toxic",), (), ("toxic", "rude")]
    path = write(tmp_path, "b.csv", "text,toxic,rude\na,2,0\n")
    with pytest.raises(ValueError, match="line 2: column 'toxic' is '2', expected 0 or 1"):
        labels(path, columns={"label": "toxic,rude"})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": "review"}, "has no column 'review'; it has: 'body', 'label'"),
        (
            {},
            "has no columns text, text_pair or text or .*; it has: 'body', 'label'; say which column is which, "
            "as --column text=body",
        ),
        ({"txt": "body"}, "there is no role 'txt' to give a column to; there are: id, label, text, text_pair"),
    ],
)
def test_a_missing_column(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        read("classification", write(tmp_path, "a.csv", "body,label\na,b\n"), columns=columns)


def test_a_record_without_the_column(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match="line 2 has no column 'text'; it has: 'txt'"):
        read("classification", path)
    path = write(tmp_path, "b.jsonl", '{"text": "a"}\n{"text": null}\n')
    with pytest.raises(ValueError, match="line 2: column 'text' is nothing, expected text"):
        read("classification", path)


def test_ids(tmp_path):
    found = read("classification", write(tmp_path, "a.csv", "idx,text\n7,a\n9,b\n"))
    assert [example.id for example in found.examples] == ["7", "9"]
    with pytest.raises(ValueError, match="line 4 has the id 'x', as line 2 has"):
        read("classification", write(tmp_path, "b.csv", "id,text\nx,a\ny,b\nx,c\n"))


def test_what_is_refused(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\n")
    with pytest.raises(ValueError, match="holds no examples"):
        read("classification", path)
    with pytest.raises(ValueError, match="there is no data set and no kind of task 'sst'; data sets: cola, "):
        read("sst", path)
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        read("classification", tmp_path)
    with pytest.raises(
        ValueError, match="reading classification has no option 'iob1'; it has: problem, label_delimiter"
    ):
        read("classification", path, iob1=True)


@settings(deadline=None)
@given(st.lists(st.sampled_from(["x", "y", "z"]), unique=True), st.sampled_from(["|", ";", ", "]))
def test_several_labels_joined_and_cut_again(tmp_path_factory, names, delimiter):
    path = tmp_path_factory.mktemp("multi") / "a.tsv"
    path.write_text(f"text\tlabels\na\t{delimiter.join(names)}\n")
    assert labels(path, label_delimiter=delimiter) == [tuple(names)]


def test_a_list_as_python_prints_it_is_no_label(tmp_path):
    path = write(tmp_path, "a.csv", "text,labels\nhello,\"['a', 'b']\"\n")
    with pytest.raises(ValueError, match=r"a.csv, line 2: column 'labels' is .*, expected a list in JSON"):
        read("classification", path)


def test_a_score_beyond_any_number(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "a", "score": 1' + 400 * "0" + "}\n")
    with pytest.raises(ValueError, match=r"line 1: column 'score' is 1000.*, expected a number"):
        read("classification", path)


def jsonl(tmp_path, *records):
    return write(tmp_path, "a.jsonl", "".join(json.dumps(record) + "\n" for record in records))


def test_columns_are_those_of_all_records(tmp_path):
    path = jsonl(tmp_path, {"text": "one"}, {"text": "two", "label": "b"})
    assert [example.label for example in read("classification", path).examples] == [None, "b"]
    assert [example.label for example in read("classification", path, labelled=False).examples] == [None, None]
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 has no column 'label'; it has: 'text'"):
        read("classification", path, labelled=True)
    path = jsonl(tmp_path, {"text": "one", "label": "a"}, {"text": "two", "text_pair": "zwei", "label": "b"})
    with pytest.raises(ValueError, match=r"a.jsonl, line 1 has no column 'text_pair'; it has: 'text', 'label'"):
        read("classification", path)
    path = jsonl(tmp_path, {"text": "one", "rude": 0, "mean": 1}, {"text": "two", "rude": 1})
    with pytest.raises(ValueError, match=r"line 2 has no column 'mean'; it has: 'text', 'rude'"):
        read("classification", path, columns={"label": "rude,mean"}, labelled=True)
    words = jsonl(tmp_path, {"tokens": ["a"]}, {"tokens": ["b"], "tags": ["O"]})
    assert [example.tags for example in read("tokens", words).examples] == [None, ("O",)]
    choices = jsonl(tmp_path, {"choices": ["a", "b"]}, {"choices": ["c", "d"], "label": 1})
    assert [example.label for example in read("multiple_choice", choices).examples] == [None, 1]


@pytest.mark.parametrize("label", [-1, -1.0, "-1"])
def test_minus_one_is_no_label(tmp_path, label):
    """As Hugging Face has it in the test sets of GLUE."""
    path = jsonl(tmp_path, {"text": "one", "label": label}, {"text": "two", "label": label})
    for problem in (None, "single", "regression"):
        assert [e.label for e in read("classification", path, problem=problem).examples] == [None, None]
    with pytest.raises(ValueError, match=r"line 1: column 'label' is '?-1.*, expected a label"):
        read("classification", path, labelled=True)
    path = jsonl(tmp_path, {"text": "one", "label": 0}, {"text": "two", "label": label}, {"text": "three", "label": 1})
    with pytest.raises(ValueError, match=r"line 2: column 'label' is '?-1.*no_label=-1 if it does .* no_label=none"):
        read("classification", path)
    found = read("classification", path, labelled=True, no_label=-1)
    assert ([e.label for e in found.examples], found.skipped) == (["0", "1"], {NO_LABEL: 1})
    assert [e.label for e in read("classification", path, no_label="-1").examples] == ["0", None, "1"]
    assert [e.label for e in read("classification", path, no_label="-1.0").examples] == ["0", None, "1"]
    assert {e.label for e in read("classification", path, no_label="none").examples} >= {"0", "1"}
    assert len({e.label for e in read("classification", path, no_label="none").examples}) == 3


def test_minus_one_is_a_number(tmp_path):
    path = jsonl(tmp_path, {"text": "one", "score": -1}, {"text": "two", "score": 0.5})
    assert [e.label for e in read("classification", path, labelled=True).examples] == [-1.0, 0.5]


def test_a_mark_of_no_label(tmp_path):
    path = jsonl(tmp_path, {"text": "one", "label": "?"}, {"text": "two", "label": "a"})
    found = read("classification", path, labelled=True, no_label="?")
    assert ([e.label for e in found.examples], found.skipped) == (["a"], {NO_LABEL: 1})
