"""ELECTRA from text to a served model: pre-trained, fine-tuned on each kind of task, scored, distilled, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert_fast import Embedder
from bert_fast.info import describe
from bert_fast.recipes import predict
from bert_fast.recipes.distill import DistillSettings, distill
from bert_fast.recipes.export import export
from bert_fast.recipes.finetune import FinetuneSettings, finetune
from bert_fast.recipes.pretrain import PretrainSettings, pretrain
from bert_fast.tasks.filling import MaskFiller
from bert_fast.verify import verify
from bert_fast.vocabulary.training import train

pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint has no weights for this head")

EXAMPLES = Path(__file__).parents[2] / "examples"
QUIET: dict[str, Any] = {"disable_tqdm": True, "plot_metrics": False, "use_cpu": True, "learning_rate": 3e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def electra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A discriminator that was pre-trained for two steps, with embeddings narrower than its layers."""
    place = tmp_path_factory.mktemp("electra")
    lines = [line for file in sorted((EXAMPLES / "text").glob("*.txt")) for line in file.read_text().splitlines()]
    train(lines, vocab_size=300, show_progress=False).save(place / "tokenizer")
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    (place / "shape.json").write_text(json.dumps({**shape, "embedding_size": 16, "max_position_embeddings": 128}))
    settings = PretrainSettings(
        str(place / "model"),
        train_file=str(EXAMPLES / "text"),
        objective="electra",
        config_name=str(place / "shape.json"),
        tokenizer_name=str(place / "tokenizer"),
        max_seq_length=32,
        validation_split_percentage=25,
        arguments={**QUIET, "max_steps": 2, "save_strategy": "no"},
    )
    pretrain(settings)
    return place / "model"


def settings(electra: Path, output_dir: Path, task: str, files: str, **arguments: Any) -> FinetuneSettings:
    folder, ending = files.split(".")
    sources = {f"{split}_file": str(EXAMPLES / folder / f"{split}.{ending}") for split in ("train", "validation")}
    options = (
        {"max_seq_length": 128, "doc_stride": 40, "version_2_with_negative": True}
        if task == "question_answering"
        else {"max_seq_length": 64}
    )
    return FinetuneSettings(
        str(electra),
        task,
        str(output_dir),
        task_options=options,
        arguments={**QUIET, "per_device_train_batch_size": 8, **arguments},
        max_train_samples=24,
        max_eval_samples=12,
        **sources,
    )


def test_a_classifier_from_text_to_transformers(electra: Path, tmp_path: Path) -> None:
    run = settings(electra, tmp_path / "run", "classification", "reviews.tsv", max_steps=3, layer_decay=0.8)
    result = finetune(run)
    tuned = predict.load(tmp_path / "run", device="cpu")
    assert type(tuned.model).__name__ == "ElectraForSequenceClassification"
    output = tmp_path / "said.jsonl"
    metrics, part = predict.evaluate(tuned, str(run.validation_file), output=output, progress=False)
    assert 0 <= metrics["accuracy"] <= 1
    assert result.metrics["validation"].keys() == metrics.keys()

    export(tmp_path / "run", tmp_path / "exported")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    assert type(theirs) is transformers.ElectraForSequenceClassification
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    said = [json.loads(line) for line in output.read_text().splitlines()]
    texts = [example.text for example in part.examples]
    with torch.inference_mode():
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
        probabilities = theirs(**inputs).logits.softmax(1)
    ours = torch.tensor([list(line["probabilities"].values()) for line in said])
    torch.testing.assert_close(ours, probabilities, rtol=1e-5, atol=1e-5)
    assert "An ELECTRA for classifying texts" in (tmp_path / "exported" / "README.md").read_text()
    assert "hidden_size 32 (embeddings 16)" in describe(tmp_path / "exported")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "files", "auto", "plain"),
    [
        ("tokens", "entities.txt", "AutoModelForTokenClassification", False),
        ("question_answering", "questions.json", "AutoModelForQuestionAnswering", False),
        ("multiple_choice", "endings.csv", "AutoModelForMultipleChoice", False),
        ("embeddings", "pairs.tsv", "AutoModel", False),
        ("classification", "topics.jsonl", "AutoModelForSequenceClassification", True),
    ],
)
def test_every_kind_of_task(electra: Path, tmp_path: Path, task: str, files: str, auto: str, plain: bool) -> None:
    run = settings(electra, tmp_path, task, files, max_steps=1)
    run.plain = plain
    result = finetune(run)
    assert result.main_metric in result.metrics["validation"]
    model, info = getattr(transformers, auto).from_pretrained(tmp_path, output_loading_info=True)
    assert type(model).__module__ == "transformers.models.electra.modeling_electra"
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    predict.load(tmp_path, device="cpu", precision="int8")


@pytest.mark.slow
def test_a_student_learns_from_it(electra: Path, tmp_path: Path) -> None:
    run = settings(electra, tmp_path / "teacher", "classification", "reviews.tsv", max_steps=1)
    finetune(run)
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    narrower = {**config, "num_hidden_layers": 1, "hidden_size": 16, "embedding_size": 8}
    (tmp_path / "narrower.json").write_text(json.dumps(narrower))
    options: dict[str, Any] = {
        "teacher": str(tmp_path / "teacher"),
        "output_dir": str(tmp_path / "student"),
        "train_file": run.train_file,
        "validation_file": run.validation_file,
        "student_config": str(tmp_path / "narrower.json"),
        "arguments": {**QUIET, "max_steps": 1},
        "max_train_samples": 12,
        "max_eval_samples": 6,
    }
    distill(DistillSettings(**options))
    student = predict.load(tmp_path / "student", device="cpu").model
    assert (student.config.model_type, student.config.hidden_size) == ("electra", 16)
    (tmp_path / "narrower.json").write_text(json.dumps({**narrower, "model_type": "bert"}))
    with pytest.raises(ValueError, match="the student's model_type is 'bert', the teacher's 'electra'"):
        distill(DistillSettings(**{**options, "output_dir": str(tmp_path / "other")}))


def test_the_generator_fills_masks_and_the_discriminator_says_that_it_cannot(electra: Path, tmp_path: Path) -> None:
    text = "The [MASK] is warm."
    found = MaskFiller(electra / "generator", device="cpu").fill([text], top_k=3)[0].masks[0]
    pipeline = transformers.pipeline("fill-mask", model=str(electra / "generator"), device="cpu", top_k=3)
    for ours, theirs in zip(found, pipeline(text), strict=True):
        assert ours.tokens[0] == theirs["token_str"].replace(" ", "")
        assert ours.score == pytest.approx(theirs["score"], rel=1e-4)
    with pytest.raises(ValueError, match="and of an ELECTRA the generator"):
        MaskFiller(electra, device="cpu")
    export(electra, tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "An ELECTRA for finding replaced words" in card
    assert "bert-fast finetune --model_name_or_path exported" in card
    assert type(transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "exported")).__name__ == (
        "ElectraForPreTraining"
    )


def test_vectors_are_the_plain_definitions(electra: Path) -> None:
    assert Embedder(electra, device="cpu").encode(["Bread.", "A boat."]).shape == (2, 32)
    report = verify(electra, ["The bees fly.", "She bakes bread every day."], device="cpu")
    assert report.passed, str(report)


def test_pretraining_names_the_wrong_family(electra: Path, tmp_path: Path) -> None:
    settings = PretrainSettings(str(tmp_path), train_file=str(EXAMPLES / "text"), model_name_or_path=str(electra))
    with pytest.raises(ValueError, match="is 'electra', but objective 'mlm' is for 'bert'"):
        pretrain(settings)
