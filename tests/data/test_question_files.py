"""Questions from SQuAD's JSON and from rows; answers that are not where they should be."""

import json

import pytest

from bert_fast.data import questions
from bert_fast.data.catalogue import read
from bert_fast.data.examples import Answer, QuestionExample

CONTEXT = "Ann lives in Oslo. Bob lives in Rome."


def squad(*qas, context=CONTEXT, version="v2.0"):
    return {"version": version, "data": [{"title": "t", "paragraphs": [{"context": context, "qas": list(qas)}]}]}


def qa(name, *answers, **more):
    answers = [{"text": text, "answer_start": start} for text, start in answers]
    return {"id": name, "question": f"{name}?", "answers": answers, **more}


def write(tmp_path, value, name="train.json"):
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def test_squad_1(tmp_path):
    path = write(tmp_path, squad(qa("a", ("Oslo", 13)), qa("b", ("Rome", 32), ("in Rome", 29)), version="1.1"))
    found = read("squad", path, labelled=True)
    assert found.examples == (
        QuestionExample("a", "a?", CONTEXT, (Answer("Oslo", 13),)),
        QuestionExample("b", "b?", CONTEXT, (Answer("Rome", 32), Answer("in Rome", 29))),
    )
    assert found.skipped == {}


def test_squad_2(tmp_path):
    impossible = qa("b", is_impossible=True, plausible_answers=[{"text": "Rome", "answer_start": 32}])
    write(tmp_path, squad(qa("a", ("Oslo", 13), is_impossible=False), impossible), "train-v2.0.json")
    found = read("squad_v2", tmp_path, labelled=True)
    assert [(e.id, len(e.answers), e.is_impossible) for e in found.examples] == [("a", 1, False), ("b", 0, True)]


def test_questions_of_a_test_set(tmp_path):
    path = write(tmp_path, squad({"id": "a", "question": "a?"}))
    assert read("squad", path).examples == (QuestionExample("a", "a?", CONTEXT),)
    with pytest.raises(ValueError, match=r"data\[0\].paragraphs\[0\].qas\[0\] has no answers"):
        read("squad", path, labelled=True)
    path = write(tmp_path, squad(qa("a", ("Oslo", 13))))
    assert read("squad", path, labelled=False).examples == (QuestionExample("a", "a?", CONTEXT),)


def test_answers_that_are_not_in_the_context(tmp_path):
    path = write(
        tmp_path,
        squad(
            qa("good", ("Oslo", 13)),
            qa("absent", ("Paris", 13)),
            qa("misplaced", ("Oslo", 12)),
            qa("before", ("Ann", -37)),
            qa("one of two", ("Rome", 0), ("Rome", 32)),
            qa("empty", ("", 3)),
            qa("none", is_impossible=False),
        ),
    )
    found = read("squad_v2", path, labelled=True)
    assert [(e.id, e.answers) for e in found.examples] == [
        ("good", (Answer("Oslo", 13),)),
        ("one of two", (Answer("Rome", 32),)),
    ]
    assert found.skipped == {
        questions.NOT_IN_CONTEXT: 2,
        questions.NOT_AT_ITS_PLACE: 2,
        questions.ONE_OF_SEVERAL: 1,
        questions.NO_ANSWER: 1,
    }


def test_all_answers_count_in_evaluation(tmp_path):
    """As SQuAD's scripts score every question of the file by the texts of its answers."""
    questions = [
        qa("absent", ("Paris", 13)),
        qa("one of two", ("Rome", 0), ("Rome", 32)),
        qa("none", is_impossible=False),
    ]
    path = write(tmp_path, squad(*questions))
    found = read("squad_v2", path, split="validation", labelled=True)
    assert found.skipped == {}
    assert [(e.id, e.answers, e.is_impossible) for e in found.examples] == [
        ("absent", (Answer("Paris", -1),), False),
        ("one of two", (Answer("Rome", -1), Answer("Rome", 32)), False),
        ("none", (), True),
    ]


def test_offsets_are_in_characters(tmp_path):
    context = "Łódź 🚂 → Kraków"
    path = write(tmp_path, squad(qa("a", ("Kraków", 9)), context=context))
    (example,) = read("squad", path).examples
    assert context[example.answers[0].start :] == "Kraków"


OSLO = (Answer("Oslo", 13),)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ({"text": ["Oslo"], "answer_start": [13]}, OSLO),  # an export of Hugging Face's
        ([{"text": "Oslo", "answer_start": 13}], OSLO),
        ({"text": "Oslo", "answer_start": 13}, OSLO),
        (["Oslo", "Rome"], (*OSLO, Answer("Rome", 32))),
        ("Oslo", OSLO),
        ('{"text": ["Oslo"], "answer_start": [13]}', OSLO),  # a csv of it
        ("lives", (Answer("lives", 4),)),  # the first of two
        ({"text": [], "answer_start": []}, ()),
        ("", ()),
        (None, ()),
    ],
)
def test_rows(tmp_path, answers, expected):
    row = {"id": "a", "question": "a?", "context": CONTEXT, "answers": answers}
    for name in ("squad_v2", "question_answering"):
        for path in (write(tmp_path, json.dumps(row), "a.jsonl"), write(tmp_path, [row], "a.json")):
            (example,) = read(name, path, labelled=True).examples
            assert example == QuestionExample("a", "a?", CONTEXT, expected, is_impossible=not expected)


def test_rows_with_columns_of_their_own(tmp_path):
    path = write(tmp_path, f"q,context,answer,answer_start\nWho?,{CONTEXT},lives,23\n", "a.csv")
    (example,) = read("question_answering", path, columns={"question": "q", "answer_start": "answer_start"}).examples
    assert example == QuestionExample("0", "Who?", CONTEXT, (Answer("lives", 23),))
    (example,) = read("question_answering", path, columns={"question": "q"}).examples
    assert example.answers == (Answer("lives", 4),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (squad(qa("a", ("Oslo", 13)), qa("a", ("Rome", 32))), r"qas\[1\] has the id 'a', as .*qas\[0\] has"),
        (squad({"id": "a", "answers": []}), r"qas\[0\] has no 'question'; it has: 'id', 'answers'"),
        (squad(qa("a", ("Oslo", "x"))), "the place of an answer is 'x', expected a number of characters"),
        (squad(qa("a", ("Oslo", float("inf")))), "the place of an answer is inf, expected a number of characters"),
        (squad({**qa("a"), "answers": [3]}), "an answer is 3, expected"),
        (squad({**qa("a"), "question": None}), r"qas\[0\]: 'question' is a NoneType"),
        ({"data": [{"paragraphs": [3]}]}, r"data\[0\].paragraphs\[0\] has no 'context'; it is no object"),
        ({"data": [{"paragraphs": []}]}, "holds no examples"),
        ({"data": []}, "is empty"),
        ({"dat": []}, "holds a dict, expected a list of objects"),
        ([{"question": "a?", "answers": []}], "has no columns .*context.*; it has: 'question', 'answers'"),
        ("{", "is not JSON"),
    ],
)
def test_what_is_refused(tmp_path, value, message):
    with pytest.raises(ValueError, match=message):
        read("question_answering", write(tmp_path, value))


def test_brackets_without_end(tmp_path):
    rows = [{"question": "Who?", "context": "[" * 20000, "answers": "[" * 20000}]
    (example,) = read("question_answering", write(tmp_path, rows)).examples
    assert example.answers == (Answer("[" * 20000, 0),)
