"""Folders to publish: cards that the Hub's own reader takes, and checkpoints that transformers loads as its own."""

import json
import re

import pytest
import torch
import transformers
import word_checkpoints as checkpoints
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from bert_fast.cli import app
from bert_fast.embedder import Embedder
from bert_fast.loading import from_pretrained
from bert_fast.modules import HEADS
from bert_fast.recipes.card import KINDS, write_card
from bert_fast.recipes.export import export

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

AUTO = {
    None: "AutoModel",
    "masked_lm": "AutoModelForMaskedLM",
    "next_sentence": "AutoModelForNextSentencePrediction",
    "pre_training": "AutoModelForPreTraining",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "question_answering": "AutoModelForQuestionAnswering",
    "multiple_choice": "AutoModelForMultipleChoice",
    "sentence_embedding": "AutoModel",
}


def results(kind="classification", **others):
    """What `finetune` leaves, of a run that never was."""
    return {
        "task": kind,
        "kind": kind,
        "model": "demo",
        "settings": {
            "model_name_or_path": "demo",
            "task": kind,
            "output_dir": "/somewhere/secret/out",
            "train_file": "/home/somebody/train.tsv",
            "validation_file": "/home/somebody/dev.tsv",
            "arguments": {"learning_rate": 3e-5, "seed": 1, "disable_tqdm": True, "deepspeed": "/etc/a|b.json"},
            "task_options": {},
        },
        "labels": ["no", "yes"],
        "main_metric": "accuracy",
        "metrics": {"validation": {"accuracy": 0.75, "macro_f1": 0.5, "loss": 0.25}},
        "train": {
            "seconds": 2.0, "steps": 9, "examples": 70, "tokens_per_second": 800.0, "skipped": {"no text": 2},
            "num_truncated": 3,
        },
        "versions": {"bert_fast": "0.1.0"},
        **others,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """What a run leaves: the model, its tokenizer, results, and a checkpoint on the way without a tokenizer."""
    run = tmp_path / "run"
    labels = {"id2label": {0: "no", 1: "yes"}}
    checkpoints.save(run, "sequence_classification", **labels)
    (run / "results.json").write_text(json.dumps(results()))
    (run / "task.json").write_text(json.dumps({"kind": "classification", "options": {"labels": ["no", "yes"]}}))
    checkpoint = run / "checkpoint-6"
    checkpoints.model("sequence_classification", **labels).double().save_pretrained(checkpoint)
    history = [{"step": 3, "eval_accuracy": 0.1}, {"step": 6, "loss": 1.0}, {"step": 6, "eval_accuracy": 0.625}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 6, "log_history": history}))
    (checkpoint / "optimizer.pt").write_bytes(b"large")
    return run


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("pretraining", "discriminator")])
def test_a_card_of_each_kind_is_what_the_hub_reads(kind, folder):
    (folder / "results.json").write_text(json.dumps(results(kind)))
    card = ModelCard.load(write_card(folder))
    assert card.data.pipeline_tag == KINDS[kind].pipeline_tag
    assert card.data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert card.data.library_name == ("sentence-transformers" if kind == "embeddings" else "transformers")
    assert card.data.metrics == ["accuracy", "macro_f1"]
    # the Hub's names of tasks and libraries are checked by it alone; the structure is checked here
    name, evaluations = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "run"
    assert {(e.metric_type, e.metric_value, e.dataset_split) for e in evaluations} == {
        ("accuracy", 0.75, "validation"),
        ("macro_f1", 0.5, "validation"),
    }


def test_a_card_names_the_metric_that_chose_the_checkpoint(folder):
    told = results()
    told["settings"] = {**told["settings"], "arguments": {"metric_for_best_model": "eval_loss"}}
    (folder / "results.json").write_text(json.dumps(told))
    assert "The checkpoint was chosen by loss, on" in write_card(folder).read_text()


def test_a_card_says_data_recipe_and_scores_and_no_paths(folder):
    text = write_card(folder).read_text()
    for wanted in (
        "| validation | 0.7500 | 0.5000 | 0.2500 |", "chosen by accuracy", "`train.tsv`", "examples in training: 70",
        "cut at the longest length: 3", "left out, no text: 2", "labels: no, yes", "| `learning_rate` | `3e-05` |",
        "9 steps in 2.0 s, 800 tokens per second", "2 layers of width 32", "| `deepspeed` | `\"a\\|b.json\"` |",
        'AutoModelForSequenceClassification.from_pretrained("run")', "bert-fast predict run FILE",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "somebody" not in text
    assert "secret" not in text
    assert "disable_tqdm" not in text


def test_a_data_set_of_the_catalogue_goes_by_its_name_on_the_hub(folder):
    for task, hub_id, configuration in (("mrpc", "nyu-mll/glue", "mrpc"), ("imdb", "stanfordnlp/imdb", None)):
        (folder / "results.json").write_text(json.dumps(results(task=task)))
        data = ModelCard.load(write_card(folder)).data
        assert data.datasets == [hub_id]
        assert {e.dataset_config for e in data.eval_results} == {configuration}


def test_a_base_that_is_a_folder_is_no_id_of_the_hub(folder):
    given = results()
    given["settings"]["model_name_or_path"] = str(folder)
    (folder / "results.json").write_text(json.dumps(given))
    card = ModelCard.load(write_card(folder))
    assert card.data.base_model is None
    assert "from `run`" in card.text


def test_a_card_of_pretraining(folder):
    told = {
        "objective": "mlm_nsp",
        "settings": {"model_name_or_path": None, "train_file": None, "arguments": {"max_steps": 5}},
        "held_out": {"before": {"perplexity": 90.0}, "after": {"perplexity": 12.5}},
        "train": {"seconds": 3.0, "steps": 5, "tokens": 100, "tokens_per_second": 33.0},
    }
    (folder / "results.json").write_text(json.dumps(told))
    card = ModelCard.load(write_card(folder))
    assert card.data.pipeline_tag == "fill-mask"
    assert "from fresh weights" in card.text
    assert "| held out, after | 12.5000 |" in card.text
    assert "bert-fast fill run" in card.text


@pytest.mark.parametrize("content", [None, "{", "[]", '{"kind": "poetry", "settings": {}}', '{"kind": "tokens"}'])
def test_a_folder_without_results_gets_no_card(folder, content):
    if content is None:
        (folder / "results.json").unlink()
    else:
        (folder / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json"):
        write_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
def test_transformers_gives_the_logits_of_every_head(head, dtype, tmp_path):
    ours = checkpoints.save(tmp_path / "run", head)
    export(tmp_path / "run", tmp_path / "out", dtype=dtype)
    wanted = torch.float32 if dtype is None else torch.bfloat16
    theirs = getattr(transformers, AUTO[head]).from_pretrained(tmp_path / "out", dtype=wanted).eval()
    assert {p.dtype for p in theirs.parameters()} == {wanted}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(checkpoints.SENTENCES[:4], padding=True, return_tensors="pt")
    if head == "multiple_choice":
        inputs = {name: value.view(2, 2, -1) for name, value in inputs.items()}
    ours, theirs = ours.to(wanted).float(), theirs.float()
    with torch.no_grad():
        got, expected = ours(**inputs), theirs(**inputs)
    if head == "sentence_embedding":
        mask = inputs["attention_mask"][..., None]
        mean = (expected.last_hidden_state * mask).sum(1) / mask.sum(1)
        pairs = [(got.sentence_embedding, torch.nn.functional.normalize(mean, dim=1))]
    else:
        pairs = [(got[name], value) for name, value in expected.items()]
    for mine, value in pairs:
        keep = inputs["attention_mask"].bool() if mine.shape[:2] == inputs["input_ids"].shape else ...
        torch.testing.assert_close(mine[keep], value[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_vectors_of_an_export_are_those_of_sentence_transformers(dtype, tmp_path):
    settings = {"sentence_embedding": {"pooling_mode": "max", "max_seq_length": 6}}
    checkpoints.save(tmp_path / "run", "sentence_embedding", **settings)
    out = export(tmp_path / "run", tmp_path / "out", dtype=dtype)
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= files(out)
    texts = [text for text in checkpoints.SENTENCES if len(text.split()) <= 4]
    expected = SentenceTransformer(str(out), device="cpu", model_kwargs={"dtype": "float32"}).encode(texts)
    torch.testing.assert_close(Embedder(out, dtype="float32").encode(texts), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_on_the_way_has_the_scores_of_its_step_and_nothing_of_training(folder, tmp_path):
    out = export(folder / "checkpoint-6", tmp_path / "out", dtype="float32")
    assert files(out) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "task.json",
        "results.json", "README.md",
    }  # fmt: skip
    text = (out / "README.md").read_text()
    assert "| validation | 0.6250 |" in text
    assert "0.75" not in text
    assert "chosen by" not in text
    assert "6 steps\n" in text
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    model = from_pretrained(out, "sequence_classification")
    assert model.config.id2label == {0: "no", 1: "yes"}
    before = from_pretrained(folder / "checkpoint-6", "sequence_classification").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].float()), name


def test_weights_in_several_files(folder, tmp_path):
    out = export(folder, tmp_path / "out", max_shard_size="20KB")
    shards = [name for name in files(out) if name.endswith(".safetensors")]
    assert len(shards) > 1
    assert "model.safetensors.index.json" in files(out)
    ours = from_pretrained(out, "sequence_classification").state_dict()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(out).state_dict()
    for name, value in from_pretrained(folder, "sequence_classification").state_dict().items():
        assert torch.equal(ours[name], value)
        assert torch.equal(theirs[name], value)


def test_what_cannot_be_exported(folder, tmp_path):
    for arguments, message in (
        ((folder, folder), "is there already, expected the name of a new folder"),
        ((tmp_path / "none", tmp_path / "out"), "there is no folder"),
        ((folder, tmp_path / "out", "int8"), "dtype is 'int8', expected one of float32"),
        ((folder, tmp_path / "out", None, "5 bits"), "max_shard_size is '5 bits'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            export(*arguments[:2], **dict(zip(("dtype", "max_shard_size"), arguments[2:], strict=False)))
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer, nor has the folder it is in"):
        export(folder / "checkpoint-6", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_an_export_that_fails_leaves_nothing(folder, tmp_path):
    (folder / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="is not what finetune or pretrain leaves"):
        export(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_command(folder, tmp_path):
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    assert re.search(r"^ +[\d,]+  model\.safetensors$", done.stdout, re.M)
    done = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "is there already" in done.stderr
