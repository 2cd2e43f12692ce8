"""ELECTRA: the two models against transformers', what a step of pre-training does, checkpoints both ways."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bert_fast
from bert_fast import BertConfig, electra, ops, reference
from bert_fast.config import ElectraConfig
from bert_fast.electra import ElectraForMaskedLM, ElectraForPreTraining, ElectraPretraining
from bert_fast.ragged import Ragged

SHAPE: dict[str, Any] = {
    "vocab_size": 60,
    "embedding_size": 12,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
PAIRS = {"generator": ElectraForMaskedLM, "discriminator": ElectraForPreTraining}
THEIRS = {"generator": "ElectraForMaskedLM", "discriminator": "ElectraForPreTraining"}
HEADS = {"generator": "masked_lm", "discriminator": "pre_training"}


def batch(name: str) -> dict[str, Tensor]:
    """Four padded texts; labels of words, few, or of tokens: was it replaced?"""
    torch.manual_seed(3)
    lengths = torch.tensor([13, 5, 9, 1])
    mask = (torch.arange(13) < lengths[:, None]).long()
    ids = torch.randint(5, 60, (4, 13)) * mask
    labels = torch.randint(2, (4, 13))
    if name != "discriminator":
        labels = ids.masked_fill((torch.rand(4, 13) > 0.3) | (mask == 0), -100)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(2, (4, 13)), "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The loss and what follows from it, by name."""
    model.zero_grad()
    loss = model.train()(**inputs, **options).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def pair(name: str, **others: Any) -> tuple[Any, Any]:
    """transformers' model and ours, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(transformers, THEIRS[name])(transformers.ElectraConfig(**{**SHAPE, **others})).train()
    ours = PAIRS[name](ElectraConfig(**{**SHAPE, **others})).train()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("width", [12, 32], ids=["projected", "as wide as the layers"])
@pytest.mark.parametrize("loss_only", [False, True])
@pytest.mark.parametrize("name", PAIRS)
def test_losses_and_gradients_are_those_of_transformers(name: str, loss_only: bool, width: int) -> None:
    (theirs, ours), inputs = pair(name, embedding_size=width), batch(name)
    truth = gradients(copy.deepcopy(theirs).double(), inputs)
    plain, fast = gradients(theirs, inputs), gradients(ours, inputs, loss_only=loss_only)
    assert fast.keys() == truth.keys()
    exact = gradients(copy.deepcopy(ours).double(), inputs, loss_only=loss_only)
    for key, expected in truth.items():
        torch.testing.assert_close(exact[key].double(), expected.double(), rtol=1e-6, atol=1e-7, msg=key)
        error, allowed = ((found[key].double() - expected.double()).norm() for found in (fast, plain))
        assert error <= 4 * allowed + 8 * torch.finfo(torch.float32).eps * expected.norm() + 1e-9, key


@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_transformers(name: str) -> None:
    (theirs, ours), inputs = pair(name), batch(name)
    kept = inputs["attention_mask"] == 1
    for model in (ours.eval(), getattr(reference, THEIRS[name])(ours.config).eval()):
        model.load_state_dict(ours.state_dict())
        with torch.no_grad():
            found, expected = (m.eval().double()(**inputs).logits[kept] for m in (copy.deepcopy(model), theirs))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PAIRS)
def test_transformers_reads_ours_and_we_read_theirs(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, info = getattr(transformers, THEIRS[name]).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert type(transformers.AutoConfig.from_pretrained(tmp_path / "ours")) is transformers.ElectraConfig
    back = bert_fast.from_pretrained(tmp_path / "theirs", HEADS[name])
    for key, weight in theirs.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], weight, rtol=0, atol=0)
        torch.testing.assert_close(back.state_dict()[key], weight, rtol=0, atol=0)


def joint(plain: bool = False, **others: Any) -> ElectraPretraining:
    """The same weights on every call."""
    torch.manual_seed(1)
    config = ElectraConfig(**{**SHAPE, **others})
    module: Any = reference if plain else electra
    return ElectraPretraining(module.ElectraForMaskedLM(config.generator(0.5)), module.ElectraForPreTraining(config))


def test_generator_has_the_shape_of_googles() -> None:
    small, base = ElectraConfig(), ElectraConfig(hidden_size=768, num_attention_heads=12, embedding_size=768)
    assert [getattr(small.generator(), n) for n in ("hidden_size", "num_attention_heads", "intermediate_size")] == [
        64, 1, 256
    ]  # fmt: skip
    third = base.generator(1 / 3)
    assert (third.hidden_size, third.num_attention_heads, third.intermediate_size) == (256, 4, 1024)
    assert (third.embedding_size, third.num_hidden_layers) == (768, 12)
    with pytest.raises(ValueError, match="generator_hidden_size is 0"):
        base.generator(0)


def test_all_embeddings_are_shared_and_nothing_else() -> None:
    model = joint()
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    shared = {alias.split("electra.")[-1] for aliases in names.values() if len(aliases) > 1 for alias in aliases}
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    weights = {f"embeddings.{table}.weight" for table in tables}
    assert shared == {*weights, "embeddings.LayerNorm.bias", "generator.generator_lm_head.weight"}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_is_the_plain_definition(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples, losses and gradients through the kernels, through the definitions of the ops, and padded."""
    if not dropout:  # the plain path draws no seeds, after which the samples would be other ones
        monkeypatch.setattr(ops, "draw_seeds", lambda count: torch.zeros(count, dtype=torch.int64))
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    inputs = batch("generator")

    def run(model: nn.Module, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)
        return gradients(model, inputs, **options)

    fast = run(joint(**rates), loss_only=True)
    with ops.force("reference"):
        others = [run(joint(**rates), loss_only=True)]
    if not dropout:  # which torch's own modules draw otherwise
        others += [run(joint(plain=True)), run(joint())]
    for plain in others:
        assert plain.keys() == fast.keys()
        for name, gradient in plain.items():
            torch.testing.assert_close(fast[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_is_made_of_transformers_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLM + 50 x BCE, as `ElectraForMaskedLM` and `ElectraForPreTraining` give them, whose gradients do not mix."""
    monkeypatch.setattr(ops, "draw_seeds", lambda count: torch.zeros(count, dtype=torch.int64))
    model, inputs = joint(), batch("generator")
    with torch.no_grad():  # or no sample would be the original
        model.generator.generator_lm_head.bias[inputs["labels"][inputs["labels"] != -100]] = 3.0
    torch.manual_seed(5)
    output = model.train()(**inputs, loss_only=True)
    output.loss.backward()
    theirs = []
    for name, ours in (("generator", model.generator), ("discriminator", model.discriminator)):
        config = transformers.ElectraConfig(**ours.config.to_dict())
        theirs.append(getattr(transformers, THEIRS[name])(config).train())
        theirs[-1].load_state_dict(ours.state_dict())
    mask, labels = inputs["attention_mask"], inputs["labels"]
    generator_loss = theirs[0](**inputs).loss
    replaced = torch.zeros_like(mask).masked_scatter(mask == 1, output.replaced.long())
    assert 0 < replaced.sum() < (labels != -100).sum(), "the seed shows neither or only replaced tokens"
    torch.manual_seed(5)
    hidden = theirs[0].generator_predictions(theirs[0].electra(**{k: v for k, v in inputs.items() if k != "labels"})[0])
    samples = electra.sample(hidden[labels != -100], theirs[0].generator_lm_head)
    ids = inputs["input_ids"].masked_scatter(labels != -100, samples)
    ids[:, 0] = torch.where(labels[:, 0] != -100, labels[:, 0], ids[:, 0])
    assert torch.equal((ids != inputs["input_ids"]).long(), replaced)
    discriminator_loss = theirs[1](**{**inputs, "input_ids": ids, "labels": replaced}).loss
    torch.testing.assert_close(output.generator_loss, generator_loss)
    torch.testing.assert_close(output.discriminator_loss, discriminator_loss)
    torch.testing.assert_close(output.loss, generator_loss + 50 * discriminator_loss)
    (generator_loss + 50 * discriminator_loss).backward()
    for name, parameter in model.generator.named_parameters():
        expected = theirs[0].get_parameter(name).grad
        if ".embeddings." in name:
            expected = expected + theirs[1].get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_what_the_discriminator_sees(data: Any) -> None:
    """Chosen tokens become the samples, but never a first one; the label is whether a token is not the original."""
    lengths = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    total = sum(lengths)
    originals = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)), dtype=torch.int64)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    samples = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)), dtype=torch.int64)
    seen = torch.where(chosen, 9, originals)  # [MASK]
    positions = chosen.nonzero().squeeze(1)
    ragged, replaced = electra.corrupt(
        Ragged.from_lengths(seen, torch.tensor(lengths)), positions, originals[positions], samples[positions]
    )
    starts = {sum(lengths[:i]) for i, length in enumerate(lengths) if length}
    for index in range(total):
        word = samples[index] if chosen[index] and index not in starts else originals[index]
        assert ragged.input_ids[index] == word
        assert bool(replaced[index]) == bool(word != originals[index])
    assert torch.equal(seen, torch.where(chosen, 9, originals)), "the generator's batch was changed"


def test_samples_follow_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chi-squared test, over several blocks; a word without probability is never drawn."""
    monkeypatch.setattr(electra, "BLOCK_PROBABILITIES", 1000)
    torch.manual_seed(0)
    decoder = nn.Linear(3, 7)
    with torch.no_grad():
        decoder.bias[4] = -1000.0
    hidden, draws = torch.randn(1, 3), 20_000
    found = electra.sample(hidden.expand(draws, 3), decoder).bincount(minlength=7)
    expected = draws * torch.softmax(decoder(hidden)[0], -1).detach()
    assert found[4] == 0
    kept = torch.arange(7) != 4
    assert ((found - expected)[kept].square() / expected[kept]).sum() < 20.5  # 99.9% of chi-squared with 5 degrees
    assert electra.sample(torch.zeros(0, 3), decoder).shape == (0,)


def test_a_batch_without_labels_teaches_the_discriminator_alone() -> None:
    model, inputs = joint(), batch("generator")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for loss_only in (False, True):
        output = model(**inputs, loss_only=loss_only)
        assert output.generator_loss == 0
        assert not output.replaced.any()
        torch.testing.assert_close(output.loss, 50 * output.discriminator_loss)


def test_bad_input_is_named() -> None:
    inputs = batch("generator")
    with pytest.raises(ValueError, match="needs labels"):
        joint()(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="labels 60 at index"):
        joint()(**{**inputs, "labels": inputs["labels"].fill_(60)}, loss_only=True)
    config = ElectraConfig(**SHAPE)
    other = ElectraForMaskedLM(ElectraConfig(**{**SHAPE, "vocab_size": 50}))
    with pytest.raises(ValueError, match="vocab_size of the generator is 50, of the discriminator 60"):
        ElectraPretraining(other, ElectraForPreTraining(config))
    with pytest.raises(ValueError, match="embedding_size is 0"):
        ElectraConfig(embedding_size=0)
    with pytest.raises(ValueError, match="model_type is 'electra', expected 'bert'"):
        BertConfig.from_dict(config.to_dict())
