"""A teacher's folder in, a student's folder out: what it holds, what it says, and what is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import small
import torch
from tiny_checkpoint import checkpoint

from bert_fast.folders import read_json
from bert_fast.recipes import predict
from bert_fast.recipes.distill import DistillSettings, distill
from bert_fast.recipes.finetune import FinetuneSettings, finetune


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A checkpoint, a teacher made of it that knows its texts, and the texts."""
    folder = tmp_path_factory.mktemp("models")
    model = checkpoint(folder / "model", max_position_embeddings=128, num_hidden_layers=3)
    finetune(small.settings(model, folder / "teacher", num_train_epochs=10))
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(places, folder, **options):
    texts = str(places / "texts.tsv")
    values = {"student_layers": 2, "train_file": texts, "validation_file": texts}
    values |= {"arguments": {**small.SHORT, "num_train_epochs": 10}}
    return DistillSettings(str(places / "teacher"), str(folder), **{**values, **options})


def test_the_student_is_a_fine_tuned_model_and_the_table_says_what_it_cost(places, tmp_path):
    result = distill(settings(places, tmp_path / "student", hidden_weight=1.0, attention_weight=1.0))
    assert result.teacher.metrics["validation"]["accuracy"] == 1.0
    assert (result.teacher.layers, result.student.layers) == (3, 2)
    tuned = predict.load(tmp_path / "student", device="cpu")
    metrics, _ = predict.evaluate(tuned, places / "texts.tsv")
    assert metrics == result.student.metrics["validation"]
    assert metrics["accuracy"] == 1.0
    assert result.student.parameters == sum(parameter.numel() for parameter in tuned.model.parameters())
    assert min(result.teacher.texts_per_second, result.student.texts_per_second) > 0
    told = read_json(tmp_path / "student" / "results.json")
    assert told["distillation"]["student"] == dataclasses.asdict(result.student)
    assert told["settings"]["hidden_weight"] == 1.0
    lines = str(result).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "model", "layers", "hidden", "parameters", "validation accuracy", "texts/s", "speed",
    ]  # fmt: skip
    assert lines[2].split("|")[-2].strip() == "1.00x"
    logged = [json.loads(line) for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_logits", "loss_labels", "loss_hidden", "loss_attention"} <= logged[0].keys()


def test_a_student_learns_from_texts_without_labels(places, tmp_path):
    texts = small.file(tmp_path / "unlabelled.tsv", labelled=False)
    wanted = settings(places, tmp_path / "student", train_file=texts, unlabelled=True)
    assert distill(wanted).student.metrics["validation"]["accuracy"] == 1.0
    with pytest.raises(ValueError, match=r"unlabelled.tsv.*label"):
        distill(dataclasses.replace(wanted, output_dir=str(tmp_path / "b"), unlabelled=False))


@pytest.mark.slow
def test_a_narrower_student_and_one_that_was_trained_before(places, tmp_path):
    shape = json.loads((places / "teacher" / "config.json").read_text())
    shape |= {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "id2label": {"0": "x", "1": "y"}}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    short = {"arguments": {**small.SHORT, "max_steps": 2}, "student_layers": None}
    narrow = distill(
        settings(places, tmp_path / "a", student_config=str(tmp_path / "config.json"), hidden_weight=1.0, **short)
    )
    assert (narrow.student.hidden_size, narrow.student.layers) == (16, 1)
    assert read_json(tmp_path / "a" / "config.json")["id2label"] == {"0": "no", "1": "yes"}
    other = checkpoint(tmp_path / "other", hidden_size=48, num_hidden_layers=4, max_position_embeddings=128)
    wide = distill(settings(places, tmp_path / "b", student=str(other), attention_weight=1.0, **short))
    assert (wide.student.hidden_size, wide.student.layers) == (48, 4)


def test_what_cannot_be_distilled_says_so(places, tmp_path):
    def refused(message, **options):
        with pytest.raises(ValueError, match=message):
            distill(dataclasses.replace(settings(places, tmp_path / "out"), **options))

    refused(r"model has no task.json, which says what its outputs mean: a teacher is", teacher=str(places / "model"))
    refused(r"student_layers is 4, expected from 1 to the teacher's 3", student_layers=4)
    refused(r"none given, expected exactly one of student_layers, student_config, student", student_layers=None)
    refused(r"student_layers and student given, expected exactly one", student="demo")
    refused(r"there are no training examples", train_file=None)
    refused(r"weights of logits, labels, hidden, attention are all 0", logits_weight=0.0, labels_weight=0.0)
    shape = json.loads((places / "teacher" / "config.json").read_text()) | {"hidden_size": 64}
    (tmp_path / "wide.json").write_text(json.dumps(shape))
    refused(
        r"hidden_size is 64, more than the teacher's 32, whose weights it is to start from; --student takes",
        student_layers=None,
        student_config=str(tmp_path / "wide.json"),
    )
    other = checkpoint(tmp_path / "other", max_position_embeddings=128)
    for name in ("tokenizer.json", "vocab.txt"):
        file = other / name
        file.write_text(file.read_text(encoding="utf-8").replace("##ing", "##gni"), encoding="utf-8")
    refused(
        r"the student .*other has another vocabulary than the teacher: '##", student_layers=None, student=str(other)
    )
    refused(r"teacher holds a model that was fine-tuned before", output_dir=str(places / "teacher"))


@pytest.mark.slow
def test_half_of_the_demos_layers_keep_most_of_its_score(tmp_path, capsys):
    """On reviews: the teacher, MiniLM fine-tuned on 120 of them, has at least 0.9 of 40 others, the student 0.85."""
    torch.set_num_threads(2)
    reviews = Path(__file__).parent.parent.parent / "examples" / "reviews"
    train, validation = str(reviews / "train.tsv"), str(reviews / "validation.tsv")
    arguments = {**small.SHORT, "per_device_train_batch_size": 32, "learning_rate": 2e-4, "save_only_model": True}
    teacher = FinetuneSettings("demo", "classification", str(tmp_path / "teacher"), train, validation)
    finetune(dataclasses.replace(teacher, arguments={**arguments, "num_train_epochs": 3}))
    result = distill(
        DistillSettings(
            teacher.output_dir, str(tmp_path / "student"), student_layers=3, train_file=train,
            validation_file=validation, arguments={**arguments, "num_train_epochs": 4},
        )
    )  # fmt: skip
    with capsys.disabled():
        print(f"\n{result}")
    scores = [model.metrics["validation"]["accuracy"] for model in (result.teacher, result.student)]
    assert scores[0] >= 0.9
    assert scores[1] >= 0.85
    assert result.student.texts_per_second > result.teacher.texts_per_second
