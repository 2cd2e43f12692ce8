"""Gradients of the whole batch, optimisers, schedules, evaluation and the best checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, TrainerCallback

import bert_fast
from bert_fast import heads, ops
from bert_fast.config import ElectraConfig
from bert_fast.electra import ElectraForMaskedLM, ElectraForPreTraining, ElectraPretraining
from bert_fast.modules import BertForMaskedLM, BertForPreTraining, BertForQuestionAnswering, BertForTokenClassification
from bert_fast.training.batches import TokenBudgetSampler
from bert_fast.training.progress import METRICS_FILE, PLOT_FILE, read
from bert_fast.training.trainer import Trainer


class Watch(TrainerCallback):
    """Keeps the gradients of the first step, and its loss."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            named = self.model.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}


def first_step(
    folder: Path, model: nn.Module, batch: list[dict[str, Any]], size: int, **options: Any
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one step over the whole batch, in micro-batches of this many examples."""
    arguments = tiny.arguments(
        folder,
        max_steps=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=len(batch) // size,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        **options,
    )
    watch = Watch(model)
    Trainer(model, arguments, train_dataset=batch, callbacks=[watch]).train()
    return read(folder / METRICS_FILE)[0]["loss"], watch.gradients


def examples(kind: str) -> list[dict[str, Any]]:
    """Eight examples with targets of this kind; very unevenly many labels, in one of them none at all."""
    rows = tiny.padded()[:8]
    for index, row in enumerate(rows):
        ids, row["labels"] = row["input_ids"], row.pop("labels")
        tokens = [-100] * len(ids)
        if index % 4:
            tokens[1 : 2 + index] = ids[1 : 2 + index]
        if kind == "tokens":
            row["labels"] = [-100 if label == -100 else label % 2 for label in tokens]
        elif kind in ("words", "pre-training"):
            row["labels"] = tokens
        elif kind == "spans":
            del row["labels"]
            row |= {
                "start_positions": 99 if index in (2, 3, 5) else index,
                "end_positions": 99 if index in (2, 3, 5) else 9,
            }
        elif kind == "numbers":
            row["labels"] = float(index)
        if kind == "pre-training":
            row["next_sentence_label"] = index % 2
    return rows


def make(kind: str) -> heads.Head:
    torch.manual_seed(7)
    if kind == "words":
        return tiny.masked_lm(dropout=0.0)
    if kind == "pre-training":
        return BertForPreTraining(tiny.config(0.0))
    if kind == "tokens":
        return BertForTokenClassification(tiny.config(0.0))
    if kind == "spans":
        return BertForQuestionAnswering(tiny.config(0.0))
    return tiny.classifier(0.0, id2label={0: "number"} if kind == "numbers" else {0: "short", 1: "long"})


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param("words", 2, id="masked words, some micro-batches with few"),
        pytest.param("words", 1, id="masked words, some micro-batches without any"),
        pytest.param("pre-training", 1, id="two terms, with counts of their own"),
        pytest.param("tokens", 2, id="labels of tokens"),
        pytest.param("spans", 2, id="spans, one micro-batch without an answer"),
        pytest.param("texts", 2, id="labels of texts"),
        pytest.param("numbers", 4, id="numbers"),
    ],
)
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path: Path, kind: str, size: int) -> None:
    expected, whole = first_step(tmp_path / "whole", make(kind), examples(kind), 8)
    loss, gradients = first_step(tmp_path / "parts", make(kind), examples(kind), size)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_packed_spans_weigh_by_those_that_lie_in_their_text(tmp_path: Path) -> None:
    """An answer past its own text is none, also where the packed batch goes on after it."""
    rows = examples("spans")
    expected, whole = first_step(tmp_path / "whole", make("spans"), rows, 8)
    for row in rows:
        row["input_ids"] = row["input_ids"][: sum(row.pop("attention_mask"))]
        if row["start_positions"] == 99:
            row["start_positions"] = row["end_positions"] = len(row["input_ids"])
    loss, gradients = first_step(tmp_path / "packed", make("spans"), rows, 1, max_tokens_per_batch=40)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_weighed_second_loss_accumulates(tmp_path: Path) -> None:
    models = [make("pre-training") for _ in range(2)]
    for model in models:
        model.next_sentence_weight = 0.3
    rows = examples("pre-training")
    expected, whole = first_step(tmp_path / "whole", models[0], rows, 8)
    loss, gradients = first_step(tmp_path / "parts", models[1], rows, 1)
    assert expected != pytest.approx(first_step(tmp_path / "one", make("pre-training"), rows, 8)[0], rel=1e-2)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_electra_accumulates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second loss is a mean over all tokens. No seeds of dropout are drawn, so that the samples are the same."""
    monkeypatch.setattr(ops, "draw_seeds", lambda count: torch.zeros(count, dtype=torch.int64))

    def model() -> ElectraPretraining:
        torch.manual_seed(7)
        shape = ElectraConfig.from_dict({**tiny.config(0.0).to_dict(), "model_type": "electra", "embedding_size": 16})
        return ElectraPretraining(ElectraForMaskedLM(shape.generator(0.5)), ElectraForPreTraining(shape))

    expected, whole = first_step(tmp_path / "whole", model(), examples("words"), 8)
    loss, gradients = first_step(tmp_path / "parts", model(), examples("words"), 1)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == whole.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_one_micro_batch_has_the_loss_of_the_model(tmp_path: Path) -> None:
    """For the head with two terms, which are weighed one by one."""
    model, rows = make("pre-training"), examples("pre-training")
    batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    expected = model(**batch).loss.item()
    assert first_step(tmp_path, model, rows, 8)[0] == pytest.approx(expected, rel=1e-6)


def test_a_transformers_model_trains_as_ours_does(tmp_path: Path) -> None:
    """The same weights, accelerated, in micro-batches: transformers' own `Trainer` would not divide this loss."""
    ours = make("words")
    ours.save_pretrained(tmp_path / "model")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    bert_fast.accelerate(theirs)
    expected, gradients = first_step(tmp_path / "ours", ours, examples("words"), 2)
    loss, others = first_step(tmp_path / "theirs", theirs, examples("words"), 2)
    assert loss == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_all_labels_ignored_is_a_loss_of_zero(tmp_path: Path) -> None:
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in examples("words")]
    model = make("words")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = Trainer(model, tiny.arguments(tmp_path, weight_decay=0.0), train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert [line["loss"] for line in read(tmp_path / METRICS_FILE) if "loss" in line] == [0.0] * 4
    assert trainer.skipped_steps == 0
    assert trainer.evaluate()["eval_loss"] == 0.0
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_it_learns_and_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    """Early stopping, evaluation by epochs, the best checkpoint loaded at the end, and a model that reads back."""
    arguments = tiny.arguments(
        tmp_path,
        max_steps=-1,
        num_train_epochs=20,
        max_tokens_per_batch=64,
        learning_rate=3e-3,
        schedule="constant",
        max_grad_norm=10.0,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        layer_decay=0.95,
    )
    rows = tiny.examples(labelled=True)
    stopping = EarlyStoppingCallback(early_stopping_patience=6)
    trainer = Trainer(
        tiny.classifier(0.0), arguments, train_dataset=rows[:14], eval_dataset=rows[14:], callbacks=[stopping]
    )
    trainer.train()
    lines = read(tmp_path / METRICS_FILE)
    losses = [line["loss"] for line in lines if "loss" in line]
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert losses[-1] < 0.5 * losses[0]
    best = min(evaluated, key=evaluated.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated[best], rel=1e-5)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 2
    read_back = bert_fast.from_pretrained(tmp_path / f"checkpoint-{best}", head="sequence_classification")
    for name, parameter in read_back.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name


@pytest.mark.parametrize(
    ("freeze", "trained"),
    [
        ("encoder", {"bert.pooler", "classifier"}),
        ("all_but_last_1", {"bert.encoder.layer.1", "bert.pooler", "classifier"}),
        ("embeddings,encoder.layer.0", {"bert.encoder.layer.1", "bert.pooler", "classifier"}),
        ("gradual", {"bert.encoder.layer.1", "bert.pooler", "classifier"}),
    ],
)
def test_what_is_frozen_stays(tmp_path: Path, freeze: str, trained: set[str]) -> None:
    """Two epochs; gradual unfreezing has trained one layer by then."""
    model = tiny.classifier()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    arguments = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=2, max_tokens_per_batch=100, freeze=freeze)
    Trainer(model, arguments, train_dataset=tiny.examples(labelled=True)).train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(any(name.startswith(part) for part in trained) for name in changed), changed
    assert all(any(name.startswith(part) for name in changed) for part in trained), changed


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "linear"), ("bert_adam", "google"), ("lamb", "constant"), ("adamw", "cosine")]
)
def test_rates_are_those_of_the_schedule(tmp_path: Path, optimizer: str, schedule: str) -> None:
    arguments = tiny.arguments(tmp_path, optimizer=optimizer, schedule=schedule, warmup_steps=2, max_steps=4)
    Trainer(tiny.classifier(), arguments, train_dataset=tiny.padded()).train()
    rates = [line["learning_rate"] for line in read(tmp_path / METRICS_FILE) if "loss" in line]
    after = {"linear": [1.0, 0.5], "google": [0.5, 0.25], "constant": [1.0, 1.0], "cosine": [1.0, 0.5]}[schedule]
    assert rates == pytest.approx([0.0, 5e-4, *(1e-3 * factor for factor in after)])


def test_every_epoch_has_all_examples_though_numbers_of_batches_differ(tmp_path: Path) -> None:
    rows, seed = tiny.examples(), 42
    lengths = [len(row["input_ids"]) for row in rows]
    for max_tokens in range(20, 80):
        sampler = TokenBudgetSampler(lengths, max_tokens, seed=seed)
        numbers = [sampler.num_batches(epoch) for epoch in range(6)]
        if len(set(numbers)) > 1:
            break
    assert len(set(numbers)) > 1, "no number of tokens makes epochs differ"
    options = {"max_tokens_per_batch": max_tokens, "seed": seed, "plot_metrics": True}
    arguments = tiny.arguments(tmp_path, max_steps=-1, num_train_epochs=6, **options)
    trainer = Trainer(tiny.masked_lm(), arguments, train_dataset=rows, data_collator=tiny.masking())
    trainer.train()
    assert trainer.state.global_step == sum(numbers)
    assert trainer.state.epoch == 6.0
    assert trainer.state.num_input_tokens_seen == 6 * sum(len(row["input_ids"]) for row in tiny.examples())
    assert (tmp_path / PLOT_FILE).read_text().startswith("<?xml")


def test_a_tokenizer_is_saved_with_the_model_and_pads_for_it(tmp_path: Path) -> None:
    vocab = dict.fromkeys(["[PAD]", "[CLS]", "[SEP]", "[MASK]", *tiny.WORDS])
    (tmp_path / "vocab.txt").write_text("\n".join(vocab))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"), unk_token="[MASK]")
    arguments = tiny.arguments(tmp_path / "run", max_steps=1, save_strategy="steps")
    model = tiny.classifier()
    Trainer(model, arguments, train_dataset=tiny.examples(labelled=True), processing_class=tokenizer).train()
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "checkpoint-1")
    ids = saved(tiny.TEXTS[0])["input_ids"]
    assert ids == tokenizer(tiny.TEXTS[0])["input_ids"]


def test_autocast_in_bfloat16(tmp_path: Path) -> None:
    """Losses near those in float32, parameters in float32."""
    losses = []
    for bf16 in (False, True):
        folder = tmp_path / str(bf16)
        arguments = tiny.arguments(folder, max_tokens_per_batch=64, bf16=bf16)
        model = tiny.masked_lm(0.0)
        Trainer(model, arguments, train_dataset=tiny.examples(), data_collator=tiny.masking()).train()
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        losses.append([line["loss"] for line in read(folder / METRICS_FILE) if "loss" in line])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


class LossAlone(BertForMaskedLM):
    """Has no logits to give."""

    def read(self, *args: Any, **options: Any) -> Any:
        raise AssertionError("the logits of all words at all tokens were made")


def test_where_nobody_reads_logits_none_are_made(tmp_path: Path) -> None:
    """In training, and in evaluation without metrics; whose masks are always the same."""
    arguments = tiny.arguments(tmp_path, max_tokens_per_batch=64)
    rows, model = tiny.examples(), LossAlone(tiny.config(0.0))
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=tiny.masking())
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"] > 0.0
