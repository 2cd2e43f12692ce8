"""Classification: labels, features as transformers makes them, predictions and metrics as scikit-learn counts them."""

import numpy as np
import pytest
import tiny_checkpoint
import torch
from sklearn.metrics import f1_score
from transformers import AutoTokenizer, BertForSequenceClassification

from bert_fast.data.examples import TextExample, TokensExample
from bert_fast.folders import resolve
from bert_fast.loading import from_pretrained
from bert_fast.tasks._batches import PaddingCollator
from bert_fast.tasks.classification import Classification

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

TOKENIZER = tiny_checkpoint.tokenizer()
TEXTS = ["a quiet house", "two boats left the harbour before anybody was awake", "no", "东京 naïve don't"]


def examples(labels, pairs=None):
    return [
        TextExample(str(number), text, None if pairs is None else pairs[number], label)
        for number, (text, label) in enumerate(zip(TEXTS, labels, strict=True))
    ]


def model_of(task, folder):
    return from_pretrained(tiny_checkpoint.checkpoint(folder), task.head, config=task.config())


def logits_of(task, model, features, collate=None):
    batch = (collate or task.collator(model.config))(features.inputs)
    return [output[0] for output in task.outputs(model, {n: v for n, v in batch.items() if n != "labels"})]


@pytest.mark.parametrize(
    ("labels", "problem", "names"),
    [
        (["b", "a", "b", "a"], "single", ("a", "b")),
        (["10", "9", "2", "x"], "single", ("2", "9", "10", "x")),  # numbers by value
        ([("b", "a"), (), ("c",), ("a",)], "multi", ("a", "b", "c")),
        ([1.5, 0.0, 5.0, 2.0], "regression", None),
    ],
)
def test_what_is_learnt_from_examples(labels, problem, names):
    task = Classification()
    task.learn(examples(labels))
    assert task.problem == problem
    assert task.labels == names
    assert len(task.config()["id2label"]) == len(names or "x")


def test_what_is_given_counts():
    task = Classification(labels=("z", "b", "a"), problem="single")
    task.learn(examples(["a", "b", "a", "b"]))
    assert task.labels == ("z", "b", "a")
    features = task.features(examples(["a", "b", "z", "z"]), TOKENIZER, labelled=True)
    assert [feature["labels"] for feature in features.inputs] == [2, 1, 0, 0]


@pytest.mark.parametrize("pairs", [None, ["and a garden", "x", "not so, I said, for I saw her myself", ""]])
def test_features_are_those_of_transformers(pairs):
    task = Classification(labels=("a", "b"), problem="single", max_seq_length=9)
    features = task.features(examples(["a"] * 4, pairs), TOKENIZER, labelled=False)
    theirs = AutoTokenizer.from_pretrained(resolve("demo"))
    expected = theirs(TEXTS, pairs, truncation="longest_first", max_length=9, padding=False)
    for number, feature in enumerate(features.inputs):
        assert feature["input_ids"].tolist() == expected["input_ids"][number]
        assert feature["token_type_ids"].tolist() == expected["token_type_ids"][number]
    whole = theirs(TEXTS, pairs)["input_ids"]
    assert features.num_truncated == sum(len(ids) > 9 for ids in whole) > 0


def test_packed_and_padded_batches_and_transformers_agree(tmp_path):
    task = Classification(labels=("a", "b", "c"), problem="single")
    features = task.features(examples(["a", "b", "c", "a"], TEXTS[::-1]), TOKENIZER, labelled=True)
    model = model_of(task, tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    theirs = BertForSequenceClassification.from_pretrained(tmp_path / "tuned").eval()
    assert theirs.config.problem_type == "single_label_classification"
    with torch.inference_mode():
        packed = logits_of(task, model, features)
        padded = logits_of(task, model, features, PaddingCollator(0))
        batch = PaddingCollator(0)(features.inputs)
        expected = theirs(**batch)
    np.testing.assert_allclose(packed, padded, atol=1e-6)
    np.testing.assert_allclose(packed, expected.logits, atol=1e-5)
    loss = model(**task.collator(model.config)(features.inputs)).loss
    assert loss.item() == pytest.approx(expected.loss.item())


def test_predictions_and_metrics_of_single_labels():
    task = Classification(labels=("a", "b", "c"), problem="single", metric_names=("accuracy", "macro_f1"))
    labelled = examples(["a", "b", "c", "a"])
    logits = np.array([[2, 1, 0], [0, 1, 2], [0, 0, 3], [1, 0, 0]], np.float32)
    said = task.predictions(labelled, None, [(row,) for row in logits])
    assert [prediction["label"] for prediction in said] == ["a", "c", "c", "a"]
    expected = torch.from_numpy(logits).softmax(1)
    np.testing.assert_allclose([list(p["probabilities"].values()) for p in said], expected, rtol=1e-6)
    metrics = task.metrics(labelled, said)
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx(f1_score([0, 1, 2, 0], [0, 2, 2, 0], average="macro", zero_division=0))
    assert task.main_metric == "accuracy"


def test_predictions_and_metrics_of_several_labels():
    task = Classification(labels=("a", "b", "c"), problem="multi")
    labelled = examples([("a",), ("b", "c"), (), ("a", "b")])
    logits = np.array([[2, 1, -1], [-1, 1, 2], [-1, -1, -3], [1, -1, -1]], np.float32)
    said = task.predictions(labelled, None, [(row,) for row in logits])
    assert [prediction["label"] for prediction in said] == [["a", "b"], ["b", "c"], [], ["a"]]
    assert said[0]["probabilities"]["a"] == pytest.approx(1 / (1 + np.exp(-2)))
    truth = [[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert task.metrics(labelled, said)["micro_f1"] == pytest.approx(f1_score(truth, logits > 0, average="micro"))


def test_a_number_is_said_and_correlated():
    task = Classification(problem="regression")
    labelled = examples(["1", 2.0, 3.5, 5.0])  # a table's numbers are strings
    said = task.predictions(labelled, None, [(np.array([x], np.float32),) for x in (0.5, 1.0, 1.75, 2.5)])
    assert [prediction["label"] for prediction in said] == [0.5, 1.0, 1.75, 2.5]
    assert task.metrics(labelled, said) == pytest.approx({"pearson": 1.0, "spearman": 1.0})


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", None, "b", "a"], {}, "example 1 has no label"),
        (["a", "a", "a", "a"], {}, "all 4 training examples have the label 'a'"),
        (["a", "b", 2.5, "a"], {}, "example 2 has the label 2.5, expected the name of a class"),
        ([("a",), ("b",), "a", ()], {}, "example 2 has the label 'a', expected the names of classes"),
        (["1", "2", "many", "3"], {"problem": "regression"}, "example 2 has the label 'many', expected a number"),
        ([1.0, 2.0, float("nan"), 3.0], {}, "example 2 has the label nan, expected a number"),
        (["a", "b", "maybe", "a"], {"labels": ("a", "b")}, "example 2 has the label 'maybe', which is none of those"),
    ],
)
def test_bad_labels_are_named(labels, options, message):
    def learn_and_tokenize():
        task = Classification(**options)
        task.learn(examples(labels))
        task.features(examples(labels), TOKENIZER, labelled=True)

    with pytest.raises(ValueError, match=message):
        learn_and_tokenize()


def test_other_bad_input():
    with pytest.raises(ValueError, match="problem is 'both', expected one of single, multi, regression"):
        Classification(problem="both")
    with pytest.raises(ValueError, match="metric_names has bleu, expected some of accuracy"):
        Classification(metric_names=("accuracy", "bleu"))
    with pytest.raises(ValueError, match="labels has a name twice: a, a"):
        Classification(labels=("a", "a"))
    with pytest.raises(ValueError, match="there are no examples"):
        Classification().learn([])
    with pytest.raises(ValueError, match="example 7 is a TokensExample, expected a TextExample"):
        Classification().learn([TokensExample("7", ("a",), ("O",))])
    mixed = [TextExample("0", "a", "b"), TextExample("1", "a")]
    with pytest.raises(ValueError, match="example 1 is a single text, but others are pairs"):
        Classification(labels=("a", "b"), problem="single").features(mixed, TOKENIZER, labelled=False)
    with pytest.raises(ValueError, match="does not know its labels yet"):
        Classification().config()
