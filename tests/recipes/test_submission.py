"""The files that benchmarks take, byte by byte, and predictions that are none."""

import json

import pytest

from bert_fast.recipes.submission import BENCHMARKS, GLUE_FILES, read_predictions, write_submission


def written(folder, benchmark, predictions):
    return {path.name: path.read_text(encoding="utf-8") for path in write_submission(benchmark, predictions, folder)}


@pytest.mark.parametrize(
    ("task", "labels", "said"),
    [
        ("cola", ["unacceptable", "acceptable"], "0 1"),
        ("sst2", ["positive", "negative"], "1 0"),
        ("mrpc", ["equivalent", "not_equivalent"], "1 0"),
        ("qqp", ["duplicate", "not_duplicate"], "1 0"),
        ("wnli", ["entailment", "not_entailment"], "1 0"),
        ("stsb", [3.14159, 5.2, -0.1], "3.142 5.000 0.000"),
        ("mnli", ["entailment", "neutral", "contradiction"], "entailment neutral contradiction"),
        ("mnli_mismatched", ["neutral"], "neutral"),
        ("ax", ["contradiction"], "contradiction"),
        ("qnli", ["entailment", "not_entailment"], "entailment not_entailment"),
        ("rte", ["not_entailment"], "not_entailment"),
    ],
)
def test_glue(tmp_path, task, labels, said):
    predictions = [{"id": str(index), "label": label} for index, label in enumerate(labels)]
    rows = "".join(f"{index}\t{label}\n" for index, label in enumerate(said.split()))
    assert written(tmp_path / "new", task, predictions) == {GLUE_FILES[task]: f"index\tprediction\n{rows}"}


def test_squad(tmp_path):
    predictions = [
        {"id": "q", "answer": "“Käl”", "null_score": -2.0, "best_answer": "“Käl”"},
        {"id": "r", "answer": "", "null_score": 900.0, "best_answer": "x"},
    ]
    answers = '{"q": "“Käl”", "r": ""}\n'
    assert written(tmp_path, "squad", predictions) == {"predictions.json": answers}
    files = written(tmp_path, "squad_v2", predictions)
    assert files["predictions.json"] == answers
    assert json.loads(files["na_prob.json"]) == {"q": pytest.approx(0.1192029), "r": 1.0}


def test_conll(tmp_path):
    predictions = [
        {"id": "0", "tags": ["B-PER", "O"], "example": {"words": ["Ida", "sang"], "tags": ["B-PER", "O"]}},
        {"id": "1", "tags": ["O"], "example": {"words": ["Oslo"], "tags": ["B-LOC"]}},
    ]
    assert written(tmp_path, "conll2003", predictions) == {
        "conll2003.txt": "Ida B-PER B-PER\nsang O O\n\nOslo B-LOC O\n"
    }
    del predictions[1]["example"]["tags"]
    with pytest.raises(ValueError, match="the prediction '1' has no words with expected tags"):
        write_submission("conll2003", predictions, tmp_path)


def test_tables(tmp_path):
    assert written(tmp_path, "swag", [{"id": "0", "label": 3}, {"id": "1", "label": 0}]) == {
        "swag.csv": ",pred\n0,3\n1,0\n"
    }
    assert written(tmp_path, "imdb", [{"id": "12_4", "label": "pos"}, {"id": "9_1", "label": "neg"}]) == {
        "imdb.csv": "id,sentiment\n12_4,1\n9_1,0\n"
    }


def test_predictions_of_something_else(tmp_path):
    with pytest.raises(ValueError, match=f"the benchmark is 'glue', expected one of {BENCHMARKS[0]}"):
        write_submission("glue", [], tmp_path)
    with pytest.raises(ValueError, match="the prediction '7' is 'good', expected one of negative, positive"):
        write_submission("sst2", [{"id": "7", "label": "good"}], tmp_path)
    with pytest.raises(ValueError, match="the prediction '7' is nan, expected a number"):
        write_submission("stsb", [{"id": "7", "label": float("nan")}], tmp_path)
    with pytest.raises(ValueError, match="the prediction '7' has no answer, only id, label"):
        write_submission("squad", [{"id": "7", "label": "good"}], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no predictions"),
        ('{"id": "0"}\n{"id": ', "line 2 is not JSON"),
        ('{"label": "a"}\n', "line 1 is no prediction: it has no id"),
        ("[1]\n", "line 1 is no prediction"),
        ('{"id": "0"}\n{"id": "1"}\n{"id": "0"}\n', "line 3 has the id '0', as line 1 has"),
    ],
)
def test_files_that_are_no_predictions(tmp_path, text, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_predictions(path)


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"id": "0", "label": "é"}\n{"id": "1", "label": null}\n', encoding="utf-8")
    assert read_predictions(path) == [{"id": "0", "label": "é"}, {"id": "1", "label": None}]
