"""Fine-tuning runs of a tiny model: what they leave, that they resume, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
import torch
import transformers
from safetensors.torch import load_file

from bert_fast.loading import read_config
from bert_fast.recipes import predict
from bert_fast.recipes.finetune import FinetuneSettings, finetune, table
from bert_fast.saving import save_pretrained
from bert_fast.tasks.registry import load_task

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

EXAMPLES = Path(__file__).parents[2] / "examples"
REVIEWS = {"train_file": "reviews/train.tsv", "validation_file": "reviews/validation.tsv"}
ARGUMENTS = {
    "num_train_epochs": 2,
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 8,
    "disable_tqdm": True,
    "plot_metrics": False,
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(base, output_dir, task="classification", arguments=(), **options):
    files = {"train_file", "validation_file", "test_file"}
    options = {**REVIEWS, "max_train_samples": 40, "max_eval_samples": 16, **options}
    options = {n: str(EXAMPLES / v) if n in files and v is not None else v for n, v in options.items()}
    return FinetuneSettings(str(base), task, str(output_dir), arguments={**ARGUMENTS, **dict(arguments)}, **options)


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """A whole run that others look at; nobody changes its folder."""
    folder = tmp_path_factory.mktemp("run")
    return finetune(settings(base, folder, arguments={"save_total_limit": None}))


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_a_run_leaves(run):
    folder = run.output_dir
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == run.metrics
    assert results["labels"] == ["negative", "positive"]
    assert results["train"]["steps"] == 10
    assert results["train"]["examples"] == 40
    assert results["settings"]["arguments"]["learning_rate"] == 3e-3
    assert load_task(folder).labels == ("negative", "positive")
    said = lines(folder / "predictions_validation.jsonl")
    right = [line["label"] == line["example"]["label"] for line in said]
    assert run.metrics["validation"]["accuracy"] == np.mean(right)
    assert len(said) == 16
    # What was trained is what the file says, in transformers too.
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.id2label == {0: "negative", 1: "positive"}
    with torch.inference_mode():
        texts = [line["example"]["text"] for line in said]
        probabilities = theirs(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(1)
    np.testing.assert_allclose([list(line["probabilities"].values()) for line in said], probabilities, atol=1e-5)


def test_the_best_epoch_is_kept(base, tmp_path):
    """A rate that ruins the model again, in a run whose first epochs are the better ones."""
    result = finetune(settings(base, tmp_path / "run", arguments={"num_train_epochs": 5, "learning_rate": 2e-2}))
    evaluated = [line["eval_accuracy"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_accuracy" in line]
    assert len(evaluated) == 5
    assert result.metrics["validation"]["accuracy"] == max(evaluated)
    assert min(evaluated) < max(evaluated)
    whole = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert "checkpoint-25" in whole  # the last one, from which the run could go on
    assert len(whole) <= 2


def test_early_stopping(base, tmp_path):
    stopping = settings(base, tmp_path, early_stopping_patience=1, arguments={"num_train_epochs": 20})
    assert finetune(stopping).train["steps"] < 100


def test_a_run_that_was_interrupted_ends_as_the_whole_one(base, run, tmp_path):
    shutil.copytree(run.output_dir / "checkpoint-5", tmp_path / "checkpoint-5")
    shutil.copyfile(run.output_dir / "metrics.jsonl", tmp_path / "metrics.jsonl")
    resumed = finetune(settings(base, tmp_path, resume=True, arguments={"save_total_limit": None}))
    assert resumed.metrics == run.metrics
    ours, whole = load_file(tmp_path / "model.safetensors"), load_file(run.output_dir / "model.safetensors")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    assert sorted(ours) == sorted(whole)


def test_the_plain_path_says_the_same(base, run, tmp_path):
    """Without dropout both see the same batches, so their weights differ by rounding alone."""
    finetune(settings(base, tmp_path, plain=True))
    plain, fast = (lines(folder / "predictions_validation.jsonl") for folder in (tmp_path, run.output_dir))
    for one, other in zip(plain, fast, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(list(other["probabilities"].values()), abs=2e-3)


def test_evaluate_and_predict(run, tmp_path):
    tuned = predict.load(run.output_dir, device="cpu")
    file = EXAMPLES / "reviews" / "validation.tsv"
    metrics, part = predict.evaluate(tuned, file, output=tmp_path / "said.jsonl", progress=False)
    assert len(part.examples) == 40
    said = lines(tmp_path / "said.jsonl")
    assert metrics["accuracy"] == np.mean([line["label"] == line["example"]["label"] for line in said])
    (tmp_path / "texts.tsv").write_text("id\tsentence\nx\tA wonderful evening.\ny\tNever again.\n")
    for name in ("said.csv", "said.tsv"):
        predict.predict(tuned, tmp_path / "texts.tsv", tmp_path / name, progress=False)
        rows = (tmp_path / name).read_text().splitlines()
        delimiter = "," if name.endswith("csv") else "\t"
        assert rows[0].split(delimiter) == ["id", "label", "probabilities.negative", "probabilities.positive"]
        assert [row.split(delimiter)[0] for row in rows[1:]] == ["x", "y"]
    with pytest.raises(ValueError, match=r"said.xlsx ends in .xlsx, expected one of .jsonl, .csv, .tsv"):
        predict.predict(tuned, tmp_path / "texts.tsv", tmp_path / "said.xlsx")
    with pytest.raises(ValueError, match="label"):
        predict.evaluate(tuned, tmp_path / "texts.tsv", progress=False)


def test_a_data_set_by_name_and_its_submission(base, run, tmp_path):
    finetune(settings(base, tmp_path / "run", "sst2", {"max_steps": 1}))
    tuned = predict.load(tmp_path / "run", device="cpu")
    file = EXAMPLES / "reviews" / "validation.tsv"
    predict.predict(tuned, file, tmp_path / "said.jsonl", submission=tmp_path / "submission", progress=False)
    rows = (tmp_path / "submission" / "SST-2.tsv").read_text().splitlines()
    said = [line["label"] for line in lines(tmp_path / "said.jsonl")]
    expected = [f"{number}\t{int(label == 'positive')}" for number, label in enumerate(said)]
    assert rows == ["index\tprediction", *expected]
    tuned = predict.load(run.output_dir, device="cpu")
    with pytest.raises(ValueError, match="the benchmark is 'classification', expected one of cola"):
        predict.predict(tuned, file, tmp_path / "said.jsonl", submission=tmp_path / "other")


def test_outputs_do_not_depend_on_batches(run):
    tuned = predict.load(run.output_dir, device="cpu")
    part = predict.read_split(tuned, EXAMPLES / "reviews" / "validation.tsv", labelled=True)
    whole, alone = (
        predict.run(tuned.model, tuned.task, part.features, batch_tokens=tokens, progress=False) for tokens in (9999, 1)
    )
    for (one,), (other,) in zip(whole, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_int8_says_nearly_the_same(run):
    file = EXAMPLES / "reviews" / "validation.tsv"
    tuned = [predict.load(run.output_dir, device="cpu", precision=precision) for precision in (None, "int8")]
    parts = [predict.said_of(one, predict.read_split(one, file, labelled=True), progress=False)[0] for one in tuned]
    exact, rounded = ([line["probabilities"]["positive"] for line in part] for part in parts)
    assert exact == pytest.approx(rounded, abs=0.05)
    assert exact != rounded


def test_a_test_file_needs_no_labels(base, tmp_path):
    (tmp_path / "test.tsv").write_text("sentence\nA wonderful evening.\nNever again.\n")
    result = finetune(settings(base, tmp_path / "run", test_file=tmp_path / "test.tsv"))
    assert list(result.metrics) == ["validation"]
    said = lines(tmp_path / "run" / "predictions_test.jsonl")
    assert [line["example"]["label"] for line in said] == [None, None]
    labelled = finetune(settings(base, tmp_path / "other", validation_file=None, test_file="reviews/validation.tsv"))
    assert list(labelled.metrics) == ["test"]


def test_the_loss_chooses_the_best_checkpoint(base, tmp_path):
    chosen = {"metric_for_best_model": "loss", "learning_rate": 0.3, "save_total_limit": None}
    result = finetune(settings(base, tmp_path / "run", arguments=chosen))
    logged = [line["eval_loss"] for line in lines(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in line]
    state = json.loads((tmp_path / "run" / "checkpoint-10" / "trainer_state.json").read_text())
    assert len(set(logged)) == 2
    assert state["best_metric"] == min(logged)
    assert result.metrics["validation"]["loss"] == pytest.approx(min(logged), rel=1e-5)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "eval_loss" in page  # beside that of training
    files = {"train_file": "pairs/train.tsv", "validation_file": "pairs/validation.tsv"}
    with pytest.raises(
        ValueError, match=r"'loss', expected one of pearson, spearman; the loss of this task is that of a"
    ):
        finetune(settings(base, tmp_path / "pairs", "embeddings", {**chosen, "max_steps": 1}, **files))


QUESTIONS = {"max_seq_length": 128, "doc_stride": 40, "version_2_with_negative": True}


@pytest.mark.parametrize(
    ("task", "folder", "ending", "options"),
    [
        ("question_answering", "questions", "json", {"task_options": QUESTIONS}),
        ("question_answering", "questions", "json", {"task_options": QUESTIONS, "plain": True}),
        ("embeddings", "pairs", "tsv", {}),
        ("embeddings", "pairs", "tsv", {"plain": True}),
        ("multiple_choice", "endings", "csv", {"plain": True}),
        ("tokens", "entities", "txt", {"plain": True}),
        ("tokens", "entities", "txt", {"task_options": {"label_all_tokens": True}}),
        ("multiple_choice", "endings", "csv", {}),
        ("classification", "topics", "jsonl", {}),  # several labels
        ("classification", "similarity", "tsv", {}),  # pairs and numbers
        ("classification", "paraphrases", "jsonl", {"arguments": {"max_tokens_per_batch": 200}}),
    ],
)
def test_other_kinds_of_tasks(base, tmp_path, task, folder, ending, options):
    options = dict(options)
    files = {f"{split}_file": f"{folder}/{split}.{ending}" for split in ("train", "validation")}
    arguments = {"max_steps": 2, **options.pop("arguments", {})}
    result = finetune(settings(base, tmp_path, task, arguments, **files, **options))
    tuned = predict.load(tmp_path, device="cpu")
    part = predict.read_split(tuned, EXAMPLES / files["validation_file"], "validation", labelled=True)
    predictions, scores = predict.said_of(tuned, part, progress=False)
    expected = tuned.model(**tuned.task.collator(tuned.model.config)(part.features.inputs)).loss.item()
    assert ("loss" in scores) == ("loss" in result.metrics["validation"]) == (folder != "pairs")
    assert scores.get("loss", expected) == pytest.approx(expected, rel=1e-5)  # wherever batches are cut
    said = {line["id"]: line for line in predictions}
    written = lines(tmp_path / "predictions_validation.jsonl")
    assert len(written) == 16
    for line in written:
        del line["example"]
        assert json.loads(json.dumps(said[line["id"]])).keys() == line.keys()
    assert result.main_metric in result.metrics["validation"]


def test_a_checkpoint_with_another_classifier_starts_afresh_and_one_with_the_same_labels_goes_on(base, run, tmp_path):
    topics = settings(run.output_dir, tmp_path / "topics", train_file="topics/train.jsonl", validation_file=None)
    with pytest.warns(UserWarning, match="the checkpoint's classifier has 2 outputs, but 6 are wanted: it is left out"):
        finetune(topics)
    assert len(read_config(tmp_path / "topics").id2label) == len(load_task(tmp_path / "topics").labels) == 6
    # The same labels in another order keep the checkpoint's numbers.
    model = predict.load(run.output_dir, device="cpu").model
    model.config.id2label = {0: "positive", 1: "negative"}
    shutil.copytree(run.output_dir, tmp_path / "turned", ignore=shutil.ignore_patterns("checkpoint-*"))
    save_pretrained(model, tmp_path / "turned")
    finetune(settings(tmp_path / "turned", tmp_path / "again", arguments={"max_steps": 1}))
    assert load_task(tmp_path / "again").labels == ("positive", "negative")


def test_samples_are_drawn_by_the_seed(base, tmp_path):
    """The files of a data set may have one class after the other."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(settings(base, tmp_path / name, max_eval_samples=5, arguments={"max_steps": 1, "seed": seed}))
    ids = {n: [line["id"] for line in lines(tmp_path / n / "predictions_validation.jsonl")] for n in "abc"}
    assert ids["a"] == ids["b"] != ids["c"]
    assert all(len(of_run) == 5 for of_run in ids.values())


def test_what_is_refused(base, run, tmp_path):
    (tmp_path / "odd.tsv").write_text("sentence\tlabel\nGood.\tpositive\nHm.\tmixed\n")
    (tmp_path / "none.tsv").write_text("sentence\nGood.\nBad.\n")
    bad = [
        ({"task": "summaries"}, "the task is 'summaries', expected a data set"),
        ({"train_file": None}, "there are no training examples: give a train_file"),
        ({"train_file": str(tmp_path / "none.tsv")}, "no column 'label'"),
        ({"validation_file": str(tmp_path / "odd.tsv")}, "has the label 'mixed', which is none of those of training"),
        ({"task_options": {"doc_stride": 3}}, "doc_stride is no option of classification"),
        ({"task_options": {"max_seq_length": 129}}, "max_seq_length is 129, expected from 3 to 128"),
        ({"columns": {"text": "body"}}, "body"),
        ({"arguments": {"metric_for_best_model": "bleu"}}, "metric_for_best_model is 'bleu', expected one of accuracy"),
        ({"data_dir": str(tmp_path)}, "classification is no data set that has a folder"),
        ({"task": "mrpc", "data_dir": str(tmp_path)}, "is no folder with a file of mrpc"),
    ]
    for number, (options, message) in enumerate(bad):
        with pytest.raises(ValueError, match=message):
            finetune(settings(base, tmp_path / str(number), **options))
    with pytest.raises(ValueError, match="holds a model that was fine-tuned before: choose another output_dir"):
        finetune(settings(base, run.output_dir))


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    small = tiny_checkpoint.checkpoint(tmp_path / "small", vocab_size=1000)
    with pytest.raises(
        ValueError, match=r"does not fit its model: .* has the id 30521, but the table .* has 1000 rows"
    ):
        finetune(settings(small, tmp_path / "run"))


def test_a_table_that_is_too_wide_stands_upright():
    metrics = {
        "validation": {"accuracy": 0.5, **{f"f1_of_{label}": 0.25 for label in "abcdefg"}},
        "test": {"accuracy": 1.0},
    }
    lines = [line.split() for line in table(metrics).splitlines()]
    assert lines[:3] == [["validation", "test"], ["accuracy", "0.5000", "1.0000"], ["f1_of_a", "0.2500"]]
    assert max(map(len, table({"validation": metrics["test"]}).splitlines())) < 30
    assert table({"test": metrics["test"]}).split() == ["accuracy", "test", "1.0000"]
