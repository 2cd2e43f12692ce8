"""The report of every kind of task: one file, no text of it runs, its numbers are right, bad folders are named."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.recipes.report import PUBLISHED, write_report

EVIL = "<script>alert('x')</script> & \"quoted\""


def results(kind, metrics, labels=(), task=None):
    return {
        "task": task or kind,
        "kind": kind,
        "model": "demo",
        "settings": {
            "train_file": "examples/train.csv",
            "validation_file": EVIL,
            "arguments": {"learning_rate": 5e-05, "num_train_epochs": 3.0},
            "task_options": {"max_seq_length": 128},
        },
        "labels": list(labels),
        "main_metric": next(iter(metrics)),
        "metrics": {"validation": metrics},
        "train": {
            "seconds": 61.27,
            "steps": 120,
            "examples": 3040,
            "tokens_per_second": 4321.0,
            "skipped": {"the answer is not in its context": 2},
            "num_truncated": 17,
        },
        "versions": {"bert_fast": "0", "torch": "2"},
    }


def classification(draw):
    labels = ["negative", "neutral", "positive"]
    texts = [
        "The soup was cold, and nobody came.",
        "A short walk from the station.",
        "I would go again tomorrow.",
        EVIL,
    ]
    for index in range(60):
        odds = draw.dirichlet([1.0, 1.0, 1.0]).tolist()
        label = labels[draw.integers(3)] if index % 3 else labels[int(np.argmax(odds))]
        example = {"id": str(index), "text": texts[index % 4], "text_pair": None, "label": label}
        said = dict(zip(labels, odds, strict=True))
        yield {"label": max(said, key=said.get), "probabilities": said, "example": example}


def several(draw):
    labels = ["food", "place", "staff"]
    for index in range(20):
        odds = dict(zip(labels, draw.uniform(size=3).tolist(), strict=True))
        wanted = [label for label in labels if draw.integers(2)]
        example = {"id": str(index), "text": "The cook and the view.", "text_pair": EVIL, "label": wanted}
        yield {"label": [n for n in labels if odds[n] > 0.5], "probabilities": odds, "example": example}


def regression(draw):
    for index in range(40):
        wanted = float(draw.uniform(0, 5))
        example = {"id": str(index), "text": "A man plays.", "text_pair": EVIL, "label": wanted}
        yield {"label": wanted + float(draw.normal()), "example": example}


def tokens(draw):
    words = ["Ida", "Brandt", "left", "Oslo", "with", EVIL]
    tags = ["B-PER", "I-PER", "O", "B-LOC", "O", "O"]
    for index in range(12):
        said = [tag if draw.uniform() > 0.2 else "O" for tag in tags]
        yield {"tags": said, "example": {"id": str(index), "words": words, "tags": tags}}


def question_answering(draw):
    context = "Long ago, " * 20 + "the lamp burned whale oil until 1926. " + EVIL + " and more. " * 30
    for index, (said, score) in enumerate(
        [("whale oil", 0.9), ("1926", 0.8), ("", 0.4), ("lamp burned whale oil", 0.7)]
    ):
        answers = [{"text": "whale oil", "start": context.index("whale")}] if index != 1 else []
        answers = [{"text": "blubber", "start": -1}, *answers] if index != 1 else []  # which the context has not
        example = {"question": "What did it burn? " + EVIL, "context": context, "answers": answers}
        example |= {"id": str(index), "is_impossible": index == 1}
        yield {
            "answer": said,
            "start": 0,
            "end": 1,
            "score": score,
            "null_score": 0.0,
            "n_best": [],
            "example": example,
        }


def multiple_choice(draw):
    for index in range(10):
        odds = draw.dirichlet(np.ones(3)).tolist()
        choices = [["He opens the door.", ending] for ending in ("It rains.", "He flies.", EVIL)]
        example = {"id": str(index), "choices": choices, "label": index % 3}
        yield {"label": int(np.argmax(odds)), "probabilities": odds, "example": example}


def embeddings(draw):
    for index in range(10):
        example = {"id": str(index), "texts": ["An anchor.", EVIL], "score": None}
        yield {"similarity": 0.5, "rank": 1 + index % 4, "example": example}


def scored(draw):
    for index in range(10):
        example = {"id": str(index), "texts": ["An anchor.", EVIL], "score": float(draw.uniform())}
        yield {"similarity": float(draw.uniform()), "example": example}


KINDS = {
    "classification": (classification, {"accuracy": 0.75}, ("negative", "neutral", "positive")),
    "several": (several, {"micro_f1": 0.5}, ("food", "place", "staff")),
    "regression": (regression, {"pearson": 0.8, "spearman": 0.79}, ()),
    "tokens": (tokens, {"f1": 0.8, "precision": 0.8}, ("O", "B-PER", "I-PER", "B-LOC")),
    "question_answering": (question_answering, {"f1": 0.5, "exact_match": 0.25}, ()),
    "multiple_choice": (multiple_choice, {"accuracy": 0.4}, ()),
    "embeddings": (embeddings, {"accuracy@1": 0.3, "mrr": 0.5}, ()),
    "scored": (scored, {"spearman": 0.3}, ()),
}
CLASSES = {"several": "classification", "regression": "classification", "scored": "embeddings"}


def make(folder, kind, *, task=None, curves=True):
    """A folder as `finetune` leaves it."""
    lines, metrics, labels = KINDS[kind]
    folder.mkdir(exist_ok=True)
    value = results(CLASSES.get(kind, kind), metrics, labels, task)
    (folder / "results.json").write_text(json.dumps(value), encoding="utf-8")
    rows = [json.dumps({"id": row["example"]["id"], **row}) for row in lines(np.random.default_rng(3))]
    (folder / "predictions_validation.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    steps = [
        {"step": s, "loss": 1 / (1 + s / 30), "learning_rate": 5e-5 * (1 - s / 120), "tokens_per_second": 4000.0 + s}
        for s in range(10, 121, 10)
    ]
    steps += [{"step": s, f"eval_{next(iter(metrics))}": s / 160} for s in (40, 80, 120)]
    if curves:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """Elements of a page, whether they are closed in order, and its text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.found, self.text, self.links = [], [], [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)


@pytest.mark.parametrize("kind", KINDS)
def test_one_file_in_which_no_text_runs(tmp_path, kind):
    source = write_report(make(tmp_path / "run", kind)).read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.found
    assert EVIL in " ".join(page.text)
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"@import|url\((?!#)", source)
    assert page.found.count("svg") >= 4
    told = " ".join(page.text)
    for shown in ("demo", "3,040", "61.3", "4,321", "17", "left out: the answer is not in its context", "5e-05"):
        assert shown in told
    for value in KINDS[kind][1].values():
        assert f"{value:.4f}" in told


def row_of(source, heading, first):
    """The cells of the row that begins so, in the section of this heading."""
    section = source.split(f"<h3>{heading}</h3>")[1].split("</section>")[0]
    row = re.search(rf"<tr><t[dh][^>]*>{first}</t[dh]>(.*?)</tr>", section)[1]
    return re.findall(r"<td[^>]*>([^<]*)</td>", row)


def test_classes_as_scikit_learn_has_them(tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    source = write_report(make(tmp_path, "classification")).read_text(encoding="utf-8")
    lines = list(classification(np.random.default_rng(3)))
    labels = KINDS["classification"][2]
    expected, said = [line["example"]["label"] for line in lines], [line["label"] for line in lines]
    wanted = metrics.precision_recall_fscore_support(expected, said, labels=labels)
    confusion = metrics.confusion_matrix(expected, said, labels=labels)
    for index, label in enumerate(labels):
        numbers = [float(cell) for cell in row_of(source, "Classes", label)]
        assert numbers == pytest.approx([column[index] for column in wanted], abs=6e-5)
        assert [int(cell) for cell in row_of(source, "Confusion matrix", label)] == confusion[index].tolist()
    errors = source.split("<h3>Worst errors</h3>")[1]
    wrong = sorted(
        (max(x["probabilities"].values()) for x in lines if x["label"] != x["example"]["label"]), reverse=True
    )
    assert f"{len(wrong)} of 60 examples are not right" in errors
    shown = [float(cell) for cell in re.findall(r'class="number">([\d.]+)</td>', errors)]
    assert shown == pytest.approx(wrong[:20], abs=6e-5)
    confident = np.array([max(line["probabilities"].values()) for line in lines])
    right = np.array([a == b for a, b in zip(expected, said, strict=True)])
    bins = (confident * 10).astype(int)
    error = sum(abs(right[bins == b].mean() - confident[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    assert f"over 10 bins: {error:.3f}" in source


def test_answers_and_entities(tmp_path):
    source = write_report(make(tmp_path / "qa", "question_answering")).read_text(encoding="utf-8")
    for name, count in (("exact", 1), ("partly right", 1), ("wrong", 2), ("no answer predicted", 1)):
        assert row_of(source, "Answers", name)[0] == str(count)
    assert "<mark>whale oil</mark>" in source
    assert source.index("1926</span>") < source.index("lamp burned whale oil</span>")  # wrong before partly right
    source = write_report(make(tmp_path / "tokens", "tokens")).read_text(encoding="utf-8")
    assert row_of(source, "Entities", "LOC")[-1] == "12"
    assert '<span class="word bad">Oslo' in source


def test_published_scores_stand_beside_those_of_their_data_set(tmp_path):
    source = write_report(make(tmp_path, "question_answering", task="squad")).read_text(encoding="utf-8")
    assert source.count("published, BERT-base: ") == 2
    assert "published, BERT-base: 0.885" in source
    source = write_report(make(tmp_path, "question_answering", task="squad_v2")).read_text(encoding="utf-8")
    assert "published" not in source
    assert all(split.startswith(("validation", "test")) for _, split in PUBLISHED)


def test_predictions_without_labels_and_no_curves(tmp_path):
    folder = make(tmp_path, "classification", curves=False)
    lines = [json.loads(line) for line in (folder / "predictions_validation.jsonl").read_text().splitlines()]
    for line in lines:
        line["example"]["label"] = None
    (folder / "predictions_test.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    source = write_report(folder).read_text(encoding="utf-8")
    assert "<h3>Labels predicted</h3>" in source.split("<h2>Predictions: test</h2>")[1].split("<h2>")[0]
    assert "<h2>Curves</h2>" not in source
    assert "Worst errors" not in source.split("<h2>Predictions: test</h2>")[1].split("<h2>")[0]


def test_folders_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"has no results\.json: it is not a folder"):
        write_report(tmp_path)
    folder = make(tmp_path / "run", "tokens")
    broken = json.loads((folder / "results.json").read_text())
    del broken["metrics"], broken["train"]
    (folder / "results.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match=r"results\.json lacks metrics, train"):
        write_report(folder)
    make(folder, "tokens")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no measurement of a step"):
        write_report(folder)
    make(folder, "tokens")
    (folder / "predictions_validation.jsonl").write_text('{"id": "0", "example": {"tags": ["O"]}}\n')
    with pytest.raises(ValueError, match=r"predictions_validation\.jsonl has predictions without 'tags', which those"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_commands(tmp_path):
    folder = make(tmp_path / "run", "regression")
    assert command("report", folder).stdout.strip() == str(folder / "report.html")
    done = command(
        "submission", folder / "predictions_validation.jsonl", "--task_name", "stsb", "--output_dir", tmp_path / "out"
    )
    assert done.stdout.strip() == str(tmp_path / "out" / "STS-B.tsv")
    bad = command("report", tmp_path)
    assert (bad.exit_code, bad.stdout) == (2, "")
    assert bad.stderr.strip().endswith("has no results.json: it is not a folder that bert-fast finetune left")
    bad = command("submission", tmp_path / "none.jsonl", "--task_name", "stsb", "--output_dir", tmp_path)
    assert (bad.exit_code, bad.stderr) == (2, f"bert-fast: {tmp_path / 'none.jsonl'}: No such file or directory\n")
