"""Accelerated transformers models with a head: what tells them apart, threads, and losses alone."""

from __future__ import annotations

import copy
import pickle
from threading import Thread
from typing import Any

import pytest
import torch
import transformers

import bert_fast

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
