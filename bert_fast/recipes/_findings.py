"""What predictions say about a model: confusions, classes, calibration, the worst errors; for each kind of task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bert_fast.recipes._page import Markup, bars, element, figure, joined, matrix, table, text
from bert_fast.tasks.metrics import answer_scores, entity_scores_by_type, precision_recall_f1

#: How many errors, labels of a matrix, and characters of a text are shown.
ERRORS, LABELS, CHARACTERS = 20, 20, 500
#: Labels of a matrix that is no wider than half of the page.
NARROW = 5

Line = Mapping[str, Any]


class Section(NamedTuple):
    """A part of the report; a wide one stands beside no other."""

    title: str
    content: Markup
    wide: bool = False


def findings(kind: str, lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    """The sections about the predictions of a split, each line with its `example`."""
    return _KINDS[kind](lines, labels)


# ---- texts and choices


def _classification(lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    known = [line for line in lines if line["example"]["label"] is not None]
    if isinstance(lines[0]["label"], list):
        return _several(known, labels)
    if isinstance(lines[0]["label"], float):
        return _numbers(known, "label", "label")
    said = [_Said(ln["example"]["label"], ln["label"], max(ln["probabilities"].values()), ln) for ln in lines]
    return _one_of(said, labels, _texts)


def _choices(lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    def shown(line: Line) -> Markup:
        texts = [" ".join(filter(None, choice)) for choice in line["example"]["choices"]]
        marks = {line["label"]: "wrong", line["example"]["label"]: "right"}
        return joined(element("div", f"{i}. ", _cut(t), class_=marks.get(i, "soft")) for i, t in enumerate(texts))

    said = []
    for line in lines:
        expected = line["example"]["label"]
        wanted = None if expected is None else str(expected)
        said.append(_Said(wanted, str(line["label"]), max(line["probabilities"]), line))
    places = range(max((len(line["probabilities"]) for line in lines), default=0))
    return _one_of(said, [str(place) for place in places], shown)


class _Said(NamedTuple):
    """One of several labels, and what is expected; None where that is not known."""

    expected: str | None
    label: str
    probability: float
    line: Line


def _one_of(said: Sequence[_Said], labels: Sequence[str], shown: Callable[[Line], Markup]) -> list[Section]:
    """One label each."""
    known = [one for one in said if one.expected is not None]
    given = Counter(one.label for one in known or said)
    if not known:
        return [Section("Labels predicted", bars({"predicted": {label: given[label] for label in labels}}))]
    expected = Counter(one.expected for one in known)
    pairs = Counter((one.expected, one.label) for one in known)
    kept = _most_frequent(labels, expected + given)
    rows = []
    for label in labels:
        scores = precision_recall_f1(expected[label], given[label], pairs[label, label])
        rows.append([label, *scores.values(), expected[label]])
    wrong = sorted((one for one in known if one.label != one.expected), key=lambda one: -one.probability)
    errors = [
        [shown(one.line), element("span", one.expected, class_="right"), _wrong(one.label), one.probability]
        for one in wrong[:ERRORS]
    ]
    distribution = {"expected": {n: expected[n] for n in kept}, "predicted": {n: given[n] for n in kept}}
    probabilities = np.array([one.probability for one in known])
    right = np.array([one.label == one.expected for one in known])
    header = ["", "expected", "predicted", "probability"]
    return [
        _confusion(kept, labels, pairs),
        Section("Classes", table(["label", "precision", "recall", "F1", "support"], rows)),
        Section("Labels", bars(distribution)),
        Section("Calibration", calibration(probabilities, right)),
        _errors(errors, len(wrong), len(known), header, "the most confident first"),
    ]


def _most_frequent(labels: Sequence[str], counts: Counter[Any]) -> list[str]:
    """Those of which there are the most, in the order of the labels."""
    most = {label for label, _ in counts.most_common(LABELS)}
    return [label for label in labels if label in most]


def _confusion(kept: Sequence[str], labels: Sequence[str], pairs: Mapping[tuple[Any, Any], int]) -> Section:
    """Of the labels that are kept; `pairs` are (expected, predicted) -> count."""
    parts = [matrix(kept, [[pairs[row, column] for column in kept] for row in kept])]
    if len(kept) < len(labels):
        parts.insert(0, element("p", f"The {len(kept)} most frequent of {len(labels)} labels.", class_="soft"))
    return Section("Confusion matrix", joined(parts), len(kept) > NARROW)


def calibration(confident: np.ndarray, right: np.ndarray, bins: int = 10) -> Markup:
    """How often answers of each probability are right, and the expected calibration error (Guo et al., 2017)."""
    places = np.minimum((confident * bins).astype(int), bins - 1)
    counts = np.bincount(places, minlength=bins)
    there = counts > 0
    accuracy = np.bincount(places, right, minlength=bins)[there] / counts[there]
    confidence = np.bincount(places, confident, minlength=bins)[there] / counts[there]
    error = float((np.abs(accuracy - confidence) * counts[there]).sum() / counts.sum())

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], linestyle=":", color="#8a8f98", label="calibrated")
        axes.plot(confidence, accuracy, marker="o", markersize=4, label="this model")
        axes.set(xlabel="probability of the predicted label", ylabel="share that is right", ylim=(-0.03, 1.03))
        axes.legend(loc="upper left")

    told = f"Expected calibration error over {bins} bins: {error:.3f}"
    return joined([element("p", told), figure("Reliability", draw)])


def _several(known: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    """Any number of labels each."""
    expected: Counter[str] = Counter()
    given: Counter[str] = Counter()
    right: Counter[str] = Counter()
    wrong: list[tuple[float, Line]] = []
    for line in known:
        wanted, said = set(line["example"]["label"]), set(line["label"])
        expected.update(wanted)
        given.update(said)
        right.update(wanted & said)
        if wanted != said:
            odds = line["probabilities"]
            wrong.append((max(abs(odds[label] - (label in wanted)) for label in wanted ^ said if label in odds), line))
    wrong.sort(key=lambda pair: -pair[0])
    rows = [
        [label, *precision_recall_f1(expected[label], given[label], right[label]).values(), expected[label]]
        for label in labels
    ]
    errors = [
        [_texts(line), ", ".join(line["example"]["label"]), _wrong(", ".join(line["label"])), off]
        for off, line in wrong[:ERRORS]
    ]
    return [
        Section("Classes", table(["label", "precision", "recall", "F1", "support"], rows)),
        Section(
            "Labels", bars({"expected": {n: expected[n] for n in labels}, "predicted": {n: given[n] for n in labels}})
        ),
        _errors(errors, len(wrong), len(known), ["", "expected", "predicted", "off by"], "the most confident first"),
    ]


def _numbers(known: Sequence[Line], said: str, wanted: str) -> list[Section]:
    """A number each."""
    if not known:
        return []
    pairs = np.array([(line["example"][wanted], line[said]) for line in known], float)

    def draw(axes: Any) -> None:
        axes.scatter(*pairs.T, s=9, alpha=0.6)
        low, high = pairs[:, 0].min(), pairs[:, 0].max()
        axes.plot([low, high], [low, high], linestyle=":", color="#8a8f98")
        axes.set(xlabel="expected", ylabel="predicted")

    order = np.argsort(-np.abs(pairs[:, 0] - pairs[:, 1]), kind="stable")[:ERRORS]
    errors = [[_texts(known[i]), *pairs[i].tolist(), float(pairs[i, 1] - pairs[i, 0])] for i in order]
    return [
        Section("Expected and predicted", figure("Expected and predicted", draw)),
        Section("Worst errors", table(["", "expected", "predicted", "difference"], errors, class_="full"), True),
    ]


# ---- words


def _tokens(lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    known = [line for line in lines if line["example"]["tags"] is not None]
    given = Counter(tag for line in known or lines for tag in line["tags"])
    if not known:
        return [Section("Tags predicted", bars({"predicted": {label: given[label] for label in labels}}))]
    expected, said = [line["example"]["tags"] for line in known], [line["tags"] for line in known]
    pairs = Counter(pair for a, b in zip(expected, said, strict=True) for pair in zip(a, b, strict=True))
    wanted = Counter(tag for tags in expected for tag in tags)
    kept = _most_frequent(labels, wanted + given)
    sections = [_confusion(kept, labels, pairs)]
    if all(label == "O" or label[:2] in ("B-", "I-") for label in labels):
        rows: list[list[Any]] = [
            [name, scores["precision"], scores["recall"], scores["f1"], int(scores["support"])]
            for name, scores in entity_scores_by_type(expected, said).items()
        ]
        sections.insert(0, Section("Entities", table(["type", "precision", "recall", "F1", "support"], rows)))
    else:
        rows = [
            [tag, *precision_recall_f1(wanted[tag], given[tag], pairs[tag, tag]).values(), wanted[tag]]
            for tag in labels
        ]
        sections.insert(0, Section("Tags", table(["tag", "precision", "recall", "F1", "support"], rows)))
    sections.append(
        Section("Labels", bars({"expected": dict(wanted.most_common()), "predicted": {n: given[n] for n in wanted}}))
    )
    wrong = [
        (sum(a != b for a, b in zip(e, s, strict=True)), i) for i, (e, s) in enumerate(zip(expected, said, strict=True))
    ]
    worst = sorted((pair for pair in wrong if pair[0]), key=lambda pair: (-pair[0], pair[1]))
    errors = [[_sentence(known[i]), count] for count, i in worst[:ERRORS]]
    sections.append(_errors(errors, len(worst), len(known), ["", "wrong tags"], "the most wrong tags first"))
    return sections


def _sentence(line: Line) -> Markup:
    """Words with their tags; wrong ones with both."""
    words = []
    for word, tag, said in zip(line["example"]["words"], line["example"]["tags"], line["tags"], strict=True):
        if tag != said:
            small = element("small", element("span", tag, class_="right"), " ", element("span", said, class_="wrong"))
            words.append(element("span", word, small, class_="word bad"))
        elif tag != "O":
            words.append(element("span", word, element("small", tag, class_="right"), class_="word good"))
        else:
            words.append(element("span", word, class_="word"))
    return joined(words)


# ---- answers


def _answers(lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    known = [line for line in lines if line["example"]["answers"] or line["example"]["is_impossible"]]
    if not known:
        return []
    gold = [_gold(line["example"]) for line in known]
    scores = [answer_scores(texts, line["answer"], True) for texts, line in zip(gold, known, strict=True)]
    f1 = np.array([score for _, score in scores])
    groups: dict[str, int] = {"exact": 0, "partly right": 0, "wrong": 0}
    for exact, overlap in scores:
        groups["exact" if exact else "partly right" if overlap else "wrong"] += 1
    if any("null_score" in line for line in known):
        groups["no answer predicted"] = sum(not line["answer"] for line in known)
        groups["no answer expected"] = sum(not texts for texts in gold)
    order = sorted((i for i in range(len(known)) if f1[i] < 1), key=lambda i: (f1[i] > 0, -known[i]["score"]))
    errors = [
        [
            joined([element("b", known[i]["example"]["question"]), element("div", _context(known[i]["example"]))]),
            element("span", " / ".join(dict.fromkeys(gold[i])) or "no answer", class_="right"),
            _wrong(known[i]["answer"] or "no answer"),
            float(f1[i]),
            known[i]["score"],
        ]
        for i in order[:ERRORS]
    ]
    header = ["question, and where its answer is", "expected", "predicted", "F1", "probability"]
    return [
        Section("Answers", bars({"questions": groups})),
        _errors(
            errors, len(order), len(known), header, "without a right word, the most confident first; then the others"
        ),
    ]


def _gold(example: Mapping[str, Any]) -> list[str]:
    return [] if example["is_impossible"] else [answer["text"] for answer in example["answers"]]


def _context(example: Mapping[str, Any], around: int = 120) -> Markup:
    """The context near the answer, with the answer marked."""
    context = example["context"]
    answer = next((answer for answer in example["answers"] if answer["start"] >= 0), None)
    if example["is_impossible"] or answer is None:
        return element("span", _cut(context, 2 * around), class_="soft")
    start, end = answer["start"], answer["start"] + len(answer["text"])
    first, last = max(start - around, 0), min(end + around, len(context))
    before = ("… " if first else "") + context[first:start]
    after = context[end:last] + (" …" if last < len(context) else "")
    return element("span", before, element("mark", context[start:end]), after, class_="soft")


# ---- vectors


def _vectors(lines: Sequence[Line], labels: Sequence[str]) -> list[Section]:
    def shown(line: Line) -> Markup:
        return joined(element("div", _cut(part)) for part in line["example"]["texts"])

    if all(line["example"]["score"] is not None for line in lines):
        flat = [{**line, "example": {**line["example"], "text": "\n".join(line["example"]["texts"])}} for line in lines]
        return _numbers(flat, "similarity", "score")
    far = sorted((line for line in lines if line["rank"] > 1), key=lambda line: -line["rank"])
    errors = [[shown(line), line["similarity"], line["rank"]] for line in far[:ERRORS]]
    header = ["anchor, positive, negative", "cosine", "rank of the positive"]
    return [_errors(errors, len(far), len(lines), header, "the farthest positives first")]


# ---- what they share


def _errors(rows: list[list[Any]], wrong: int, total: int, header: Sequence[str], order: str) -> Section:
    if not wrong:
        return Section("Worst errors", element("p", f"None in {total:,} examples."), True)
    shown = f"{wrong:,} of {total:,} examples are not right; " + (f"{len(rows)} of them, " if wrong > len(rows) else "")
    content = [element("p", shown + order + "."), table(header, rows, class_="full")]
    return Section("Worst errors", joined(content), True)


def _texts(line: Line) -> Markup:
    example = line["example"]
    return joined(element("div", _cut(part)) for part in (example["text"], example.get("text_pair")) if part)


def _wrong(label: str) -> Markup:
    return element("span", label, class_="wrong")


def _cut(value: str, most: int = CHARACTERS) -> Markup:
    return text(value if len(value) <= most else f"{value[:most]} …")


_KINDS: dict[str, Callable[[Sequence[Line], Sequence[str]], list[Section]]] = {
    "classification": _classification,
    "tokens": _tokens,
    "question_answering": _answers,
    "multiple_choice": _choices,
    "embeddings": _vectors,
}
