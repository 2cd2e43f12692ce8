"""Accelerated transformers models with a head: what tells them apart, threads, and losses alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

import bert_fast
from bert_fast.drop_in import is_accelerated
from bert_fast.ops import FallbackWarning

CONFIG = transformers.BertConfig(
    vocab_size=100,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def make(kind: type[Any]) -> Any:
    torch.manual_seed(0)
    return kind(CONFIG)


def ids() -> torch.Tensor:
    return torch.randint(1, 100, (4, 8), generator=torch.Generator().manual_seed(1))


class BertForSequenceClassification(transformers.BertForSequenceClassification):
    """Somebody's own, by transformers' name."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs).logits + 1


def test_a_subclass_stays_what_it_is_by_whatever_name() -> None:
    plain = make(BertForSequenceClassification)
    model = bert_fast.accelerate(copy.deepcopy(plain))
    for same in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), bert_fast.restore(model)):
        assert type(same) is BertForSequenceClassification
        torch.testing.assert_close(same(ids()), plain(ids()))


def test_while_a_head_computes_another_thread_gets_every_row() -> None:
    """The head reads the pooler's output alone; somebody who calls its `BertModel` does not."""
    model = bert_fast.accelerate(make(transformers.BertForSequenceClassification)).train()
    shapes: list[torch.Size] = []

    def call() -> None:
        shapes.append(model.bert(ids()).last_hidden_state.shape)

    thread = Thread(target=call)

    def meanwhile(module: Any, inputs: Any) -> None:
        if thread.ident is None:
            thread.start()
            thread.join(60)

    model.bert.pooler.dense.register_forward_pre_hook(meanwhile)
    model(ids())
    assert shapes == [(4, 8, 32)]


@pytest.mark.parametrize("kind", [transformers.BertForMaskedLM, transformers.BertForPreTraining])
@pytest.mark.parametrize("divisor", [None, 90])
def test_a_loss_alone_is_the_same_where_the_plain_path_has_to_run(kind: type[Any], divisor: int | None) -> None:
    """With labels where the mask hides the token, which count for nothing."""
    model = bert_fast.accelerate(make(kind))
    mask = torch.ones(4, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask, "labels": ids().masked_fill(ids() % 3 > 0, -100)}
    if kind is transformers.BertForPreTraining:
        inputs["next_sentence_label"] = torch.tensor([0, 1, 1, 0])
    expected = model(**inputs, loss_only=True, num_items_in_batch=divisor).loss
    model.cls.predictions.decoder.register_forward_hook(lambda *call: None)
    torch.testing.assert_close(model(**inputs, loss_only=True, num_items_in_batch=divisor).loss, expected)
    (alone,) = model(**inputs, loss_only=True, num_items_in_batch=divisor, return_dict=False)
    torch.testing.assert_close(alone, expected)


ELECTRA = transformers.ElectraConfig(**{**CONFIG.to_diff_dict(), "embedding_size": 20, "summary_last_dropout": 0.0})


def electra(kind: type[Any], **changes: Any) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(ELECTRA)
    config.update(changes)
    return kind(config)


@pytest.mark.parametrize("training", [True, False])
def test_electras_first_token_is_the_first_one_that_the_mask_keeps(training: bool) -> None:
    """The same with ops and with packed weights, padded on the left, and packed."""
    model = bert_fast.accelerate(electra(transformers.ElectraForSequenceClassification)).train(training)
    text, mask = ids()[:1, :5], torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), text], 1)
    with torch.set_grad_enabled(training):
        expected = model(text).logits
        left = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
        packed = model(torch.cat([text, text], 1), cu_seq_lens_q=cu_seqlens).logits
    torch.testing.assert_close(left, expected)
    torch.testing.assert_close(packed, expected.expand(2, -1))


def test_electras_summary_of_another_token() -> None:
    plain = electra(transformers.ElectraForMultipleChoice, summary_type="mean").eval()
    expected = plain(ids()[None]).logits
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(bert_fast.accelerate(plain)(ids()[None]).logits, expected)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_electra_without_its_originals(precision: str) -> None:
    plain = electra(transformers.ElectraForTokenClassification).eval()
    model = bert_fast.accelerate(copy.deepcopy(plain), precision=precision, free_originals=True)
    found, expected = model(ids()).logits, plain(ids()).logits
    assert (found - expected).norm() < (1e-5 if precision == "fp32" else 0.1) * expected.norm()
    assert model.electra.embeddings_project.weight.isnan().all()
    assert not model.classifier.weight.isnan().any()


def test_electra_pickled_and_saved(tmp_path: Path) -> None:
    model = bert_fast.accelerate(electra(transformers.ElectraForMultipleChoice).eval())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(ids()[None]).logits, model(ids()[None]).logits)
    assert is_accelerated(twin)
    model.save_pretrained(tmp_path)
    assert type(transformers.AutoModelForMultipleChoice.from_pretrained(tmp_path)) is type(bert_fast.restore(model))


def test_electra_trains_as_a_loss_alone() -> None:
    plain = electra(transformers.ElectraForPreTraining)
    model = bert_fast.accelerate(copy.deepcopy(plain))
    labels = ids() % 2
    expected, output = plain(ids(), labels=labels).loss, model(ids(), labels=labels, loss_only=True)
    assert list(output) == ["loss"]
    torch.testing.assert_close(output.loss, expected)
    model.electra.embeddings_project.register_forward_hook(lambda *_: None)
    with pytest.warns(FallbackWarning, match="a Linear in it has a hook"):
        torch.testing.assert_close(model(ids(), labels=labels).loss, expected)
