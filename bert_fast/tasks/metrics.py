"""The official metrics of the tasks, all between 0 and 1 (correlations between -1 and 1).

scikit-learn and SciPy compute what they have. Entities and answers are counted here, by the rules of conlleval (and of
seqeval, which are the same) and of the evaluation scripts of SQuAD 1.1 and 2.0.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Metric = Callable[[ArrayLike, ArrayLike], float]


def _pair(references: ArrayLike, predictions: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both as arrays.

    Raises:
        ValueError: their shapes differ, or there is nothing in them.
    """
    expected, got = np.asarray(references), np.asarray(predictions)
    if expected.shape != got.shape:
        raise ValueError(f"references of shape {expected.shape}, but predictions of shape {got.shape}")
    if expected.size == 0:
        raise ValueError("no examples to compute a metric of")
    return expected, got


def _constant(*sides: NDArray[Any]) -> bool:
    return any(bool(np.all(side == side.flat[0])) for side in sides)


def _f1(references: ArrayLike, predictions: ArrayLike, average: str) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(*_pair(references, predictions), average=average, zero_division=0.0))


def accuracy(references: ArrayLike, predictions: ArrayLike) -> float:
    """Share of examples (n,) that are right."""
    expected, got = _pair(references, predictions)
    return float((expected == got).mean())


def f1(references: ArrayLike, predictions: ArrayLike) -> float:
    """F1 of class 1 of two (n,): 0 where neither side has any.

    Raises:
        ValueError: there are other classes than 0 and 1.
    """
    return _f1(references, predictions, "binary")


def macro_f1(references: ArrayLike, predictions: ArrayLike) -> float:
    """Mean of the F1 of every class that either side has; (n,) numbers of classes."""
    return _f1(references, predictions, "macro")


def micro_f1(references: ArrayLike, predictions: ArrayLike) -> float:
    """F1 over all decisions of a multi-label task; (n, num_labels), 0 or 1."""
    expected, got = _pair(references, predictions)
    return _f1(expected.ravel(), got.ravel(), "binary")  # scikit-learn takes one column for a task of two classes


def mcc(references: ArrayLike, predictions: ArrayLike) -> float:
    """Matthews' correlation of classes (n,); 0 where either side has one class only, as scikit-learn has it."""
    from sklearn.metrics import matthews_corrcoef

    expected, got = _pair(references, predictions)
    return 0.0 if _constant(expected, got) else float(matthews_corrcoef(expected, got))


def _correlation(name: str, references: ArrayLike, predictions: ArrayLike) -> float:
    from scipy import stats

    expected, got = _pair(references, predictions)
    return 0.0 if _constant(expected, got) else float(getattr(stats, name)(expected, got).statistic)


def pearson(references: ArrayLike, predictions: ArrayLike) -> float:
    """Pearson's correlation of numbers (n,).

    0 where either side is constant: there it is undefined (SciPy says NaN), and 0 is what `mcc`, which is Pearson's
    correlation of two classes, takes there; a file of results stays JSON, and checkpoints comparable.
    """
    return _correlation("pearsonr", references, predictions)


def spearman(references: ArrayLike, predictions: ArrayLike) -> float:
    """Spearman's rank correlation of numbers (n,), equal ones sharing a rank; 0 where either side is constant."""
    return _correlation("spearmanr", references, predictions)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "mcc": mcc,
    "pearson": pearson,
    "spearman": spearman,
}


# ---- entities


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The entities of a sentence: (type, first word, last word + 1), by the rules of conlleval and seqeval.

    A word goes on with the entity before it where it is I or E (BILOU's L) of the same type, and the word before it was
    B or I; any other word but O begins one. So IOB1, IOB2, IOBES and BILOU need not be told apart, and I after O begins
    an entity. A tag without a type, "B", has the type "_".

    Raises:
        ValueError: a tag is of no such scheme, as "NN" (the tags of a task that has no entities).
    """
    found: list[tuple[str, int, int]] = []
    previous, previous_type = "O", ""
    for number, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        kind = kind or "_"
        if prefix not in ("O", "B", "I", "E", "L", "S", "U"):
            raise ValueError(f"{tag!r} is no tag of an entity: those are O, and B-, I-, E-, S-, L- or U- and a type")
        if prefix in ("I", "E", "L") and previous in ("B", "I") and kind == previous_type:
            found[-1] = (kind, found[-1][1], number + 1)
        elif prefix != "O":
            found.append((kind, number, number + 1))
        previous, previous_type = prefix, kind
    return found


def entity_counts(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, tuple[int, int, int]]:
    """How many entities of each type are expected, predicted, and both: same type, same first and last word.

    Raises:
        ValueError: not as many sentences, or, in one of them, not as many tags; or a tag is none of an entity.
    """
    if len(references) != len(predictions):
        raise ValueError(f"{len(references)} sentences, but predictions for {len(predictions)}")
    expected: Counter[str] = Counter()
    predicted: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for number, (reference, prediction) in enumerate(zip(references, predictions, strict=True)):
        if len(reference) != len(prediction):
            raise ValueError(f"sentence {number} has {len(reference)} tags, but {len(prediction)} predicted ones")
        gold, found = entities(reference), entities(prediction)
        expected.update(kind for kind, _, _ in gold)
        predicted.update(kind for kind, _, _ in found)
        right.update(kind for kind, _, _ in set(gold) & set(found))
    return {kind: (expected[kind], predicted[kind], right[kind]) for kind in sorted(expected | predicted)}


def precision_recall_f1(expected: int, predicted: int, right: int) -> dict[str, float]:
    """Of counts; 0 where there is nothing to divide by, as conlleval has it."""
    return {
        "precision": right / predicted if predicted else 0.0,
        "recall": right / expected if expected else 0.0,
        "f1": 2 * right / (expected + predicted) if expected + predicted else 0.0,
    }


def entity_scores(references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of entities of all types together, and accuracy of tags, as seqeval and conlleval.

    Args:
        references, predictions: tags of the words of each sentence.

    Raises:
        ValueError: as `entity_counts`; or there are no words.
    """
    counts = entity_counts(references, predictions).values()
    expected, predicted, right = (sum(count[field] for count in counts) for field in range(3))
    same = accuracy([tag for tags in references for tag in tags], [tag for tags in predictions for tag in tags])
    return precision_recall_f1(expected, predicted, right) | {"accuracy": same}


def entity_scores_by_type(
    references: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Type -> precision, recall, f1, and `support`, the number of entities that are expected; types sorted."""
    return {
        kind: precision_recall_f1(*counts) | {"support": float(counts[0])}
        for kind, counts in entity_counts(references, predictions).items()
    }


# ---- answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """SQuAD's: lower case, no ASCII punctuation, no a, an, the, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def answer_scores(gold: Sequence[str], prediction: str, version_2_with_negative: bool = False) -> tuple[float, float]:
    """Exact match and F1 of words of an answer, each against the gold answer that is kindest to it.

    Args:
        gold: all that count as right. In SQuAD 2.0 none, or ("",), means that there is no answer.
        prediction: "" for no answer.
        version_2_with_negative: count as the script of 2.0: gold answers without a word do not count, and F1 where
            either side has no word is 1 if neither has, else 0. The script of 1.1 has 0 in both cases.
    """
    expected = [normalize_answer(text) for text in gold]
    if version_2_with_negative:
        expected = [text for text in expected if text] or [""]
    got = normalize_answer(prediction)

    def overlap(text: str) -> float:
        words, found = text.split(), got.split()
        if version_2_with_negative and not (words and found):
            return float(words == found)
        common = sum((Counter(words) & Counter(found)).values())
        return 2 * common / (len(words) + len(found)) if common else 0.0

    return max((float(text == got) for text in expected), default=0.0), max(map(overlap, expected), default=0.0)


def squad_scores(
    references: Mapping[str, Sequence[str]], predictions: Mapping[str, str], *, version_2_with_negative: bool = False
) -> dict[str, float]:
    """`exact_match` and `f1` as SQuAD's scripts compute them.

    Args:
        references: id of a question -> its gold answers; none where the context has no answer.
        predictions: id -> text; "" for no answer. A question without a prediction counts 0.
        version_2_with_negative: SQuAD 2.0's arithmetic (`answer_scores`); its `HasAns_exact`, `HasAns_f1`,
            `NoAns_exact` and `NoAns_f1` over the questions that have an answer, and those that have none, are
            added, each where there is such a question.

    Raises:
        ValueError: there are no questions, or a prediction is of none of them.
    """
    _known_ids(references, predictions)
    scores = {
        id: answer_scores(gold, predictions[id], version_2_with_negative) if id in predictions else (0.0, 0.0)
        for id, gold in references.items()
    }

    def mean(ids: Sequence[str]) -> tuple[float, float]:
        return sum(scores[id][0] for id in ids) / len(ids), sum(scores[id][1] for id in ids) / len(ids)

    result = dict(zip(("exact_match", "f1"), mean(list(references)), strict=True))
    if version_2_with_negative:
        answerable = [id for id in references if any(references[id])]
        impossible = [id for id in references if not any(references[id])]
        for name, ids in (("HasAns", answerable), ("NoAns", impossible)):
            if ids:
                result |= dict(zip((f"{name}_exact", f"{name}_f1"), mean(ids), strict=True))
    return result


def best_thresholds(
    references: Mapping[str, Sequence[str]], answers: Mapping[str, str], null_scores: Mapping[str, float]
) -> dict[str, float]:
    """SQuAD 2.0's search for the null score from which on it is best to say that there is no answer.

    Two things are not as in the script: questions of equal null scores stay together, as no threshold can part them;
    and where "no answer" to all is best, the threshold is below all null scores (the script, made for probabilities,
    has 0).

    Args:
        references: id of a question -> its gold answers; none where the context has no answer.
        answers: id -> the best answer that is not empty, whatever its null score; "" where there is none at all.
        null_scores: id -> by how much "no answer" is likelier than that answer. A question is answered where this is at
            most the threshold.

    Returns:
        `best_exact`, `best_exact_thresh`, `best_f1`, `best_f1_thresh`: the scores with the best threshold, and that.

    Raises:
        ValueError: there are no questions, or an answer or a null score is missing, or is of none of them.
    """
    _known_ids(references, answers)
    _known_ids(references, null_scores)
    for id in references:
        if id not in answers or id not in null_scores:
            raise ValueError(f"question {id!r} has no {'answer' if id not in answers else 'null score'}")
    ids = sorted(references, key=lambda id: null_scores[id])
    impossible = sum(not any(gold) for gold in references.values())
    # What a question adds when it is answered; one that has no answer loses the 1 that saying so would have earned.
    gains = [
        answer_scores(references[id], answers[id], True) if any(references[id]) else (-float(bool(answers[id])),) * 2
        for id in ids
    ]
    result: dict[str, float] = {}
    for field, name in enumerate(("exact", "f1")):
        score = best = float(impossible)
        threshold = min(0.0, null_scores[ids[0]] - 1)
        for number, id in enumerate(ids):
            score += gains[number][field]
            tied = number + 1 < len(ids) and null_scores[ids[number + 1]] == null_scores[id]
            if score > best and not tied:
                best, threshold = score, null_scores[id]
        result |= {f"best_{name}": best / len(ids), f"best_{name}_thresh": threshold}
    return result


def _known_ids(references: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    if not references:
        raise ValueError("no questions to compute a metric of")
    for id in given:
        if id not in references:
            raise ValueError(f"a prediction is for {id!r}, which is none of the {len(references)} questions")
