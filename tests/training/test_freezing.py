"""Frozen tensors stay bit-identical, get no gradient and no state of the optimiser."""

import pytest
import torch
from torch import nn

from bert_fast import BertConfig, accelerate, modules
from bert_fast.training.freezing import GradualUnfreezing, freeze, train_head, train_last_layers
from bert_fast.training.optimizers import OPTIMIZERS, make_optimizer, parameter_groups
from bert_fast.training.parts import part_of, parts

LAYERS = 3


def config():
    return BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
    )


def ours():
    return modules.BertForSequenceClassification(config())


def theirs():
    transformers = pytest.importorskip("transformers")
    return transformers.BertForSequenceClassification(transformers.BertConfig(**vars(config())))


def accelerated():
    return accelerate(theirs())


MODELS = pytest.mark.parametrize("build", [ours, theirs, accelerated])


def trained_parts(model):
    """The names of the parts that are trained, none of them by half."""
    states = {name: {parameter.requires_grad for parameter in part} for name, part in parts(model).items()}
    assert all(len(state) == 1 for state in states.values())
    return [name for name, state in states.items() if state == {True}]


def is_free(name):
    """Whether a trained parameter may stay: one vector added to all keys changes no softmax, so it has no gradient."""
    return name.endswith("key.bias")


def step(model, optimizer):
    optimizer.zero_grad()
    ids = torch.tensor([[2, 5, 3], [2, 7, 3]])
    model(ids, token_type_ids=torch.zeros_like(ids), labels=torch.tensor([1, 0])).loss.backward()
    optimizer.step()


@MODELS
def test_parts(build):
    model = build()
    found = parts(model)
    assert list(found) == ["embeddings", *(f"encoder.layer.{i}" for i in range(LAYERS)), "pooler", "head"]
    assert sum(map(len, found.values())) == len(list(model.parameters()))


@MODELS
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_tensors_stay_as_they_are(build, name):
    model = build()
    optimizer = make_optimizer(name, parameter_groups(model, 0.1), lr=0.1)  # knows all, also those frozen below
    step(model, make_optimizer(name, parameter_groups(model, 0.1), lr=0.1))  # so that there are gradients to take away
    train_last_layers(model, 1)
    assert all((parameter.grad is None) == (not parameter.requires_grad) for parameter in model.parameters())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):
        step(model, optimizer)
    for name_, parameter in model.named_parameters():
        trained = name_.startswith(("bert.encoder.layer.2.", "bert.pooler.", "classifier."))
        assert torch.equal(parameter, before[name_]) != trained or is_free(name_), name_
        assert (parameter.grad is not None) == trained, name_
        assert (parameter in optimizer.state) == trained, name_


@MODELS
def test_which_parts_are_trained(build):
    model = build()
    everything = trained_parts(model)
    freeze(model, "embeddings")
    assert trained_parts(model) == everything[1:]
    freeze(model, "encoder.layer.1", "pooler")
    assert trained_parts(model) == ["encoder.layer.0", "encoder.layer.2", "head"]
    model = build()
    train_last_layers(model, 2)
    assert trained_parts(model) == everything[2:]
    train_head(model)
    assert trained_parts(model) == ["pooler", "head"]


@MODELS
def test_gradual_unfreezing(build):
    model = build()
    everything = trained_parts(model)
    optimizer = make_optimizer("adamw", parameter_groups(model, 0.1), lr=0.1)
    unfreezing = GradualUnfreezing(model)
    assert unfreezing.last_epoch == LAYERS + 1
    for epoch in range(LAYERS + 3):
        unfreezing.set_epoch(epoch)
        expected = everything[max(0, LAYERS + 1 - epoch) :]
        assert trained_parts(model) == expected
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        step(model, optimizer)
        for name, parameter in model.named_parameters():
            trained = part_of(name) in expected
            assert torch.equal(parameter, before[name]) != trained or is_free(name), name
            assert (parameter in optimizer.state) == trained, name
    unfreezing.set_epoch(1)  # as a run does that starts again
    assert trained_parts(model) == everything[LAYERS:]


def test_what_was_frozen_before_stays_so():
    model = ours()
    freeze(model, "embeddings", "encoder.layer.1")
    unfreezing = GradualUnfreezing(model)
    unfreezing.set_epoch(unfreezing.last_epoch)
    assert trained_parts(model) == ["encoder.layer.0", "encoder.layer.2", "pooler", "head"]


def test_a_tied_decoder_is_part_of_the_embeddings():
    model = modules.BertForMaskedLM(config())
    train_head(model)
    assert not model.cls.predictions.decoder.weight.requires_grad
    assert model.cls.predictions.transform.dense.weight.requires_grad
    ids = torch.tensor([[2, 5, 3]])
    model(ids, labels=ids).loss.backward()
    assert model.bert.embeddings.word_embeddings.weight.grad is None
    assert model.cls.predictions.bias.grad is not None


def test_more_than_ten_layers_are_counted_by_number():
    big = modules.BertModel(BertConfig(**(vars(config()) | {"num_hidden_layers": 11})))
    train_last_layers(big, 2)
    assert trained_parts(big) == ["encoder.layer.9", "encoder.layer.10", "pooler"]


def test_what_is_refused():
    model = ours()
    with pytest.raises(
        ValueError, match=r"no part 'layer.9', 'x'; it has embeddings, encoder.layer.0, .*, pooler, head"
    ):
        freeze(model, "embeddings", "layer.9", "x")
    assert "embeddings" in trained_parts(model), "nothing is frozen where a name is wrong"
    with pytest.raises(ValueError, match="num_layers is 4, expected 0 to 3"):
        train_last_layers(model, 4)
    with pytest.raises(ValueError, match="a BertModel has no head to train, only embeddings"):
        train_head(modules.BertModel(config(), add_pooling_layer=False))
    with pytest.raises(ValueError, match="a Linear has no parameters under embeddings"):
        freeze(nn.Linear(2, 2), "head")
