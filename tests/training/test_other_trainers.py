"""transformers' own trainer and that of sentence-transformers train a model that `accelerate` was given."""

import copy

import pytest
import tiny
import torch
import transformers
import word_checkpoints
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses

import bert_fast

pytestmark = pytest.mark.filterwarnings("ignore::bert_fast.ops.FallbackWarning")

#: How far the losses of a few steps may lie apart: rounding, which later steps multiply.
CLOSE = {"float32": {"rel": 2e-4}, "bfloat16": {"rel": 3e-2, "abs": 3e-3}}


def options(output_dir, dtype):
    """Few steps on the CPU, each one logged; bfloat16 is autocast, as the trainers have it."""
    return {
        "output_dir": str(output_dir), "max_steps": 5, "per_device_train_batch_size": 4, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "bf16": dtype == "bfloat16", "seed": 3,
    }  # fmt: skip


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForMaskedLM"])
def test_transformers_trainer(head, dtype, tmp_path):
    torch.manual_seed(1)
    config = transformers.BertConfig(**tiny.config(0.0).to_dict())
    plain = getattr(transformers, f"Bert{head}")(config)
    fast = bert_fast.accelerate(copy.deepcopy(plain))
    data = tiny.padded()
    if head == "ForMaskedLM":
        data = [{**row, "labels": [word if word > 3 else -100 for word in row["input_ids"]]} for row in data]
    arguments = transformers.TrainingArguments(**options(tmp_path, dtype))
    expected, got = (
        losses_of(transformers.Trainer(model=model, args=arguments, train_dataset=data)) for model in (plain, fast)
    )
    assert got == pytest.approx(expected, **CLOSE[dtype])
    assert len(got) == 5
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)  # it did train
    if dtype == "float32":
        for (name, mine), theirs in zip(fast.named_parameters(), plain.parameters(), strict=True):
            # Adam's first steps are of the size of the learning rate even where a gradient is next to nothing
            assert (mine - theirs).abs().mean() < 1e-4, name


def sentence_transformer(folder, normalize=True):
    """A tiny one without dropout."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    word_checkpoints.save(folder, "sentence_embedding", **no_dropout)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("dtype", CLOSE)
def test_the_trainer_of_sentence_transformers(dtype, tmp_path):
    datasets = pytest.importorskip("datasets", reason="the trainer of sentence-transformers reads its data sets")
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments

    pairs = [pair.split("|") for pair in word_checkpoints.PAIRS]
    data = datasets.Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    logged = []
    for make in (lambda model: model, bert_fast.accelerate):
        model = make(sentence_transformer(tmp_path / "model"))
        arguments = SentenceTransformerTrainingArguments(**options(tmp_path, dtype))
        loss = losses.MultipleNegativesRankingLoss(model)
        logged.append(losses_of(SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss)))
    assert logged[1] == pytest.approx(logged[0], **CLOSE[dtype])
    assert len(logged[1]) == 5
    assert logged[0][-1] < logged[0][0]


@pytest.mark.parametrize("dtype", CLOSE)
def test_a_loss_of_sentence_transformers_in_a_loop_of_ones_own(dtype, tmp_path):
    anchors, positives = zip(*(pair.split("|") for pair in word_checkpoints.PAIRS), strict=True)
    logged = []
    for make in (lambda model: model, bert_fast.accelerate):
        model = make(sentence_transformer(tmp_path / "model")).train()
        loss_of = losses.MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        logged.append([])
        for step in range(5):
            columns = [model.preprocess(list(texts[step : step + 6])) for texts in (anchors, positives)]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = loss_of(columns, torch.zeros(6))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            logged[-1].append(loss.item())
    assert logged[1] == pytest.approx(logged[0], **CLOSE[dtype])
