"""Against scikit-learn, SciPy and seqeval, and against SQuAD's and conlleval's rules written a second time."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.tasks.metrics import (
    METRICS,
    best_thresholds,
    entities,
    entity_scores,
    entity_scores_by_type,
    normalize_answer,
    squad_scores,
)

# ---- classes and numbers


def pairs(elements, size=30):
    return st.lists(st.tuples(elements, elements), min_size=1, max_size=size).map(
        lambda rows: tuple(map(np.array, zip(*rows, strict=True)))
    )


@settings(max_examples=40, deadline=None)
@given(pairs(st.integers(0, 1)), pairs(st.integers(0, 3)))
def test_classes_by_their_definitions(binary, several):
    expected, got = binary
    tp, fp, fn, tn = (int(((expected == a) & (got == b)).sum()) for a, b in ((1, 1), (0, 1), (1, 0), (0, 0)))
    assert METRICS["f1"](expected, got) == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    root = np.sqrt(float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))
    assert METRICS["mcc"](expected, got) == pytest.approx((tp * tn - fp * fn) / root if root else 0.0)
    expected, got = several
    assert METRICS["accuracy"](expected, got) == np.mean(expected == got)
    each = []
    for label in set(expected) | set(got):
        right, there = np.sum((expected == label) & (got == label)), np.sum(expected == label) + np.sum(got == label)
        each.append(2 * right / there)
    assert METRICS["macro_f1"](expected, got) == pytest.approx(np.mean(each))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 10), st.integers(0, 2**32 - 1))
def test_multi_label_counts_every_decision(labels, rows, seed):
    expected, got = np.random.default_rng(seed).integers(0, 2, (2, rows, labels))
    right, there = (expected & got).sum(), expected.sum() + got.sum()
    assert METRICS["micro_f1"](expected, got) == pytest.approx(2 * right / there if there else 0.0)


def test_correlations():
    scipy_stats = pytest.importorskip("scipy.stats")
    expected, got = np.random.default_rng(0).normal(size=(2, 50))
    got = got.round(1)  # equal ranks
    centred = expected - expected.mean(), got - got.mean()
    by_hand = (centred[0] @ centred[1]) / np.sqrt((centred[0] @ centred[0]) * (centred[1] @ centred[1]))
    assert METRICS["pearson"](expected, got) == pytest.approx(by_hand)
    ranks = scipy_stats.rankdata(expected), scipy_stats.rankdata(got)
    assert METRICS["spearman"](expected, got) == pytest.approx(METRICS["pearson"](*ranks))


@pytest.mark.parametrize("name", ["mcc", "pearson", "spearman"])
def test_one_class_or_one_value_says_nothing(name, recwarn):
    assert METRICS[name]([0, 1, 1], [1, 1, 1]) == 0.0
    assert METRICS[name]([1, 1, 1], [0, 1, 1]) == 0.0
    assert METRICS[name]([1], [0]) == 0.0
    assert not recwarn


@pytest.mark.parametrize("name", METRICS)
def test_shapes_must_fit(name):
    with pytest.raises(ValueError, match=r"references of shape \(2,\), but predictions of shape \(3,\)"):
        METRICS[name]([0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="no examples"):
        METRICS[name]([], [])


def test_f1_of_more_than_two_classes():
    with pytest.raises(ValueError, match="multiclass"):
        METRICS["f1"]([0, 1, 2], [0, 1, 1])


# ---- entities

TAGS = ["O", "B-A", "I-A", "E-A", "S-A", "B-B", "I-B", "E-B", "S-B", "B", "I"]


def sentences(tags):
    return st.lists(
        st.lists(st.tuples(st.sampled_from(tags), st.sampled_from(tags)), min_size=1, max_size=12),
        min_size=1,
        max_size=4,
    ).map(lambda rows: tuple([[pair[side] for pair in row] for row in rows] for side in (0, 1)))


@pytest.mark.filterwarnings("ignore")  # seqeval's, of divisions by zero
@settings(max_examples=200, deadline=None)
@given(sentences(TAGS))
def test_entities_as_seqeval(both):
    seqeval = pytest.importorskip("seqeval.metrics")
    from seqeval.metrics.sequence_labeling import get_entities

    references, predictions = both
    for tags in references:
        assert entities(tags) == [(kind, first, last + 1) for kind, first, last in get_entities(tags)]
    scores = entity_scores(references, predictions)
    for name in ("precision", "recall", "f1", "accuracy"):
        assert scores[name] == pytest.approx(getattr(seqeval, f"{name}_score")(references, predictions))
    if any(tag != "O" for side in both for tags in side for tag in tags):
        report = seqeval.classification_report(references, predictions, output_dict=True)
        ours = entity_scores_by_type(references, predictions)
        assert set(ours) == {kind for kind in report if not kind.endswith(" avg")}
        for kind, row in ours.items():
            for name, value in row.items():
                assert value == pytest.approx(report[kind]["f1-score" if name == "f1" else name])


def conlleval(references, predictions):
    """The loop of conlleval.pl: both taggings at once, a chunk is right where both begin and end it together."""

    def ends(before, tag, kind_before, kind):
        return (before in "BI" and tag in "BO") or (before != "O" and kind_before != kind)

    def begins(before, tag, kind_before, kind):
        return tag == "B" or (before == "O" and tag == "I") or (tag != "O" and kind_before != kind)

    right = expected = found = 0
    inside = False
    last = ("O", "", "O", "")
    for reference, prediction in zip(references, predictions, strict=True):
        for gold, guess in [*zip(reference, prediction, strict=True), ("O", "O")]:
            a, _, a_kind = gold.partition("-")
            b, _, b_kind = guess.partition("-")
            a0, a0_kind, b0, b0_kind = last
            if inside:
                a_ends, b_ends = ends(a0, a, a0_kind, a_kind), ends(b0, b, b0_kind, b_kind)
                if a_ends and b_ends and a0_kind == b0_kind:
                    inside, right = False, right + 1
                elif a_ends != b_ends or a_kind != b_kind:
                    inside = False
            a_begins, b_begins = begins(a0, a, a0_kind, a_kind), begins(b0, b, b0_kind, b_kind)
            if a_begins and b_begins and a_kind == b_kind:
                inside = True
            expected, found = expected + a_begins, found + b_begins
            last = (a, a_kind, b, b_kind)
    return expected, found, right


@settings(max_examples=200, deadline=None)
@given(sentences(["O", "B-A", "I-A", "B-B", "I-B"]))
def test_entities_as_conlleval(both):
    expected, found, right = conlleval(*both)
    scores = entity_scores(*both)
    assert scores["precision"] == (right / found if found else 0.0)
    assert scores["recall"] == (right / expected if expected else 0.0)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        (["I-A", "I-A", "B-A"], [("A", 0, 2), ("A", 2, 3)]),  # IOB1
        (["O", "I-A", "I-B"], [("A", 1, 2), ("B", 2, 3)]),  # I after O, another type
        (["S-A", "B-A", "I-A", "E-A"], [("A", 0, 1), ("A", 1, 4)]),  # IOBES
        (["U-A", "B-A", "I-A", "L-A", "L-A"], [("A", 0, 1), ("A", 1, 4), ("A", 4, 5)]),  # BILOU
        (["B-a-b", "I-a-b"], [("a-b", 0, 2)]),
        ([], []),
    ],
)
def test_schemes(tags, found):
    assert entities(tags) == found


def test_tags_that_are_no_entities():
    with pytest.raises(ValueError, match="'NN' is no tag of an entity"):
        entities(["O", "NN"])
    with pytest.raises(ValueError, match="sentence 1 has 2 tags, but 1 predicted"):
        entity_scores([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(ValueError, match="2 sentences, but predictions for 1"):
        entity_scores([["O"], ["O"]], [["O"]])
    with pytest.raises(ValueError, match="no examples"):
        entity_scores([], [])


# ---- answers


def official_normalize(text):
    """evaluate-v2.0.py's normalize_answer, in its order."""
    text = text.lower()
    text = "".join(character for character in text if character not in set(string.punctuation))
    text = re.compile(r"\b(a|an|the)\b", re.UNICODE).sub(" ", text)
    return " ".join(text.split())


def official_f1(gold, prediction, version_2):
    expected, got = official_normalize(gold).split(), official_normalize(prediction).split()
    same = sum((Counter(expected) & Counter(got)).values())
    if version_2 and (len(expected) == 0 or len(got) == 0):
        return int(expected == got)
    if same == 0:
        return 0
    precision, recall = same / len(got), same / len(expected)
    return 2 * precision * recall / (precision + recall)


def official(references, predictions, version_2):
    """Sums of evaluate-v1.1.py and evaluate-v2.0.py, the latter with 0 for missing ids."""
    exact, overlap = {}, {}
    for id, gold in references.items():
        if version_2:
            gold = [text for text in gold if official_normalize(text)] or [""]
        if id in predictions:
            exact[id] = max(
                (official_normalize(text) == official_normalize(predictions[id]) for text in gold), default=0
            )
            overlap[id] = max((official_f1(text, predictions[id], version_2) for text in gold), default=0)
        else:
            exact[id] = overlap[id] = 0
    return exact, overlap


WORDS = st.sampled_from(
    [
        "the",
        "The",
        "a",
        "an",
        "cat",
        "Cat.",
        "cats",
        "ÄRGER",
        "ärger",
        "l'été",
        "東京",
        "-",
        "…",
        "“",
        "1,000",
        "\u00a0",
        "İ",
    ]
)
TEXTS = st.one_of(
    st.lists(WORDS, max_size=5).map(" ".join), st.text(max_size=8), st.text(alphabet="aAnthe .,!\u0130-", max_size=8)
)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_normalized_as_the_script_does(text):
    assert normalize_answer(text) == official_normalize(text)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(TEXTS, max_size=3), st.none() | TEXTS), min_size=1, max_size=5), st.booleans())
def test_answers_as_the_scripts(questions, version_2):
    references = {str(number): gold for number, (gold, _) in enumerate(questions)}
    predictions = {str(number): text for number, (_, text) in enumerate(questions) if text is not None}
    exact, overlap = official(references, predictions, version_2)
    scores = squad_scores(references, predictions, version_2_with_negative=version_2)
    assert scores["exact_match"] == pytest.approx(np.mean(list(exact.values())))
    assert scores["f1"] == pytest.approx(np.mean(list(overlap.values())))
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        ids = [id for id, gold in references.items() if any(gold) == wanted]
        assert (f"{name}_f1" in scores) == (version_2 and bool(ids))
        if version_2 and ids:
            assert scores[f"{name}_exact"] == pytest.approx(np.mean([exact[id] for id in ids]))
            assert scores[f"{name}_f1"] == pytest.approx(np.mean([overlap[id] for id in ids]))


def test_answers_by_example():
    references = {"q": ["The Eiffel Tower", "a tower"], "r": ["1889"]}
    assert squad_scores(references, {"q": "eiffel tower!", "r": "1889"}) == {"exact_match": 1.0, "f1": 1.0}
    # "r" is missing; "tower in paris" has 1 of 3 words in common with "tower" (1 word): f1 = 2 * 1 / 4
    assert squad_scores(references, {"q": "tower in Paris"}) == {"exact_match": 0.0, "f1": 0.25}
    with pytest.raises(ValueError, match="a prediction is for 's', which is none of the 2 questions"):
        squad_scores(references, {"s": "x"})
    with pytest.raises(ValueError, match="no questions"):
        squad_scores({}, {})


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([(), ("cat",), ("a big cat", "cat")]),
            st.sampled_from(["cat", "dog", "big", ""]),
            st.integers(-3, 3),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_threshold_is_the_best_there_is(questions):
    references = {str(number): gold for number, (gold, _, _) in enumerate(questions)}
    answers = {str(number): text for number, (_, text, _) in enumerate(questions)}
    null_scores = {str(number): float(score) for number, (_, _, score) in enumerate(questions)}

    def at(threshold):
        said = {id: answers[id] if null_scores[id] <= threshold else "" for id in answers}
        return squad_scores(references, said, version_2_with_negative=True)

    best = best_thresholds(references, answers, null_scores)
    every = [at(threshold) for threshold in np.arange(-4.5, 4)]
    for field, name in (("exact_match", "exact"), ("f1", "f1")):
        assert best[f"best_{name}"] == pytest.approx(max(scores[field] for scores in every))
        assert at(best[f"best_{name}_thresh"])[field] == pytest.approx(best[f"best_{name}"])


def test_thresholds_need_all_of_it():
    with pytest.raises(ValueError, match="question 'q' has no null score"):
        best_thresholds({"q": []}, {"q": "x"}, {})
    with pytest.raises(ValueError, match="question 'q' has no answer"):
        best_thresholds({"q": []}, {}, {"q": 0.0})
    with pytest.raises(ValueError, match="is for 'r'"):
        best_thresholds({"q": []}, {"q": "x"}, {"q": 0.0, "r": 0.0})
